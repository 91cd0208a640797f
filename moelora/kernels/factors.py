"""What the kernels see of a bank. Begin with Factors."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Factors(NamedTuple):
    """The rank rows of all experts of one site, and whose they are.

    Row j of A and row j of B are one rank-one unit. The rows of an expert are contiguous; experts may differ in rank.

    Attributes:
        A_RD: rows that read the input.
        B_RO: rows that write the output.
        scale_E: fp32 scale that each expert was trained with (alpha/r, or alpha/sqrt(r)).
        owner_R: id of the expert that owns each row.
        rows_FP: for E experts and, last, for "no expert" (F = E + 1): the numbers of its rows, filled up to the
            largest rank P.
        fill_FP: fp32, the expert's scale where `rows_FP` is a row of its own, 0 where it is filled up.
        bias_EO: an output bias of each expert, scaled and weighted as its rows are; None where no expert has one.
    """

    A_RD: Float[Tensor, "R D"]
    B_RO: Float[Tensor, "R O"]
    scale_E: Float[Tensor, " E"]
    owner_R: Int[Tensor, " R"]
    rows_FP: Int[Tensor, "F P"]
    fill_FP: Float[Tensor, "F P"]
    bias_EO: Float[Tensor, "E O"] | None = None


def index_rows(starts: tuple[int, ...], ranks: tuple[int, ...], scales: tuple[float, ...]) -> tuple[Tensor, ...]:
    """The index tensors of `Factors` for experts whose rows begin at `starts`: scale_E, owner_R, rows_FP, fill_FP."""
    experts, total, widest = len(ranks), sum(ranks), max(ranks, default=0)
    owner_R = torch.zeros(total, dtype=torch.long)
    rows_FP = torch.zeros(experts + 1, widest, dtype=torch.long)
    fill_FP = torch.zeros(experts + 1, widest, dtype=torch.float32)
    for expert, (start, rank, scale) in enumerate(zip(starts, ranks, scales, strict=True)):
        owner_R[start : start + rank] = expert
        if rank:
            # filled up with rows of its own, so that one expert never reads another's numbers
            rows_FP[expert] = torch.arange(widest).clamp(max=rank - 1) + start
            fill_FP[expert, :rank] = scale
    return torch.tensor(scales, dtype=torch.float32), owner_R, rows_FP, fill_FP
