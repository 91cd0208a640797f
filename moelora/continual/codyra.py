"""Experts that choose their own rank: a weight per rank row, shrunk until rows vanish. Begin with CoDyRA.

    codyra = CoDyRA.fresh(in_features, out_features, generator=generator)
    for step in range(num_steps):
        loss.backward()
        optimizer.step()
        codyra.shrink_(threshold(step, num_steps))
    expert = codyra.prune()                                     # of the rank that is left

CoDyRA (2024, https://arxiv.org/abs/2412.01004) and its authors' code, Artificer-AI-Lab/CoDyRA. There the result is
merged into the weights after each task; here it stays an expert, which can be taken away again, and whose rank differs
from its neighbours'. Axes: R rank rows, P rows left, D input width, O output width.
"""

from typing import final

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from moelora.bank import Expert, fresh_expert


@final
class CoDyRA(nn.Module):
    """Delta = scale * B^T diag(w) A with one trained weight for each rank row.

    A row whose weight is exactly zero adds nothing. It still gets a gradient, and may come back until it is pruned.

    Attributes:
        A_RD, B_RO: the factors, copied.
        weight_R: w, of either sign.
        scale: on top of all; 1 in the source.

    Raises:
        ValueError: if the factors and the weights do not have the same number of rows.
    """

    A_RD: nn.Parameter
    B_RO: nn.Parameter
    weight_R: nn.Parameter
    scale: float

    def __init__(
        self,
        A_RD: Float[Tensor, "_ D"],
        B_RO: Float[Tensor, "_ O"],
        weight_R: Float[Tensor, " _"],
        *,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if not A_RD.shape[0] == B_RO.shape[0] == weight_R.shape[0]:
            raise ValueError(
                f"expected as many rows of A as of B and as weights, got {A_RD.shape[0]}, {B_RO.shape[0]} and "
                f"{weight_R.shape[0]}"
            )
        self.A_RD = nn.Parameter(A_RD.detach().clone())
        self.B_RO = nn.Parameter(B_RO.detach().clone())
        self.weight_R = nn.Parameter(weight_R.detach().clone())
        self.scale = scale

    @classmethod
    def fresh(
        cls, in_features: int, out_features: int, rank: int = 16, *, generator: torch.Generator | None = None
    ) -> "CoDyRA":
        """The source's start: A as in `fresh_expert`, B zero, w standard normal, scale 1."""
        A_RD, B_RO, scale, _ = fresh_expert(in_features, out_features, rank, scale=1.0, generator=generator)
        return cls(A_RD, B_RO, torch.randn(rank, generator=generator), scale=scale)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch O"]:
        """What is added to the site's output, in the input's dtype."""
        hidden = einsum(x.to(self.A_RD.dtype), self.A_RD, "... d, r d -> ... r")
        return (self.scale * einsum(hidden * self.weight_R, self.B_RO, "... r, r o -> ... o")).to(x.dtype)

    @torch.no_grad()
    def shrink_(self, kappa: float) -> None:
        """`soft_threshold` of the weights, in place: to be called after every optimiser step."""
        self.weight_R.copy_(soft_threshold(self.weight_R, kappa))

    @torch.no_grad()
    def prune(self) -> Expert:
        """A plain expert of the rows whose weight is not zero, with the weight in B; rank 0 if there are none.

        What the module adds is unchanged, but for the rounding of the product.
        """
        kept_P = self.weight_R.nonzero().flatten()
        weighted_PO = (self.weight_R[kept_P, None].double() * self.B_RO[kept_P].double()).to(self.B_RO.dtype)
        return Expert(self.A_RD[kept_P].detach(), weighted_PO, self.scale)


def soft_threshold(weight_R: Float[Tensor, " R"], kappa: float) -> Float[Tensor, " R"]:
    """sign(w) max(|w| - kappa, 0), the proximal step of kappa ||w||_1, as in the paper.

    Weights of size up to kappa become exactly zero, all others lose kappa.

    Raises:
        ValueError: for a negative kappa.
    """
    if not kappa >= 0:
        raise ValueError(f"kappa must not be negative, got {kappa}")
    return weight_R.sign() * (weight_R.abs() - kappa).clamp(min=0)


def shrink_and_cut(weight_R: Float[Tensor, " R"], kappa: float) -> Float[Tensor, " R"]:
    """`soft_threshold`, and then zero for everything smaller than kappa, as in the authors' code.

    Weights below 2 kappa become zero, so the result jumps there from 0 to kappa: no proximal step of a norm.

    Raises:
        ValueError: for a negative kappa.
    """
    shrunk_R = soft_threshold(weight_R, kappa)
    return torch.where(shrunk_R.abs() < kappa, 0, shrunk_R)


def threshold(step: int, num_steps: int, *, final: float = 7e-4, stages: int = 50) -> float:
    """kappa after optimiser step `step` of 0 ... num_steps - 1: zero in the first half, a staircase in the second.

    The stairs have equal length and rise linearly from 0 to `final`, both included; with fewer steps than stairs in the
    second half some stairs are skipped, the last among them. The numbers are those of the code.

    Raises:
        ValueError: for a step out of range, fewer than two stages, or a negative final threshold.
    """
    if not 0 <= step < num_steps:
        raise ValueError(f"step must be between 0 and num_steps - 1 = {num_steps - 1}, got {step}")
    if stages < 2:
        raise ValueError(f"stages must be at least 2, to begin at zero and end at {final}, got {stages}")
    if not final >= 0:
        raise ValueError(f"final must not be negative, got {final}")
    half = num_steps // 2
    if step < half:
        return 0.0
    stage = (step - half) * stages // (num_steps - half)
    return final * stage / (stages - 1)
