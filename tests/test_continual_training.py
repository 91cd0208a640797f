"""Training one expert: what moves and what must not, the schedule, the random state, and how it fails."""

from collections.abc import Mapping
from typing import Any, final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import moelora
from moelora.continual.examples import Collate
from moelora.continual.objectives import GradientAscent, Objective, Supervised
from moelora.continual.orthogonality import Hold, Orthogonality, hold, overlap_at_sites
from moelora.continual.training import Training, train_expert, train_router
from moelora.mixture import find_mixture
from moelora.testing import tiny

TEXTS = [
    {
        "input_ids": [10 + n, 20, 30 + n, 40 + n, 50][: 5 - n % 2],
        "labels": [-100, -100, 30 + n, 40 + n, 50][: 5 - n % 2],
    }
    for n in range(6)
]
ARGUMENTS: dict[str, Any] = {"collate": Collate(0), "training": Training(epochs=3, batch_size=4, learning_rate=1e-2)}


def prepared(**config: Any) -> nn.Module:
    """A tiny decoder with a trained expert "old" and a fresh one "new", which is to be trained."""
    model = moelora.patch_model(
        tiny.model("llama", num_hidden_layers=1, **config), num_experts=1, rank=3, router="gated"
    )
    old = moelora.expert_names(model)[0]
    moelora.set_trainable(model, routers=False, experts=[old])
    train_expert(model, old, TEXTS, Supervised(), **ARGUMENTS)
    moelora.add_expert(model, rank=2, name="new")
    moelora.set_trainable(model, routers=False, experts=["new"])
    return model


@pytest.fixture
def model() -> nn.Module:
    """The tiny decoder of `prepared`."""
    return prepared()


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, those outside of the state dict too, as they are now."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: value.detach().clone() for name, value in named}


@final
class Asks(Objective):
    """Runs a function in each step, on the loss that it then returns."""

    def __init__(self, change: Any) -> None:
        self.change, self.steps = change, 0

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        self.steps += 1
        return self.change(Supervised().loss(model, batch, generator), self.steps)


# --- what moves -------------------------------------------------------------------------------------------------------


def test_only_the_expert_changes(model):
    """Its factors move at every site; every other number, flag, gradient and mode is as before, and so is the base."""
    head = model.get_submodule("lm_head")
    assert isinstance(head.weight, nn.Parameter)
    head.weight.requires_grad_(True)  # somebody else's, who trains the head later
    model.get_submodule("model.layers.0.mlp").train()
    before = tensors(model)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    with torch.no_grad(), moelora.disabled(model):
        base = model(**tiny.inputs(model)).logits

    losses = train_expert(model, "new", TEXTS, Supervised(), **ARGUMENTS)

    after = tensors(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.endswith(("A_trainable_RD", "B_trainable_RO"))}
    assert len(moved) == 2 * len(find_mixture(model)[1].layers)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name: module.training for name, module in model.named_modules()} == modes
    with torch.no_grad(), moelora.disabled(model):
        assert torch.equal(model(**tiny.inputs(model)).logits, base)
    assert len(losses) == 3
    assert losses[-1] < losses[0]


def test_the_expert_acts_alone(model):
    """The first loss is the base model's, since a fresh expert adds nothing and the old one is shut."""
    one_batch = Training(epochs=1, batch_size=len(TEXTS))
    with torch.no_grad(), moelora.disabled(model):
        base = model(**Collate(0)(TEXTS)).loss
    with torch.no_grad(), moelora.use_experts(model, moelora.expert_names(model)[0]):
        old = model(**Collate(0)(TEXTS)).loss

    (loss,) = train_expert(model, "new", TEXTS, Supervised(), collate=Collate(0), training=one_batch)

    assert loss == pytest.approx(float(base), rel=1e-5)
    assert loss != pytest.approx(float(old), rel=1e-2)


def test_experts_beside_act_with_it(model):
    """A fresh expert beside the old one begins at the old one's loss, and only the new one is trained."""
    old = moelora.expert_names(model)[0]
    before = tensors(model)
    one_batch = Training(epochs=1, batch_size=len(TEXTS))
    with torch.no_grad(), moelora.use_experts(model, old):
        expected = model(**Collate(0)(TEXTS)).loss

    options: dict[str, Any] = {"collate": Collate(0), "training": one_batch, "beside": [old]}
    (loss,) = train_expert(model, "new", TEXTS, Supervised(), **options)

    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in tensors(model).items() if "trainable" not in name)


def test_only_routers_change():
    """While routers are trained, experts stay bit for bit, and flags are put back."""
    model = moelora.patch_model(tiny.model("llama", num_hidden_layers=1), num_experts=2, rank=2)
    with torch.no_grad():
        for layer in find_mixture(model)[1].layers.values():
            assert layer.bank.B_trainable_RO is not None
            layer.bank.B_trainable_RO.normal_()
    moelora.set_trainable(model, routers=False)
    before = tensors(model)

    losses = train_router(model, TEXTS, Supervised(), **ARGUMENTS)

    moved = {name for name, value in tensors(model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.endswith("router.weight_ED")}
    assert losses[-1] < losses[0]
    assert not any(parameter.requires_grad for parameter in model.parameters() if parameter.ndim == 2)
    with pytest.raises(ValueError, match="this model's routers have nothing to train"):
        train_router(prepared(), TEXTS, Supervised(), **ARGUMENTS)


def test_losses_are_means_over_examples():
    """A small last batch counts by its examples: 4 at a loss of 1 and 2 at a loss of 4 have a mean of 2."""
    model = prepared()
    seen = Asks(lambda loss, step: 0 * loss + (1.0 if step % 2 else 4.0))

    assert train_expert(model, "new", TEXTS, seen, **ARGUMENTS) == [2.0, 2.0, 2.0]
    assert seen.steps == 6


def test_hold_is_obeyed_and_removed(model):
    """With a constraint there is no overlap with the old expert after training, and afterwards no hook is left."""
    old = moelora.expert_names(model)[0]
    held = hold(model, "new", [old], Orthogonality(mode="nullspace"), generator=torch.Generator())

    train_expert(model, "new", TEXTS, Supervised(), **ARGUMENTS, hold=held)

    assert overlap_at_sites(model, "new", [old], "in") < 1e-6
    assert all(not parameter._backward_hooks for parameter in model.parameters())

    # what holds it is the hold
    train_expert(model, "new", TEXTS, Supervised(), **ARGUMENTS)
    assert overlap_at_sites(model, "new", [old], "in") > 1e-6


def test_penalty_is_trained_on_and_not_reported(model):
    """A penalty moves the factors, and the loss that is returned stays the objective's."""
    old = moelora.expert_names(model)[0]
    flat = Asks(lambda loss, step: 0 * loss + 1.0)
    before = overlap_at_sites(model, "new", [old], "in")
    held = hold(model, "new", [old], Orthogonality(mode="penalty"), generator=torch.Generator())

    losses = train_expert(model, "new", TEXTS, flat, **ARGUMENTS, hold=held)

    assert losses == [1.0, 1.0, 1.0]
    assert overlap_at_sites(model, "new", [old], "in") < before / 2


# --- randomness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training_mode", [False, True])
def test_global_random_state_is_untouched(training_mode):
    """Also with dropout, which draws from it; what is drawn depends on the seed alone, not on the state before."""
    results = {}
    for start, seed in [(0, 0), (1, 0), (1, 1)]:
        model = prepared(attention_dropout=0.5).train(training_mode)
        torch.manual_seed(start)
        before = torch.get_rng_state()

        training = Training(epochs=1, batch_size=6, seed=seed)
        results[start, seed] = train_expert(model, "new", TEXTS, Supervised(), collate=Collate(0), training=training)

        assert torch.equal(torch.get_rng_state(), before)
    assert results[0, 0] == results[1, 0]
    # one batch: its order does not matter, and only dropout can make a difference
    assert (results[0, 0] == pytest.approx(results[1, 1], rel=1e-6)) != training_mode


def test_same_seed_same_expert():
    """Bit for bit, and another seed shuffles otherwise."""
    trained = []
    for seed in (0, 0, 1):
        model = prepared()
        training = Training(epochs=2, batch_size=2, seed=seed)
        train_expert(model, "new", TEXTS, Supervised(), collate=Collate(0), training=training)
        trained.append(torch.cat([parameter.flatten() for parameter in model.parameters() if parameter.requires_grad]))

    assert torch.equal(trained[0], trained[1])
    assert not torch.equal(trained[0], trained[2])


# --- schedule ---------------------------------------------------------------------------------------------------------


def test_rate_by_hand():
    """Two of ten steps rise, the second at the full rate; then down by an eighth a step, to an eighth in the last."""
    training = Training(learning_rate=8.0, warmup=0.2)

    assert [training.rate(step, 10) for step in range(10)] == [4.0, 8.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]


@given(st.integers(1, 200), st.floats(0, 1))
def test_rate_rises_once_and_falls_once(steps, warmup):
    """Always positive, the full rate in some step and never above it."""
    training = Training(learning_rate=1.0, warmup=warmup)
    rates = torch.tensor([training.rate(step, steps) for step in range(steps)])

    assert (rates > 0).all()
    assert rates.max() == 1
    signs = rates.diff().sign()
    assert (signs[signs != 0].diff() <= 0).all()


def test_rate_is_that_of_the_steps(model, monkeypatch):
    """The optimiser steps with the rates of the schedule, over all epochs."""
    used = []
    step = torch.optim.AdamW.step

    def stepped(self: torch.optim.AdamW, *args: Any) -> Any:
        used.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)
    train_expert(model, "new", TEXTS, Supervised(), **ARGUMENTS)

    assert used == [ARGUMENTS["training"].rate(number, 6) for number in range(6)]


# --- failure ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def removed(monkeypatch: pytest.MonkeyPatch) -> list[Hold]:
    """The holds that have been removed."""
    seen: list[Hold] = []
    remove = Hold.remove

    def removing(self: Hold) -> None:
        seen.append(self)
        remove(self)

    monkeypatch.setattr(Hold, "remove", removing)
    return seen


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_loss_that_is_not_finite(model, removed, value):
    """The error names the step; the hold is gone, and so are flags and settings of the training."""
    held = Hold()
    bad = Asks(lambda loss, step: loss * value if step == 4 else loss)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    with pytest.raises(ValueError, match=r"in step 4 of the training of 'new' the loss is .* Lower the learning_rate"):
        train_expert(model, "new", TEXTS, bad, **ARGUMENTS, hold=held)

    assert removed == [held]
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert find_mixture(model)[1].tape.settings.fixed is None


def test_gradient_that_is_not_finite(model, removed):
    """A finite loss may have a gradient that is not; in the last step as well no such expert is returned."""
    held = Hold()
    # 0 * inf in the backward pass of a square root at 0
    bad = Asks(lambda loss, step: loss + (loss - loss.detach()).sqrt() if step == 6 else loss)

    with pytest.raises(ValueError, match=r"in step 6 of .* gradient has the length (nan|inf)"):
        train_expert(model, "new", TEXTS, bad, **ARGUMENTS, hold=held)

    assert removed == [held]


def test_penalty_that_is_not_finite(model, removed):
    """What the hold adds is looked at too."""
    held = Hold([lambda: torch.tensor(torch.nan)], 1.0)

    with pytest.raises(ValueError, match="in step 1 of the training of 'new' the loss is nan"):
        train_expert(model, "new", TEXTS, Supervised(), **ARGUMENTS, hold=held)

    assert removed == [held]


def test_what_cannot_be_trained(model, removed):
    """An empty dataset, an expert that is not trainable or not alone, one that is frozen whole, a loss without it."""
    old = moelora.expert_names(model)[0]

    def refused(message: str, name: str = "new", dataset: Any = TEXTS, objective: Any = None) -> None:
        removed.clear()
        with pytest.raises(ValueError, match=message):
            train_expert(model, name, dataset, objective or Supervised(), **ARGUMENTS, hold=Hold())
        assert len(removed) == 1

    refused("the dataset is empty", dataset=[])
    refused("there is no expert 'none'", name="none")
    refused(rf"expected '{old}' to be the only expert that is trained, but that is \['new'\]; call", name=old)
    refused("does not depend on 'new'", objective=Asks(lambda loss, step: loss.detach()))
    moelora.set_trainable(model, routers=False, experts=True)
    refused("expected 'new' to be the only expert")
    moelora.set_trainable(model, routers=False, experts=["new"])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    refused("all factors of expert 'new' are frozen")


def test_gradients_are_clipped(model):
    """At a bound that is next to nothing, Adam's own epsilon keeps the factors where they are."""
    before = tensors(model)
    training = Training(epochs=1, batch_size=6, max_grad_norm=1e-12)

    train_expert(model, "new", TEXTS, GradientAscent(), collate=Collate(0), training=training)

    after = tensors(model)
    for name in (name for name in before if name.endswith(("A_trainable_RD", "B_trainable_RO"))):
        assert (after[name] - before[name]).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs and batch_size must be at least 1, got 0 and 16"),
        ({"batch_size": 0}, "epochs and batch_size must be at least 1, got 10 and 0"),
        ({"learning_rate": 0.0}, "learning_rate and max_grad_norm must be positive"),
        ({"learning_rate": float("nan")}, "learning_rate and max_grad_norm must be positive"),
        ({"weight_decay": -1.0}, "weight_decay not negative"),
        ({"max_grad_norm": 0.0}, "learning_rate and max_grad_norm must be positive"),
        ({"warmup": 1.5}, "warmup is a share of the steps, from 0 to 1; got 1.5"),
    ],
)
def test_training_options(values, message):
    """Options that mean nothing are refused."""
    with pytest.raises(ValueError, match=message):
        Training(**values)
