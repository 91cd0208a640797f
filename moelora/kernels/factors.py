"""What the kernels see of a bank. Begin with Factors."""

from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


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
        owners: the same for the Triton kernels, with an axis for the projections of one input, of length 1: int32 owner
            of each row (1, R), fp32 scales, int32 first rows and ranks of the experts (1, E).
        slices: each expert's own rows once more, those of A transposed (D, R), and its scale as a Python number; empty
            where making them would cost more than it saves, as for rows that are trained.
        shared_A_PD: where all experts are heads of one A, in the order of their ids, that A once; `A_RD` repeats it.
    """

    A_RD: Float[Tensor, "R D"]
    B_RO: Float[Tensor, "R O"]
    scale_E: Float[Tensor, " E"]
    owner_R: Int[Tensor, " R"]
    rows_FP: Int[Tensor, "F P"]
    fill_FP: Float[Tensor, "F P"]
    bias_EO: Float[Tensor, "E O"] | None = None
    owners: tuple[Tensor, ...] = ()
    slices: tuple[tuple[Tensor, Tensor, float], ...] = ()
    shared_A_PD: Float[Tensor, "P D"] | None = None


@lru_cache(maxsize=64)
def index_tensors(
    starts: tuple[int, ...], ranks: tuple[int, ...], scales: tuple[float, ...], device: torch.device
) -> tuple[Tensor, ...]:
    """All index tensors of `Factors` on a device: those of `index_rows`, and its `owners`.

    Sites that hold the same experts share them: compiled code checks and loads every tensor that it reads, so one that
    88 sites read costs a decoded token as much as one.
    """
    # whoever asks first may be in inference mode; its tensors could not be trained with
    with torch.inference_mode(mode=False):
        rows, (owner_1R, starts_1E, ranks_1E) = index_rows(starts, ranks, scales), index_kernels(starts, ranks)
        return tuple(tensor.to(device) for tensor in (*rows, owner_1R, rows[0][None], starts_1E, ranks_1E))


@lru_cache(maxsize=64)
def index_rows(
    starts: tuple[int, ...], ranks: tuple[int, ...], scales: tuple[float, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The index tensors of `Factors` for experts whose rows begin at `starts`: scale_E, owner_R, rows_FP, fill_FP."""
    starts_E1 = torch.tensor(starts, dtype=torch.long).view(-1, 1)
    ranks_E1 = torch.tensor(ranks, dtype=torch.long).view(-1, 1)
    scale_E = torch.tensor(scales, dtype=torch.float32)
    places_P = torch.arange(max(ranks, default=0))

    # filled up with rows of its own, so that one expert never reads another's numbers; the last row is "no expert"
    own_EP = places_P < ranks_E1
    rows_EP = torch.where(ranks_E1 > 0, starts_E1 + torch.minimum(places_P, (ranks_E1 - 1).clamp(min=0)), 0)
    rows_FP = F.pad(rows_EP, (0, 0, 0, 1))
    fill_FP = F.pad(own_EP * scale_E[:, None], (0, 0, 0, 1))

    owner_R = torch.zeros(sum(ranks), dtype=torch.long)
    owner_R[rows_EP[own_EP]] = torch.arange(len(ranks)).repeat_interleave(ranks_E1[:, 0])
    return scale_E, owner_R, rows_FP, fill_FP


@lru_cache(maxsize=64)
def index_kernels(starts: tuple[int, ...], ranks: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The int32 tensors among `Factors.owners`: owner, first row and rank, each as one row."""
    owner_R = torch.zeros(sum(ranks), dtype=torch.int32)
    for expert, (start, rank) in enumerate(zip(starts, ranks, strict=True)):
        owner_R[start : start + rank] = expert
    return owner_R[None], torch.tensor([starts], dtype=torch.int32), torch.tensor([ranks], dtype=torch.int32)
