"""The sparsegen router: an exact projection, a learned number of experts, in a layer, in training, on disk."""

import pytest
import torch
from generating import cache_name
from hypothesis import given
from hypothesis import strategies as st
from random_mixture import random_mixture
from torch.nn import functional as F

import moelora
from moelora import AuxLosses, MoELoRAConfig, Sparsegen, losses
from moelora.layer import MoELoRALinear
from moelora.routers.sparsegen import FIRST_BIAS, sparsegen
from moelora.routing import dense_weights
from moelora.tape import Tape
from moelora.testing import tiny
from moelora.testing.router_contract import router_contract


@st.composite
def problems(draw):
    """Scores of a few tokens in fp64, and a lambda below 0.99 for each."""
    tokens, num_experts = draw(st.integers(1, 5)), draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    spread = draw(st.sampled_from([0.01, 1.0, 30.0]))
    logits_TE = torch.randn(tokens, num_experts, generator=generator, dtype=torch.float64) * spread
    lam_T1 = 0.99 - torch.rand(tokens, 1, generator=generator, dtype=torch.float64) * draw(st.sampled_from([0.1, 5.0]))
    return logits_TE, lam_T1


def by_bisection(logits_TE, lam_T1):
    """The threshold that makes the weights sum to 1, by halving an interval that holds it."""
    low_T1 = logits_TE.amax(-1, keepdim=True) - (1 - lam_T1)
    high_T1 = logits_TE.amax(-1, keepdim=True)
    for _ in range(100):
        tau_T1 = (low_T1 + high_T1) / 2
        too_low_T1 = (logits_TE - tau_T1).relu().sum(-1, keepdim=True) > 1 - lam_T1
        low_T1, high_T1 = torch.where(too_low_T1, tau_T1, low_T1), torch.where(too_low_T1, high_T1, tau_T1)
    return (logits_TE - low_T1).relu() / (1 - lam_T1)


# --- the projection ---------------------------------------------------------------------------------------------------


def test_by_hand():
    """u = (1, 0.5, 0), lambda 0: two act, tau = 0.25. Lambda 0.5: one acts. Lambda -1: three, tau = -1/6."""
    logits_TE = torch.tensor([[1.0, 0.5, 0.0]] * 3)

    weights_TE = sparsegen(logits_TE, torch.tensor([[0.0], [0.5], [-1.0]]))

    expected_TE = torch.tensor([[0.75, 0.25, 0.0], [1.0, 0.0, 0.0], [7 / 12, 4 / 12, 1 / 12]])
    torch.testing.assert_close(weights_TE, expected_TE)


@given(problems())
def test_it_is_the_point_of_the_simplex_that_bisection_finds(problem):
    """Not negative, sums to 1, and exact."""
    weights_TE = sparsegen(*problem)

    assert bool((weights_TE >= 0).all())
    torch.testing.assert_close(weights_TE.sum(-1), torch.ones(len(weights_TE), dtype=torch.float64))
    torch.testing.assert_close(weights_TE, by_bisection(*problem), rtol=1e-9, atol=1e-9)


@given(problems(), st.integers(0, 1000))
def test_no_other_point_of_the_simplex_is_better(problem, seed):
    """It minimises |p - u|^2 - lambda |p|^2 among random points, near and far."""
    logits_TE, lam_T1 = problem
    ours_TE = sparsegen(logits_TE, lam_T1)

    def value(weights_TE):
        # the square of u is the same for all, and would drown the difference
        return ((1 - lam_T1[:, 0]) * weights_TE.square().sum(-1)) - 2 * (weights_TE * logits_TE).sum(-1)

    generator = torch.Generator().manual_seed(seed)
    for reach in (1.0, 1e-2):
        other_TE = torch.rand(logits_TE.shape, generator=generator, dtype=torch.float64).log().neg()
        other_TE = (1 - reach) * ours_TE + reach * other_TE / other_TE.sum(-1, keepdim=True)
        assert bool((value(other_TE) >= value(ours_TE) - 1e-9).all())


@given(problems())
def test_the_support_grows_as_lambda_falls(problem):
    """From one-hot to all."""
    logits_TE, lam_T1 = problem
    counts = [(sparsegen(logits_TE, lam_T1 - step) > 0).sum(-1) for step in (0.0, 0.5, 1e4)]

    assert bool((counts[0] <= counts[1]).all())
    assert bool((counts[2] == logits_TE.shape[1]).all())


@pytest.mark.parametrize("lam", [0.9, 0.0, -2.0])
def test_gradients_are_derivatives(lam):
    """With respect to the scores and to lambda, where one, some and all experts act."""
    logits_TE = torch.tensor([[0.7, 0.1, -0.4, -1.0], [0.05, 0.0, 0.02, -0.3]], dtype=torch.float64, requires_grad=True)
    lam_T1 = torch.full((2, 1), lam, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(sparsegen, (logits_TE, lam_T1))


def test_experts_that_cannot_be_chosen_get_nothing():
    """-inf is as good as no column, and its gradient is 0, not NaN."""
    logits_TE = torch.randn(5, 3)
    wide_TE = torch.cat([torch.full((5, 1), -torch.inf), logits_TE], 1).requires_grad_()
    lam_T1 = torch.full((5, 1), -0.5)

    weights_TE = sparsegen(wide_TE, lam_T1)
    (grad_TE,) = torch.autograd.grad(weights_TE.square().sum(), wide_TE)

    assert torch.equal(weights_TE[:, 1:], sparsegen(logits_TE, lam_T1))
    assert torch.equal(weights_TE[:, 0], torch.zeros(5))
    assert torch.equal(grad_TE[:, 0], torch.zeros(5))
    assert torch.isfinite(grad_TE).all()


def test_large_scores_keep_their_differences():
    """A constant on all scores changes nothing, also where fp32 sums of them would lose the differences."""
    logits_TE = torch.tensor([[0.5, 0.25, 0.0, -0.25]])

    torch.testing.assert_close(sparsegen(logits_TE + 4096, torch.zeros(1, 1)), sparsegen(logits_TE, torch.zeros(1, 1)))


# --- the router -------------------------------------------------------------------------------------------------------


def wide_router(in_features, available, *, bias=None):
    """A router whose scores and lambda spread enough for one, some and all experts to act."""
    router = Sparsegen(hidden=5).build(in_features, available, None)
    with torch.no_grad():
        router.weight_ED.normal_(0, 0.2)
        router.out_weight_1H.normal_()
        router.out_bias_1.fill_(0.0 if bias is None else bias)
    return router


def test_sparsegen_router_keeps_the_contract():
    """Weights sum to 1."""
    router_contract(wide_router, weight_sum=1.0)


def test_how_many_experts_act_depends_on_the_token():
    """Slots are in the order of the experts the site has; those without a weight are empty."""
    torch.manual_seed(0)
    router = wide_router(12, [True, False, True, True, True], bias=-0.5)
    x_TD = torch.randn(64, 12)

    routing = router(x_TD, Tape())

    counts_T = (routing.experts_TK >= 0).sum(-1)
    assert set(counts_T.tolist()) == {1, 2, 3, 4}
    assert torch.equal(routing.experts_TK >= 0, routing.weights_TK > 0)
    assert routing.experts_TK.shape == (64, 4)
    assert router.top_k == 4
    slots_K = routing.experts_TK.amax(0)
    assert slots_K.tolist() == [0, 2, 3, 4]
    expected_TE = sparsegen(routing.logits_TE, router.sparsity(x_TD))
    assert torch.equal(dense_weights(routing, 5), expected_TE)


def test_lambda_by_hand():
    """log_sigmoid(MLP(x)) + 1 - epsilon, always below 1 - epsilon."""
    router = wide_router(12, [True] * 3)
    x_TD = torch.randn(6, 12) * 10
    hidden_TH = F.relu(F.linear(x_TD, router.hidden_weight_HD, router.hidden_bias_H))
    expected_T1 = torch.sigmoid(F.linear(hidden_TH, router.out_weight_1H, router.out_bias_1)).log() + 0.99

    torch.testing.assert_close(router.sparsity(x_TD), expected_T1)
    assert bool((router.sparsity(x_TD * 100) <= 0.99).all())


def test_a_fresh_router_uses_all_experts():
    """Its lambda is low, its scores are small."""
    router = Sparsegen().build(32, [True] * 4, torch.Generator().manual_seed(0))

    routing = router(torch.randn(20, 32), Tape())

    assert bool((routing.experts_TK >= 0).all())
    assert router.out_bias_1.item() == FIRST_BIAS


def test_scores_and_lambda_are_fp32_under_autocast():
    """As of every linear router: the number of experts must not hang on rounding."""
    router, x_TD = wide_router(12, [True] * 4), torch.randn(30, 12)
    plain = router(x_TD, Tape())
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x_TD, Tape())

    assert torch.equal(routing.experts_TK, plain.experts_TK)
    assert torch.equal(routing.weights_TK, plain.weights_TK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"epsilon": 0.0}, r"epsilon must lie between 0 and 1, got 0\.0"),
        ({"epsilon": 1.0}, r"epsilon must lie between 0 and 1, got 1\.0"),
        ({"init_std": -1.0}, r"init_std must not be negative, got -1\.0"),
    ],
)
def test_options_are_checked(options, message):
    """Where the configuration is made."""
    with pytest.raises(ValueError, match=message):
        Sparsegen(**options)


# --- in a model -------------------------------------------------------------------------------------------------------


def spread(model):
    """Give the routers of a model different opinions of different tokens."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("router.weight_ED"):
            parameter.data.normal_(0, 0.3, generator=generator)
        if name.endswith("router.out_weight_1H"):
            parameter.data.normal_(0, 1.0, generator=generator)
        if name.endswith("router.out_bias_1"):
            parameter.data.zero_()
    return model


@pytest.mark.parametrize("backend", ["reference", "dense", "gathered"])
def test_every_way_to_compute_skips_the_empty_slots(backend):
    """All agree with the one that is chosen."""
    model = spread(random_mixture(losses=AuxLosses(), router=Sparsegen())).eval()
    inputs = tiny.inputs(model)
    with torch.no_grad(), moelora.record(model) as recording:
        auto = model(**inputs).logits
    empty = torch.cat([recording[site].experts_TK.flatten() for site in recording]) < 0
    assert empty.any()
    assert not empty.all()

    for layer in model.modules():
        if isinstance(layer, MoELoRALinear):
            layer.backend = backend
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, auto, rtol=1e-4, atol=1e-5)


def test_decoding_is_prefill():
    """Token by token with a cache, the logits are those of the whole."""
    model = spread(random_mixture(losses=AuxLosses(), router=Sparsegen())).eval()
    ids = tiny.inputs(model, length=3)["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :2], use_cache=True)
        last = model(input_ids=ids[:, 2:], **{cache_name(model): first[cache_name(model)]}).logits

    torch.testing.assert_close(last[:, 0], whole[:, 2], rtol=1e-4, atol=1e-5)


def test_a_budget_brings_the_number_of_experts_down():
    """Training with over_budget ends near it, and every tensor of the router gets a gradient."""
    weights = AuxLosses(load_balance=0.01, over_budget=1.0, budget=2)
    model = random_mixture(losses=weights, router=Sparsegen(), experts=False, num_hidden_layers=1)
    inputs = tiny.inputs(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)

    def experts_per_token():
        with torch.no_grad(), moelora.record(model) as recording:
            model(**inputs)
        return sum(float((recording[site].experts_TK >= 0).sum(-1).float().mean()) for site in recording) / len(
            recording
        )

    before = experts_per_token()
    for step in range(60):
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        if step == 0:
            routers = {name: p for name, p in model.named_parameters() if ".router." in name}
            assert len(routers) == 4 * 5
            assert all(p.grad is not None and bool(p.grad.any()) for p in routers.values())
        optimizer.step()

    assert before == 4.0
    assert experts_per_token() < 2.2


def test_the_balance_loss_counts_the_slots_that_act():
    """f is the share of an expert in all assignments, however many each token has."""
    router = wide_router(12, [True] * 4)
    routing = router(torch.randn(40, 12), Tape())
    active_TE = (dense_weights(routing, 4) > 0).float()
    share_E = active_TE.sum(0) / active_TE.sum()

    value = losses.load_balance(routing.logits_TE, routing.experts_TK)

    torch.testing.assert_close(value, 4 * (share_E * routing.logits_TE.softmax(-1).mean(0)).sum())


def test_saved_and_loaded_it_answers_bit_for_bit(tmp_path):
    """By name, with its network."""
    base = tiny.model("llama")
    for seed, name in enumerate("ab"):
        tiny.adapter(base, tmp_path / name, seed=seed)
    config = MoELoRAConfig(router=Sparsegen(hidden=7, epsilon=0.05))
    model = spread(moelora.patch_model(base, [tmp_path / "a", tmp_path / "b"], config=config))
    inputs = tiny.inputs(model)
    with torch.no_grad():
        expected = model(**inputs).logits
    moelora.save(model, tmp_path / "mixture")

    again = moelora.load(tiny.model("llama"), tmp_path / "mixture")

    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, expected)


def test_by_name_and_experts_come_and_go():
    """router="sparsegen"; a new expert has a slot, and none once it is removed."""
    model = moelora.patch_model(tiny.model("llama"), num_experts=2, rank=2, router="sparsegen")
    inputs = tiny.inputs(model)
    with torch.no_grad(), moelora.record(model) as recording:
        model(**inputs)
    site = next(iter(recording))
    assert recording[site].experts_TK.shape[1] == 2
    moelora.add_expert(model, name="new", rank=2)
    with torch.no_grad(), moelora.record(model) as recording:
        model(**inputs)
    assert recording[site].experts_TK.shape[1] == 3
    moelora.remove_expert(model, "new")
    with torch.no_grad(), moelora.record(model) as recording:
        model(**inputs)
    assert recording[site].experts_TK.shape[1] == 2
