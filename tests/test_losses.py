"""Losses on routings: values worked out by hand, gradients, padding, and the same scale for every E and K."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moelora import losses
from moelora.aux_losses import loss_of, weigh
from moelora.config import AuxLosses
from moelora.routing import Routing, dense_weights
from moelora.tape import Record

LN2 = math.log(2)


def test_load_balance_by_hand():
    """Two experts, three tokens: f = (2/3, 1/3), P = (0.6, 0.4), so 2 * (0.4 + 0.4/3)."""
    logits_TE = torch.tensor([[0.7, 0.3], [0.8, 0.2], [0.3, 0.7]]).log()
    experts_TK = torch.tensor([[0], [0], [1]])

    value = losses.load_balance(logits_TE, experts_TK)

    torch.testing.assert_close(value, torch.tensor(2 * (2 / 3 * 0.6 + 1 / 3 * 0.4)))


def test_importance_by_hand():
    """Summed weights 3 and 1: mean 2, variance 1, squared CV 1/4."""
    weights_TE = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])

    torch.testing.assert_close(losses.importance(weights_TE), torch.tensor(0.25))


def test_z_loss_by_hand():
    """logsumexp(0, 0) = ln 2 and logsumexp(ln 3, 0) = ln 4."""
    logits_TE = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])

    torch.testing.assert_close(losses.z_loss(logits_TE), torch.tensor((LN2**2 + (2 * LN2) ** 2) / 2))


def test_mutual_information_by_hand():
    """Sure and balanced: -1. Undecided: 0. Sure of one expert only: 0."""
    sure = torch.tensor([[40.0, 0.0], [0.0, 40.0]])
    undecided = torch.zeros(2, 2)
    collapsed = torch.tensor([[40.0, 0.0], [40.0, 0.0]])

    torch.testing.assert_close(losses.mutual_information(sure), torch.tensor(-1.0))
    torch.testing.assert_close(losses.mutual_information(undecided), torch.tensor(0.0))
    torch.testing.assert_close(losses.mutual_information(collapsed), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_uniform_cross_entropy_by_hand():
    """Mean gate (3/4, 1/4): -(ln 3/4 + ln 1/4) / 2 - ln 2; 0 at balance."""
    logits_TE = torch.tensor([[0.75, 0.25]]).log()

    value = losses.uniform_cross_entropy(logits_TE)

    torch.testing.assert_close(value, torch.tensor(-(math.log(0.75) + math.log(0.25)) / 2 - LN2))
    torch.testing.assert_close(losses.uniform_cross_entropy(torch.zeros(3, 5)), torch.tensor(0.0))


@given(st.integers(2, 9), st.data())
def test_perfect_balance_is_the_same_number_for_every_e_and_k(num_experts, data):
    """1 for load_balance, 0 for the others."""
    top_k = data.draw(st.integers(1, num_experts))
    logits_TE = torch.zeros(num_experts, num_experts)
    experts_TK = (torch.arange(num_experts)[:, None] + torch.arange(top_k)) % num_experts
    routing = Routing(experts_TK, torch.full(experts_TK.shape, 1 / top_k), logits_TE)

    torch.testing.assert_close(losses.load_balance(logits_TE, experts_TK), torch.tensor(1.0))
    torch.testing.assert_close(losses.importance(dense_weights(routing, num_experts)), torch.tensor(0.0))
    torch.testing.assert_close(losses.uniform_cross_entropy(logits_TE), torch.tensor(0.0), atol=1e-6, rtol=0)


ALL = {
    "load_balance": lambda logits_TE, valid_T: losses.load_balance(logits_TE, logits_TE.topk(2).indices, valid_T),
    "importance": lambda logits_TE, valid_T: losses.importance(logits_TE.softmax(-1), valid_T),
    "z_loss": losses.z_loss,
    "mutual_information": losses.mutual_information,
    "uniform_cross_entropy": losses.uniform_cross_entropy,
}


@pytest.mark.parametrize("name", ALL)
@given(seed=st.integers(0, 1000), padding=st.integers(0, 4))
def test_padding_changes_nothing(name, seed, padding):
    """Whatever stands in padding, NaN too, the value and the gradient are those without it."""
    logits_TE = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)).double().requires_grad_()
    junk_TE = torch.full((padding, 4), torch.nan, dtype=torch.float64)
    if name == "load_balance":
        junk_TE = torch.full((padding, 4), 50.0, dtype=torch.float64)
    valid_T = torch.tensor([True] * 6 + [False] * padding)

    padded = ALL[name](torch.cat([logits_TE, junk_TE]), valid_T)
    (grad_padded,) = torch.autograd.grad(padded, logits_TE)
    plain = ALL[name](logits_TE, None)
    (grad_plain,) = torch.autograd.grad(plain, logits_TE)

    torch.testing.assert_close(padded, plain)
    torch.testing.assert_close(grad_padded, grad_plain)


@pytest.mark.parametrize("name", ALL)
def test_gradients_are_derivatives(name):
    """Against finite differences, in fp64; f of the balance loss carries no gradient, so it is held fixed."""
    logits_TE = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    experts_TK = logits_TE.detach().topk(2).indices
    if name == "load_balance":
        assert torch.autograd.gradcheck(lambda z: losses.load_balance(z, experts_TK), logits_TE)
    else:
        assert torch.autograd.gradcheck(lambda z: ALL[name](z, None), logits_TE)


@pytest.mark.parametrize("name", ALL)
def test_an_expert_that_cannot_be_chosen_does_not_count(name):
    """A column of -inf is as good as no column, with a finite gradient."""
    logits_TE = torch.randn(6, 4, dtype=torch.float64)
    wide_TE = torch.cat([logits_TE, torch.full((6, 1), -torch.inf, dtype=torch.float64)], 1).requires_grad_()
    if name == "importance":
        available_E = torch.tensor([True] * 4 + [False])
        value = losses.importance(wide_TE.softmax(-1), None, available_E)
    else:
        value = ALL[name](wide_TE, None)
    value.backward()

    torch.testing.assert_close(value.detach(), ALL[name](logits_TE, None))
    assert wide_TE.grad is not None
    assert torch.isfinite(wide_TE.grad[:, :4]).all()


@pytest.mark.parametrize("name", ["load_balance", "mutual_information", "uniform_cross_entropy"])
def test_one_expert_alone_is_no_imbalance(name):
    """With E = 1 there is nothing to balance."""
    logits_TE = torch.randn(3, 1)
    value = losses.load_balance(logits_TE, torch.zeros(3, 1, dtype=torch.long)) if name == "load_balance" else None
    value = ALL[name](logits_TE, None) if value is None else value
    assert value == 0


def test_losses_are_averaged_over_routers_not_pooled():
    """Two routers that each collapse onto another expert are as bad as they are, though balanced together."""
    logits_TE = torch.zeros(4, 2)
    first = Routing(torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1), logits_TE + torch.tensor([30.0, 0.0]))
    second = Routing(torch.ones(4, 1, dtype=torch.long), torch.ones(4, 1), logits_TE + torch.tensor([0.0, 30.0]))
    records = {"one": [Record(first, None)], "two": [Record(second, None)]}

    value = weigh(records, AuxLosses(load_balance=1.0))

    torch.testing.assert_close(value, torch.tensor(2.0))


def test_a_shared_router_counts_once():
    """q, k and v with one router are one answer, not three."""
    shared = Routing(torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1), torch.tensor([[30.0, 0.0]] * 4))
    other = Routing(torch.arange(4)[:, None] % 2, torch.ones(4, 1), torch.zeros(4, 2))
    records = {name: [Record(shared, None, repeated=name != "q")] for name in "qkv"} | {"o": [Record(other, None)]}

    torch.testing.assert_close(weigh(records, AuxLosses(load_balance=1.0)), torch.tensor(1.5))


def test_weights_weigh():
    """Each loss counts as often as its weight says."""
    routing = Routing(torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1), torch.randn(4, 3))
    assert routing.logits_TE is not None
    expected = 0.5 * losses.z_loss(routing.logits_TE) + 2 * losses.mutual_information(routing.logits_TE)

    value = loss_of(Record(routing, None), AuxLosses(load_balance=0.0, z_loss=0.5, mutual_information=2.0))

    torch.testing.assert_close(value, expected)
