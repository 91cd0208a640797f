"""Old experts as fixed directions whose lengths are trained anew with each task. Begin with Magnitudes.

For experts that learn. Never for experts that unlearn: a new task's data re-scale the old experts, so what an
unlearning request has taken away comes back, in part or in whole, without any data of that request being seen and with
no loss that would notice. An unlearning expert keeps the scale it was trained with.

SD-LoRA (Wu et al. 2025, ICLR, https://openreview.net/forum?id=5U1rlpX68A). Axes: T directions (tasks), R rank rows,
D input width, O output width. Products of directions are computed from their factors; no O x D matrix is made.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, final

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from moelora.bank import Expert
from moelora.continual.subspace import RANK_TOLERANCE

TAU = 9e-4
"""Residual below which a new direction counts as known: the paper's."""


@final
class Magnitudes(nn.Module):
    """Delta = a_1 D_1 + ... + a_{t-1} D_{t-1} + a_t B_t^T A_t, with all magnitudes a and the newest factors trained.

    D_k = B_k^T A_k / ||B_k^T A_k||_F is frozen. An old expert's magnitude starts at scale * ||B_k^T A_k||_F and the
    newest's at its scale, so that a task starts from what the tasks before it left, to rounding; the paper starts all
    at 1, for which pass each old as `unit_direction(old)[0]`. The next task's module is

        Magnitudes(module.as_experts(), fresh_expert(...))

    In the paper one magnitude serves a task at all sites; here each site has its own.

    Only for learning experts: the file's first lines say why.

    Attributes:
        magnitude_T: the trained magnitudes, the newest last.
        A_old_RD, B_old_RO: the rows of all unit directions, buffers.
        owner_R: whose row each is.
        A_new_RD, B_new_RO: the newest factors, parameters; not normalised.

    Raises:
        ValueError: if an expert has a bias, an old one is zero, or widths differ.
    """

    magnitude_T: nn.Parameter
    A_new_RD: nn.Parameter
    B_new_RO: nn.Parameter
    A_old_RD: Tensor
    B_old_RO: Tensor
    owner_R: Tensor

    def __init__(self, olds: Sequence[Expert], new: Expert) -> None:
        super().__init__()
        widths = {(expert.A_RD.shape[1], expert.B_RO.shape[1]) for expert in (*olds, new)}
        if len(widths) > 1:
            raise ValueError(f"expected experts of one site, got (in, out) widths {sorted(widths)}")
        if new.bias_O is not None:
            raise ValueError("expected experts without a bias, got one with; a bias has no part in a direction")
        units = [unit_direction(old) for old in olds]
        A_new_RD, B_new_RO = new.A_RD.detach().clone(), new.B_RO.detach().clone()
        self.A_new_RD, self.B_new_RO = nn.Parameter(A_new_RD), nn.Parameter(B_new_RO)
        starts = [*(length for _, length in units), new.scale]
        self.magnitude_T = nn.Parameter(A_new_RD.new_tensor(starts))
        # the newest's dtype and device for all
        self.register_buffer("A_old_RD", torch.cat([A_new_RD[:0], *(unit.A_RD.to(A_new_RD) for unit, _ in units)]))
        self.register_buffer("B_old_RO", torch.cat([B_new_RO[:0], *(unit.B_RO.to(B_new_RO) for unit, _ in units)]))
        owners = [index for index, (unit, _) in enumerate(units) for _ in range(unit.rank)]
        self.register_buffer("owner_R", torch.tensor(owners, dtype=torch.long, device=A_new_RD.device))

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch O"]:
        """What is added to the site's output, in the input's dtype."""
        wide = x.to(self.A_new_RD.dtype)
        old = einsum(wide, self.A_old_RD, "... d, r d -> ... r") * self.magnitude_T[self.owner_R]
        new = einsum(wide, self.A_new_RD, "... d, r d -> ... r") * self.magnitude_T[-1]
        old_out = einsum(old, self.B_old_RO, "... r, r o -> ... o")
        return (old_out + einsum(new, self.B_new_RO, "... r, r o -> ... o")).to(x.dtype)

    @torch.no_grad()
    def as_experts(self) -> list[Expert]:
        """All directions as plain experts, copied, with the magnitudes as scales; the newest last."""
        scales = self.magnitude_T.tolist()
        olds = [
            Expert(self.A_old_RD[self.owner_R == index], self.B_old_RO[self.owner_R == index], scale)
            for index, scale in enumerate(scales[:-1])
        ]
        return [*olds, Expert(self.A_new_RD.detach().clone(), self.B_new_RO.detach().clone(), scales[-1])]


def frobenius_norm(A_RD: Float[Tensor, "R D"], B_RO: Float[Tensor, "R O"]) -> float:
    """||B^T A||_F, in fp64, from the R x R triangular factors of A^T and B^T.

    The triangles keep what the product of two Gram matrices would lose where rows cancel each other.
    """
    right, left = (torch.linalg.qr(rows.detach().double().mT, mode="r").R for rows in (A_RD, B_RO))
    return float(torch.linalg.norm(einsum(left, right, "o r, d r -> o d")))


def unit_direction(expert: Expert) -> tuple[Expert, float]:
    """The expert's direction, with ||B^T A||_F = 1 and scale 1, and the length it had, its scale included.

    The length is shared between A and B by its root. A negative scale is a negative length.

    Raises:
        ValueError: if the expert has a bias, or adds nothing, so that it has no direction.
    """
    if expert.bias_O is not None:
        raise ValueError("expected experts without a bias, got one with; a bias has no part in a direction")
    length = frobenius_norm(expert.A_RD, expert.B_RO)
    rounding = RANK_TOLERANCE * float(expert.A_RD.double().norm() * expert.B_RO.double().norm())
    if not length > rounding:
        raise ValueError(f"the expert of rank {expert.rank} adds nothing, so it has no direction; leave it out")
    divisor = length**0.5
    return Expert(expert.A_RD.detach() / divisor, expert.B_RO.detach() / divisor), expert.scale * length


def rank_of_task(task: int, steps: Sequence[tuple[int, int]] = ((1, 10), (4, 8), (8, 6))) -> int:
    """Rank of a task's new direction, tasks counted from 1: later tasks need less (the variant RR).

    Args:
        task: 1 for the first.
        steps: (first task, rank) of each step; as in the paper, 10, then 8 from task 4 and 6 from task 8.

    Raises:
        ValueError: for a task before the first, or for steps that do not begin at task 1, are out of order, or rise.
    """
    ordered = all(a[0] < b[0] and a[1] >= b[1] for a, b in pairwise(steps))
    if not steps or steps[0][0] != 1 or not ordered or steps[-1][1] < 1:
        raise ValueError(
            f"expected steps (first task, rank) from task 1 on, tasks rising and ranks falling but at least 1, "
            f"got {tuple(steps)}"
        )
    if task < 1:
        raise ValueError(f"tasks are counted from 1, got {task}")
    return [rank for first, rank in steps if first <= task][-1]


class DirectionFit(NamedTuple):
    """A new expert as a sum of old directions.

    Attributes:
        magnitude_T: what to add to the olds' magnitudes in the place of the new expert, fp64.
        residual: what the sum misses, as a share of the new expert's length, in [0, 1].
    """

    magnitude_T: Tensor
    residual: float

    def is_known(self, tau: float = TAU) -> bool:
        """Whether the olds say all of it, so that only their magnitudes need to change."""
        return self.residual < tau


def fit_direction(new: Expert, olds: Sequence[Expert]) -> DirectionFit:
    """Least squares of a new direction on the unit directions of old ones (the variant KD).

    min_c ||D_new - c_1 D_1 - ... ||_F from inner products <B^T A, Q^T P> = sum((A P^T) * (B Q^T)), R x R each. Which
    length the paper's residual refers to is not known to us; ours is relative to the new one's, so it does not depend
    on the scale of the factors. No olds: a residual of 1.

    Raises:
        ValueError: if an expert has a bias or adds nothing.
    """
    target, length = unit_direction(new)
    units = [unit_direction(old)[0] for old in olds]
    if not units:
        return DirectionFit(torch.zeros(0, dtype=torch.float64), 1.0)
    gram_TT = torch.stack([torch.stack([_inner(one, other) for other in units]) for one in units])
    product_T = torch.stack([_inner(one, target) for one in units])
    # olds may depend on each other; of all best sums, the one with the smallest magnitudes
    inverse_TT = torch.linalg.pinv(gram_TT, rtol=RANK_TOLERANCE**2, hermitian=True)
    share_T = einsum(inverse_TT, product_T, "t s, s -> t")

    # the norm of the difference itself: 1 - share . product would lose half the digits
    shares = share_T.tolist()
    rest_A = torch.cat([target.A_RD.double(), *(unit.A_RD.double() for unit in units)])
    rest_B = torch.cat(
        [target.B_RO.double(), *(-share * unit.B_RO.double() for share, unit in zip(shares, units, strict=True))]
    )
    return DirectionFit(share_T * length, min(frobenius_norm(rest_A, rest_B), 1.0))


# --- inside -----------------------------------------------------------------------------------------------------------


def _inner(one: Expert, other: Expert) -> Tensor:
    rows = einsum(one.A_RD.double(), other.A_RD.double(), "r d, s d -> r s")
    return (rows * einsum(one.B_RO.double(), other.B_RO.double(), "r o, s o -> r s")).sum()
