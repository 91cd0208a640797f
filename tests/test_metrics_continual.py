"""The matrix of accuracies, against numbers worked out by hand; what was not measured is never read."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moelora import metrics

NAN = math.nan
LOWER = torch.tensor([[0.9, NAN, NAN], [0.7, 0.8, NAN], [0.8, 0.5, 0.6]])
"""Three tasks, each measured since it was trained on."""

FULL = torch.tensor([[0.9, 0.2, 0.1], [0.7, 0.8, 0.3], [0.8, 0.5, 0.6]])
"""The same, each measured always."""

ALL = {
    "final_accuracy": metrics.final_accuracy,
    "average_accuracy": metrics.average_accuracy,
    "backward_transfer": metrics.backward_transfer,
    "forgetting": metrics.forgetting,
    "forgetting_since_trained": metrics.forgetting_since_trained,
    "forward_transfer": lambda a: metrics.forward_transfer(a, torch.zeros(len(a))),
    "persistence_loss": metrics.persistence_loss,
}

NEEDED = {
    "final_accuracy": [[0, 0, 0], [0, 0, 0], [1, 1, 1]],
    "average_accuracy": [[1, 0, 0], [1, 1, 0], [1, 1, 1]],
    "backward_transfer": [[1, 0, 0], [0, 1, 0], [1, 1, 1]],
    "forgetting": [[1, 1, 0], [1, 1, 0], [1, 1, 0]],
    "forgetting_since_trained": [[1, 0, 0], [1, 1, 0], [1, 1, 0]],
    "forward_transfer": [[0, 1, 0], [0, 0, 1], [0, 0, 0]],
    "persistence_loss": [[1, 0, 0], [0, 1, 0], [1, 1, 1]],
}
"""Which entries of three by three each of them needs."""


def test_values_by_hand():
    """Last row; means of rows so far; last row less diagonal; best earlier less last; above the diagonal less b."""
    assert metrics.final_accuracy(LOWER) == pytest.approx(1.9 / 3)
    assert metrics.average_accuracy(LOWER) == pytest.approx((0.9 + 0.75 + 1.9 / 3) / 3)
    assert metrics.backward_transfer(LOWER) == pytest.approx((-0.1 - 0.3) / 2)
    assert metrics.forgetting(FULL) == pytest.approx((0.1 + 0.3) / 2)
    assert metrics.forward_transfer(FULL, torch.tensor([NAN, 0.25, 0.2])) == pytest.approx((-0.05 + 0.1) / 2)


def test_forgetting_counts_every_earlier_moment():
    """Task 1 was best before it was trained on: that counts in `forgetting`, not since it was trained on."""
    early = FULL.clone()
    early[0, 1] = 1.0

    assert metrics.forgetting(early) == pytest.approx((0.1 + 0.5) / 2)
    assert metrics.forgetting_since_trained(early) == pytest.approx((0.1 + 0.3) / 2)


def test_forgetting_is_negative_where_later_tasks_help():
    """The maximum excludes the last moment."""
    helped = torch.tensor([[0.4, 0.0], [0.7, 0.9]])

    assert metrics.forgetting(helped) == pytest.approx(-0.3)
    assert metrics.backward_transfer(helped) == pytest.approx(0.3)


def test_persistence_loss_by_hand():
    """Request 0 comes back from 0.25 to 0.6, request 1 stays gone."""
    residual = torch.tensor([[0.25, NAN, NAN], [0.4, 0.2, NAN], [0.6, 0.2, 0.3]])

    assert metrics.persistence_loss(residual) == pytest.approx(0.35 / 2)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("missing", [NAN, math.inf])
def test_what_is_needed_is_needed_and_nothing_else(name, missing):
    """Entry by entry: a missing one that the formula names is an error, and any other changes nothing."""
    expected = ALL[name](FULL)
    for moment in range(3):
        for task in range(3):
            holed = FULL.clone()
            holed[moment, task] = missing
            if NEEDED[name][moment][task]:
                with pytest.raises(
                    ValueError, match=rf"{name} needs .* of which 1 are NaN .* \[\[{moment}, {task}\]\]"
                ):
                    ALL[name](holed)
            else:
                assert ALL[name](holed) == expected


def test_forward_transfer_needs_the_untouched_model():
    """On every task but the first."""
    with pytest.raises(ValueError, match="untouched model's accuracy"):
        metrics.forward_transfer(FULL, torch.tensor([0.1, 0.2, NAN]))


@pytest.mark.parametrize("name", [name for name in ALL if "accuracy" not in name])
def test_one_task_cannot_transfer(name):
    """There is no pair of moments."""
    with pytest.raises(ValueError, match=f"{name} compares moments, so it needs two tasks or more, got 1"):
        ALL[name](torch.ones(1, 1))


def test_one_task_or_none():
    """One task has an accuracy; none has not."""
    assert metrics.final_accuracy(torch.full((1, 1), 0.25)) == 0.25
    assert metrics.average_accuracy(torch.full((1, 1), 0.25)) == 0.25
    with pytest.raises(ValueError, match="expects a square matrix"):
        metrics.final_accuracy(torch.zeros(0, 0))


@given(st.integers(2, 6), st.integers(0, 999), st.floats(-1, 1))
def test_a_shift_of_all_accuracies_shifts_means_and_no_difference(tasks, seed, shift):
    """And BWT is never above minus the forgetting since training, which compares with the best and not the first."""
    matrix = torch.rand(tasks, tasks, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for name in ("final_accuracy", "average_accuracy"):
        assert ALL[name](matrix + shift) == pytest.approx(ALL[name](matrix) + shift, abs=1e-12)
    for name in ("backward_transfer", "forgetting", "forgetting_since_trained", "persistence_loss"):
        assert ALL[name](matrix + shift) == pytest.approx(ALL[name](matrix), abs=1e-12)
    assert metrics.forgetting(matrix) >= metrics.forgetting_since_trained(matrix) - 1e-12
    assert metrics.forgetting_since_trained(matrix) >= -metrics.backward_transfer(matrix) - 1e-12
