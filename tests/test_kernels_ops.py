"""The operator computes the mixture that plain torch defines, on every path, with every gradient, reproducibly.

Without a GPU its kernels run in Triton's interpreter, `TRITON_INTERPRET=1`, which has no bf16.
"""

import pytest
import torch
from mixture_problems import (
    CASES,
    CASES_IN_DTYPES,
    DEVICE,
    DTYPES,
    as_leaf,
    assert_no_worse,
    assert_same_bits,
    bits,
    by_operator,
    chosen_by,
    convert,
    eager,
    exact,
    gradients,
    gradients_of,
    in_a_fresh_process,
    leaves_of,
    made_by,
    mask_of,
    on_a_shallow_stack,
    random,
    random_mixture,
    results,
    tile_of_few_programs,
    whole_numbers,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from moelora.kernels.gpu import ops, picks, tiles
from moelora.losses import load_balance, z_loss

RULES = {
    "dense": {"picked_tokens": -1, "dense_rows_per_slot": 10**6},
    "sorted": {"picked_tokens": -1, "dense_rows_per_slot": -1},
    "picked": {"picked_tokens": 10**6, "dense_rows_per_slot": 10**6},
}

trained = pytest.mark.parametrize("path", ["dense", "sorted"], indirect=True)
all_paths = pytest.mark.parametrize("path", ["dense", "sorted", "picked"], indirect=True)
cases = pytest.mark.parametrize(("case", "dtype"), CASES_IN_DTYPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path that every call takes, whatever its shapes are."""
    for name, value in RULES[request.param].items():
        monkeypatch.setitem(tiles.table(tiles.device_name())["rules"], name, value)
    monkeypatch.setattr(picks, "tile_for", tile_of_few_programs)
    return request.param


@pytest.fixture(autouse=True)
def _shallow_stack(request: pytest.FixtureRequest) -> None:
    if DEVICE == "cpu":
        request.node.obj = on_a_shallow_stack(request.node.obj)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Deterministic algorithms alone; new memory holds NaN, so that what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@trained
@cases
def test_no_worse_than_plain_torch(case, dtype, path):
    """Outputs, weights, scores and all gradients, against fp64; and the choice is that of the exact scores."""
    mixture = random_mixture(**CASES[case], dtype=dtype)
    lists = convert(mixture.lists, as_leaf)

    answer = by_operator(lists, mixture)

    assert answer.experts_QTK is None or torch.equal(answer.experts_QTK, chosen_by(mixture))
    ours = made_by(answer) | gradients(lists, answer, mixture)
    assert_no_worse(ours, eager(mixture), exact(mixture))


@pytest.mark.parametrize("path", ["picked"], indirect=True)
@cases
def test_no_worse_for_a_few_tokens(case, dtype, path):
    """The same of the picked path, which has no backward pass."""
    mixture = random_mixture(**dict(CASES[case], tokens=4), dtype=dtype)

    answer = ops.mixture(mixture.lists, mixture.settings, keeps=False)

    assert answer.experts_QTK is None or torch.equal(answer.experts_QTK, chosen_by(mixture))
    ours, theirs, expected = made_by(answer), eager(mixture), exact(mixture)
    assert_no_worse(ours, {name: theirs[name] for name in ours}, {name: expected[name] for name in ours})


@trained
def test_without_tokens(path):
    """T = 0 gives empty outputs, also in evaluation, and gradients that are zero."""
    mixture = random_mixture(tokens=0, outs=(37, 16))
    found = results(mixture)
    assert found["output[1]"].shape == (0, 16)
    assert found["logits"].shape == (1, 0, 4)
    assert not any(value.any() for value in found.values())
    shapes = {name: value.shape for name, value in made_by(ops.mixture(*mixture[:2], keeps=False)).items()}
    assert shapes == {name: found[name].shape for name in shapes}


@dtypes
@all_paths
def test_no_token_gets_what_is_anothers(path, dtype):
    """In whole numbers, outputs and gradients are exact."""
    mixture = whole_numbers(dtype)
    expected = exact(mixture)

    ours = results(mixture) if path != "picked" else made_by(ops.mixture(*mixture[:2], keeps=False))

    for name, value in ours.items():
        assert torch.equal(value.double(), expected[name]), name
    assert len({tuple(row) for row in ours["output[0]"].tolist()}) > 35


@trained
def test_an_expert_that_nobody_chooses_has_no_gradient(path):
    """Exactly zero, in A, B and the router; also where all tokens choose the same."""
    mixture = random_mixture()
    mixture.lists.x[:, 0] = 4
    mixture.lists.gates[0][:, 0] = torch.tensor([-20.0, 5, 10, -20])
    mixture = mixture._replace(grad_logits=torch.zeros_like(mixture.grad_logits))
    for top_k, combine, nobodys in ((2, "renormalized", (0, 3)), (1, "softmax", (0, 1, 3))):
        mixture = mixture.with_settings(top_k=top_k, combine=combine)
        mixture = mixture._replace(grad_weights=mixture.grad_weights[..., :top_k])
        assert not torch.isin(chosen_by(mixture), torch.tensor(nobodys, device=DEVICE)).any()

        ours = results(mixture)

        assert_no_worse(ours, eager(mixture), exact(mixture))
        mine_R = torch.isin(mixture.lists.owners[0][0], torch.tensor(nobodys, device=DEVICE))
        for factor in ("A", "B"):
            assert not ours[f"grad {factor}[0]"][mine_R].any()
            assert ours[f"grad {factor}[0]"][~mine_R].any()
        if combine == "renormalized":
            assert not ours["grad gates[0]"][list(nobodys)].any()


@trained
def test_balance_losses_reach_the_router_alone(path):
    """Losses of the scores and the weights; what has no gradient itself, as the outputs here, gives none."""
    mixture = random_mixture(outs=(37, 16, 50), routers=3)

    def balanced(answer):
        pairs = zip(answer.logits_QTE, answer.experts_QTK, strict=True)
        losses = [load_balance(logits_TE, ids_TK) + z_loss(logits_TE) for logits_TE, ids_TK in pairs]
        return torch.stack(losses).sum() + answer.weights_QTK.square().sum()

    ours, theirs, expected = gradients_of(mixture, balanced)

    assert ours.keys() == {"grad x", "grad gates[0]", "grad gates[1]", "grad gates[2]"}
    assert_no_worse(ours, theirs, expected)


@trained
def test_an_unused_output_gives_no_gradient(path):
    """With one of three outputs in the loss, the factors of the others get zeros, and x what is due to that one."""
    mixture = random_mixture(outs=(37, 16, 50), routers=3)

    ours, *others = gradients_of(mixture, lambda answer: answer.outputs[1].square().sum())

    assert ours.keys() == {"grad x", "grad A[1]", "grad B[1]", "grad gates[1]"}
    assert_no_worse(ours, *others)


@trained
def test_a_router_learns_in_fp32(path):
    """Also in 16 bits the gradient of the router's fp32 weight is as exact as that of a router in plain torch."""
    mixture = random_mixture(tokens=40, dtype=torch.float16)

    def scored(answer):
        return answer.logits_QTE.square().sum()

    ours, theirs, expected = (way["grad gates[0]"] for way in gradients_of(mixture, scored))
    assert (ours - expected).norm() <= 2 * (theirs - expected).norm() + 1e-7 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@dtypes
@all_paths
@pytest.mark.parametrize("linear", [True, False])
def test_idle_tokens_keep_their_base(linear, path, dtype):
    """Bit for bit, also beside factors that are NaN, and if the base is NaN or -0.0 itself."""
    mixture = random_mixture(tokens=12, given=True, every_token=False, linear=linear, dtype=dtype)
    lists = mixture.lists
    for factor in (*lists.A, *lists.B):
        factor.fill_(torch.nan)
    if linear:
        base_TO = torch.nn.functional.linear(lists.x, lists.weights[0], lists.biases[0])
    else:
        base_TO = lists.bases[0]
        base_TO[::2, ::3], base_TO[::2, 1::3] = -0.0, torch.nan
    ids_TK, weights_TK = (part[0] for part in lists.routing)
    idle_T = ((ids_TK < 0) | (weights_TK == 0)).all(1)

    out_TO = ops.mixture(lists, mixture.settings, keeps=path != "picked").outputs[0]

    assert torch.equal(bits(out_TO[idle_T]), bits(base_TO[idle_T]))
    assert out_TO[~idle_T].isnan().all()
    assert 0 < idle_T.sum() < 12


@trained
@pytest.mark.parametrize("given", [True, False])
def test_two_runs_are_equal(given, path):
    """Bit for bit, outputs and gradients; in evaluation, too, and in a second backward pass through one graph."""
    mixture = random_mixture(given=given, every_token=not given)
    lists = convert(mixture.lists, as_leaf)
    answer = by_operator(lists, mixture)
    first = {name: grad.clone() for name, grad in gradients(lists, answer, mixture, again=True).items()}

    assert_same_bits(results(mixture), made_by(answer) | first)
    for leaf in leaves_of(lists).values():
        leaf.grad = None
    assert_same_bits(gradients(lists, answer, mixture), first)
    assert_same_bits(made_by(ops.mixture(mixture.lists, mixture.settings, keeps=False)), made_by(answer))


@all_paths
def test_strides_change_nothing(path):
    """Rows or columns that stand apart, and gradients that are few numbers spread over many places."""
    mixture = random_mixture(linear=False, tokens=9, outs=(37, 20), dtype=DTYPES[-1])
    everywhere, in_each_row = random(1, 1, dtype=DTYPES[-1]).expand(9, 37), random(20, dtype=DTYPES[-1]).expand(9, 20)

    def apart(tensor):
        return torch.nn.functional.pad(tensor, (0, 4), value=7)[:, :-4]

    def by_column(tensor):
        return tensor.T.contiguous().T

    def run(x_TD, change, grads):
        lists = convert(mixture.lists._replace(x=x_TD), lambda tensor: as_leaf(change(tensor)))
        answer = ops.mixture(lists, mixture.settings, keeps=path != "picked")
        more = {} if path == "picked" else gradients(lists, answer, mixture._replace(grads=grads))
        return made_by(answer) | more

    x_TD = mixture.lists.x
    expected = run(x_TD, torch.clone, [everywhere.contiguous(), in_each_row.contiguous()])
    assert_same_bits(run(apart(x_TD), apart, [everywhere, in_each_row]), expected)
    assert_same_bits(run(by_column(x_TD), torch.clone, [by_column(everywhere), apart(in_each_row)]), expected)


@trained
@pytest.mark.parametrize("given", [False, True])
def test_what_is_frozen_gets_no_gradient(given, path):
    """Whatever learns alone gets the gradient that it gets among the others."""
    mixture = random_mixture(linear=False, given=given, tokens=5)
    expected = results(mixture)

    for alone in [("weights",), ("x",)] if given else [("x",), ("gates",), ("A", "bases"), ("B",)]:
        lists = convert(mixture.lists, torch.clone)
        mine = [name for name in leaves_of(lists) if name.startswith(alone)]
        for name in mine:
            leaves_of(lists)[name].requires_grad_()
        answer = by_operator(lists, mixture)
        gradients(lists, answer, mixture)

        assert len(mine) == len(alone)
        for name, leaf in leaves_of(lists).items():
            assert (leaf.grad is not None) == (name in mine), name
            assert leaf.grad is None or torch.equal(leaf.grad, expected[f"grad {name}"]), name


@trained
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_give_the_same_gradients(use_reentrant, path):
    """Also with dropout, where the seed is drawn within."""
    mixture = random_mixture().with_settings(dropout=0.2)

    def run(lists):
        seed = torch.randint(2**31, (1,), device=DEVICE)
        answer = by_operator(lists._replace(seed=[seed]), mixture)
        return answer.outputs[0], answer.weights_QTK, answer.logits_QTE

    def trained_by(call):
        torch.manual_seed(3)
        lists = convert(mixture.lists, as_leaf)
        output, weights, logits = call(lists)
        answer = ops.Answer([output], output, None, weights, logits)
        return made_by(answer) | gradients(lists, answer, mixture)

    def in_checkpoint(lists):
        # reentrant ones look for tensors among the arguments themselves
        return checkpoint(lambda *_: run(lists), *leaves_of(lists).values(), use_reentrant=use_reentrant)

    assert_same_bits(trained_by(in_checkpoint), trained_by(run))


@all_paths
@pytest.mark.parametrize("given", [False, True])
def test_autocast_around_changes_nothing(given, path):
    """The operator computes in its input's dtype."""
    mixture = random_mixture(tokens=5, given=given, every_token=not given)

    def run(enabled):
        lists = convert(mixture.lists, as_leaf)
        with torch.autocast(DEVICE, torch.float16, enabled=enabled):
            answer = ops.mixture(lists, mixture.settings, keeps=path != "picked")
            return made_by(answer) | ({} if path == "picked" else gradients(lists, answer, mixture))

    assert_same_bits(run(True), run(False))


@pytest.mark.parametrize(
    ("case", "dropout", "dtype"),
    [("renormalized", 0.5, DTYPES[0]), ("own routers", 0.1, DTYPES[-1]), ("given, idle tokens", 0.1, DTYPES[1])],
)
@trained
def test_dropout_is_a_mask_for_the_experts(path, dropout, case, dtype):
    """Outputs and gradients are those of a masked x; the router's scores see all of it; the seed decides alone."""
    seed, other = (torch.tensor([number], device=DEVICE) for number in (5, 6))
    mixture = random_mixture(**CASES[case], dtype=dtype).with_settings(dropout=dropout).replace(seed=[seed])
    kept_TD, other_TD = (mask_of(number, mixture.tokens, dropout) for number in (seed, other))
    assert abs(kept_TD.float().mean() - (1 - dropout)) < 4 * (dropout * (1 - dropout) / kept_TD.numel()) ** 0.5
    assert not torch.equal(other_TD, kept_TD)

    ours = results(mixture)
    assert_no_worse(ours, eager(mixture, kept_TD), exact(mixture, kept_TD))
    assert_same_bits(results(mixture), ours)


@pytest.mark.parametrize(
    ("rank", "experts", "shape"),
    [(16, 8, (8192, 1, 128)), (16, 20, (8192, 1, 320)), (64, 28, (1, 8192, 2, 64)), (20, 64, (1, 8192, 2, 32))],
)
def test_little_is_kept_for_the_backward_pass(rank, experts, shape):
    """Of 8192 tokens: the call's own tensors, the routers' answers, and T * R or T * K * P values of rank rows."""
    mixture = random_mixture(tokens=8192, ranks=(rank,) * experts, dtype=torch.float16)
    lists = convert(tree_map(FakeTensorMode().from_tensor, mixture.lists), as_leaf)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        answer = by_operator(lists, mixture)

    own = {part.untyped_storage()._cdata for part in tree_leaves(lists)}
    kept = [tensor for tensor in saved if tensor.untyped_storage()._cdata not in own]
    assert answer.S.shape == shape
    assert sorted(tensor.shape for tensor in kept) == sorted(part.shape for part in tree_leaves(answer[1:]))
    assert answer.S.nbytes <= 2 * 1024**2 or shape[2] == 320


@pytest.mark.slow
def test_the_operators_are_what_they_declare():
    """Schema, fake implementation, derivative, and tracing with symbolic sizes: all of torch.library.opcheck."""
    in_a_fresh_process(
        """
        forward, backward = torch.ops.moelora.mixture.default, torch.ops.moelora.mixture_backward.default
        rules = tiles.table(tiles.device_name())["rules"]

        def check(mixture, keeps, needs=()):
            settings, answer = mixture.settings, ops.mixture(mixture.lists, mixture.settings, keeps=keeps)
            torch.library.opcheck(forward, (*convert(mixture.lists, as_leaf), *settings, keeps))
            if keeps:
                kept = mixture.lists._replace(bases=[], routing=mixture.lists.routing or [*answer[2:]])
                others = [mixture.grad_weights, mixture.grad_logits] if kept.gates else [None, None]
                torch.library.opcheck(backward, (*kept, *settings, answer.S, mixture.grads, *others, *needs))

        picks.tile_for = tile_of_few_programs
        check(random_mixture(tokens=1, ranks=(3, 5)), keeps=False)
        rules["dense_rows_per_slot"] = 1000
        check(random_mixture(tokens=4), keeps=True, needs=(True, True, True, True))
        rules["dense_rows_per_slot"] = -1
        idle = random_mixture(tokens=4, given=True, every_token=False, linear=False)
        check(idle, keeps=True, needs=(False, True, False, True))
        """
    )


@pytest.mark.slow
def test_one_compiled_graph_serves_all_numbers_of_tokens():
    """torch.compile(fullgraph=True, dynamic=True) gives eager's bits, forward and backward."""
    in_a_fresh_process(
        """
        from torch._dynamo.utils import counters

        def mix(lists, settings):
            # made anew: torch 2.11 does not compile `_replace`
            answer = ops.mixture(ops.Lists(lists.x * 1.5, *lists[1:]), settings, keeps=True)
            return ops.Answer([output + 1 for output in answer.outputs], *answer[1:])

        compiled = torch.compile(mix, fullgraph=True, backend="aot_eager", dynamic=True)
        for tokens in (12, 7):
            mixture = random_mixture(tokens=tokens, outs=(37, 16), routers=2)
            ours, theirs = (results(mixture, lambda lists, one: way(lists, one.settings)) for way in (compiled, mix))
            assert_same_bits(ours, theirs)
            assert counters["stats"]["unique_graphs"] == 1
        """
    )
