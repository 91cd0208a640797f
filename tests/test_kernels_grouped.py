"""The sorted path computes what loops over picks define, in every shape and routing, and writes all that it returns.

Without a GPU the kernels run in Triton's interpreter, which has no bf16.
"""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moelora.kernels.gpu.grouped_expand import grouped_expand
from moelora.kernels.gpu.grouped_gram import grouped_gram
from moelora.kernels.gpu.grouped_shrink import grouped_shrink, grouped_shrink_backward
from moelora.kernels.gpu.order import sort_by_expert
from moelora.kernels.gpu.reduce import sum_parts
from moelora.kernels.gpu.tile import Tile
from moelora.testing.strategies import routings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANKS = (3, 0, 17, 40, 16)
E, D, O = len(RANKS), 56, 72
TILE = Tile(rows=64, columns=64, inner=32, warps=4, stages=2)
NARROW = TILE._replace(columns=16)

cases = pytest.mark.parametrize(
    ("kind", "tokens"),
    [("usual", 0), ("usual", 1), ("usual", 17), ("usual", 150), ("all", 17), ("one", 150), ("none", 17)],
)

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
dtypes_and_tiles = pytest.mark.parametrize(
    ("dtype", "tile"),
    [(torch.float32, TILE), (torch.float32, NARROW), (torch.float16, TILE)],
    ids=["float32", "float32 in narrow blocks", "float16"],
)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """New memory holds NaN, or the largest integer, so that what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Problem(NamedTuple):
    """Factors, a routing and wide tensors that belong together; rows of all but s are strided."""

    A_RD: torch.Tensor
    B_RO: torch.Tensor
    scale_E: torch.Tensor
    starts_E: torch.Tensor
    ranks_E: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    x_TD: torch.Tensor
    grad_TO: torch.Tensor
    s_TKP: torch.Tensor

    def order(self):
        return sort_by_expert(self.ids_TK, self.weights_TK, E, TILE.rows)

    def slices(self):
        return self.starts_E, self.ranks_E

    def picks(self):
        """Token, slot, expert and the expert's rows, for all that acts."""
        for token, (ids, weights) in enumerate(zip(self.ids_TK.tolist(), self.weights_TK.tolist(), strict=True)):
            if any(i >= 0 and w != 0 for i, w in zip(ids, weights, strict=True)):
                for slot, expert in enumerate(ids):
                    if expert >= 0:
                        start = int(self.starts_E[expert])
                        yield token, slot, expert, slice(start, start + RANKS[expert])


def route(kind, tokens, generator):
    """Ids and weights: with empty slots and idle tokens, K = E, all tokens to one expert, or no expert at all."""
    K = {"usual": 3, "all": E, "one": 1, "none": 2}[kind]
    ids_TK = torch.rand(tokens, E, generator=generator).argsort(-1)[:, :K]
    weights_TK = torch.randn(tokens, K, generator=generator)
    if kind == "usual":
        ids_TK[torch.rand(tokens, K, generator=generator) < 0.3] = -1
        weights_TK[torch.rand(tokens, generator=generator) < 0.2] = 0
        weights_TK[torch.rand(tokens, K, generator=generator) < 0.2] = 0
    if kind == "one":
        ids_TK.fill_(2)
    if kind == "none":
        ids_TK.fill_(-1)
    return ids_TK.to(torch.int32 if kind == "all" else torch.int64), weights_TK


def make(kind, tokens, dtype):
    """A problem of one kind; the same one every time."""
    generator = torch.Generator().manual_seed(tokens)

    def wide(*shape):
        """Contiguous columns, but rows that stand apart."""
        return torch.randn(shape[0], shape[1] + 8, generator=generator).to(DEVICE, dtype)[:, : shape[1]]

    ids_TK, weights_TK = route(kind, tokens, generator)
    ranks_E = torch.tensor(RANKS, dtype=torch.int32)
    problem = Problem(
        wide(sum(RANKS), D),
        wide(sum(RANKS), O),
        torch.tensor([2.0, 1.0, 0.5, -1.5, 16 / 7], device=DEVICE),
        (ranks_E.cumsum(0) - ranks_E).to(DEVICE, torch.int32),
        ranks_E.to(DEVICE),
        ids_TK.to(DEVICE),
        weights_TK.to(DEVICE),
        wide(tokens, D),
        wide(tokens, O),
        torch.zeros(tokens, ids_TK.shape[1], 64, dtype=dtype, device=DEVICE),
    )
    for token, slot, _, rows in problem.picks():
        rank = rows.stop - rows.start
        problem.s_TKP[token, slot, :rank] = torch.randn(rank, generator=generator).to(problem.s_TKP)
    return problem


def exact(*tensors):
    """The same numbers in fp64."""
    return [tensor.cpu().double() for tensor in tensors]


def assert_close(ours, expected):
    """Relative Frobenius error; the bounds are those of reference/kernels.md, section 4.6."""
    bound = 1e-3 if ours.dtype is torch.float16 else 1e-5
    error = torch.linalg.vector_norm(ours.cpu().double() - expected)

    assert ours.shape == expected.shape
    assert error <= bound * torch.linalg.vector_norm(expected)


@settings(max_examples=20)
@given(st.data(), st.sampled_from([0, 1, 17, 130, 300]), st.sampled_from([1, 2, 7, 200]), st.sampled_from([16, 64]))
def test_order_is_a_stable_sort(data, tokens, experts, rows):
    """Tokens, offsets and tiles are those of a stable torch.sort, the tokens without an expert behind all others."""
    routing = data.draw(routings(min(experts, 7), tokens))
    has_weights, int_type = data.draw(st.booleans()), data.draw(st.sampled_from([torch.int32, torch.int64]))
    # spread over all experts
    ids_TK = torch.where(routing.experts_TK < 0, -1, routing.experts_TK * max(1, experts // 7))
    weights_TK = routing.weights_TK.to(DEVICE) if has_weights else None

    order = sort_by_expert(ids_TK.to(DEVICE, int_type), weights_TK, experts, rows)

    acts_TK = (ids_TK >= 0) & ((routing.weights_TK != 0) | (not has_weights))
    bins_TK = torch.where(acts_TK.any(-1, keepdim=True) & (ids_TK >= 0), ids_TK, experts)
    for slot, bins_T in enumerate(bins_TK.T):
        sorted_T, by_expert_T = bins_T.sort(stable=True)
        offsets_F = [int((bins_T < expert).sum()) for expert in range(experts + 1)]
        tiles = [
            [expert if expert < experts else -1, begin, min(begin + rows, end)]
            for expert, (first, end) in enumerate(zip(offsets_F, [*offsets_F[1:], tokens], strict=True))
            for begin in range(first, end, rows)
        ]
        assert torch.equal(order.tokens_KT[slot].cpu().long(), by_expert_T.where(sorted_T < experts, -1 - by_expert_T))
        assert order.offsets_KF[slot].tolist() == offsets_F
        assert order.tiles_KN3[slot, : len(tiles)].tolist() == tiles
        for expert, begin, end in order.tiles_KN3[slot, len(tiles) :].tolist():
            assert expert == -1
            assert begin == end


@pytest.mark.parametrize(("tokens", "experts"), [(700, 1024), (32800, 3)])
def test_order_of_many(tokens, experts):
    """Many experts, which are looked at in chunks; many tokens, which are sorted in larger blocks."""
    ids_T1 = torch.randint(-1, experts, (tokens, 1), generator=torch.Generator().manual_seed(0))

    order = sort_by_expert(ids_T1.to(DEVICE), None, experts, 128)

    bins_T = torch.where(ids_T1 < 0, experts, ids_T1)[:, 0]
    sorted_T, by_expert_T = bins_T.sort(stable=True)
    counts_F = torch.bincount(bins_T, minlength=experts + 1)
    tiles_E = counts_F[:experts].add(127) // 128
    tiles_N = torch.arange(experts).repeat_interleave(tiles_E)
    assert torch.equal(order.tokens_KT[0].cpu().long(), by_expert_T.where(sorted_T < experts, -1 - by_expert_T))
    assert torch.equal(order.offsets_KF[0].cpu().long(), counts_F.cumsum(0) - counts_F)
    assert torch.equal(order.tiles_KN3[0, : len(tiles_N), 0].cpu().long(), tiles_N)


@cases
@dtypes_and_tiles
def test_shrink_is_x_times_the_rows_of_each_expert(kind, tokens, dtype, tile):
    """Every pick gets its own expert's numbers; what has no expert, or lies behind its rank, is 0."""
    problem = make(kind, tokens, dtype)

    s_TKP = grouped_shrink(problem.x_TD, problem.A_RD, problem.order(), *problem.slices(), max(RANKS), tile)

    (x_TD, A_RD), expected_TKP = exact(problem.x_TD, problem.A_RD), torch.zeros(problem.s_TKP.shape).double()
    for token, slot, _, rows in problem.picks():
        expected_TKP[token, slot, : rows.stop - rows.start] = A_RD[rows] @ x_TD[token]
    assert s_TKP.dtype is dtype
    assert_close(s_TKP, expected_TKP)


@cases
@dtypes_and_tiles
def test_shrink_backward_gives_gradients_of_s_and_of_the_weights(kind, tokens, dtype, tile):
    """Both in one pass over dY; 0 for what has no expert."""
    problem = make(kind, tokens, dtype)
    gate = problem.weights_TK, problem.scale_E

    ds_TKP, dweights_TK = grouped_shrink_backward(
        problem.grad_TO, problem.B_RO, problem.s_TKP, *gate, problem.order(), *problem.slices(), tile
    )

    grad_TO, B_RO, s_TKP, weights_TK, scale_E = exact(problem.grad_TO, problem.B_RO, problem.s_TKP, *gate)
    expected_TKP, expected_TK = torch.zeros_like(s_TKP), torch.zeros_like(weights_TK)
    for token, slot, expert, rows in problem.picks():
        rank = rows.stop - rows.start
        u = B_RO[rows] @ grad_TO[token]
        expected_TKP[token, slot, :rank] = u * weights_TK[token, slot] * scale_E[expert]
        expected_TK[token, slot] = scale_E[expert] * (s_TKP[token, slot, :rank] @ u)
    assert ds_TKP.dtype is dtype
    assert_close(ds_TKP, expected_TKP)
    assert_close(dweights_TK, expected_TK)


@cases
@dtypes_and_tiles
def test_expand_adds_to_tokens_that_have_an_expert(kind, tokens, dtype, tile):
    """The others keep their bits."""
    problem = make(kind, tokens, dtype)
    base_TO, out_TO = problem.grad_TO, problem.grad_TO.clone()
    gate = problem.weights_TK, problem.scale_E

    grouped_expand(
        problem.s_TKP,
        *gate,
        problem.B_RO,
        out_TO,
        problem.order(),
        *problem.slices(),
        accumulate=True,
        tile=tile._replace(inner=tile.columns),
    )

    expected_TO, is_idle_T = exact(base_TO)[0], torch.ones(tokens, dtype=torch.bool)
    B_RO, s_TKP, weights_TK, scale_E = exact(problem.B_RO, problem.s_TKP, *gate)
    for token, slot, expert, rows in problem.picks():
        s = s_TKP[token, slot, : rows.stop - rows.start]
        expected_TO[token] += weights_TK[token, slot] * scale_E[expert] * (s @ B_RO[rows])
        is_idle_T[token] = False
    assert_close(out_TO, expected_TO)
    assert torch.equal(out_TO[is_idle_T], base_TO[is_idle_T])


@cases
@dtypes
@pytest.mark.parametrize("depth", [0, 5, 70])
def test_expand_writes_every_row(kind, tokens, dtype, depth):
    """Without a gate and from nothing, as for dx: tokens without an expert get the extra product alone, or 0."""
    problem = make(kind, tokens, dtype)
    out_TD = torch.full((tokens, D), float("nan"), dtype=dtype, device=DEVICE)
    left_TC = torch.randn(tokens, depth + 3).to(DEVICE, dtype)[:, :depth]
    right_CD = torch.randn(depth, D).to(DEVICE, dtype)

    grouped_expand(
        problem.s_TKP,
        None,
        None,
        problem.A_RD,
        out_TD,
        problem.order(),
        *problem.slices(),
        accumulate=False,
        tile=TILE,
        extra=(left_TC, right_CD) if depth else None,
    )

    A_RD, s_TKP, left_TC, right_CD = exact(problem.A_RD, problem.s_TKP, left_TC, right_CD)
    expected_TD = left_TC @ right_CD
    for token, slot, _, rows in problem.picks():
        expected_TD[token] += s_TKP[token, slot, : rows.stop - rows.start] @ A_RD[rows]
    assert_close(out_TD, expected_TD)


@cases
@dtypes
@pytest.mark.parametrize(("has_gate", "split"), [(True, 1), (False, 3)])
def test_gram_sums_over_the_picks_of_each_expert(kind, tokens, dtype, has_gate, split):
    """Gated, as for dB, and plain, as for dA; experts without tokens get zeros."""
    problem = make(kind, tokens, dtype)
    gate = (problem.weights_TK, problem.scale_E) if has_gate else (None, None)
    tile = (TILE if split == 1 else NARROW)._replace(split=split)

    out_RO = grouped_gram(problem.s_TKP, *gate, problem.grad_TO, problem.order(), *problem.slices(), sum(RANKS), tile)

    s_TKP, weights_TK, scale_E, grad_TO = exact(problem.s_TKP, problem.weights_TK, problem.scale_E, problem.grad_TO)
    expected_RO = torch.zeros(sum(RANKS), O).double()
    for token, slot, expert, rows in problem.picks():
        s = s_TKP[token, slot, : rows.stop - rows.start]
        if has_gate:
            # rounded as for the forward product
            s = (s * weights_TK[token, slot] * scale_E[expert]).to(dtype).double()
        expected_RO[rows] += s[:, None] * grad_TO[token]
    assert out_RO.dtype is torch.float32
    assert_close(out_RO, expected_RO)


def test_two_runs_give_the_same_bits():
    """Whatever is added up, is added up in one order."""
    problem = make("usual", 150, torch.float32)
    split = TILE._replace(split=2)

    def run():
        order, slices, gate = problem.order(), problem.slices(), (problem.weights_TK, problem.scale_E)
        out_TO = problem.grad_TO.clone()
        s_TKP = grouped_shrink(problem.x_TD, problem.A_RD, order, *slices, max(RANKS), TILE)
        grouped_expand(s_TKP, *gate, problem.B_RO, out_TO, order, *slices, accumulate=True, tile=TILE)
        backward = grouped_shrink_backward(problem.grad_TO, problem.B_RO, s_TKP, *gate, order, *slices, TILE)
        dB_RO = grouped_gram(s_TKP, *gate, problem.grad_TO, order, *slices, sum(RANKS), split)
        return s_TKP, out_TO, *backward, dB_RO

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(1, 3, 5), (3, 7, 300), (4, 0, 5)])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16], ids=str)
def test_parts_are_added_in_order(shape, out_dtype):
    """Bit for bit what a loop over the parts gives, rounded once."""
    parts_SRO = torch.randn(shape).to(DEVICE)

    expected_RO = torch.zeros_like(parts_SRO[0])
    for part_RO in parts_SRO:
        expected_RO += part_RO
    assert torch.equal(sum_parts(parts_SRO, out_dtype), expected_RO.to(out_dtype))
