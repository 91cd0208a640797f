"""One pair of factors for all tasks, and a small routing matrix between them that grows by addition. Begin with CLoRA.

    c_lora = CLoRA(A_RD, B_RO)
    basis_SR = routing_basis(c_lora.old_RR)                     # once a task
    loss = task_loss + 0.1 * overlap_penalty(c_lora.new_RR, basis_SR)
    c_lora.absorb()                                             # after the task

C-LoRA with a routing matrix (2025, https://arxiv.org/abs/2502.17920); not the element-wise regularised C-LoRA of Smith
et al. Axes: R rank, S directions of a basis in R^R, D input width, O output width. In a routing matrix the first axis
belongs to `B_RO`, the second to `A_RD`.
"""

from typing import final

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from moelora.bank import Expert
from moelora.continual.basis import benign_basis


@final
class CLoRA(nn.Module):
    """Delta = scale * B^T (R_old + R_new) A: all tasks share A and B, and a task owns the R x R numbers of R_new.

    The forward uses both routing matrices. A and B get their gradient through R_new only, that of R_old's term being
    stopped (eq. 11-12); the input gets its gradient through both. That makes the factors' gradient smaller where the
    two terms agree (Theorem 3.1, which needs a non-negative inner product of the two; it is larger otherwise), and it
    is no promise that old tasks stay as they are: R_old stays, yet the factors around it move. Where old behaviour must
    not move, as after an unlearning request, freeze them: `c_lora.requires_grad_(False)`, then
    `c_lora.new_RR.requires_grad_()`. R_old's term is then constant, bit for bit.

    R_new starts at zero, so a task starts from what the tasks before it left. Experts with scalar weights are the
    special case of a block-diagonal routing matrix (eq. 4-5). The start of the factors is the caller's choice.

    Attributes:
        A_RD, B_RO: the shared factors, copied.
        old_RR: sum of the routing matrices of all finished tasks, a buffer.
        new_RR: the routing matrix of this task.
        scale: on top of all.

    Raises:
        ValueError: if the ranks differ, or if a factor is all zero, as the B of a fresh expert: nothing would get a
            gradient then, R_new being zero too.
    """

    A_RD: nn.Parameter
    B_RO: nn.Parameter
    new_RR: nn.Parameter
    old_RR: Tensor
    scale: float

    def __init__(self, A_RD: Float[Tensor, "R D"], B_RO: Float[Tensor, "_ O"], *, scale: float = 1.0) -> None:
        super().__init__()
        rank = A_RD.shape[0]
        if B_RO.shape[0] != rank:
            raise ValueError(f"expected factors of one rank, got {rank} rows of A and {B_RO.shape[0]} of B")
        for name, factor in (("A", A_RD), ("B", B_RO)):
            if not factor.any():
                raise ValueError(
                    f"{name} is all zero, and R_new starts at zero, so nothing would get a gradient; start {name} from "
                    "random numbers: the change is zero as long as R_new is"
                )
        self.A_RD = nn.Parameter(A_RD.detach().clone())
        self.B_RO = nn.Parameter(B_RO.detach().clone())
        self.new_RR = nn.Parameter(A_RD.new_zeros(rank, rank))
        self.register_buffer("old_RR", A_RD.new_zeros(rank, rank))
        self.scale = scale

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch O"]:
        """What is added to the site's output, in the input's dtype."""
        wide = x.to(self.A_RD.dtype)
        new = _through(wide, self.A_RD, self.new_RR, self.B_RO)
        old = _through(wide, self.A_RD.detach(), self.old_RR, self.B_RO.detach())
        return (self.scale * (old + new)).to(x.dtype)

    @torch.no_grad()
    def absorb(self) -> None:
        """Close the task: R_old becomes R_old + R_new and R_new zero, which changes nothing but by rounding.

        An optimiser with momentum still remembers the finished task and would move R_new by it: make a new one.
        """
        self.old_RR += self.new_RR
        self.new_RR.zero_()

    @torch.no_grad()
    def as_expert(self) -> Expert:
        """The same change as a plain expert of rank R: A, and (R_old + R_new)^T B in the place of B."""
        routing_RR = self.old_RR.double() + self.new_RR.double()
        # rounded once, so that the expert differs from the module by no more than its dtype must
        routed_RO = einsum(routing_RR, self.B_RO.double(), "s r, s o -> r o").to(self.B_RO.dtype)
        return Expert(self.A_RD.detach().clone(), routed_RO, self.scale)


def routing_basis(old_RR: Float[Tensor, "R R"], energy: float = 0.99) -> Float[Tensor, "S R"]:
    """Orthonormal rows that span what R_old writes to: its first left singular vectors that hold this share of the
    sum of squared singular values, in fp64. No rows for a zero matrix.

    Which basis the paper's eq. 26 means is not known to us; this one is ours. With energy near 1 and a matrix of full
    rank it is all of R^R, and `overlap_penalty` becomes the squared length of R_new.

    Raises:
        ValueError: for an energy out of range.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {energy}")
    if not old_RR.any():
        return old_RR.new_zeros(0, len(old_RR), dtype=torch.float64)
    return benign_basis(old_RR.detach().mT, energy)


def overlap_penalty(new_RR: Float[Tensor, "R R"], basis_SR: Float[Tensor, "S R"]) -> Float[Tensor, ""]:
    """||basis(R_old)^T R_new||_F^2, how much of R_new writes where R_old does (eq. 26). Weighed with 0.1 by us.

    It is a statement about R^R: two routing matrices without overlap write to orthogonal outputs only if the rows of B
    are orthogonal. It depends on the scale of R_new.
    """
    return einsum(basis_SR.detach().to(new_RR.dtype), new_RR, "s q, q r -> s r").square().sum()


# --- inside -----------------------------------------------------------------------------------------------------------


def _through(x: Tensor, A_RD: Tensor, routing_RR: Tensor, B_RO: Tensor) -> Tensor:
    hidden = einsum(x, A_RD, "... d, r d -> ... r")
    return einsum(einsum(hidden, routing_RR, "... r, s r -> ... s"), B_RO, "... s, s o -> ... o")
