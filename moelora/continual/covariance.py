"""Second moments of a site's inputs, gathered batch by batch. Begin with InputCovariance."""

from typing import final

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from moelora.continual.subspace import RANK_TOLERANCE, check_orthonormal, projected


@final
class InputCovariance:
    """The sum of x x^T over all inputs seen, in fp64: all that is needed of them to know the subspace they use.

    Not centred, as in GPM (Saha et al. 2021, https://arxiv.org/abs/2103.09762): an adapter sees inputs, not their
    differences from a mean. It takes D x D numbers, whatever the count; it still tells of the inputs, so keep that of
    forget data as carefully as the data's other statistics.

    Attributes:
        moment_DD: the sum of x x^T.
        count: how many inputs were added.
    """

    moment_DD: Tensor
    count: int

    def __init__(self, width: int, *, device: torch.device | str = "cpu") -> None:
        self.moment_DD = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.count = 0

    @classmethod
    def of(cls, inputs_ND: Float[Tensor, "N D"]) -> "InputCovariance":
        """The second moments of these inputs."""
        covariance = cls(inputs_ND.shape[1], device=inputs_ND.device)
        covariance.update(inputs_ND)
        return covariance

    @torch.no_grad()
    def update(self, inputs_ND: Float[Tensor, "N D"]) -> None:
        """Add inputs. Padding is to be left out by the caller.

        Raises:
            ValueError: if an input has the wrong width or is not finite; nothing is added then.
        """
        check_inputs(inputs_ND)
        if inputs_ND.shape[1] != len(self.moment_DD):
            raise ValueError(f"expected inputs of width {len(self.moment_DD)}, got {inputs_ND.shape[1]}")
        exact_ND = inputs_ND.to(self.moment_DD)
        self.moment_DD += einsum(exact_ND, exact_ND, "n d, n e -> d e")
        self.count += len(inputs_ND)

    def without(self, basis_SD: Float[Tensor, "S D"]) -> "InputCovariance":
        """The second moments of the inputs without their part in the span of an orthonormal basis."""
        check_orthonormal(basis_SD)
        basis_SD = basis_SD.to(self.moment_DD)
        rest = InputCovariance(len(self.moment_DD), device=self.moment_DD.device)
        # P M P, of a symmetric M
        rest.moment_DD = projected(projected(self.moment_DD, basis_SD).mT, basis_SD)
        rest.count = self.count
        return rest

    def directions(self) -> tuple[Float[Tensor, " D"], Float[Tensor, "D D"]]:
        """How much of the inputs' energy (sum of squares) lies along each direction, and these, the strongest first."""
        energy_D, vectors_DD = torch.linalg.eigh(self.moment_DD)
        return energy_D.flip(0).clamp(min=0), vectors_DD.mT.flip(0)


def directions(
    inputs: Float[Tensor, "N D"] | InputCovariance,
) -> tuple[Float[Tensor, " S"], Float[Tensor, "S D"]]:
    """`InputCovariance.directions` of inputs or of their second moments; of N < D inputs no D x D matrix is made."""
    if isinstance(inputs, InputCovariance):
        return inputs.directions()
    check_inputs(inputs)
    if inputs.shape[0] >= inputs.shape[1]:
        return InputCovariance.of(inputs).directions()
    _, length_S, rows_SD = torch.linalg.svd(inputs.detach().double(), full_matrices=False)
    return length_S.square(), rows_SD


def num_used(energy_S: Float[Tensor, " S"], whole: float) -> int:
    """How many directions hold more than the rounding of inputs whose energy is `whole`."""
    return int(((energy_S > 0) & (energy_S > RANK_TOLERANCE**2 * whole)).sum())


def check_inputs(inputs_ND: Float[Tensor, "N D"]) -> None:
    """Raise ValueError unless all inputs are finite."""
    finite_N = inputs_ND.isfinite().all(-1)
    if not finite_N.all():
        raise ValueError(
            f"{int((~finite_N).sum())} of {len(finite_N)} inputs hold NaN or infinite values, which would spoil every "
            "direction; find the batch that they come from"
        )
