"""Overlap of row spaces, penalties of two papers, hard constraints, and rows chosen before training."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moelora.bank import Expert, absent_expert
from moelora.continual.basis import FixedBasis, benign_basis, designed_rows
from moelora.continual.covariance import InputCovariance
from moelora.continual.nullspace import NullspaceConstraint
from moelora.continual.orthogonal import expert_overlap, mean_overlap, o3_penalty, o_lora_penalty, overlap
from moelora.continual.subspace import complement, project_rows, row_basis


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cosines(rows_RD: torch.Tensor, basis_SD: torch.Tensor) -> torch.Tensor:
    """Of every row with every row of a basis, in fp64."""
    return nn.functional.normalize(rows_RD.double(), dim=-1) @ basis_SD.double().mT


# --- overlap ----------------------------------------------------------------------------------------------------------


def test_overlap_by_hand():
    """A line at 60 degrees to a plane's axis and out of it: cos^2 = 1/4. A plane that shares one of two axes: 1/2."""
    axis = torch.tensor([[1.0, 0.0, 0.0]])
    line = torch.tensor([[math.cos(math.pi / 3), 0.0, math.sin(math.pi / 3)]])
    plane = torch.tensor([[3.0, 0.0, 0.0], [5.0, 2.0, 0.0]])

    torch.testing.assert_close(overlap(line, axis), torch.tensor(0.25))
    torch.testing.assert_close(overlap(plane, axis), torch.tensor(0.5))
    torch.testing.assert_close(overlap(axis, plane), torch.tensor(1.0))
    torch.testing.assert_close(overlap(torch.tensor([[0.0, 0.0, 7.0]]), plane), torch.tensor(0.0))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31))
def test_overlap_is_of_spaces_not_of_rows(new_rank, old_rank, seed):
    """In [0, 1], and the same however the rows of either side are scaled and mixed."""
    new_RD = gaussian(new_rank, 12, seed=seed, dtype=torch.float64)
    old_SD = gaussian(old_rank, 12, seed=seed + 1, dtype=torch.float64)
    mix_RR = torch.eye(new_rank) + 0.3 * torch.ones(new_rank, new_rank)
    length_S1 = torch.logspace(-6, 6, old_rank)[:, None]

    value = overlap(new_RD, old_SD)

    assert 0 <= value <= 1
    torch.testing.assert_close(overlap(1e-9 * mix_RR.double() @ new_RD, length_S1 * old_SD), value)
    # mean squared cosine of the principal angles
    cosine = torch.linalg.svdvals(torch.linalg.qr(old_SD.T).Q.T @ torch.linalg.qr(new_RD.T).Q)
    torch.testing.assert_close(value, cosine.square().sum() / new_rank)


def test_overlap_gradient_is_right_orthogonal_to_the_rows_and_only_for_the_new_ones():
    """Against finite differences. Scaling or mixing rows changes nothing, so the gradient has no part along them."""
    new_RD = gaussian(3, 7, dtype=torch.float64).requires_grad_()
    old_SD = gaussian(2, 7, seed=1, dtype=torch.float64).requires_grad_()

    (grad_RD,) = torch.autograd.grad(overlap(new_RD, old_SD), new_RD)

    assert torch.autograd.gradcheck(lambda rows: overlap(rows, old_SD.detach()), new_RD)
    torch.testing.assert_close(grad_RD @ new_RD.T, torch.zeros(3, 3, dtype=torch.float64), atol=1e-12, rtol=0)
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(overlap(new_RD, old_SD), old_SD)


@pytest.mark.parametrize(
    ("rows", "rank"),
    [
        ([[1.0, 2.0, 0.5, 1.0], [1.0, 2.0, 0.5, 1.0]], 1),  # the same row twice
        ([[1.0, 2.0, 0.5, 1.0], [0.0, 0.0, 0.0, 0.0]], 1),
        ([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0], [2.0, 3.0, 2.0, 3.0]], 2),
        ([[0.0] * 4] * 2, 0),
    ],
)
def test_dependent_rows_have_the_overlap_of_their_space_and_a_finite_gradient(rows, rank):
    """Divided by the dimension of the space, so 1 where it lies in the old one; the gradient is never NaN."""
    new_RD = torch.tensor(rows, requires_grad=True)

    (grad_RD,) = torch.autograd.grad(overlap(new_RD, gaussian(2, 4)), new_RD)

    assert row_basis(new_RD).shape == (rank, 4)
    torch.testing.assert_close(overlap(new_RD, torch.eye(4)), torch.tensor(float(rank > 0)))
    assert grad_RD.isfinite().all()
    assert grad_RD.any() == (rank > 0)


def test_descent_on_overlap_makes_spaces_orthogonal_without_shrinking_the_rows():
    """From rows near the old ones. A gradient orthogonal to the rows can only lengthen them."""
    old_SD = gaussian(4, 32)
    new_RD = old_SD + 0.5 * gaussian(4, 32, seed=1)
    new_RD.requires_grad_()
    length = new_RD.detach().norm()
    optimizer = torch.optim.SGD([new_RD], lr=10.0)
    start = overlap(new_RD, old_SD).item()
    for _ in range(100):
        optimizer.zero_grad()
        overlap(new_RD, old_SD).backward()
        optimizer.step()

    assert start > 0.5
    assert overlap(new_RD, old_SD) < 1e-3
    assert new_RD.norm() >= length


def test_nothing_overlaps_with_nothing():
    """No old rows, no new rows, no predecessor: 0, with a backward pass."""
    rows_RD = gaussian(2, 4).requires_grad_()
    none_RD = torch.zeros(0, 4, requires_grad=True)

    for value in (overlap(rows_RD, torch.zeros(0, 4)), overlap(none_RD, rows_RD), mean_overlap(rows_RD, [])):
        assert value == 0
        value.backward()
    assert rows_RD.grad is not None
    assert not rows_RD.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_overlap_of_low_precision_rows_is_at_least_fp32(dtype):
    """Rows overlap fully with themselves in every dtype."""
    rows_RD = gaussian(2, 4).to(dtype)

    value = overlap(rows_RD, rows_RD)

    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(value, torch.ones_like(value))


def test_mean_overlap_is_over_all_predecessors():
    """One without rows counts as sharing nothing."""
    new_RD, olds = gaussian(2, 9), [gaussian(rank, 9, seed=rank) for rank in (3, 1, 0)]

    expected = (overlap(new_RD, olds[0]) + overlap(new_RD, olds[1]) + 0) / 3

    torch.testing.assert_close(mean_overlap(new_RD, olds), expected)


def test_expert_overlap_takes_the_side_asked_for():
    """Orthogonal in the inputs, equal in the outputs."""
    B_RO = gaussian(2, 3)
    new, old = Expert(torch.eye(6)[:2], B_RO, 0.1), Expert(torch.eye(6)[2:4], B_RO, 7.0)
    absent = absent_expert(6, 3)

    for side, expected in (("in", 0.0), ("out", 1.0), ("both", 0.5)):
        assert expert_overlap(new, [old], side) == pytest.approx(expected, abs=1e-6)
    assert expert_overlap(new, [old, absent], "both") == pytest.approx(0.25)
    assert expert_overlap(absent, [old], "both") == 0
    with pytest.raises(ValueError, match="unknown side 'input'; expected one of"):
        expert_overlap(new, [old], "input")


# --- penalties --------------------------------------------------------------------------------------------------------


def test_penalties_by_hand():
    """Products (2, -3) with one predecessor, 4 with the other: absolute values sum to 9, squares of the first to 13."""
    new_RD = torch.tensor([[1.0, 1.0]], requires_grad=True)
    first_SD, second_SD = torch.tensor([[2.0, 0.0], [0.0, -3.0]]), torch.tensor([[4.0, 0.0]])

    l1 = o_lora_penalty(new_RD, [first_SD, second_SD])
    squared = o3_penalty(new_RD, first_SD)

    assert (l1.item(), squared.item()) == (9.0, 13.0)
    # sum of sign * old row; 2 * sum of product * old row
    assert torch.autograd.grad(l1, new_RD)[0].tolist() == [[2.0 + 4.0, 3.0]]
    assert torch.autograd.grad(squared, new_RD)[0].tolist() == [[8.0, 18.0]]
    assert o_lora_penalty(new_RD, []) == 0


def test_penalties_send_no_gradient_to_predecessors():
    """Also where these are parameters."""
    new_RD, old_SD = gaussian(2, 4).requires_grad_(), gaussian(3, 4, seed=1).requires_grad_()

    (o_lora_penalty(new_RD, [old_SD]) + o3_penalty(new_RD, old_SD)).backward()

    assert new_RD.grad is not None
    assert old_SD.grad is None


# --- subspaces --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 6), st.integers(0, 2**31))
def test_complement_and_basis_are_an_orthonormal_basis_of_all(rank, seed):
    """For every rank from none to full."""
    basis_SD = row_basis(gaussian(rank, 6, seed=seed))

    whole_DD = torch.cat([basis_SD, complement(basis_SD)])

    torch.testing.assert_close(whole_DD @ whole_DD.T, torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.float64, 1e-13), (torch.bfloat16, 0.02)])
def test_projected_rows_are_orthogonal_to_rounding_even_if_almost_nothing_is_left(dtype, rounding):
    """Rows that lie in the span but for 1e-3: a single pass would leave rounding a thousand times as large."""
    basis_SD = row_basis(gaussian(8, 64)).to(torch.promote_types(dtype, torch.float32))
    rows_RD = (gaussian(4, 8, seed=1).to(basis_SD) @ basis_SD + 1e-3 * gaussian(4, 64, seed=2).to(basis_SD)).to(dtype)

    left_RD = project_rows(rows_RD, basis_SD)

    assert left_RD.dtype == dtype
    assert left_RD.any(-1).all()
    assert cosines(left_RD, basis_SD).abs().max() < rounding


def test_projection_keeps_what_is_orthogonal_and_takes_all_that_is_not():
    """Exactly so along axes; an empty basis takes nothing."""
    basis_SD = torch.eye(4)[:2]

    assert project_rows(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), basis_SD).tolist() == [[0.0, 0.0, 3.0, 4.0]]
    assert project_rows(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.zeros(0, 4)).tolist() == [[1.0, 2.0, 3.0, 4.0]]


@pytest.mark.parametrize("bad", [2 * torch.eye(4)[:2], torch.ones(2, 4) / 2, torch.full((1, 4), torch.nan)])
def test_a_basis_that_is_not_orthonormal_is_refused(bad):
    """Too long, dependent, or NaN."""
    for use in (lambda: project_rows(torch.ones(1, 4), bad), lambda: complement(bad)):
        with pytest.raises(ValueError, match=r"expected a basis of orthonormal rows.*make it with row_basis"):
            use()


# --- constraint -------------------------------------------------------------------------------------------------------

OLD_SD = row_basis(gaussian(6, 40, seed=5))


def trained(optimizer_class, *, attach: bool, steps: int = 50, **options) -> nn.Parameter:
    """A parameter after some steps towards targets, most of which lie in the forbidden span."""
    parameter = nn.Parameter(gaussian(4, 40, seed=6))
    constraint = NullspaceConstraint(parameter, OLD_SD)
    optimizer = optimizer_class([parameter], **options)
    if attach:
        constraint.attach(optimizer)
    inputs_ND = gaussian(16, 6, seed=7) @ OLD_SD.float() + 0.3 * gaussian(16, 40, seed=8)
    for _ in range(steps):
        optimizer.zero_grad()
        (inputs_ND @ parameter.T - 1).square().mean().backward()
        assert parameter.grad is not None
        assert cosines(parameter.grad, OLD_SD).abs().max() < 1e-5
        optimizer.step()
    return parameter


def test_constraint_holds_under_adamw():
    """In fp32, after 50 steps. Not if only start and gradients are projected, as Adam leaves the subspace then."""
    held = trained(torch.optim.AdamW, attach=True, lr=1e-2)
    drifted = trained(torch.optim.AdamW, attach=False, lr=1e-2)

    assert overlap(held, OLD_SD.float()) <= 1e-6
    assert overlap(drifted, OLD_SD.float()) > 1e-4
    # it was trained, not stopped
    assert (held - project_rows(gaussian(4, 40, seed=6), OLD_SD)).norm() > 0.1


def test_constraint_holds_under_sgd_without_projecting_the_parameter():
    """Sums of projected gradients, and weight decay, stay in the subspace."""
    parameter = trained(torch.optim.SGD, attach=False, lr=1e-1, momentum=0.9, weight_decay=1e-2)

    assert overlap(parameter, OLD_SD.float()) <= 1e-6


def test_constraint_removed_leaves_a_free_parameter():
    """A step along the forbidden direction goes all the way."""
    parameter = nn.Parameter(gaussian(2, 40))
    constraint = NullspaceConstraint(parameter, OLD_SD)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    constraint.attach(optimizer)
    held_RD = parameter.detach().clone()
    constraint.remove()

    (-parameter @ OLD_SD[0].float()).sum().backward()
    optimizer.step()

    torch.testing.assert_close(parameter.detach(), held_RD + OLD_SD[0].float())


def test_constraint_refuses_what_it_cannot_hold_and_touches_nothing():
    """Checked before the parameter is projected."""
    parameter = nn.Parameter(torch.cat([gaussian(1, 40), OLD_SD[:1].float()]))
    before_RD = parameter.detach().clone()

    with pytest.raises(ValueError, match=r"rows \[1\] of the parameter lie in the span"):
        NullspaceConstraint(parameter, OLD_SD)
    with pytest.raises(ValueError, match="no direction is left"):
        NullspaceConstraint(parameter, torch.eye(40))
    with pytest.raises(ValueError, match=r"as long as the basis's, 6, got shape \(2, 40\)"):
        NullspaceConstraint(parameter, torch.eye(6)[:2])
    with pytest.raises(ValueError, match="orthonormal"):
        NullspaceConstraint(parameter, 2 * OLD_SD)
    assert torch.equal(parameter, before_RD)
    # the zero rows of a fresh B are free to begin in the complement
    constraint = NullspaceConstraint(nn.Parameter(torch.zeros(2, 40)), OLD_SD)
    with pytest.raises(ValueError, match="does not hold the constrained parameter"):
        constraint.attach(torch.optim.SGD([parameter], lr=1.0))


# --- rows chosen before training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [7, 200])
def test_covariance_in_batches_is_the_inputs_at_once(count):
    """The same basis and the same rows, with fewer inputs than the width and with more."""
    benign_ND, forget_ND = gaussian(count, 24) * torch.logspace(0, -3, 24), gaussian(count, 24, seed=1)
    covariance, forget = InputCovariance(24), InputCovariance(24)
    for batch_ND in benign_ND.split(3):
        covariance.update(batch_ND)
    forget.update(forget_ND)

    basis_SD = benign_basis(benign_ND, 0.9)
    rows_RD = designed_rows(forget_ND, basis_SD, 2)

    assert covariance.count == count
    torch.testing.assert_close(covariance.moment_DD, benign_ND.double().T @ benign_ND.double())
    assert benign_basis(covariance, 0.9).shape == basis_SD.shape
    assert overlap(benign_basis(covariance, 0.9), basis_SD) == pytest.approx(1)
    assert overlap(designed_rows(forget, basis_SD, 2), rows_RD) == pytest.approx(1)


def test_benign_basis_by_hand():
    """Energies 16, 4, 1, 0 along the axes: 76 % in the first, 95 % in two, all in three."""
    inputs_ND = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.0]))

    sizes = [len(benign_basis(inputs_ND, energy)) for energy in (0.5, 0.76, 0.77, 0.95, 0.96, 1.0)]

    assert sizes == [1, 1, 2, 2, 3, 3]
    torch.testing.assert_close(benign_basis(inputs_ND, 0.95).abs(), torch.eye(4, dtype=torch.float64)[:2])


def test_designed_rows_see_the_forget_inputs_and_nothing_benign():
    """Forget inputs strong in a benign direction, weaker outside it: the rows take the strongest of the outside."""
    forget_ND = torch.diag(torch.tensor([9.0, 0.0, 3.0, 2.0, 1.0]))
    benign_SD = torch.eye(5)[:2]

    rows_RD = designed_rows(forget_ND, benign_SD, 2)

    torch.testing.assert_close(rows_RD.abs(), torch.eye(5)[2:4])
    assert (gaussian(10, 2) @ benign_SD @ rows_RD.T).abs().max() < 1e-6


def test_designed_rows_refuse_more_than_there_is():
    """Inputs inside the avoided span leave rounding, which is no direction."""
    benign_SD = row_basis(gaussian(6, 24))
    inside_ND = gaussian(50, 6, seed=1) @ benign_SD.float()

    for inputs in (inside_ND, InputCovariance.of(inside_ND)):
        with pytest.raises(ValueError, match=r"have 0 direction\(s\) outside the avoided subspace of 6, but rank is 2"):
            designed_rows(inputs, benign_SD, 2)
    with pytest.raises(ValueError, match=r"have 3 direction\(s\)"):
        designed_rows(gaussian(3, 24, seed=2), benign_SD, 4)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        designed_rows(inside_ND, benign_SD, 0)


def test_inputs_that_say_nothing_are_refused():
    """NaN, a wrong width, none, no energy asked for; the accumulator stays as it was."""
    spoilt_ND = gaussian(3, 4)
    spoilt_ND[1, 2] = torch.nan
    covariance = InputCovariance(4)

    with pytest.raises(ValueError, match="1 of 3 inputs hold NaN"):
        covariance.update(spoilt_ND)
    with pytest.raises(ValueError, match="1 of 3 inputs hold NaN"):
        benign_basis(spoilt_ND)
    with pytest.raises(ValueError, match="expected inputs of width 4, got 5"):
        covariance.update(torch.ones(1, 5))
    with pytest.raises(ValueError, match="span nothing"):
        benign_basis(covariance)
    with pytest.raises(ValueError, match=r"energy must be in \(0, 1\], got 0"):
        benign_basis(torch.ones(1, 4), 0.0)
    assert covariance.count == 0
    assert not covariance.moment_DD.any()


def test_fixed_basis_hands_out_orthogonal_rows_until_it_is_used_up():
    """And goes on where it stopped."""
    basis = FixedBasis.random(10, generator=torch.Generator().manual_seed(0))

    first_RD, second_RD = basis.take(3), basis.take(4)
    rest = FixedBasis(basis.basis_DD, used=basis.used)

    assert overlap(first_RD, second_RD) < 1e-28
    with pytest.raises(ValueError, match="at most 3 rows, as many as are left of 10, got rank=4"):
        rest.take(4)
    whole_DD = torch.cat([first_RD, second_RD, rest.take(3)])
    torch.testing.assert_close(whole_DD @ whole_DD.T, torch.eye(10, dtype=torch.float64))
    assert rest.left == 0
    with pytest.raises(ValueError, match="rank must be at least 1"):
        rest.take(0)
    with pytest.raises(ValueError, match="used must be between 0 and 10, got 11"):
        FixedBasis(basis.basis_DD, used=11)


def test_rows_taken_are_copies():
    """Training them in place leaves the basis whole."""
    basis = FixedBasis(torch.eye(3))
    basis.take(1).zero_()

    assert torch.equal(basis.basis_DD, torch.eye(3))


def test_least_used_directions_come_first():
    """Energies 1, 9, 4."""
    covariance = InputCovariance.of(torch.diag(torch.tensor([1.0, 3.0, 2.0])))

    rows_RD = FixedBasis.least_used(covariance).take(3)

    torch.testing.assert_close(rows_RD.abs(), torch.eye(3, dtype=torch.float64)[[0, 2, 1]])
