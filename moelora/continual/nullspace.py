"""A parameter whose rows stay orthogonal to a stored basis while it is trained. Begin with NullspaceConstraint.

The hard variant of `moelora.continual.orthogonal`: the overlap is zero to rounding, at the price of the directions that
the basis takes.
"""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moelora.continual.subspace import RANK_TOLERANCE, check_orthonormal, projected


@final
class NullspaceConstraint:
    """Keeps every row of a parameter orthogonal to the rows of a basis.

        constraint = NullspaceConstraint(bank.A_trainable_RD, row_basis(torch.cat(old_rows)))
        constraint.attach(optimizer)

    Three projections (`project_rows`) do it: of the initial value, in place; of every gradient, in a hook; and of the
    parameter after every optimiser step, once attached. Gradient and momentum that lie in a subspace stay there under
    SGD. Adam divides each element by its own scale, which leaves the subspace although every gradient lies in it, so
    the last projection is needed there. GPM (Saha et al. 2021, https://arxiv.org/abs/2103.09762) and InfLoRA (Liang and
    Li 2024, https://arxiv.org/abs/2404.00228) project so.

    Of a bank's `A_trainable_RD` all rows are held, so no other trainable expert may share the bank.

    Attributes:
        parameter: what is held.
        basis_SD: the orthonormal rows that it stays orthogonal to; in the parameter's dtype, at least fp32.

    Raises:
        ValueError: if the shapes do not fit, the basis is not orthonormal or leaves no direction, or if rows of the
            parameter lie in its span, so that nothing is left of them. The parameter is untouched then.
    """

    parameter: nn.Parameter
    basis_SD: Tensor

    def __init__(self, parameter: nn.Parameter, basis_SD: Float[Tensor, "S D"]) -> None:
        if parameter.ndim != 2 or parameter.shape[1] != basis_SD.shape[1]:
            raise ValueError(
                f"expected a parameter whose rows are as long as the basis's, {basis_SD.shape[1]}, "
                f"got shape {tuple(parameter.shape)}"
            )
        if basis_SD.shape[0] >= basis_SD.shape[1]:
            raise ValueError(
                f"the basis has {basis_SD.shape[0]} rows of width {basis_SD.shape[1]}, so no direction is left; "
                "store fewer directions, for example a smaller energy in benign_basis"
            )
        check_orthonormal(basis_SD)
        self.parameter = parameter
        self.basis_SD = basis_SD.detach().to(
            device=parameter.device, dtype=torch.promote_types(parameter.dtype, torch.float32), copy=True
        )
        self._check_start()
        self.project_()
        self._handles: list[RemovableHandle] = [parameter.register_hook(self._project)]

    @torch.no_grad()
    def project_(self) -> None:
        """Project the parameter in place."""
        self.parameter.copy_(self._project(self.parameter))

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Project the parameter after every step of this optimiser.

        Raises:
            ValueError: if the optimiser does not hold the parameter.
        """
        if not any(held is self.parameter for group in optimizer.param_groups for held in group["params"]):
            raise ValueError(
                "the optimizer does not hold the constrained parameter, so its steps would not move it; "
                "make the optimizer from the parameters that the model has now"
            )
        self._handles.append(optimizer.register_step_post_hook(lambda *_: self.project_()))

    def remove(self) -> None:
        """Take all hooks away: the parameter is free again, and keeps its value."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # --- inside ---------------------------------------------------------------------------------------------------

    def _project(self, rows_RD: Tensor) -> Tensor:
        # a model that is moved takes its parameters along, not the basis
        self.basis_SD = self.basis_SD.to(rows_RD.device)
        return projected(rows_RD, self.basis_SD)

    @torch.no_grad()
    def _check_start(self) -> None:
        before_R = self.parameter.double().norm(dim=-1)
        after_R = self._project(self.parameter.double()).norm(dim=-1)
        lost_R = (before_R > 0) & ~(after_R > RANK_TOLERANCE * before_R)
        if lost_R.any():
            raise ValueError(
                f"rows {lost_R.nonzero().flatten().tolist()[:8]} of the parameter lie in the span of the basis, so "
                "nothing is left of them; start them elsewhere, for example with designed_rows or FixedBasis.take"
            )
