"""Training by reinforcement: draws, the estimator by enumeration, and what each parameter's gradient is."""

import itertools
from typing import Any

import pytest
import torch
from generating import prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trainer import CHECKPOINTING, KeepGradients, Rows
from transformers import TrainingArguments

import moelora
from moelora import RLOO, AuxLosses, Learned, MoELoRAConfig, losses
from moelora.example_losses import losses_of
from moelora.plackett_luce import gumbel_like
from moelora.routers import rloo as rloo_router
from moelora.tape import Tape
from moelora.testing import tiny

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")

N, K = 5, 3
ORDERS = torch.tensor(list(itertools.permutations(range(N), K)))


def scores(seed=0, spread=1.5):
    """Scores of five experts, in fp64."""
    return spread * torch.randn(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_q(logits_E, orders=ORDERS, function=losses.ordered_log_prob):
    """log-probability of each of these draws."""
    return function(logits_E.expand(len(orders), -1), orders)


def loss_of_sets(seed=1):
    """A random loss of each set of three, for every order of it."""
    value = {}
    generator = torch.Generator().manual_seed(seed)
    for combination in itertools.combinations(range(N), K):
        value[combination] = float(torch.rand((), generator=generator))
    return torch.tensor([value[tuple(sorted(order.tolist()))] for order in ORDERS], dtype=torch.float64)


# --- the distribution -------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.1, 1.0, 5.0, 40.0]))
def test_the_probabilities_of_all_draws_sum_to_one(seed, spread):
    """Also where one expert has all but nothing."""
    torch.testing.assert_close(log_q(scores(seed, spread)).exp().sum(), torch.tensor(1.0, dtype=torch.float64))


def test_a_draw_by_hand():
    """q = (1/2, 1/4, 1/4): first the second, then the first: 1/4 * (1/2) / (3/4) = 1/6."""
    logits_TE = torch.tensor([[0.5, 0.25, 0.25]]).log()
    log_prob_T = losses.ordered_log_prob(logits_TE, torch.tensor([[1, 0]]))

    torch.testing.assert_close(log_prob_T.exp(), torch.tensor([1 / 6]))
    torch.testing.assert_close(
        losses.unordered_log_prob(logits_TE, torch.tensor([[1, 0]])).exp(), torch.tensor([1 / 6 + 1 / 4])
    )


def test_nothing_cancels_where_one_expert_has_it_all():
    """1 - q is 0 in fp32 there; the masked form is exact to rounding, and so is its gradient."""
    logits_TE = torch.tensor([[60.0, 1.0, 0.0]], requires_grad=True)
    log_prob_T = losses.ordered_log_prob(logits_TE, torch.tensor([[0, 1]]))
    log_prob_T.sum().backward()

    torch.testing.assert_close(log_prob_T, torch.tensor([-0.3132617]))
    torch.testing.assert_close(logits_TE.grad, torch.tensor([[0.0, 0.2689414, -0.2689414]]))


def test_experts_that_are_absent_count_for_nothing():
    """A score of -inf: the others' probabilities and gradients are as without it."""
    logits_TE = torch.tensor([[0.3, -torch.inf, 1.0, -0.5]], requires_grad=True)
    log_prob_T = losses.ordered_log_prob(logits_TE, torch.tensor([[2, 0]]))
    log_prob_T.sum().backward()

    kept = losses.ordered_log_prob(torch.tensor([[0.3, 1.0, -0.5]]), torch.tensor([[1, 0]]))
    torch.testing.assert_close(log_prob_T, kept)
    assert logits_TE.grad is not None
    assert logits_TE.grad[0, 1] == 0
    assert torch.isfinite(logits_TE.grad).all()


def test_gumbel_draws_follow_q():
    """Frequencies of all 60 draws, by the router itself: chi-square below its 99.9 % point, seeded."""
    draws, logits_E = 200_000, scores(3).float()
    router = RLOO(top_k=K, weight="mean").build(1, [True] * N, None).train()
    router.weight_ED.data = logits_E[:, None]
    experts_TK = router(torch.ones(draws, 1), Tape(generator=torch.Generator().manual_seed(0))).experts_TK

    codes = (experts_TK * torch.tensor([N * N, N, 1])).sum(1)
    counts = torch.bincount(codes, minlength=N**3)[(ORDERS * torch.tensor([N * N, N, 1])).sum(1)].double()
    expected = draws * log_q(logits_E.double()).exp()
    chi_square = ((counts - expected).square() / expected).sum()
    assert counts.sum() == draws
    assert chi_square < 98.3, chi_square  # chi-square with 59 degrees of freedom
    assert (counts - expected).abs().max() / draws < 1.5e-3


def test_gumbel_noise_has_the_moments_of_its_kind():
    """Mean 0.5772, variance pi^2 / 6."""
    noise = gumbel_like(torch.empty(400_000, 1), torch.Generator().manual_seed(0))
    torch.testing.assert_close(noise.mean(), torch.tensor(0.5772), atol=0.01, rtol=0)
    torch.testing.assert_close(noise.var(), torch.tensor(1.6449), atol=0.02, rtol=0)


def test_the_unordered_log_probability_is_that_of_all_orders():
    """log of the sum of Q over the orders of the set, by enumeration; the same for every order."""
    logits_E = scores(4)
    by_set: dict[tuple, torch.Tensor] = {}
    for order, log_prob in zip(ORDERS.tolist(), log_q(logits_E), strict=True):
        key = tuple(sorted(order))
        by_set[key] = by_set.get(key, torch.zeros((), dtype=torch.float64)) + log_prob.exp()

    found = log_q(logits_E, function=losses.unordered_log_prob)
    expected = torch.stack([by_set[tuple(sorted(order))].log() for order in ORDERS.tolist()])
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="up to 3 experts per token, got 4; take log_prob='ordered'"):
        losses.unordered_log_prob(torch.randn(2, 6), torch.arange(4).expand(2, -1))


# --- the estimator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [losses.ordered_log_prob, losses.unordered_log_prob])
def test_the_estimator_is_unbiased(function):
    """Its mean over all 3600 pairs of draws (M = 2), exactly, is the gradient of the expected loss."""
    logits_E, loss_J = scores(5).requires_grad_(), loss_of_sets()
    (exact_E,) = torch.autograd.grad((log_q(logits_E).exp() * loss_J).sum(), logits_E)

    log_prob_J, q_J = log_q(logits_E, function=function), log_q(logits_E).exp().detach()
    first, second = torch.cartesian_prod(torch.arange(60), torch.arange(60)).T
    pairs = torch.stack([first, second], 1)
    advantage_BM = losses.leave_one_out(loss_J[pairs])
    surrogate_B = (advantage_BM * log_prob_J[pairs]).sum(1)
    (mean_E,) = torch.autograd.grad((q_J[first] * q_J[second] * surrogate_B).sum(), logits_E)

    torch.testing.assert_close(mean_E, exact_E, rtol=1e-12, atol=1e-14)
    assert exact_E.abs().max() > 1e-3


def test_the_unordered_form_has_less_variance():
    """Over the same pairs of draws, in every component that varies."""
    logits_E, loss_J = scores(5), loss_of_sets()
    q_J = log_q(logits_E).exp()
    first, second = torch.cartesian_prod(torch.arange(60), torch.arange(60)).T
    advantage_B = losses.leave_one_out(loss_J[torch.stack([first, second], 1)])
    spread = []
    for function in (losses.ordered_log_prob, losses.unordered_log_prob):
        gradient_JE = torch.autograd.functional.jacobian(lambda z, f=function: log_q(z, function=f), logits_E)
        estimate_BE = advantage_B[:, :1] * gradient_JE[first] + advantage_B[:, 1:] * gradient_JE[second]
        weight_B1 = (q_J[first] * q_J[second])[:, None]
        mean_E = (weight_B1 * estimate_BE).sum(0)
        spread.append((weight_B1 * (estimate_BE - mean_E).square()).sum())

    assert spread[1] < 0.95 * spread[0]


@given(st.integers(2, 9), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_it_is_the_textbook_leave_one_out(samples, seed):
    """(1/M) (L_m - mean of the others), to rounding; a constant added to an example's losses changes nothing."""
    loss_BM = torch.randn(4, samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    others_BM = (loss_BM.sum(1, keepdim=True) - loss_BM) / (samples - 1)
    found_BM = losses.leave_one_out(loss_BM)

    torch.testing.assert_close(found_BM, (loss_BM - others_BM) / samples, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(losses.leave_one_out(loss_BM + 7), found_BM, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        losses.leave_one_out(loss_BM[:, :1])


# --- on a model -------------------------------------------------------------------------------------------------------


def patched(family="llama", *, losses=None, seed=1, share_router=False, targets: Any = "auto", base=None, **options):
    """A tiny model in training with four random experts and routers that are not sure."""
    settings: dict[str, Any] = {"init_std": 0.2} | options
    router = RLOO(**settings)
    config = MoELoRAConfig(router=router, losses=losses or AuxLosses(load_balance=0.0), share_router=share_router)
    model = moelora.patch_model(
        tiny.model(family, **(base or {})), num_experts=4, rank=2, config=config, targets=targets
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".bank." in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    return model.train()


def batch_of(model, *, batch=2, length=7, known=2):
    """Inputs, one row padded, with labels behind a prompt of `known` tokens."""
    inputs = tiny.inputs(model, batch=batch, length=length)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :known] = -100
    return inputs | {"labels": labels}


def gradients(model):
    """A copy of all that there are."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, expected, *, rtol=1e-4, atol=1e-6):
    """The same names, and close values."""
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            got[name], gradient, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def backward(model, batch, samples, *, seed=3, **options):
    """The loss and all gradients, from one seed."""
    model.zero_grad()
    torch.manual_seed(seed)
    found = moelora.rloo_loss(model, batch, samples, **options)
    found.total.backward()
    return found, gradients(model)


def enable_checkpointing(model, *, reentrant):
    """By the name and the arguments that the release of transformers at hand knows."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    except TypeError:
        enable({"use_reentrant": reentrant})


class Chosen:
    """In place of noise: what makes a router draw given experts, site after site."""

    def __init__(self, experts):
        self.experts = list(experts)

    def __call__(self, logits_TE, generator=None):
        experts_TK = self.experts.pop(0)
        high_TK = 1e4 * torch.arange(experts_TK.shape[1], 0, -1.0).expand(experts_TK.shape)
        return torch.zeros_like(logits_TE).scatter(1, experts_TK, high_TK)


@pytest.mark.parametrize("share_router", [False, True], ids=["own", "shared"])
def test_every_gradient_is_what_it_should_be(share_router, monkeypatch):
    """Experts: the mean of M supervised runs with the draws fixed. Routers: ReMix's estimator in closed form."""
    M, B, length = 3, 2, 7
    model = patched(share_router=share_router)
    batch = batch_of(model)
    sites, seen = model._moelora.layers, {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, site=site: seen.update({site: args[0].detach()}))
        for site, layer in sites.items()
    ]
    with moelora.record(model) as recording:
        found, got = backward(model, batch, M)
    for handle in handles:
        handle.remove()
    inputs, drawn = dict(seen), {site: recording[site] for site in recording}

    # each sample alone, by the model's own loss of each row
    mean: dict[str, torch.Tensor] = {}
    owners = {id(layer.router): site for site, layer in reversed(sites.items())}
    for m in range(M):
        for b in range(B):
            rows = slice((m * B + b) * length, (m * B + b + 1) * length)
            picked = [drawn[site].experts_TK[rows] for site, layer in sites.items() if owners[id(layer.router)] == site]
            monkeypatch.setattr(rloo_router, "gumbel_like", Chosen(picked))
            model.zero_grad()
            output = model(**{name: value[b : b + 1] for name, value in batch.items()})
            torch.testing.assert_close(output.loss.detach(), found.loss_BM[b, m].detach())
            output.loss.backward()
            for name, gradient in gradients(model).items():
                mean[name] = mean.get(name, 0) + gradient / (M * B)
    experts = {name: gradient for name, gradient in got.items() if ".bank." in name}
    assert len(experts) == 2 * len(sites)
    assert_same_gradients(experts, {name: mean[name] for name in experts})

    # d log Q / d z_e = sum_j [ 1{e = i_j} - softmax over those that were left ]
    loss_BM = found.loss_BM.detach()
    advantage_BM = (loss_BM - loss_BM.mean(1, keepdim=True)) / (M - 1)
    real_T = batch["attention_mask"].repeat(M, 1).flatten()
    credit_T = (advantage_BM.T.flatten() / B).repeat_interleave(length) * real_T
    for site in set(owners.values()):
        routing = drawn[site]
        assert routing.logits_TE is not None
        left_TE, gradient_TE = routing.logits_TE, torch.zeros_like(routing.logits_TE)
        for slot in range(2):
            chosen_T1 = routing.experts_TK[:, slot : slot + 1]
            gradient_TE += torch.zeros_like(left_TE).scatter(1, chosen_T1, 1.0) - left_TE.softmax(-1)
            left_TE = left_TE.scatter(1, chosen_T1, -torch.inf)
        expected_ED = torch.einsum("t,te,td->ed", credit_T, gradient_TE, inputs[site].flatten(0, 1))
        torch.testing.assert_close(got[f"{site}.router.weight_ED"], expected_ED, rtol=1e-4, atol=1e-6)
        assert expected_ED.abs().max() > 1e-4


def test_the_parts_add_up():
    """total, task and surrogate; the router's weight; AuxLosses as they stand in the configuration."""
    model = patched(losses=AuxLosses(load_balance=0.5, z_loss=0.1))
    batch = batch_of(model)
    found, _ = backward(model, batch, 2, router_weight=3.0)

    torch.testing.assert_close(found.total, found.task + 3.0 * found.surrogate + found.aux)
    torch.testing.assert_close(found.task, found.loss_BM.mean())
    torch.testing.assert_close(found.aux, moelora.aux_loss(model))
    torch.testing.assert_close(found.advantage_BM.sum(1), torch.zeros(2))
    assert found.aux > 0
    none, _ = backward(patched(), batch, 2)
    assert none.aux == 0


def test_aux_losses_are_added_once():
    """A model that gets its labels, for a loss_fn, leaves them out of its own loss; and reentrant two passes agree."""
    model = patched(losses=AuxLosses(load_balance=0.5, z_loss=0.1))
    batch, seen = batch_of(model), []

    def by_row(output, each):
        seen.append(output)
        return losses_of(model, output, each).loss_B

    found, expected = backward(model, batch, 2, loss_fn=by_row)
    torch.testing.assert_close(seen[0].loss.detach(), found.task.detach(), rtol=1e-2, atol=0)
    assert "aux_loss" not in seen[0]
    gradient = {name: torch.zeros_like(value) for name, value in expected.items()}
    for reentrant in (False, True):
        enable_checkpointing(model, reentrant=reentrant)
        model.zero_grad()
        torch.manual_seed(5)
        moelora.rloo_backward(model, batch, 2, loss_fn=by_row)
        if reentrant:
            assert_same_gradients(gradients(model), gradient)
        gradient = gradients(model)


def test_router_weight_scales_the_routers_gradient_alone():
    """0 leaves the routers where they are."""
    model = patched()
    batch = batch_of(model)
    once, thrice, never = (backward(model, batch, 2, router_weight=weight)[1] for weight in (1.0, 3.0, 0.0))

    for name, gradient in once.items():
        factor = 3 if ".router." in name else 1
        torch.testing.assert_close(thrice[name], factor * gradient, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(never[name], 0 * gradient if factor == 3 else gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("credit", ["sequence", "reward_to_go"])
@pytest.mark.parametrize("granularity", ["token", "prompt"])
@pytest.mark.parametrize("family", ["llama", "jamba"])
def test_checkpointing_changes_nothing(family, granularity, credit, reentrant):
    """The second run draws the same experts, and log Q's gradient finds the router."""
    model = patched(family, granularity=granularity)
    batch = batch_of(model)
    plain, expected = backward(model, batch, 2, credit=credit)
    enable_checkpointing(model, reentrant=reentrant)
    again, got = backward(model, batch, 2, credit=credit)

    torch.testing.assert_close(again.loss_BM, plain.loss_BM)
    torch.testing.assert_close(again.surrogate, plain.surrogate)
    assert plain.surrogate != 0
    assert_same_gradients(got, expected)


def test_log_q_of_a_prompt_counts_once():
    """One choice for each row and site, whatever its length: by hand from the recorded scores."""
    model = patched(granularity="prompt")
    batch = batch_of(model)
    with moelora.record(model) as recording:
        found, _ = backward(model, batch, 2)

    log_prob_N = torch.zeros(4)
    for routing in recording.values():
        assert routing.logits_TE is not None
        assert routing.log_prob_T is not None
        logits_NE, experts_NK = (x.unflatten(0, (4, -1))[:, 0] for x in (routing.logits_TE, routing.experts_TK))
        log_prob_N += losses.ordered_log_prob(logits_NE, experts_NK)
        by_row_N = routing.log_prob_T.unflatten(0, (4, -1)).sum(1)
        torch.testing.assert_close(by_row_N, losses.ordered_log_prob(logits_NE, experts_NK))
    expected = (found.advantage_BM * log_prob_N.view(2, 2).T).sum(1).mean()
    torch.testing.assert_close(found.surrogate.detach(), expected)


def test_reward_to_go_by_hand():
    """A position's log Q is weighed by the advantage of the losses from there on; the first by the whole example's."""
    model = patched()
    batch = batch_of(model)
    with moelora.record(model) as recording:
        found, got = backward(model, batch, 2, credit="reward_to_go")
    sequence, _ = backward(model, batch, 2)
    torch.testing.assert_close(found.loss_BM, sequence.loss_BM)

    log_prob_NL = torch.zeros(4, 7)
    for site, routing in recording.items():
        assert routing.log_prob_T is not None
        log_prob_NL += (routing.log_prob_T * recording.valid(site)).unflatten(0, (4, -1))
    torch.manual_seed(3)
    repeated = {name: torch.cat([value, value]) for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = model(**repeated).logits
    log_p = logits[:, :-1].log_softmax(-1)
    labels = batch["labels"].repeat(2, 1)[:, 1:]
    share = -log_p.gather(2, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    share = share / (labels != -100).sum(1, keepdim=True)
    to_go_NL = torch.stack([share[:, place:].sum(1) for place in range(6)] + [torch.zeros(4)], 1)
    torch.testing.assert_close(to_go_NL[:, 0].view(2, 2).T, found.loss_BM.detach())
    difference_BL = to_go_NL[:2] - to_go_NL[2:]
    expected = (difference_BL / 2 * (log_prob_NL[:2] - log_prob_NL[2:])).sum(1).mean()
    torch.testing.assert_close(found.surrogate.detach(), expected, rtol=1e-4, atol=1e-6)
    assert got.keys() == gradients(model).keys()


@pytest.mark.parametrize("granularity", ["token", "prompt"])
@pytest.mark.parametrize("credit", ["sequence", "reward_to_go"])
def test_two_passes_draw_the_same(credit, granularity):
    """The second runs' experts are those of the first, bit for bit; their gradients add up to the estimator."""
    M = 3
    model = patched(granularity=granularity)
    batch = batch_of(model)
    torch.manual_seed(5)
    with moelora.record(model) as recording:
        found = moelora.rloo_backward(model, batch, M, credit=credit)
    got, after = gradients(model), torch.get_rng_state()

    calls = {site: recording.calls(site) for site in recording}
    for site_calls in calls.values():
        assert len(site_calls) == 2 * M
        for first, second in zip(site_calls[:M], site_calls[M:], strict=True):
            assert torch.equal(first.experts_TK, second.experts_TK)
            assert first.logits_TE is not None
            assert second.logits_TE is not None
            assert torch.equal(first.logits_TE, second.logits_TE)
        assert granularity == "prompt" or not torch.equal(site_calls[0].experts_TK, site_calls[1].experts_TK)
    assert not any(tensor.requires_grad for tensor in found)

    # random numbers go on behind those of the first runs, as if there had been no second ones
    torch.manual_seed(5)
    for _ in range(M):
        with torch.no_grad():
            model(**{name: value for name, value in batch.items() if name != "labels"})
    assert torch.equal(torch.get_rng_state(), after)

    # the same draws in one batch
    rows = zip(*(site_calls[:M] for site_calls in calls.values()), strict=True)
    joined = [torch.cat(each) for each in zip(*([routing.experts_TK for routing in row] for row in rows), strict=True)]
    if granularity == "prompt":
        joined = [experts_TK.unflatten(0, (2 * M, -1))[:, 0] for experts_TK in joined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rloo_router, "gumbel_like", Chosen(joined))
        batched, expected = backward(model, batch, M, credit=credit)
    for one, other in zip(found, batched, strict=True):
        torch.testing.assert_close(one, other.detach())
    assert_same_gradients(got, expected)


def test_two_passes_scale_and_accumulate():
    """scale multiplies what is differentiated, and gradients that were there stay."""
    model = patched()
    batch = batch_of(model)
    found = []
    for scale, zero in ((1.0, True), (0.25, True), (1.0, False)):
        if zero:
            model.zero_grad()
        torch.manual_seed(5)
        moelora.rloo_backward(model, batch, 2, scale=scale)
        found.append(gradients(model))

    assert_same_gradients(found[1], {name: gradient / 4 for name, gradient in found[0].items()})
    assert_same_gradients(found[2], {name: gradient * 1.25 for name, gradient in found[0].items()})


def test_two_passes_under_the_tapes_generator_and_checkpointing():
    """A generator of the mixture's own is wound back too; recomputation and second runs do not disturb each other."""
    model = patched()
    batch = batch_of(model)
    model._moelora.tape.generator = torch.Generator().manual_seed(9)
    with moelora.record(model) as recording:
        moelora.rloo_backward(model, batch, 2)
    for site in recording:
        first, second, third, fourth = (call.experts_TK for call in recording.calls(site))
        assert torch.equal(first, third)
        assert torch.equal(second, fourth)

    model._moelora.tape.generator = None
    found = []
    for reentrant in (None, True, False):
        if reentrant is not None:
            enable_checkpointing(model, reentrant=reentrant)
        model.zero_grad()
        torch.manual_seed(5)
        moelora.rloo_backward(model, batch, 2)
        found.append(gradients(model))
    for got in found[1:]:
        assert_same_gradients(got, found[0])


def test_other_heads_have_their_own_losses():
    """Masked language models and encoder-decoders have each label at its own place."""
    quiet = {"bert": {"attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0}, "t5": {"dropout_rate": 0}}
    for family, options in quiet.items():
        model = patched(family, base=options)
        inputs = tiny.inputs(model)
        length = (inputs.get("decoder_input_ids", inputs["input_ids"])).shape[1]
        batch = inputs | {"labels": prompt(2, length)}
        with torch.no_grad(), moelora.disabled(model):
            plain = model(**batch).loss
        for name, parameter in model.named_parameters():
            if name.endswith("B_trainable_RO"):
                parameter.data.zero_()
        found, _ = backward(model, batch, 2)
        torch.testing.assert_close(found.task.detach(), plain)


def test_class_scores_by_row_and_anything_by_loss_fn():
    """One label for a row of scores; a loss of one's own gives the same as the known one where it is the same."""
    model = patched()
    scores_BC, labels_B = torch.randn(3, 4), torch.tensor([0, 3, 1])
    by_row = losses_of(model, {"logits": scores_BC}, {"labels": labels_B})
    torch.testing.assert_close(by_row.loss_B, -scores_BC.log_softmax(-1)[torch.arange(3), labels_B])
    assert by_row.to_go_BL is None
    with pytest.raises(ValueError, match=r"logits of shape \(3, 1\) and labels of shape \(3,\); pass loss_fn"):
        losses_of(model, {"logits": scores_BC[:, :1]}, {"labels": labels_B})

    batch = batch_of(model)
    plain, expected = backward(model, batch, 2)
    again, got = backward(
        model,
        batch,
        2,
        loss_fn=lambda output, each: torch.stack(
            [
                torch.nn.functional.cross_entropy(logits[:-1], labels[1:])
                for logits, labels in zip(output.logits, each["labels"], strict=True)
            ]
        ),
    )
    torch.testing.assert_close(again.loss_BM, plain.loss_BM)
    assert_same_gradients(got, expected)


@pytest.mark.parametrize(("granularity", "credit"), [("prompt", "sequence"), ("token", "reward_to_go")])
def test_routers_learn_by_rewards_alone(granularity, credit):
    """Two of the four experts say nothing and two spoil the base's answer: the mean loss of what is drawn falls."""
    model = patched(init_std=0.0, weight="mean", granularity=granularity, seed=4, targets=["v_proj", "o_proj"])
    for layer in model._moelora.layers.values():
        for index, factor in enumerate((0.0, 0.0, 12.0, 12.0)):
            layer.bank.expert(index).B_RO.mul_(factor)
    moelora.set_trainable(model, routers=True, experts=False)
    batch = tiny.inputs(model, batch=4)
    with torch.no_grad(), moelora.disabled(model):
        answers = model(**batch).logits.argmax(-1)
    batch["labels"] = torch.cat([answers[:, :1], answers[:, :-1]], 1)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)

    tasks = []
    for _ in range(30):
        optimiser.zero_grad()
        found = moelora.rloo_loss(model, batch, 8, credit=credit)
        found.total.backward()
        optimiser.step()
        tasks.append(found.task.item())

    assert sum(tasks[-5:]) / 5 < sum(tasks[:5]) / 5 - 0.25


# --- Trainer ----------------------------------------------------------------------------------------------------------


def rows(count=8, length=6):
    """Token rows."""
    made = Rows()
    for number in range(count):
        ids = torch.randint(3, 20, (length,), generator=torch.Generator().manual_seed(number))
        made.append({"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)})
    return made


def rloo_trainer(model, folder, **options):
    """A short run."""
    defaults = {"max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no"}
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, **(defaults | options)
    )
    return moelora.RLOOTrainer(
        model=model, args=arguments, train_dataset=rows(), eval_dataset=rows()[:4], samples=2, credit="reward_to_go"
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulated_batches_are_one_batch(checkpointing, tmp_path, monkeypatch):
    """Two batches of two give the gradient of one of four, experts' and routers', where the draws are the same."""

    def by_sample(logits_TE, generator=None):
        # the noise of a token hangs on its sample alone
        noise_ME = torch.randn(2, logits_TE.shape[1], generator=torch.Generator().manual_seed(logits_TE.shape[1]))
        return 3 * noise_ME.repeat_interleave(logits_TE.shape[0] // 2, 0)

    monkeypatch.setattr(rloo_router, "gumbel_like", by_sample)
    found = []
    for size in (4, 2):
        keep, options = KeepGradients(), {}
        if checkpointing:
            options = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}
        run = rloo_trainer(
            patched(), tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size,
            max_grad_norm=0, **options,
        )  # fmt: skip
        run.add_callback(keep)
        run.train()
        found.append(keep.gradients)

    assert any(".router." in name and gradient.any() for name, gradient in found[0].items())
    assert_same_gradients(found[1], found[0])


def test_trainer_trains_logs_and_evaluates(tmp_path):
    """All trainable tensors move; what is logged is the supervised loss; evaluation is Trainer's own."""
    model = patched()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = rloo_trainer(model, tmp_path, max_steps=3, gradient_accumulation_steps=2)
    run.train()

    logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    metrics = run.evaluate()
    still = [name for name, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[name])]
    assert still == []
    # a supervised loss of random weights, near that of evaluation; the surrogate's value would be far from it
    assert all(abs(value - metrics["eval_loss"]) < 1.0 for value in logged)
    inputs = {key: torch.stack([row[key] for row in rows()[:4]]) for key in ("input_ids", "labels", "attention_mask")}
    with torch.no_grad():
        assert metrics["eval_loss"] == pytest.approx(model.eval()(**inputs).loss.item(), rel=1e-5)


def test_trainer_refuses_what_would_have_no_effect(tmp_path):
    """Label smoothing."""
    with pytest.raises(ValueError, match="label_smoothing_factor and compute_loss_func would have no effect"):
        rloo_trainer(patched(), tmp_path, label_smoothing_factor=0.1)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [moelora.rloo_loss, moelora.rloo_backward])
def test_errors_say_what_to_do(function):
    """Too few samples, evaluation, another router, a mixture that is off or fixed, unknown options."""
    model = patched()
    batch = batch_of(model)
    with pytest.raises(ValueError, match="needs at least 2 samples, got samples=1"):
        function(model, batch, 1)
    with pytest.raises(ValueError, match=r"call model.train\(\), with gradients enabled"):
        function(model.eval(), batch)
    model.train()
    with torch.no_grad(), pytest.raises(ValueError, match="with gradients enabled"):
        function(model, batch)
    with moelora.disabled(model), pytest.raises(ValueError, match="the mixture is disabled, or fixed by use_experts"):
        function(model, batch)
    with moelora.use_experts(model, "expert1"), pytest.raises(ValueError, match="disabled, or fixed by use_experts"):
        function(model, batch)
    with pytest.raises(ValueError, match="pass loss_fn"):
        function(model, {"input_ids": batch["input_ids"]})
    with pytest.raises(ValueError, match="loss_fn must give one loss for each row"):
        function(model, batch, loss_fn=lambda output, each: output.loss)
    with pytest.raises(ValueError, match="credit='reward_to_go' is for causal language models"):
        function(model, batch, credit="reward_to_go", loss_fn=lambda output, each: output.logits.mean((1, 2)))
    other = moelora.patch_model(tiny.model("llama"), num_experts=2, rank=2, router=Learned()).train()
    with pytest.raises(ValueError, match=r"RLOO\(top_k=2\); this model has Learned"):
        function(other, batch)
    with pytest.raises(ValueError, match="this LlamaForCausalLM is no patched model"):
        function(tiny.model("llama"), batch)
    four = moelora.patch_model(tiny.model("llama"), num_experts=6, rank=2, router=RLOO(top_k=4)).train()
    with pytest.raises(ValueError, match="up to 3 experts per token, got 4"):
        function(four, batch, log_prob="unordered")


def test_tensors_without_rows_cannot_be_repeated():
    """They are named, and two passes take them."""
    model = patched()
    batch = batch_of(model) | {"cache_position": torch.arange(7), "logits_to_keep": 0}
    with pytest.raises(ValueError, match=r"'cache_position' has the shape \(7,\), but 'labels' has 2 rows"):
        moelora.rloo_loss(model, batch)
    assert moelora.rloo_backward(model, batch, 2).loss_BM.shape == (2, 2)
