"""Every router keeps the contract."""

import pytest
import torch

from moelora.call_settings import GivenIds, Settings
from moelora.routers.base import AbstractRouter
from moelora.routers.given import Given
from moelora.routers.learned import Learned
from moelora.routing import Routing
from moelora.tape import Tape
from moelora.testing.router_contract import router_contract


@pytest.mark.parametrize(
    ("config", "weight_sum"),
    [
        (Learned(top_k=1, combine="unit"), 1.0),
        (Learned(top_k=1, combine="softmax"), None),
        (Learned(top_k=2), 1.0),
        (Learned(top_k=2, combine="softmax"), None),
        (Learned(top_k=2, combine="constant"), 1.0),
        (Learned(top_k=2, combine="unit"), 2.0),
        (Learned(top_k=99, temperature=0.5), 1.0),
        (Learned(top_k=99, combine="softmax"), 1.0),
        (Learned(top_k=2, balance_bias_speed=1e-3), 1.0),
    ],
    ids=str,
)
def test_learned_router_keeps_the_contract(config, weight_sum):
    """All ways to choose and to weigh."""

    def build(in_features, available):
        # wide scores, so that a rounding of the input cannot change the choice
        router = config.build(in_features, available, None)
        torch.nn.init.normal_(router.weight_ED)
        if router.balance_bias_E is not None:
            router.balance_bias_E.normal_()
        return router

    router_contract(build, weight_sum=weight_sum)


def test_noisy_router_keeps_the_contract_in_evaluation():
    """Noise is for training only."""
    router_contract(
        lambda width, available: Learned(top_k=2, noisy=True, init_std=1.0).build(width, available, None),
        deterministic=False,
        weight_sum=1.0,
    )


def test_given_router_keeps_the_contract():
    """The ids of the tokens are on the tape; experts that have moved have new ids."""
    ids = [0, 2, -1, 1, 2, 0]

    def tape(tokens, order):
        moved = [-1 if ids[token] < 0 else order.index(ids[token]) for token in tokens]
        return Tape(settings=Settings(given=GivenIds(ids=torch.tensor([moved]))))

    router_contract(lambda width, available: Given().build(width, available, None), tape=tape)


class Flawed(AbstractRouter):
    """A sound router with one flaw, chosen by the test."""

    def __init__(self, width, available, flaw):
        super().__init__()
        self.inner = Learned(top_k=2, init_std=1.0).build(width, available, torch.Generator().manual_seed(0))
        self.flaw = flaw
        self._set_available(available)

    def forward(self, x_TD, tape):
        experts_TK, weights_TK, logits_TE, _ = self.inner(x_TD, tape)
        if self.flaw == "duplicates":
            experts_TK = experts_TK[:, :1].expand_as(experts_TK)
        if self.flaw == "remembers":
            self.last = x_TD
        if self.flaw == "batch":
            weights_TK = weights_TK * x_TD.mean()
        if self.flaw == "nan":
            weights_TK = weights_TK * torch.nan
        if self.flaw == "unavailable":
            experts_TK = torch.where(self.available_E[experts_TK], (~self.available_E).to(torch.uint8).argmax(), 0)
            experts_TK[:, 1:] = -1
            weights_TK = weights_TK * (experts_TK >= 0)
        if self.flaw == "precision":
            weights_TK = weights_TK.double()
        return Routing(experts_TK, weights_TK, logits_TE)

    def keep_experts(self, order):
        if self.flaw != "order":
            self.inner.keep_experts(order)
        self._set_available([bool(self.available_E[index]) for index in order])

    def add_experts(self, available):
        self.inner.add_experts(available)
        self._set_available([*self.available_E.tolist(), *available])


def test_the_sound_part_of_a_flawed_router_is_sound():
    """What the next test finds is the flaw and nothing else."""
    router_contract(lambda width, available: Flawed(width, available, None))


@pytest.mark.parametrize("flaw", ["duplicates", "remembers", "batch", "nan", "unavailable", "precision", "order"])
def test_the_contract_finds_a_flaw(flaw):
    """A contract that nothing can break says nothing."""
    with pytest.raises((AssertionError, RuntimeError)):
        router_contract(lambda width, available: Flawed(width, available, flaw))
