"""The kernels for a few tokens compute what the reference defines, read only what was picked, and choose as torch does.

Without a GPU they run in Triton's interpreter, `TRITON_INTERPRET=1`, which has no bf16.
"""

from typing import NamedTuple, no_type_check

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from moelora.kernels import reference
from moelora.kernels.factors import Factors, index_rows
from moelora.kernels.gpu.choose import choose, choose_experts, store_choice
from moelora.kernels.gpu.picked import picked_expand, picked_shrink, router_logits
from moelora.kernels.gpu.tile import Tile
from moelora.routing import NO_EXPERT, Routing, active_tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
D, O = 70, 45
RANKS = (3, 0, 1, 17, 3, 17, 1, 2)
BROKEN = 5
"""An expert whose factors are NaN: slots may name it with weight 0, and with that weight alone."""

SMALL = Tile(rows=16, columns=32, inner=16, split=3)
LARGE = Tile(rows=64, columns=64, inner=128, split=1)


# the interpreter computes with numpy, which warns where a GPU goes on with NaN
to_nan = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


class Problem(NamedTuple):
    """A bank, inputs and a routing that belong together."""

    base_TO: Tensor
    x_TD: Tensor
    A_RD: Tensor
    B_RO: Tensor
    scale_E: Tensor
    starts_E: Tensor
    ranks_E: Tensor
    routing: Routing


def problem(tokens: int, top_k: int, dtype: torch.dtype = torch.float32, ids_dtype=torch.int64) -> Problem:
    """Experts of mixed ranks in a shuffled bank; picks of which some are empty and some of weight 0 (one of NaN)."""
    num_experts = len(RANKS)
    ranks_E = torch.tensor(RANKS)
    order_E = torch.randperm(num_experts)
    starts_E = torch.empty_like(ranks_E)
    starts_E[order_E] = ranks_E[order_E].cumsum(0) - ranks_E[order_E]

    x_TD, base_TO = torch.randn(tokens, D), torch.randn(tokens, O)
    A_RD, B_RO = torch.randn(sum(RANKS), D) / D**0.5, torch.randn(sum(RANKS), O)
    for factor in (A_RD, B_RO):
        factor[starts_E[BROKEN] : starts_E[BROKEN] + RANKS[BROKEN]] = torch.nan

    experts_TK = torch.rand(tokens, num_experts).topk(top_k).indices
    experts_TK[torch.rand(tokens, top_k) < 0.2] = NO_EXPERT
    weights_TK = torch.rand(tokens, top_k) + 0.1
    weights_TK[(experts_TK == BROKEN) | (torch.rand(tokens, top_k) < 0.1)] = 0
    routing = Routing(experts_TK.to(DEVICE, ids_dtype), weights_TK.to(DEVICE))
    scale_E = torch.rand(num_experts, device=DEVICE) + 0.5
    return Problem(
        base_TO=base_TO.to(DEVICE, dtype),
        x_TD=x_TD.to(DEVICE, dtype),
        A_RD=A_RD.to(DEVICE, dtype),
        B_RO=B_RO.to(DEVICE, dtype),
        scale_E=scale_E,
        starts_E=starts_E.int().to(DEVICE),
        ranks_E=ranks_E.int().to(DEVICE),
        routing=routing,
    )


def run(one: Problem, tile: Tile, *, in_place: bool = False) -> Tensor:
    """Both kernels, one after the other."""
    experts_TK, weights_TK, *_ = one.routing
    parts_CTKP = picked_shrink(one.x_TD, one.A_RD, experts_TK, one.starts_E, one.ranks_E, max(RANKS), tile)
    base_TO = one.base_TO.clone() if in_place else one.base_TO
    out_TO = base_TO if in_place else torch.full_like(base_TO, torch.nan)
    picked_expand(
        parts_CTKP, experts_TK, weights_TK, one.scale_E, one.B_RO, one.starts_E, one.ranks_E, base_TO, out_TO, tile
    )
    return out_TO


def by_reference(one: Problem, dtype: torch.dtype) -> Tensor:
    """The specification, in this dtype. It multiplies by zero, so NaN becomes 0 first."""
    A_RD, B_RO = one.A_RD.nan_to_num(0).to(dtype), one.B_RO.nan_to_num(0).to(dtype)
    tables = index_rows(tuple(one.starts_E.tolist()), RANKS, tuple(one.scale_E.tolist()))
    scale_E, owner_R, rows_FP, fill_FP = (table.to(DEVICE) for table in tables)
    factors = Factors(A_RD, B_RO, scale_E, owner_R, rows_FP, fill_FP)
    routing = one.routing._replace(experts_TK=one.routing.experts_TK.long())
    return reference.mix(one.base_TO.to(dtype), one.x_TD.to(dtype), factors, routing)


def bits(tensor: Tensor) -> Tensor:
    """As integers, so that -0.0 is not 0.0 and NaN is itself."""
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


@pytest.mark.parametrize("tile", [SMALL, LARGE])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_worse_than_the_reference(dtype, top_k, tile):
    """Against fp64, the error is at most twice the reference's in the same dtype."""
    one = problem(6, top_k, dtype, torch.int32 if top_k == 2 else torch.int64)
    exact_TO, eager_TO = by_reference(one, torch.float64), by_reference(one, dtype)

    ours_TO = run(one, tile)

    assert ours_TO.dtype == dtype
    unit = torch.finfo(dtype).eps * exact_TO.abs().max()
    assert (ours_TO - exact_TO).norm() <= 2 * (eager_TO - exact_TO).norm() + unit
    assert active_tokens(one.routing).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_place", [False, True])
def test_tokens_without_experts_keep_their_base(in_place, dtype):
    """Bit for bit, signs of zeros and NaNs included, beside tokens that have experts and where none has."""
    one = problem(4, 2, dtype)
    one.routing.experts_TK[::2] = torch.tensor([[NO_EXPERT, BROKEN], [NO_EXPERT] * 2], device=DEVICE)
    one.routing.weights_TK[::2] = torch.tensor([0.3, 0.0], device=DEVICE)
    one.routing.experts_TK[1::2] = torch.tensor([0, 3], device=DEVICE)
    one.routing.weights_TK[1::2] = 0.5
    one.base_TO[::2, ::3], one.base_TO[::2, 1::3] = -0.0, torch.nan

    ours_TO = run(one, SMALL, in_place=in_place)
    assert torch.equal(bits(ours_TO[::2]), bits(one.base_TO[::2]))
    assert (ours_TO[1::2] != one.base_TO[1::2]).any(dim=1).all()

    one.routing.weights_TK.zero_()
    assert torch.equal(bits(run(one, SMALL, in_place=in_place)), bits(one.base_TO))


def test_in_place_again_and_in_strided_rows():
    """Where the output goes and how often it is computed changes no bit; how far apart rows are no more than one."""
    one = problem(3, 3)
    fresh_TO = run(one, SMALL)

    def spread(tensor):
        return F.pad(tensor, (0, 3), value=7)[:, :-3]

    strided = one._replace(
        base_TO=spread(one.base_TO),
        x_TD=spread(one.x_TD),
        A_RD=spread(one.A_RD),
        B_RO=spread(one.B_RO),
        routing=Routing(spread(one.routing.experts_TK), spread(one.routing.weights_TK)),
    )
    assert strided.x_TD.stride(0) == D + 3
    for other_TO in (run(one, SMALL), run(one, SMALL, in_place=True)):
        assert torch.equal(other_TO, fresh_TO)
    # aligned rows may be read, and so added up, in another order
    torch.testing.assert_close(run(strided, SMALL), fresh_TO)


@to_nan
def test_hidden_values_end_with_the_rank():
    """The parts add up to x times the expert's own rows; beyond them, and in empty slots, is 0, even for infinite x."""
    one = problem(6, 2)
    one.x_TD[0] = torch.inf
    one.routing.experts_TK[:] = torch.tensor([[0, 1], [2, 3], [4, NO_EXPERT], [NO_EXPERT] * 2, [6, 7], [3, 0]])

    parts_CTKP = picked_shrink(one.x_TD, one.A_RD, one.routing.experts_TK, one.starts_E, one.ranks_E, max(RANKS), SMALL)

    assert parts_CTKP.shape == (SMALL.split, 6, 2, 32)
    for token, picks in enumerate(one.routing.experts_TK.tolist()):
        for slot, expert in enumerate(picks):
            rank = 0 if expert == NO_EXPERT else RANKS[expert]
            start = int(one.starts_E[expert])
            assert not parts_CTKP[:, token, slot, rank:].any()
            hidden_P = parts_CTKP[:, token, slot, :rank].double().sum(dim=0)
            if token == 0:
                assert not hidden_P.isfinite().any()
            else:
                exact_P = one.A_RD[start : start + rank].double() @ one.x_TD[token].double()
                torch.testing.assert_close(hidden_P, exact_P, rtol=1e-5, atol=1e-6)


@to_nan
def test_a_weight_reaches_the_rows_of_its_expert_alone():
    """An infinite weight gives infinities and no NaN, and a NaN for an expert without rows is nobody's."""
    one = problem(2, 1)
    one.routing.experts_TK[:] = torch.tensor([[0], [1]])
    one.routing.weights_TK[:] = torch.tensor([[torch.inf], [torch.nan]])
    one.B_RO.abs_()
    one.A_RD[:] = one.x_TD[0]

    out_TO = run(one, SMALL)

    assert (out_TO[0] == torch.inf).all()
    assert torch.equal(out_TO[1], one.base_TO[1])


@pytest.mark.parametrize("ranks_widest", [0, 1])
def test_narrow_banks(ranks_widest):
    """Ranks of 1 work; a bank without rows adds nothing."""
    ids_TK = torch.tensor([[0], [1]], device=DEVICE)
    ranks_E = torch.full((2,), ranks_widest, dtype=torch.int32, device=DEVICE)
    starts_E = torch.arange(2, dtype=torch.int32, device=DEVICE) * ranks_widest
    x_TD, base_TO = torch.randn(2, D, device=DEVICE), torch.randn(2, O, device=DEVICE)
    A_RD, B_RO = torch.randn(2 * ranks_widest, D, device=DEVICE), torch.randn(2 * ranks_widest, O, device=DEVICE)
    ones = torch.ones(2, 1, device=DEVICE)

    parts_CTKP = picked_shrink(x_TD, A_RD, ids_TK, starts_E, ranks_E, ranks_widest, SMALL)
    out_TO = torch.empty_like(base_TO)
    picked_expand(parts_CTKP, ids_TK, ones, ones[:, 0], B_RO, starts_E, ranks_E, base_TO, out_TO, SMALL)

    delta_TO = (x_TD * A_RD).sum(dim=1, keepdim=True) * B_RO if ranks_widest else torch.zeros_like(base_TO)
    torch.testing.assert_close(out_TO, base_TO + delta_TO)


@pytest.mark.parametrize("tile", [SMALL, Tile(rows=4, columns=16, inner=32, split=2)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "num_experts"), [(1, 5), (3, 40), (18, 9)])
def test_router_logits_are_fp32_products(tokens, num_experts, dtype, tile):
    """Up to the error of fp32, whatever the input's dtype, with strided rows; and twice the same bits."""
    x_TD = torch.randn(tokens, D + 2, device=DEVICE).to(dtype)[:, :D]
    W_ED = torch.randn(num_experts, D + 2, device=DEVICE)[:, :D]
    exact_TE = x_TD.double() @ W_ED.double().T

    parts_CTE = router_logits(x_TD, W_ED, tile)

    assert parts_CTE.shape == (tile.split, tokens, num_experts)
    assert (parts_CTE.double().sum(dim=0) - exact_TE).norm() <= 1e-6 * exact_TE.norm()
    assert torch.equal(parts_CTE, router_logits(x_TD, W_ED, tile))


def weights_of(chosen_TK: Tensor, logits_TE: Tensor, combine: str) -> Tensor:
    """What `moelora.routers.learned.Learned` says of `combine`."""
    return {
        "renormalized": chosen_TK.softmax(dim=-1),
        "softmax": (chosen_TK - logits_TE.logsumexp(dim=-1, keepdim=True)).exp(),
        "constant": torch.full_like(chosen_TK, 1 / chosen_TK.shape[1]),
        "unit": torch.ones_like(chosen_TK),
    }[combine]


@pytest.mark.parametrize("combine", ["renormalized", "softmax", "constant", "unit"])
@pytest.mark.parametrize(("num_experts", "tokens"), [(1, 3), (5, 19), (64, 3), (200, 2)])
def test_choice_is_that_of_topk(num_experts, tokens, combine):
    """Ids of torch.topk, weights of the router's formulas, and scores that are the sum of the parts in their order."""
    for top_k in range(1, min(num_experts, 3) + 1):
        parts_CTE = torch.randn(3, tokens, num_experts, device=DEVICE)
        # half, not 0.7: some devices divide, others multiply by a rounded 1 / 0.7
        expected_TE = (parts_CTE[0] + parts_CTE[1] + parts_CTE[2]) / 0.5
        chosen_TK, expected_TK = expected_TE.topk(top_k, dim=-1)

        experts_TK, weights_TK, logits_TE = choose_experts(parts_CTE, 0.5, top_k, combine)

        assert torch.equal(logits_TE, expected_TE)
        assert torch.equal(experts_TK, expected_TK)
        torch.testing.assert_close(weights_TK, weights_of(chosen_TK, expected_TE, combine), rtol=2e-6, atol=1e-7)
        again = choose_experts(parts_CTE, 0.5, top_k, combine)
        assert all(map(torch.equal, (experts_TK, weights_TK, logits_TE), again))


@pytest.mark.parametrize("num_experts", [5, 200])
def test_equal_scores_go_to_the_lowest_ids(num_experts):
    """As a stable sort has it, for scores of few different values, and for infinite ones."""
    logits_TE = torch.randint(0, 3, (6, num_experts), device=DEVICE).float()
    logits_TE[0] = 0
    logits_TE[1] = -torch.inf
    logits_TE[2, 1:] = -torch.inf

    experts_TK, _, _ = choose_experts(logits_TE[None], 1.0, 3, "constant")

    assert torch.equal(experts_TK, logits_TE.sort(dim=-1, descending=True, stable=True).indices[:, :3])


@to_nan
def test_ids_are_distinct_and_in_range_whatever_the_scores_are():
    """NaN counts as the highest score, as in torch, and makes weights NaN, not ids wild."""
    logits_TE = torch.randn(5, 5, device=DEVICE)
    logits_TE[0] = torch.nan
    logits_TE[1, 3] = torch.nan
    logits_TE[2] = -torch.inf
    logits_TE[3] = torch.inf

    for combine in ("renormalized", "softmax"):
        experts_TK, weights_TK, logits_again_TE = choose_experts(logits_TE[None], 1.0, 3, combine)

        assert torch.equal(logits_again_TE.nan_to_num(9), logits_TE.nan_to_num(9))
        assert ((experts_TK >= 0) & (experts_TK < 5)).all()
        assert (experts_TK.sort(dim=-1).values.diff(dim=-1) > 0).all()
        assert experts_TK[1, 0] == 3
        assert weights_TK[:4].isnan().all()
        assert weights_TK[4].isfinite().all()


@triton.jit
@no_type_check
def _choose_in_a_tile(logits_ptr, experts_ptr, weights_ptr, scores_ptr, T, E, ROWS: tl.constexpr, E_PAD: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, E_PAD)
    logits = tl.load(logits_ptr + rows[:, None] * E_PAD + columns[None, :])
    ids, weights = choose(logits, E, E_PAD, 2, "softmax")
    store_choice(ids, weights, logits, rows, rows < T, experts_ptr, weights_ptr, scores_ptr, E, E_PAD, 2)


def test_other_kernels_choose_from_tiles_with_rubbish_beyond_the_experts():
    """Padded columns are never chosen and weigh nothing, and masked rows are not written."""
    T, E, rubbish = 3, 5, (torch.inf, torch.nan, 1e30)
    tile = torch.randn(4, 8, device=DEVICE)
    tile[:, E:] = torch.tensor(rubbish, device=DEVICE)
    experts_TK = torch.full((4, 2), -7, device=DEVICE)
    weights_TK, logits_TE = torch.full((4, 2), -7.0, device=DEVICE), torch.full((4, E), -7.0, device=DEVICE)

    _choose_in_a_tile[(1,)](tile, experts_TK, weights_TK, logits_TE, T, E, ROWS=4, E_PAD=8)

    expected = tile[:T, :E].topk(2)
    assert torch.equal(experts_TK[:T], expected.indices)
    assert torch.equal(logits_TE[:T], tile[:T, :E])
    torch.testing.assert_close(weights_TK[:T], weights_of(expected.values, tile[:T, :E], "softmax"))
    assert (experts_TK[T:] == -7).all()
    assert (weights_TK[T:] == -7).all()
    assert (logits_TE[T:] == -7).all()


def test_no_tokens():
    """Nothing to do is done."""
    one = problem(0, 2)

    assert run(one, SMALL).shape == (0, O)
    parts_CTE = router_logits(one.x_TD, torch.randn(4, D, device=DEVICE), SMALL)
    experts_TK, weights_TK, logits_TE = choose_experts(parts_CTE, 1.0, 2, "softmax")
    assert (experts_TK.shape, weights_TK.shape, logits_TE.shape) == ((0, 2), (0, 2), (0, 4))
