"""C-LoRA, CoDyRA, GainLoRA, InfLoRA and SD-LoRA: values by hand, gradients, and what each promises to leave alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moelora.bank import Expert, ExpertBank, fresh_expert
from moelora.continual.c_lora import CLoRA, overlap_penalty, routing_basis
from moelora.continual.codyra import CoDyRA, shrink_and_cut, soft_threshold, threshold
from moelora.continual.covariance import InputCovariance
from moelora.continual.gain_lora import GainGate, GateConstraint, GateMemory, gain, mean_embedding
from moelora.continual.inf_lora import InfLoRA, InputMemory, extended_basis
from moelora.continual.sd_lora import (
    Magnitudes,
    fit_direction,
    frobenius_norm,
    rank_of_task,
    unit_direction,
)
from moelora.continual.subspace import check_orthonormal, project_rows

FEW = settings(max_examples=15)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def generator(seed: int = 0) -> torch.Generator:
    """A seeded one."""
    return torch.Generator().manual_seed(seed)


def in_span(count: int, basis_SD: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Random inputs in the span of some rows, fp32."""
    return (gaussian(count, len(basis_SD), seed=seed, dtype=torch.float64) @ basis_SD.double()).float()


def exact_change(expert: Expert, x: torch.Tensor) -> torch.Tensor:
    """What an expert adds, in fp64."""
    return x.double() @ expert.delta_OD().T


def trained(module: torch.nn.Module, x: torch.Tensor, steps: int = 20, after=lambda: None) -> None:
    """A few steps of AdamW with weight decay towards random outputs."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05, weight_decay=0.1)
    target = gaussian(*module(x).shape, seed=99)
    for _ in range(steps):
        optimizer.zero_grad()
        (module(x) - target).square().mean().backward()
        optimizer.step()
        after()


# --- C-LoRA -----------------------------------------------------------------------------------------------------------


def c_lora(rank: int = 3, dtype: torch.dtype = torch.float32) -> CLoRA:
    """With both routing matrices random."""
    module = CLoRA(gaussian(rank, 5, dtype=dtype), gaussian(rank, 4, seed=1, dtype=dtype), scale=0.5)
    module.old_RR.copy_(gaussian(rank, rank, seed=2))
    module.new_RR.data.copy_(gaussian(rank, rank, seed=3))
    return module


def test_c_lora_by_hand():
    """x = (1, 2) is A x; R sends its second entry to the first row of B, twice; the scale halves it."""
    module = CLoRA(torch.eye(2), torch.tensor([[1.0, 0.0, 3.0], [0.0, 1.0, 0.0]]), scale=0.5)
    module.new_RR.data[0, 1] = 2.0

    torch.testing.assert_close(module(torch.tensor([1.0, 2.0])), torch.tensor([2.0, 0.0, 6.0]))


def test_c_lora_changes_nothing_at_first_and_learns():
    """R_new = 0: no change, yet a gradient for it."""
    module = CLoRA(gaussian(3, 5), gaussian(3, 4, seed=1))
    out = module(gaussian(2, 5, seed=2))
    out.sum().backward()

    assert not out.any()
    assert module.new_RR.grad is not None
    assert module.new_RR.grad.abs().min() > 0


def test_c_lora_factors_learn_through_the_new_routing_only_and_inputs_through_both():
    """The factors' gradient is that of a module without R_old; the input's is that of the whole change."""
    module, x = c_lora(dtype=torch.float64), gaussian(6, 5, seed=4, dtype=torch.float64).requires_grad_()
    seen = gaussian(6, 4, seed=5, dtype=torch.float64)
    A, B, new = (p.detach().clone().requires_grad_() for p in (module.A_RD, module.B_RO, module.new_RR))

    got = torch.autograd.grad((module(x) * seen).sum(), [module.A_RD, module.B_RO, module.new_RR, x])
    of_new = torch.autograd.grad((0.5 * (x.detach() @ A.T @ new.T @ B) * seen).sum(), [A, B, new])

    for ours, expected in zip(got, of_new, strict=False):
        torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(got[3], seen @ module.as_expert().delta_OD())


def test_c_lora_gradient_of_factors_shrinks_or_grows_with_the_sign_of_the_old_term():
    """Against one that is not stopped: R_old = 2 R_new makes it a third, R_old = -2 R_new turns it round."""
    for old, factor in ((2.0, 3.0), (-2.0, -1.0)):
        module, x = c_lora(), gaussian(6, 5, seed=4)
        module.old_RR.copy_(old * module.new_RR.detach())
        (stopped,) = torch.autograd.grad(module(x).sum(), module.A_RD)
        whole = CLoRA(module.A_RD, module.B_RO, scale=0.5)
        whole.new_RR.data.copy_(module.old_RR + module.new_RR)
        (free,) = torch.autograd.grad(whole(x).sum(), whole.A_RD)

        torch.testing.assert_close(free, factor * stopped)


def test_c_lora_absorbs_a_task_without_a_change_and_is_an_exact_expert():
    """What it adds is the same before and after, and the expert's."""
    module, x = c_lora(), gaussian(6, 5, seed=4)
    before, expert = module(x), module.as_expert()

    module.absorb()

    assert not module.new_RR.any()
    torch.testing.assert_close(module(x), before)
    torch.testing.assert_close(exact_change(expert, x).float(), before)
    torch.testing.assert_close(exact_change(module.as_expert(), x), exact_change(expert, x), atol=1e-6, rtol=1e-6)
    assert expert.rank == 3


def test_c_lora_with_frozen_factors_keeps_the_old_term_bit_for_bit():
    """As after an unlearning request: R_new is trained, and without it the module is what it was."""
    module, x = c_lora(), gaussian(6, 5, seed=4)
    module.absorb()
    before = module(x)
    module.requires_grad_(False)
    module.new_RR.requires_grad_()
    optimizer = torch.optim.AdamW([module.new_RR], lr=0.1)
    for _ in range(3):
        module(x).square().sum().backward()
        optimizer.step()

    assert module.new_RR.any()
    module.new_RR.data.zero_()
    assert torch.equal(module(x), before)


def test_c_lora_basis_and_penalty_by_hand():
    """Singular values 10 and 1 along e_2 and e_1: the first holds 100 / 101 > 0.99 of the energy. R_new = ones."""
    old_RR = torch.zeros(3, 3)
    old_RR[1, 0], old_RR[0, 2] = 10.0, 1.0

    basis_SR = routing_basis(old_RR)

    torch.testing.assert_close(basis_SR.abs().float(), torch.tensor([[0.0, 1.0, 0.0]]))
    torch.testing.assert_close(overlap_penalty(torch.ones(3, 3), basis_SR), torch.tensor(3.0))
    torch.testing.assert_close(overlap_penalty(torch.ones(3, 3), routing_basis(old_RR, 0.995)), torch.tensor(6.0))
    assert overlap_penalty(torch.ones(3, 3), routing_basis(torch.zeros(3, 3))) == 0


def test_c_lora_penalty_drives_new_away_from_what_old_writes_to():
    """Its gradient is 2 U U^T R_new, so a step of 1/2 takes the overlap away and nothing else."""
    old_RR = gaussian(4, 1, dtype=torch.float64) @ gaussian(1, 4, seed=1, dtype=torch.float64)
    new_RR = gaussian(4, 4, seed=2, dtype=torch.float64).requires_grad_()
    (grad_RR,) = torch.autograd.grad(overlap_penalty(new_RR, routing_basis(old_RR)), new_RR)
    stepped_RR = (new_RR - grad_RR / 2).detach()

    torch.testing.assert_close(old_RR.T @ stepped_RR, torch.zeros(4, 4, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(overlap_penalty(grad_RR / 2, routing_basis(old_RR)), (grad_RR / 2).square().sum())


def test_c_lora_errors():
    """Ranks that differ, a dead start, an energy out of range."""
    with pytest.raises(ValueError, match="3 rows of A and 2 of B"):
        CLoRA(gaussian(3, 5), gaussian(2, 4))
    with pytest.raises(ValueError, match="B is all zero"):
        CLoRA(gaussian(3, 5), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="energy must be in"):
        routing_basis(torch.zeros(3, 3), 1.5)


# --- CoDyRA -----------------------------------------------------------------------------------------------------------


def test_thresholds_by_hand():
    """kappa = 1: the paper's cuts up to 1, the code's below 2."""
    weight_R = torch.tensor([-3.0, -2.0, -1.5, -1.0, 0.0, 0.5, 1.5, 2.0, 3.0])

    assert soft_threshold(weight_R, 1.0).tolist() == [-2.0, -1.0, -0.5, 0.0, 0.0, 0.0, 0.5, 1.0, 2.0]
    assert shrink_and_cut(weight_R, 1.0).tolist() == [-2.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 2.0]


@FEW
@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=6), st.floats(0, 1))
def test_soft_threshold_is_the_proximal_step_of_the_l1_norm(values, kappa):
    """No other point has a smaller (v - w)^2 / 2 + kappa |v|. Without a threshold both leave all as it is."""
    weight_R = torch.tensor(values, dtype=torch.float64)
    shrunk_R = soft_threshold(weight_R, kappa)

    def cost(v: torch.Tensor) -> torch.Tensor:
        return (v - weight_R).square() / 2 + kappa * v.abs()

    for other in torch.linspace(-2, 2, 41, dtype=torch.float64):
        assert (cost(shrunk_R) <= cost(other.expand_as(weight_R)) + 1e-12).all()
    assert torch.equal(soft_threshold(weight_R, 0.0), weight_R)
    assert torch.equal(shrink_and_cut(weight_R, 0.0), weight_R)


def test_threshold_rises_in_fifty_stairs_over_the_second_half():
    """1000 steps: zero for 500, then 50 stairs of 10 steps, the last at 7e-4."""
    kappas = [threshold(step, 1000) for step in range(1000)]

    assert set(kappas[:510]) == {0.0}
    assert kappas[510] == pytest.approx(7e-4 / 49)
    assert kappas[-1] == 7e-4
    assert len(set(kappas)) == 50
    assert all(kappas[i] == kappas[i - i % 10] for i in range(500, 1000))
    rises = [later - sooner for sooner, later in zip(kappas[500::10], kappas[510::10], strict=False)]
    assert rises == pytest.approx([7e-4 / 49] * 49)
    assert threshold(0, 1) == 0.0


def test_codyra_is_a_weighted_expert_and_starts_without_a_change():
    """diag(w) between the factors, by hand; a fresh one adds nothing, and its B gets a gradient."""
    module = CoDyRA(torch.eye(2), torch.tensor([[1.0, 1.0], [0.0, 5.0]]), torch.tensor([3.0, -1.0]), scale=2.0)
    torch.testing.assert_close(module(torch.tensor([[1.0, 2.0]])), torch.tensor([[6.0, -14.0]]))

    fresh = CoDyRA.fresh(6, 4, generator=generator())
    out = fresh(gaussian(3, 6))
    out.sum().backward()
    assert not out.any()
    assert fresh.B_RO.grad is not None
    assert fresh.B_RO.grad.any()
    assert len(fresh.weight_R) == 16


def test_codyra_prunes_to_experts_of_unequal_rank_that_add_the_same():
    """Rows 1 and 3 of 4 are left; a bank takes it beside one of rank 0 and one of rank 4."""
    x = gaussian(5, 6, seed=9)
    module = CoDyRA(gaussian(4, 6), gaussian(4, 3, seed=1), torch.tensor([1e-3, -2.0, 0.0, 0.5]), scale=2.0)
    whole = module.prune()
    module.shrink_(0.1)
    part = module.prune()
    out = module(x)
    module.shrink_(10.0)

    assert (whole.rank, part.rank, module.prune().rank) == (3, 2, 0)
    assert torch.equal(part.A_RD, module.A_RD[[1, 3]])
    torch.testing.assert_close(exact_change(part, x).float(), out)
    bank = ExpertBank.stack([whole, part, module.prune()], in_features=6, out_features=3)
    assert bank.ranks == (3, 2, 0)


def test_codyra_trained_with_shrinkage_loses_rows_that_it_does_not_need():
    """The target has rank 1 and starts with four rows; shrinking after each step leaves fewer, and the fit holds."""
    x, wanted_OD = gaussian(64, 6), gaussian(3, 1) @ gaussian(1, 6, seed=1)
    module = CoDyRA.fresh(6, 3, rank=4, generator=generator(3))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    for step in range(400):
        optimizer.zero_grad()
        (module(x) - x @ wanted_OD.T).square().mean().backward()
        optimizer.step()
        module.shrink_(threshold(step, 400, final=0.03))

    assert 1 <= module.prune().rank < 4
    missed = (module(x) - x @ wanted_OD.T).square().mean() / (x @ wanted_OD.T).square().mean()
    assert missed < 0.1


def test_codyra_errors():
    """Rows that do not match, thresholds and steps out of range."""
    with pytest.raises(ValueError, match="got 2, 2 and 3"):
        CoDyRA(gaussian(2, 4), gaussian(2, 4), gaussian(3))
    with pytest.raises(ValueError, match="kappa must not be negative"):
        soft_threshold(gaussian(2), -0.1)
    with pytest.raises(ValueError, match="step must be between"):
        threshold(10, 10)
    with pytest.raises(ValueError, match="stages must be at least 2"):
        threshold(0, 10, stages=1)
    with pytest.raises(ValueError, match="final must not be negative"):
        threshold(0, 10, final=-1.0)


# --- GainLoRA ---------------------------------------------------------------------------------------------------------


@FEW
@given(st.floats(-8, 8))
def test_gain_is_the_papers_formula(score):
    """|2 sigmoid(b) - 1|, zero at zero without rounding, and with the right slope on either side."""
    b = torch.tensor(score, dtype=torch.float64)

    torch.testing.assert_close(gain(b), (2 * b.sigmoid() - 1).abs(), atol=1e-12, rtol=0)
    assert gain(torch.tensor(0.0)) == 0
    torch.testing.assert_close(gain(torch.tensor(1e-20)), torch.tensor(5e-21))


def test_mean_embedding_leaves_padding_out():
    """By hand; NaN in padding does no harm, and a prompt of nothing but padding is an error."""
    embeddings_BLD = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [math.nan, 0.0]]])
    mask_BL = torch.tensor([[True, True, False]])

    torch.testing.assert_close(mean_embedding(embeddings_BLD, mask_BL), torch.tensor([[2.0, 4.0]]))
    with pytest.raises(ValueError, match=r"prompts \[0\] have no token"):
        mean_embedding(embeddings_BLD, torch.zeros(1, 3, dtype=torch.bool))


def test_gate_by_hand():
    """p_1 = SiLU(2 x_1), b = 3 p_1."""
    gate = GainGate([torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0]])])
    b = 3 * torch.nn.functional.silu(torch.tensor(2.0))

    torch.testing.assert_close(gate(torch.tensor([[1.0, 7.0]])), (2 * b.sigmoid() - 1).abs()[None])


def tasks_of_gates(hidden: bool) -> tuple[GainGate, GateMemory, list[torch.Tensor]]:
    """The second gate, and a memory of two old tasks of five prompts each."""
    widths = [24, 20, 16] if hidden else [24]
    olds = [gaussian(5, 24, seed=seed) for seed in (1, 2)]
    gate, memory = GainGate.fresh(widths, generator=generator()), GateMemory()
    memory.update(gate.inputs(olds[0]), energy=1.0)
    gate = GainGate.after(gate, memory, generator=generator(1))
    memory.update(gate.inputs(olds[1]), energy=1.0)
    return gate, memory, olds


@pytest.mark.parametrize("hidden", [False, True])
def test_a_new_gate_is_closed_on_old_tasks_before_and_after_training(hidden):
    """AdamW with weight decay, as the hardest case. On the new task it is open; without the constraint it opens."""
    old_gate, memory, olds = tasks_of_gates(hidden)
    gate = GainGate.after(old_gate, memory, generator=generator(2))
    new = gaussian(5, 24, seed=3)
    old = torch.cat(olds)
    seen = gate.inputs(old)
    assert gate(new).min() > 1e-4
    assert gate(old).max() < 1e-6

    constraint = GateConstraint(gate, memory)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=0.02, weight_decay=0.1)
    constraint.attach(optimizer)

    def step() -> None:
        optimizer.zero_grad()
        (1 - gate(torch.cat([new, old]))).square().sum().backward()
        optimizer.step()

    before = gate(new)
    for _ in range(30):
        step()
    assert gate(old).max() < 2e-6
    assert gate(new).mean() > before.mean() + 0.1
    for was, reads in zip(seen, gate.inputs(old), strict=True):
        torch.testing.assert_close(reads, was, atol=1e-5, rtol=0)
    if hidden:
        assert not torch.equal(gate.layers[0], old_gate.layers[0])

    constraint.remove()
    gate.layers[-1].grad = None
    gate(new).sum().backward()
    optimizer.step()
    assert gate(old).max() > 1e-4


def test_a_gate_of_one_layer_is_closed_on_the_whole_stored_subspace():
    """Not only on the prompts themselves: any sum of them, however long."""
    old_gate, memory, _ = tasks_of_gates(hidden=False)
    gate = GainGate.after(old_gate, memory, generator=generator(2))
    constraint = GateConstraint(gate, memory)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.1)
    constraint.attach(optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        (1 - gate(gaussian(4, 24, seed=5))).sum().backward()
        optimizer.step()
    inside = in_span(20, memory.bases[0])

    assert gate(inside).max() < 2e-6
    assert gate(inside + 0.1 * gaussian(20, 24, seed=6)).max() > 1e-2


def test_a_gates_gradient_has_no_part_in_the_subspace_and_earlier_layers_keep_their_value_there():
    """The hooks project gradients; the start of G_1 is the old gate's, also along old inputs."""
    old_gate, memory, olds = tasks_of_gates(hidden=True)
    gate = GainGate.after(old_gate, memory, generator=generator(2))
    GateConstraint(gate, memory)
    gate(gaussian(4, 24, seed=5)).sum().backward()

    for layer, old, basis_SW in zip(gate.layers, old_gate.layers, memory.bases, strict=True):
        assert layer.grad is not None
        assert layer.grad.any()
        assert (layer.grad.double() @ basis_SW.T).abs().max() < 1e-6 * layer.grad.norm()
        assert torch.equal(layer, old) == (len(layer) > 1)
    assert (gate.inputs(olds[0])[1]).any()


def test_the_first_gate_is_free():
    """An empty memory holds nothing back."""
    gate = GainGate.fresh([6, 4], generator=generator())
    GateConstraint(gate, GateMemory())
    x = gaussian(3, 6)
    free = GainGate(list(gate.layers))
    gate(x).sum().backward()
    free(x).sum().backward()

    for layer, other in zip(gate.layers, free.layers, strict=True):
        torch.testing.assert_close(layer.grad, other.grad)


def test_gate_errors():
    """Layers that do not fit, memories that do not fit or leave nothing, optimisers of other parameters."""
    with pytest.raises(ValueError, match="the last with one row"):
        GainGate([gaussian(2, 3)])
    with pytest.raises(ValueError, match="each as wide as the one below"):
        GainGate([gaussian(2, 3), gaussian(1, 3)])
    gate, memory = GainGate.fresh([4], generator=generator()), GateMemory()
    memory.update(gate.inputs(gaussian(9, 4)), energy=1.0)
    with pytest.raises(ValueError, match="fill all 4 directions"):
        GainGate.after(gate, memory, generator=generator())
    with pytest.raises(ValueError, match="fill all 4 directions"):
        GateConstraint(gate, memory)
    with pytest.raises(ValueError, match="inputs of 1 layers, got 2"):
        memory.update([gaussian(3, 4), gaussian(3, 4)], energy=1.0)
    with pytest.raises(ValueError, match=r"widths \[4\], as the memory has them, got \[5\]"):
        GateConstraint(GainGate.fresh([5], generator=generator()), memory)

    line, inside = GateMemory(), GainGate([torch.tensor([[1.0, 0.0]])])
    line.update([torch.tensor([[2.0, 0.0]])], energy=1.0)
    with pytest.raises(ValueError, match="nothing is left of it"):
        GateConstraint(inside, line)
    assert inside.layers[0].tolist() == [[1.0, 0.0]]
    with pytest.raises(ValueError, match="does not hold all layers"):
        GateConstraint(GainGate([torch.tensor([[1.0, 1.0]])]), line).attach(torch.optim.SGD(inside.parameters()))


# --- InfLoRA ----------------------------------------------------------------------------------------------------------


def test_extended_basis_by_hand():
    """Energies 1, 9 and 90 along the axes, the first of them known. 1 + 90 of 100 reach 0.91, not 0.92."""
    inputs_ND = torch.diag(torch.tensor([1.0, 3.0, math.sqrt(90.0)]))
    known_SD = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)

    sizes = {energy: len(extended_basis(known_SD, inputs_ND, energy)) for energy in (0.005, 0.9, 0.909, 0.92, 1.0)}

    assert sizes == {0.005: 1, 0.9: 2, 0.909: 2, 0.92: 3, 1.0: 3}
    torch.testing.assert_close(extended_basis(known_SD, inputs_ND, 0.9).abs()[1].float(), torch.eye(3)[2])


@FEW
@given(st.integers(1, 6), st.integers(1, 6), st.floats(0.1, 1.0), st.booleans(), st.integers(0, 2**31))
def test_extended_basis_holds_its_share_and_no_smaller_one_would(old, count, energy, by_moments, seed):
    """The energy is reached, one direction fewer would miss it, and the old span stays inside."""
    basis_SD = extended_basis(torch.zeros(0, 12), gaussian(old, 12, seed=seed), 1.0)
    inputs_ND = gaussian(count, 12, seed=seed + 1, dtype=torch.float64)
    larger_SD = extended_basis(basis_SD, InputCovariance.of(inputs_ND) if by_moments else inputs_ND, energy)
    whole = inputs_ND.square().sum()

    check_orthonormal(larger_SD)
    assert (inputs_ND @ larger_SD.T).square().sum() >= (energy - 1e-9) * whole
    assert torch.equal(larger_SD[: len(basis_SD)], basis_SD)
    # row_basis mixes the added rows, so the best smaller set comes from the singular values of what was missing
    missing_S = torch.linalg.svdvals(project_rows(inputs_ND, basis_SD)).square()
    added = len(larger_SD) - len(basis_SD)
    if added:
        assert missing_S[added - 1 :].sum() > (1 - energy) * whole - 1e-9


def test_memory_stores_the_smaller_side():
    """Up to half the width the basis, beyond it the complement, of the same subspace."""
    memory, olds = InputMemory(8), []
    for task, (rows, held, complement_held) in enumerate([(3, 3, False), (1, 4, False), (2, 2, True), (1, 1, True)]):
        olds.append(gaussian(rows, 8, seed=task))
        memory.update(olds[-1], energy=1.0)

        assert (len(memory.stored_SD), memory.holds_complement) == (held, complement_held)
        seen = torch.cat(olds).double()
        assert memory.basis().shape == (len(seen), 8)
        assert project_rows(seen, memory.basis()).abs().max() < 1e-9


@pytest.mark.parametrize("old_rank", [4, 12])
def test_inf_lora_never_changes_old_outputs(old_rank):
    """Before training and after it, on all of the old subspace, whichever side is stored; on new inputs it does."""
    old_SD, new_ND = gaussian(old_rank, 16), gaussian(20, 16, seed=1)
    memory = InputMemory(16)
    memory.update(old_SD, energy=1.0)
    module = InfLoRA.designed(new_ND, memory, rank=3, out_features=5)
    old_ND = in_span(30, old_SD, seed=2)
    A_RD = module.A_RD.clone()
    assert not module(new_ND).any()

    trained(module, new_ND)

    assert module(old_ND).abs().max() < 1e-6 * old_ND.norm(dim=-1).max()
    assert module(new_ND).abs().max() > 0.1
    assert torch.equal(module.A_RD, A_RD)
    assert [name for name, _ in module.named_parameters()] == ["B_RO"]
    torch.testing.assert_close(exact_change(module.as_expert(), new_ND).float(), module(new_ND))


def test_inf_lora_reads_what_the_new_task_has_and_the_old_ones_have_not():
    """Its rows lie in the span of the new inputs' rest, and take the strongest of it."""
    memory = InputMemory(4)
    memory.update(torch.tensor([[5.0, 0.0, 0.0, 0.0]]), energy=1.0)
    new_ND = torch.tensor([[9.0, 0.0, 0.0, 0.0], [4.0, 2.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])

    torch.testing.assert_close(
        InfLoRA.designed(new_ND, memory, rank=1, out_features=2).A_RD.abs(), torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    )
    with pytest.raises(ValueError, match=r"2 direction\(s\) outside"):
        InfLoRA.designed(new_ND, memory, rank=3, out_features=2)


def test_training_b_is_training_the_weight_inside_the_span():
    """One SGD step of B changes W by the projection of the step that W itself would take."""
    x, seen = gaussian(7, 6), gaussian(7, 3, seed=1)
    module = InfLoRA.designed(gaussian(9, 6, seed=2), InputMemory(6), rank=2, out_features=3)
    (module(x) * seen).sum().backward()
    assert module.B_RO.grad is not None
    step_OD = module.B_RO.grad.T @ module.A_RD

    torch.testing.assert_close(step_OD, (seen.T @ x) @ module.A_RD.T @ module.A_RD)


def test_memory_errors_leave_it_as_it_was():
    """An energy out of range, inputs that are not finite."""
    memory = InputMemory(3)
    memory.update(torch.eye(3)[:1], energy=1.0)
    with pytest.raises(ValueError, match="energy must be in"):
        memory.update(torch.eye(3), energy=0.0)
    with pytest.raises(ValueError, match="NaN or infinite"):
        memory.update(torch.full((1, 3), math.nan), energy=0.9)
    assert len(memory.stored_SD) == 1


# --- SD-LoRA ----------------------------------------------------------------------------------------------------------


def random_expert(rank: int, seed: int, scale: float = 1.0) -> Expert:
    """At a site of 6 inputs and 5 outputs."""
    return Expert(gaussian(rank, 6, seed=seed), gaussian(rank, 5, seed=seed + 1000), scale)


@FEW
@given(st.integers(1, 8), st.integers(0, 2**31), st.sampled_from([-0.5, 1.0, 3.0]))
def test_a_unit_direction_has_length_one_and_keeps_the_rest_as_its_length(rank, seed, scale):
    """Against the O x D matrix, also for ranks above the widths."""
    expert = random_expert(rank, seed, scale)
    unit, length = unit_direction(expert)

    assert frobenius_norm(expert.A_RD, expert.B_RO) == pytest.approx(float(expert.delta_OD().norm()) / abs(scale))
    assert float(unit.delta_OD().norm()) == pytest.approx(1)
    torch.testing.assert_close(length * unit.delta_OD(), expert.delta_OD(), rtol=1e-5, atol=1e-5)


def test_a_task_starts_from_what_the_last_one_left():
    """Three tasks: folding a trained direction into the olds changes nothing, and a fresh one adds nothing."""
    x = gaussian(7, 6)
    module = Magnitudes([], random_expert(3, 1, scale=0.5))
    for task in range(3):
        trained(module, x)
        after = Magnitudes(module.as_experts(), fresh_expert(6, 5, 2, scale=1.0, generator=generator(task)))

        torch.testing.assert_close(after(x), module(x), atol=1e-5, rtol=1e-5)
        added = sum(exact_change(expert, x) for expert in module.as_experts())
        assert torch.is_tensor(added)
        torch.testing.assert_close(added.float(), module(x), atol=1e-5, rtol=1e-5)
        for old in after.as_experts()[:-1]:
            assert float(old.delta_OD().norm()) == pytest.approx(abs(old.scale), rel=1e-4)
        assert len(after.magnitude_T) == task + 2
        assert float(after.magnitude_T[-1].detach()) == 1.0
        module = after


def test_old_directions_stay_and_their_magnitudes_learn():
    """The paper's start of 1 by unit directions. After training only lengths differ, and they do."""
    olds = [unit_direction(random_expert(rank, rank))[0] for rank in (1, 3)]
    module = Magnitudes(olds, random_expert(2, 7))
    assert module.magnitude_T.tolist() == pytest.approx([1.0, 1.0, 1.0])
    x = gaussian(7, 6, seed=3)
    trained(module, x)

    assert {name for name, _ in module.named_parameters()} == {"magnitude_T", "A_new_RD", "B_new_RO"}
    for old, now in zip(olds, module.as_experts(), strict=False):
        torch.testing.assert_close(now.delta_OD(), now.scale * old.delta_OD(), atol=1e-6, rtol=1e-5)
        assert abs(now.scale - 1) > 1e-2


def test_the_gradient_of_a_magnitude_is_its_directions_share():
    """d(sum out * seen) / d a_k = <seen^T x, D_k>."""
    module = Magnitudes([random_expert(2, 1), random_expert(1, 2)], random_expert(2, 3))
    x, seen = gaussian(4, 6, seed=4), gaussian(4, 5, seed=5)
    (module(x) * seen).sum().backward()
    expected = [float(((seen.T @ x) * (e.delta_OD() / e.scale)).sum()) for e in module.as_experts()]

    assert module.magnitude_T.grad is not None
    assert module.magnitude_T.grad.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_rank_falls_with_the_tasks():
    """10 for tasks 1 to 3, 8 to task 7, then 6."""
    assert [rank_of_task(task) for task in range(1, 11)] == [10, 10, 10, 8, 8, 8, 8, 6, 6, 6]
    assert rank_of_task(5, steps=[(1, 4)]) == 4
    with pytest.raises(ValueError, match="counted from 1"):
        rank_of_task(0)
    for wrong in ([], [(2, 4)], [(1, 4), (3, 6)], [(1, 4), (1, 3)], [(1, 0)]):
        with pytest.raises(ValueError, match="expected steps"):
            rank_of_task(1, steps=wrong)


def test_a_sum_of_old_directions_is_known_and_its_magnitudes_add_it():
    """Rows of 2 D_1 - 3 D_2, as one expert of their ranks together: the fit gives it back."""
    olds = [random_expert(2, 1, scale=0.5), random_expert(1, 2)]
    new = Expert(torch.cat([olds[0].A_RD, olds[1].A_RD]), torch.cat([2 * olds[0].B_RO, -3 * olds[1].B_RO]), scale=0.25)
    fit = fit_direction(new, olds)

    assert fit.is_known()
    assert fit.residual < 1e-6
    units = [unit_direction(old)[0].delta_OD() for old in olds]
    rebuilt = fit.magnitude_T[0] * units[0] + fit.magnitude_T[1] * units[1]
    torch.testing.assert_close(rebuilt, new.delta_OD(), atol=1e-5, rtol=1e-5)


@FEW
@given(st.integers(0, 2**31))
def test_the_fit_is_least_squares(seed):
    """Against lstsq of the O x D matrices; the residual is relative, so the scale does not matter."""
    olds, new = [random_expert(2, seed + i) for i in range(3)], random_expert(3, seed + 9, scale=7.0)
    fit = fit_direction(new, olds)
    columns = torch.stack([unit_direction(old)[0].delta_OD().flatten() for old in olds], dim=1)
    target = new.delta_OD().flatten()
    expected = torch.linalg.lstsq(columns, target[:, None]).solution[:, 0]

    torch.testing.assert_close(fit.magnitude_T, expected, rtol=1e-4, atol=1e-4)
    missed = float((target - columns @ expected).norm() / target.norm())
    assert fit.residual == pytest.approx(missed, rel=1e-4)
    assert fit.is_known(missed * 1.01)
    assert not fit.is_known(missed * 0.99)
    assert fit_direction(new._replace(scale=1e-3), olds).residual == pytest.approx(fit.residual)


def test_a_fit_bears_olds_that_depend_on_each_other_and_none():
    """The same direction twice: each gets half."""
    old = random_expert(2, 1)
    fit = fit_direction(old, [old, old])

    length = float(old.delta_OD().norm())
    assert fit.residual < 1e-6
    assert fit.magnitude_T.tolist() == pytest.approx([length / 2, length / 2], rel=1e-5)
    assert fit_direction(old, []).residual == 1.0


def test_sd_lora_errors():
    """A direction that is zero, also by rows that cancel; a bias; another site."""
    expert = random_expert(1, 1)
    cancelling = Expert(torch.cat([expert.A_RD, expert.A_RD]), torch.cat([expert.B_RO, -expert.B_RO]))
    for nothing in (fresh_expert(6, 5, 2, scale=1.0, generator=generator()), cancelling):
        with pytest.raises(ValueError, match="has no direction"):
            Magnitudes([nothing], expert)
    biased = expert._replace(bias_O=torch.zeros(5))
    for olds, new in (([biased], expert), ([], biased)):
        with pytest.raises(ValueError, match="without a bias"):
            Magnitudes(olds, new)
    with pytest.raises(ValueError, match="experts of one site"):
        Magnitudes([expert], Expert(gaussian(1, 7), gaussian(1, 5)))
