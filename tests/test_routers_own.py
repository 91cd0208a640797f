"""A router of the user's own: registered, patched, trained, saved, loaded; and the straight-through unit weight."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import moelora
from moelora import Learned, MoELoRAConfig, Routing, register_router
from moelora.config import ROUTERS, resolve_router
from moelora.routers.base import AbstractRouter, RouterConfig
from moelora.tape import Tape
from moelora.testing import tiny
from moelora.testing.router_contract import router_contract


@dataclass(frozen=True, kw_only=True, slots=True)
class Fixed:
    """A learned mixture that is the same for all tokens."""

    start: float = 0.0

    def build(self, in_features: int, available: Sequence[bool], generator: torch.Generator | None) -> "FixedRouter":
        return FixedRouter(self, available)


@final
class FixedRouter(AbstractRouter):
    """One weight for each expert."""

    def __init__(self, config, available):
        super().__init__()
        self.weight_E = nn.Parameter(torch.full((len(available),), config.start))
        self._set_available(available)

    def forward(self, x_TD, tape):
        experts_E = torch.arange(self.num_experts, device=x_TD.device).masked_fill(~self.available_E, -1)
        weights_E = self.weight_E.masked_fill(~self.available_E, 0)
        return Routing(experts_E.expand(x_TD.shape[0], -1), weights_E.expand(x_TD.shape[0], -1))

    def keep_experts(self, order):
        self.weight_E = nn.Parameter(self.weight_E.detach()[list(order)])
        self._set_available([bool(self.available_E[index]) for index in order])

    def add_experts(self, available):
        self.weight_E = nn.Parameter(torch.cat([self.weight_E.detach(), torch.zeros(len(available))]))
        self._set_available([*self.available_E.tolist(), *available])


@pytest.fixture
def registered(monkeypatch):
    """The router has a name, for this test only."""
    monkeypatch.setattr("moelora.config.ROUTERS", dict(ROUTERS))
    register_router("fixed", Fixed)


def patched(**options):
    """A tiny mixture with that router."""
    model = moelora.patch_model(tiny.model("llama"), num_experts=3, rank=2, **options)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".bank." in name or "weight_E" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    return model


def logits(model):
    """What it answers."""
    with torch.no_grad():
        return model(**tiny.inputs(model)).logits


def test_a_router_of_ones_own_keeps_the_contract():
    """The suite that the package ships is for users too."""

    def build(width, available):
        router = Fixed().build(width, available, None)
        nn.init.normal_(router.weight_E)
        return router

    assert isinstance(Fixed(), RouterConfig)
    router_contract(build)


def test_patched_by_name_or_configuration(registered):
    """A name takes the defaults."""
    assert patched(router="fixed")._moelora.config.router == Fixed()
    assert patched(router=Fixed(start=1.0))._moelora.config.router == Fixed(start=1.0)


def test_trained_saved_and_loaded(registered, tmp_path):
    """Options, weights and logits come back, bit for bit."""
    model = patched(router=Fixed(start=0.5)).train()
    inputs = tiny.inputs(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(router.weight_E.grad.any() for router in model._moelora.routers().values())

    moelora.save(model.eval(), tmp_path)
    twin = moelora.load(tiny.model("llama"), tmp_path)

    assert twin._moelora.config.router == Fixed(start=0.5)
    assert torch.equal(logits(twin), logits(model))


def test_experts_come_and_go(registered):
    """The model asks the router to follow."""
    model = patched(router="fixed")
    before = logits(model)
    moelora.add_expert(model, name="new", rank=2)
    torch.testing.assert_close(logits(model), before)
    moelora.remove_expert(model, "new")
    assert torch.equal(logits(model), before)


def test_without_a_name_it_is_not_saved(tmp_path):
    """The message says what to call; nothing is written."""
    model = patched(router=Fixed())
    with pytest.raises(ValueError, match=r"moelora.register_router\(name, Fixed\)"):
        moelora.save(model, tmp_path / "mixture")
    assert not (tmp_path / "mixture" / "moelora_config.json").exists()


def test_without_a_name_it_is_not_loaded(registered, monkeypatch, tmp_path):
    """Whoever loads it has to know the class."""
    moelora.save(patched(router="fixed"), tmp_path)
    monkeypatch.delitem(__import__("moelora.config", fromlist=["ROUTERS"]).ROUTERS, "fixed")
    model = tiny.model("llama")
    with pytest.raises(ValueError, match="unknown router 'fixed'; expected one of"):
        moelora.load(model, tmp_path)
    assert not moelora.is_patched(model)


class NoDataclass:
    """It can build, but cannot be written down."""

    def build(self, in_features, available, generator):
        return FixedRouter(Fixed(), available)


@dataclass(frozen=True)
class NoBuild:
    """It can be written down, but builds nothing."""


def test_what_register_router_refuses(registered):
    """Names that are taken, and classes that are no configuration; a name may be given twice to the same class."""
    register_router("fixed", Fixed)
    with pytest.raises(ValueError, match="there is a router 'learned' already, Learned; choose another name"):
        register_router("learned", Fixed)
    for kind in (NoDataclass, NoBuild, Fixed()):
        with pytest.raises((ValueError, TypeError), match=r"frozen dataclass with a method `build`|kind"):
            register_router("other", kind)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="unknown router 'other'"):
        resolve_router("other", top_k=2)


# --- straight-through unit weights ------------------------------------------------------------------------------------


@given(st.integers(0, 2**31 - 1), st.sampled_from([0.1, 1.0, 2.0]))
def test_a_unit_weight_is_exactly_one_and_learns_as_its_probability(seed, spread):
    """Hard-Routed MoR-LoRA: forward 1 on the best expert, backward the gradient of its softmax probability."""
    generator = torch.Generator().manual_seed(seed)
    x_TD, gain_T = torch.randn(5, 8, generator=generator), torch.randn(5, generator=generator)
    router = Learned(top_k=1, combine="unit", init_std=spread).build(8, [True] * 4, generator)

    routing = router(x_TD, Tape())
    (routing.weights_TK[:, 0] * gain_T).sum().backward()
    found_ED, router.weight_ED.grad = router.weight_ED.grad, None
    probability_TE = (x_TD @ router.weight_ED.T).softmax(-1)
    (probability_TE.amax(-1) * gain_T).sum().backward()

    assert torch.equal(routing.weights_TK, torch.ones(5, 1))
    assert torch.equal(routing.experts_TK[:, 0], probability_TE.argmax(-1))
    torch.testing.assert_close(found_ED, router.weight_ED.grad, rtol=1e-3, atol=1e-5)


def test_a_unit_mixture_is_the_chosen_adapter_at_its_trained_scale():
    """Where a token's expert is known, its projection answers as that adapter alone does, to the bit."""
    model = patched(config=MoELoRAConfig(router=Learned(top_k=1, combine="unit", init_std=0.5)))
    layer = model._moelora.layers["model.layers.0.self_attn.q_proj"]
    x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), moelora.record(model) as recording:
        model(**tiny.inputs(model))
        experts_T = layer.router(x[0], layer.tape).experts_TK[:, 0]
        mixed = layer(x)
        for place, expert in enumerate(experts_T.tolist()):
            with moelora.use_experts(model, f"expert{expert}"):
                torch.testing.assert_close(mixed[0, place], layer(x)[0, place])
    assert len(recording) > 0
    assert len(set(experts_T.tolist())) > 1
