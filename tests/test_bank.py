"""A bank keeps its experts, bit for bit, whatever is added, dropped, frozen or cast."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moelora.bank import Expert, ExpertBank, absent_expert, fresh_expert
from moelora.testing.strategies import experts

D, O = 5, 7


def _stack(some, trainable=(), dtype=torch.float32):
    return ExpertBank.stack(some, in_features=D, out_features=O, trainable=trainable, dtype=dtype)


def _assert_same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one.A_RD, other.A_RD)
        assert torch.equal(one.B_RO, other.B_RO)
        assert one.scale == other.scale
        assert (one.bias_O is None) == (other.bias_O is None)
        assert one.bias_O is None or torch.equal(one.bias_O, other.bias_O)


@given(experts(D, O), st.sets(st.integers(0, 4)))
def test_split_is_the_inverse_of_stack(some, trainable):
    """Frozen and trainable experts of any rank come back as they went in."""
    _assert_same(_stack(some, trainable & set(range(len(some)))).split(), some)


@given(experts(D, O), experts(D, O, max_size=1), st.booleans())
def test_dropping_what_was_added_changes_nothing(some, extra, trainable):
    """add and drop are inverses, and drop takes the right one."""
    bank = _stack(some)
    bank.add(extra[0], trainable=trainable)
    _assert_same(bank.split(), [*some, extra[0]])

    bank.drop(len(some))

    _assert_same(bank.split(), some)


@given(experts(D, O, min_size=2), st.data())
def test_drop_keeps_the_others_in_order(some, data):
    """Those behind a dropped expert move up."""
    index = data.draw(st.integers(0, len(some) - 1))
    trainable = data.draw(st.sets(st.integers(0, len(some) - 1)))
    bank = _stack(some, trainable)

    bank.drop(index)

    _assert_same(bank.split(), [expert for place, expert in enumerate(some) if place != index])


@given(experts(D, O), st.data())
def test_freezing_moves_rows_and_keeps_ids(some, data):
    """What an expert knows does not depend on whether it is trained."""
    bank = _stack(some)
    for _ in range(3):
        wanted = data.draw(st.sets(st.integers(0, len(some) - 1)))
        bank.set_trainable(wanted)
        _assert_same(bank.split(), some)
        assert bank.trainable == tuple(index in wanted and some[index].rank > 0 for index in range(len(some)))


@given(experts(D, O), st.data())
def test_factors_name_the_owner_of_each_row(some, data):
    """The kernels' view of a bank and the experts themselves are one and the same."""
    trainable = data.draw(st.sets(st.integers(0, len(some) - 1)))
    factors = _stack(some, trainable).factors()

    for index, expert in enumerate(some):
        own = factors.owner_R == index
        assert torch.equal(factors.A_RD[own], expert.A_RD)
        assert torch.equal(factors.B_RO[own], expert.B_RO)
        rows = factors.rows_FP[index][factors.fill_FP[index] != 0]
        assert torch.equal(factors.A_RD[rows], expert.A_RD)
        assert factors.scale_E[index] == torch.tensor(expert.scale)
        if expert.bias_O is not None and factors.bias_EO is not None:
            assert torch.equal(factors.bias_EO[index], expert.bias_O)
    assert not factors.fill_FP[-1].any()


def test_frozen_rows_are_buffers_and_trainable_rows_parameters():
    """Only what is trained is a parameter; an optimiser never sees the rest."""
    one, two = fresh_expert(D, O, 2, scale=1.0), fresh_expert(D, O, 3, scale=2.0)
    bank = _stack([one, two], trainable={1})

    assert [name for name, _ in bank.named_parameters()] == ["A_trainable_RD", "B_trainable_RO"]
    assert bank.A_trainable_RD is not None
    assert bank.A_trainable_RD.shape == (3, D)
    assert bank.A_frozen_RD.shape == (2, D)


def test_a_cast_leaves_scales_exact():
    """`.to(bfloat16)` casts rows; a scale of 16/7 is still 16/7."""
    bank = _stack([Expert(torch.ones(2, D), torch.ones(2, O), 16 / 7)]).to(torch.bfloat16)

    factors = bank.factors()

    assert factors.A_RD.dtype == torch.bfloat16
    assert factors.scale_E.dtype == torch.float32
    assert torch.equal(factors.scale_E, torch.tensor([16 / 7]))
    assert torch.equal(factors.fill_FP[0], torch.full((2,), 16 / 7))


def test_state_dict_round_trip():
    """A bank's state dict holds all rows and nothing that depends on their order in memory."""
    some = [fresh_expert(D, O, rank, scale=1.0) for rank in (2, 3)]
    bank, other = _stack(some, {1}), _stack([Expert(e.A_RD * 0, e.B_RO, e.scale) for e in some], {1})

    other.load_state_dict(bank.state_dict())

    _assert_same(other.split(), some)


@pytest.mark.parametrize(
    "expert",
    [
        Expert(torch.zeros(2, D + 1), torch.zeros(2, O)),
        Expert(torch.zeros(2, D), torch.zeros(2, O + 1)),
        Expert(torch.zeros(2, D), torch.zeros(3, O)),
        Expert(torch.zeros(2, D), torch.zeros(2, O), float("nan")),
    ],
)
def test_an_expert_that_does_not_fit_is_refused(expert):
    """A wrong width, unequal ranks or a broken scale raise before anything changes."""
    some = [fresh_expert(D, O, 2, scale=1.0)]
    bank = _stack(some)

    with pytest.raises(Exception, match=r"expert|shape|Type-check|scale"):
        bank.add(expert)

    _assert_same(bank.split(), some)


def test_fresh_and_absent_experts_change_nothing():
    """A fresh expert has B = 0, an absent one no rows."""
    assert not fresh_expert(D, O, 3, scale=2.0).delta_OD().any()
    assert absent_expert(D, O).rank == 0
