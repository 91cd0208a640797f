"""Rows chosen before training, so that they need no constraint in it. Begin with designed_rows and FixedBasis.

    benign_SD = benign_basis(covariance_of_benign_text)
    A_RD = designed_rows(forget_inputs_ND, benign_SD, rank=8)      # frozen; only B is trained

`designed_rows` looks at the data; `FixedBasis` hands out rows of one basis in turn.
"""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from moelora.continual.covariance import InputCovariance, directions, num_used
from moelora.continual.subspace import check_orthonormal, project_rows


def benign_basis(inputs: Float[Tensor, "N D"] | InputCovariance, energy: float = 0.99) -> Float[Tensor, "S D"]:
    """Orthonormal basis of the smallest subspace that holds this share of the inputs' energy (sum of squares), in fp64.

    GPM (Saha et al. 2021, https://arxiv.org/abs/2103.09762), of inputs taken together.

    Args:
        inputs: at one site, of a benign corpus, without padding; or their `InputCovariance`.
        energy: in (0, 1]; 1 keeps all that is more than rounding.

    Raises:
        ValueError: for an energy out of range, or for inputs that are all zero or none.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {energy}")
    energy_S, rows_SD = directions(inputs)
    used = num_used(energy_S, float(energy_S.sum()))
    if not used:
        raise ValueError("the inputs span nothing; give at least one input that is not zero")
    held_S = energy_S[:used].cumsum(0) / energy_S[:used].sum()
    # the first that reaches the share; all of them where rounding keeps the last below 1
    size = min(int((held_S < energy).sum()) + 1, used)
    return rows_SD[:size]


def designed_rows(
    forget_inputs: Float[Tensor, "N D"] | InputCovariance, avoid_basis_SD: Float[Tensor, "S D"], rank: int
) -> Float[Tensor, "R D"]:
    """Orthonormal rows that see the most of the forget inputs and nothing of a subspace to avoid.

    The forget inputs without their part in the avoided span, H - (H Q^T) Q; of the rest the `rank` strongest right
    singular directions. With A fixed to these, A x is close to 0 for benign x even where a gate errs. InfLoRA's
    construction (Liang and Li 2024, https://arxiv.org/abs/2404.00228) with benign text in the place of the old tasks.

    Returns them in the inputs' dtype, at least fp32; fp64 for an `InputCovariance`. Rows have length 1, while those of
    a fresh expert have about 0.58.

    Raises:
        ValueError: if the rest has fewer than `rank` directions, or if the basis is not orthonormal.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    rest: Tensor | InputCovariance
    if isinstance(forget_inputs, InputCovariance):
        dtype = torch.float64
        whole = float(forget_inputs.moment_DD.trace())
        rest = forget_inputs.without(avoid_basis_SD)
    else:
        dtype = torch.promote_types(forget_inputs.dtype, torch.float32)
        exact_ND = forget_inputs.detach().double()
        whole = float(exact_ND.square().sum())
        rest = project_rows(exact_ND, avoid_basis_SD)
    energy_S, rows_SD = directions(rest)

    # measured against the whole inputs: if all of them lie in the avoided span, the rest is only rounding
    left = num_used(energy_S, whole)
    if left < rank:
        raise ValueError(
            f"the forget inputs have {left} direction(s) outside the avoided subspace of {len(avoid_basis_SD)}, "
            f"but rank is {rank}; lower the rank, give more forget inputs, or avoid less (a smaller energy)"
        )
    return rows_SD[:rank].to(dtype)


@final
class FixedBasis:
    """One orthonormal basis of R^D, handed out row by row: experts whose rows come from it are orthogonal for good.

    PLAN (ICCV 2025) takes every task's A from one fixed basis and trains B only.

    `FixedBasis.random` and `FixedBasis.least_used` make one. To go on after a restart, keep `basis_DD` and `used`, or
    the rows themselves: a basis computed again may differ by rounding.

    Attributes:
        basis_DD: its rows, in the order in which they are handed out.
        used: how many have been.
    """

    basis_DD: Tensor
    used: int

    def __init__(self, basis_DD: Float[Tensor, "D D"], *, used: int = 0) -> None:
        check_orthonormal(basis_DD)
        if not 0 <= used <= len(basis_DD):
            raise ValueError(f"used must be between 0 and {len(basis_DD)}, got {used}")
        self.basis_DD, self.used = basis_DD, used

    @classmethod
    def random(cls, width: int, *, generator: torch.Generator) -> "FixedBasis":
        """A random basis: the QR of a Gaussian matrix."""
        device = generator.device
        gaussian_DD = torch.randn(width, width, generator=generator, dtype=torch.float64, device=device)
        return cls(torch.linalg.qr(gaussian_DD).Q)

    @classmethod
    def least_used(cls, covariance: InputCovariance) -> "FixedBasis":
        """The directions of reference inputs, those along which they have the least energy first."""
        _, rows_DD = covariance.directions()
        return cls(rows_DD.flip(0))

    @property
    def left(self) -> int:
        """How many rows can still be taken."""
        return len(self.basis_DD) - self.used

    def take(self, rank: int) -> Float[Tensor, "R D"]:
        """The next rows, copied, in the basis's dtype; nobody gets them again.

        Raises:
            ValueError: if fewer are left; none is taken then.
        """
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if rank > self.left:
            raise ValueError(
                f"expected at most {self.left} rows, as many as are left of {len(self.basis_DD)}, got rank={rank}; "
                "lower the rank, or let experts that may share a subspace use the same rows"
            )
        rows_RD = self.basis_DD[self.used : self.used + rank].clone()
        self.used += rank
        return rows_RD
