"""Experts that read nothing of what old tasks have shown a site. Begin with InputMemory and InfLoRA.

    memory = InputMemory(width)
    for task in tasks:
        expert = InfLoRA.designed(task.inputs, memory, rank=8, out_features=out_features)
        train(expert)                                           # B only; A is frozen
        memory.update(task.inputs, energy=0.99)

InfLoRA (Liang and Li 2024, https://arxiv.org/abs/2404.00228), whose letters A and B are exchanged: its frozen down
matrix B_t is our `A_RD`. Axes: N inputs, S rows of a basis, R rank rows, D input width, O output width.
"""

from typing import final

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from moelora.bank import Expert
from moelora.continual.basis import designed_rows
from moelora.continual.covariance import InputCovariance, directions, num_used
from moelora.continual.subspace import check_orthonormal, complement, project_rows, row_basis


@final
class InputMemory:
    """The subspace that holds the inputs of all old tasks at one site, as a basis of it or of its complement.

    DualGPM: the one with fewer rows is stored, so a site never needs more than D / 2 rows of D numbers. A direction
    that is in stays in. The basis tells of the inputs' geometry; keep it as carefully as other statistics of the data.

    To go on after a restart, keep `stored_SD` and `holds_complement`.

    Attributes:
        stored_SD: orthonormal rows, fp64.
        holds_complement: whether they span what no old input uses; else what old inputs use.
    """

    stored_SD: Tensor
    holds_complement: bool

    def __init__(self, width: int, *, device: torch.device | str = "cpu") -> None:
        self.stored_SD = torch.zeros(0, width, dtype=torch.float64, device=device)
        self.holds_complement = False

    def basis(self) -> Float[Tensor, "S D"]:
        """Orthonormal basis of the old tasks' subspace, in fp64, whichever is stored."""
        return complement(self.stored_SD) if self.holds_complement else self.stored_SD

    def update(self, inputs: Float[Tensor, "N D"] | InputCovariance, energy: float) -> None:
        """Take in the inputs of a finished task, without padding: `extended_basis`.

        Raises:
            ValueError: for an energy out of range, or inputs that are not finite; nothing is added then.
        """
        basis_SD = extended_basis(self.basis(), inputs, energy)
        self.holds_complement = 2 * basis_SD.shape[0] > basis_SD.shape[1]
        self.stored_SD = complement(basis_SD) if self.holds_complement else basis_SD


@final
class InfLoRA(nn.Module):
    """Delta = scale * B^T A with A frozen at designed rows and only B trained, from zero.

    A x is zero, to rounding, for every x in the old tasks' subspace, so no training of B changes the output there. For
    orthonormal rows, training B is training W inside their span, a proposition of the source.

    Attributes:
        A_RD: orthonormal rows, a buffer.
        B_RO: trained.
        scale: on top.
    """

    A_RD: Tensor
    B_RO: nn.Parameter
    scale: float

    def __init__(self, A_RD: Float[Tensor, "R D"], out_features: int, *, scale: float = 1.0) -> None:
        super().__init__()
        check_orthonormal(A_RD)
        self.register_buffer("A_RD", A_RD.detach().clone())
        self.B_RO = nn.Parameter(A_RD.new_zeros(len(A_RD), out_features))
        self.scale = scale

    @classmethod
    def designed(
        cls,
        inputs: Float[Tensor, "N D"] | InputCovariance,
        memory: InputMemory,
        *,
        rank: int,
        out_features: int,
        scale: float = 1.0,
    ) -> "InfLoRA":
        """An expert for a new task, in fp32: `designed_rows` of the task's inputs outside the memory's subspace.

        Raises:
            ValueError: if the inputs have fewer than `rank` directions outside of it: what the old tasks have left is
                then too little.
        """
        A_RD = designed_rows(inputs, memory.basis(), rank)
        return cls(A_RD.float(), out_features, scale=scale)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch O"]:
        """What is added to the site's output, in the input's dtype."""
        hidden = einsum(x.to(self.A_RD.dtype), self.A_RD, "... d, r d -> ... r")
        return (self.scale * einsum(hidden, self.B_RO, "... r, r o -> ... o")).to(x.dtype)

    def as_expert(self) -> Expert:
        """The factors as they are, copied. The source merges them into W; an expert can still be taken away."""
        return Expert(self.A_RD.clone(), self.B_RO.detach().clone(), self.scale)


def extended_basis(
    basis_SD: Float[Tensor, "S D"], inputs: Float[Tensor, "N D"] | InputCovariance, energy: float
) -> Float[Tensor, "_ D"]:
    """An orthonormal basis with the fewest directions added after which it holds this share of the inputs' energy.

    GPM's rule (Saha et al. 2021, https://arxiv.org/abs/2103.09762): the smallest u with
    ||(H_hat)_u||_F^2 + ||M M^T H||_F^2 >= energy ||H||_F^2, where M is the basis, H the inputs, H_hat what M leaves of
    them and (.)_u its best approximation of rank u. The span of the old basis stays inside. In fp64.

    Args:
        basis_SD: orthonormal; no rows at the first task.
        inputs: without padding, or their `InputCovariance`. All zero: nothing is added.
        energy: in (0, 1]; 1 adds all that is more than rounding.

    Raises:
        ValueError: for an energy out of range, a basis that is not orthonormal, or inputs that are not finite.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {energy}")
    basis_SD = basis_SD.double()
    rest: Tensor | InputCovariance
    if isinstance(inputs, InputCovariance):
        whole = float(inputs.moment_DD.trace())
        rest = inputs.without(basis_SD)
    else:
        exact_ND = inputs.detach().double()
        whole = float(exact_ND.square().sum())
        rest = project_rows(exact_ND, basis_SD)
    energy_S, rows_SD = directions(rest)

    # what is still missing after u directions: at most 1 - energy of the whole, for the smallest such u
    used = num_used(energy_S, whole)
    missing_S = energy_S.flip(0).cumsum(0).flip(0)[:used]
    num_added = int((missing_S > (1 - energy) * whole).sum())

    # weak directions carry rounding errors of the strong ones inside the basis: project them once more
    added_SD = row_basis(project_rows(rows_SD[:num_added], basis_SD))
    return torch.cat([basis_SD, added_SD])
