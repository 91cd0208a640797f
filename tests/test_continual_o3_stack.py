"""O3Stack on a tiny model: one adapter trained on, weights of the paper and of the code, and what an error leaves."""

from dataclasses import dataclass, field
from typing import Any, final

import pytest
import torch
from stack_texts import BENIGN, FORGET, OTHER, prompts, texts
from torch import Tensor, nn

import moelora
from moelora.bank import Expert
from moelora.continual.detectors.o3 import O3Code, O3Paper
from moelora.continual.examples import model_inputs
from moelora.continual.features import HiddenStates, Windows
from moelora.continual.o3_stack import O3Stack
from moelora.continual.objectives import Objective, Refusal
from moelora.continual.training import Training
from moelora.mixture import find_mixture
from moelora.testing import tiny

QUICK = Training(epochs=1, learning_rate=1e-2, batch_size=16)
SLOW = Training(epochs=1, learning_rate=1e-12, batch_size=16)
VARIANTS = ("paper", "code")


def choices(topic: int, count: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    """Questions of a topic whose answers begin with one of its four tokens."""
    return [{**text, "options": list(range(topic, topic + 4))} for text in texts(topic, count, seed)]


def stack_of(model: nn.Module, variant: str, **options: Any) -> O3Stack:
    """An empty stack, without the paper's warning."""
    if variant == "code":
        pytest.importorskip("sklearn")
        return O3Stack(model, "code", rank=2, **options)
    with pytest.warns(UserWarning, match=r"never below 0\.5"):
        return O3Stack(model, "paper", rank=2, **options)


def made(variant: str, *topics: int, **options: Any) -> tuple[nn.Module, O3Stack]:
    """A model and a stack that has forgotten these topics."""
    model = tiny.model("llama")
    stack = stack_of(model, variant, **options)
    for topic in topics:
        stack.forget(choices(topic), training=QUICK)
    return model, stack


@pytest.fixture(scope="module")
def forgetful():
    """Both variants, with two requests each; not to be changed."""
    return {variant: made(variant, FORGET, OTHER) for variant in VARIANTS}


def adapter_of(model: nn.Module) -> dict[str, Expert]:
    """The adapter's factors, copied."""
    experts = {path: layer.bank.expert(0) for path, layer in find_mixture(model)[1].layers.items()}
    return {path: Expert(e.A_RD.clone(), e.B_RO.clone(), e.scale) for path, e in experts.items()}


def product(new: dict[str, Expert], old: dict[str, Expert], side: str) -> float:
    """What O3 penalises, summed over sites."""
    pairs = [(new[path], old[path]) for path in new]
    rows = [(n.A_RD, o.A_RD) if side == "in" else (n.B_RO, o.B_RO) for n, o in pairs]
    return sum(float((o @ n.T).square().sum()) for n, o in rows)


@final
@dataclass(frozen=True)
class Nothing(Objective):
    """A loss that says nothing, so that the penalty alone trains; or that fails."""

    fails: bool = False

    def loss(self, model: nn.Module, batch: Any, generator: torch.Generator) -> Tensor:
        loss = 0 * model(**model_inputs(batch)).logits.float().square().mean()
        return loss * torch.nan if self.fails else loss


# --- weights ----------------------------------------------------------------------------------------------------------


def test_the_papers_gate_never_closes(forgetful):
    """Whatever the prompt: w is at least 0.5, and the output is not the base's. It says so when it is made."""
    model, stack = forgetful["paper"]
    batch = prompts(FORGET, OTHER, BENIGN, 90)

    weights_B1 = stack.weights(batch)

    assert weights_B1.shape == (4, 1)
    assert (weights_B1 >= 0.5).all()
    assert (weights_B1 < 1).all()
    with torch.no_grad(), moelora.disabled(model):
        base = model(**batch).logits
    with torch.no_grad():
        ours = model(**batch).logits
    assert all(not torch.equal(row, base_row) for row, base_row in zip(ours, base, strict=True))


def test_the_codes_gate_has_the_hand_set_steps(forgetful):
    """0, 1.2 or the window between; what is at 0 is the base, bit for bit, in a batch with others."""
    model, stack = forgetful["code"]
    rows = [prompts(topic, seed=seed) for topic in (FORGET, OTHER, BENIGN) for seed in range(8)]
    batch = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    weights_B = stack.weights(batch)[:, 0]

    closed_B = weights_B == 0
    assert closed_B.any()
    assert (weights_B == 1.2).any()
    assert (closed_B | (weights_B == 1.2) | ((weights_B >= 0.3) & (weights_B < 0.4))).all()
    with torch.no_grad(), moelora.disabled(model):
        base = model(**batch).logits
    with torch.no_grad():
        ours = model(**batch).logits
    assert torch.equal(ours[closed_B], base[closed_B])
    assert not torch.equal(ours[~closed_B], base[~closed_B])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_weight_is_the_largest_of_all_requests_and_scales_the_one_adapter(variant, forgetful):
    """Each request's column is its detector's own; the model runs as with the adapter fixed at the weights."""
    model, stack = forgetful[variant]
    batch = prompts(FORGET, OTHER, BENIGN)
    features_BSD = HiddenStates(model, [1, 2]).means(batch).features_WSD

    columns_BT = stack.request_weights(batch)
    weights_B1 = stack.weights(batch)

    assert moelora.expert_names(model) == ["o3"]
    for column_B, request in zip(columns_BT.T, stack.requests, strict=True):
        torch.testing.assert_close(column_B, request.detector.weight(features_BSD))
    assert torch.equal(weights_B1[:, 0], columns_BT.max(1).values)
    with torch.no_grad():
        ours = model(**batch).logits
        with moelora.use_experts(model, [{"o3": float(weight)} for weight in weights_B1[:, 0]]):
            fixed = model(**batch).logits
    torch.testing.assert_close(ours, fixed)


def test_an_unlike_prompt_weighs_less_than_the_request_itself(forgetful):
    """The median over its own prompts is near 1; a far topic is in the tail, at a half."""
    _, stack = forgetful["paper"]
    own = {name: torch.cat([prompts(FORGET, seed=s)[name] for s in range(9)]) for name in prompts(FORGET)}
    far = {name: torch.cat([prompts(BENIGN, seed=s)[name] for s in range(9)]) for name in prompts(FORGET)}

    assert stack.request_weights(far)[:, 0].median() == pytest.approx(0.5, abs=1e-3)
    assert stack.request_weights(own)[:, 0].median() > 0.6


def test_of_a_prompt_of_several_windows_the_one_that_weighs_most_counts():
    """By features that have two windows for the first prompt."""
    _, stack = made("paper", FORGET)
    batch = prompts(FORGET, BENIGN)
    one = stack.features(batch)
    windows = Windows(one.features_WSD[[0, 1, 1]], torch.tensor([0, 0, 1]), 2)
    weights_B = stack.weights(batch)[:, 0]
    stack.features = lambda batch: windows

    assert torch.equal(stack.weights(batch)[:, 0], torch.stack([weights_B.max(), weights_B[1]]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_is_asked_once(variant, forgetful):
    """With a cache as without one."""
    model, _ = forgetful[variant]
    batch = prompts(FORGET, BENIGN)
    model.generation_config.pad_token_id = 0

    tokens = model.generate(**batch, max_new_tokens=3, do_sample=False)

    assert tokens.shape == (2, batch["input_ids"].shape[1] + 3)


# --- the adapter ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_adapter_goes_on_from_its_last_value(variant):
    """Almost without a step it is what it was, whose overlap with itself is 1; a real training moves it."""
    model, stack = made(variant, FORGET)
    first = adapter_of(model)

    second = stack.forget(choices(OTHER), training=SLOW)

    for path, expert in adapter_of(model).items():
        torch.testing.assert_close(expert.A_RD, first[path].A_RD)
        torch.testing.assert_close(expert.B_RO, first[path].B_RO)
        assert expert.B_RO.any()
    assert stack.requests[0].overlap == 0
    assert second.overlap == pytest.approx(1, abs=1e-4)
    third = stack.forget(choices(BENIGN), training=QUICK)
    assert third.overlap < 0.999
    assert len(third.losses) == 1
    assert moelora.expert_names(model) == ["o3"]


@pytest.mark.parametrize(("variant", "side"), [("paper", "out"), ("code", "in")])
def test_the_penalty_is_on_the_variants_side(variant, side):
    """A training by the penalty alone shrinks the product with the last value, and leaves the other factor as it is."""
    model, stack = made(variant, FORGET)
    first = adapter_of(model)

    stack.forget(choices(OTHER), objective=Nothing(), training=QUICK)

    now = adapter_of(model)
    other = "in" if side == "out" else "out"
    assert product(now, first, side) < 0.9 * product(first, first, side)
    assert product(now, first, other) == product(first, first, other)


@final
@dataclass(frozen=True)
class Heard(Objective):
    """A loss that says nothing, and hears the gradients of the factors."""

    A: dict[str, Tensor] = field(default_factory=dict)
    B: dict[str, Tensor] = field(default_factory=dict)

    def loss(self, model: nn.Module, batch: Any, generator: torch.Generator) -> Tensor:
        for path, layer in find_mixture(model)[1].layers.items():
            for factor, heard in ((layer.bank.A_trainable_RD, self.A), (layer.bank.B_trainable_RO, self.B)):
                assert factor is not None
                factor.register_hook(lambda gradient, path=path, heard=heard: heard.setdefault(path, gradient.clone()))
        return Nothing().loss(model, batch, generator)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_code_looks_back_at_every_request_and_the_paper_at_the_last(variant):
    """By the penalty's gradient: 2 * 0.1 / blocks * sum_j (N P_j^T) P_j, of new rows N and old ones P_j."""
    model, stack = made(variant, FORGET)
    values = [adapter_of(model)]
    stack.forget(choices(OTHER), training=QUICK)
    values.append(adapter_of(model))
    heard = Heard()
    stack.forget(choices(BENIGN), objective=heard, training=SLOW)

    for path, new in values[-1].items():
        if variant == "code":
            rows, olds, gradient = new.A_RD, [value[path].A_RD for value in values], heard.A[path]
        else:
            rows, olds, gradient = new.B_RO, [values[-1][path].B_RO], heard.B[path]
        expected = torch.stack([rows @ old.T @ old for old in olds]).sum(0) * (2 * 0.1 / 2)
        torch.testing.assert_close(gradient, expected)


# --- options and errors -----------------------------------------------------------------------------------------------


def test_a_text_can_be_refused():
    """O3's target for free text."""
    model = tiny.model("llama")
    stack = stack_of(model, "paper")

    request = stack.forget(texts(FORGET, 24), objective=Refusal(answers=[[90, 2], [91, 92, 2]]), training=QUICK)

    assert request.name == "request-1"
    assert len(request.losses) == 1


def test_held_out_is_the_papers_d_rest():
    """The bank of D_used holds what is left."""
    model = tiny.model("llama")
    stack = stack_of(model, "paper")

    first = stack.forget(choices(FORGET, 20), training=QUICK)
    second = stack.forget(choices(OTHER, 20), training=QUICK, held_out=0.4)

    assert [len(request.detector._fitted.layers.bank_NSD) for request in (first, second)] == [16, 12]


def test_a_detector_brings_the_variants_options():
    """zeta of the paper; the code's other set of cut-offs. Each request has a copy of its own."""
    with pytest.warns(UserWarning, match="O3 as printed"):
        detector = O3Paper(zeta=100.0)
    _, stack = made("paper", FORGET, detector=detector)
    _, tofu = made("code", FORGET, detector=O3Code("tofu"))

    own = stack.requests[0].detector
    assert isinstance(own, O3Paper)
    assert own.zeta == 100.0
    assert own is not detector
    assert (tofu.weights(prompts(FORGET, BENIGN)) <= 1.0).all()


def failing(stack: O3Stack) -> None:
    """A training whose loss is NaN."""
    stack.forget(choices(OTHER), objective=Nothing(fails=True), training=QUICK)


ERRORS = {
    "NaN": (failing, "in step 1 of the training of 'o3' the loss is nan"),
    "few prompts": (lambda stack: stack.forget(choices(OTHER, 5)), "features of at least 10 prompts, got 5"),
    "a name twice": (lambda stack: stack.forget(choices(OTHER), name="request-1"), "there is a request 'request-1'"),
    "free text": (lambda stack: stack.forget(texts(OTHER, 24)), "replaces the answer of a text by a refusal"),
    "a share of one": (lambda stack: stack.forget(choices(OTHER), held_out=1.0), "used is a share between 0 and 1"),
}


@pytest.mark.parametrize(
    ("case", "requests"), [(case, count) for case in ERRORS for count in (0, 1) if count or case != "a name twice"]
)
def test_errors_leave_model_and_stack_as_they_were(case, requests):
    """Bit for bit, with no request and with one."""
    call, message = ERRORS[case]
    model, stack = made("paper", *[FORGET] * requests)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    batch = prompts(FORGET, BENIGN)
    with torch.no_grad():
        logits = model(**batch).logits

    with pytest.raises(ValueError, match=message):
        call(stack)

    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert len(stack.requests) == requests
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, logits)
    stack.forget(choices(OTHER), training=QUICK)


def test_what_a_stack_refuses():
    """Before the model is touched."""
    model = tiny.model("llama")
    with pytest.raises(ValueError, match=r"unknown variant 'o3'; expected one of \('paper', 'code'\)"):
        O3Stack(model, "o3")
    with pytest.raises(ValueError, match="variant 'paper' has an O3Paper, got a O3Code"):
        O3Stack(model, "paper", detector=O3Code())
    stack = O3Stack(model, "code")
    with pytest.raises(ValueError, match="the share that the code holds out is its variant's"):
        stack.forget(choices(FORGET), held_out=0.3)
    with pytest.raises(ValueError, match="no requests yet"):
        stack.weights(prompts(FORGET))
    assert not moelora.is_patched(model)
    moelora.patch_model(model, num_experts=1, rank=2, top_k=1)
    with pytest.raises(ValueError, match="patched already"):
        O3Stack(model, "code")
