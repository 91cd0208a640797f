"""Partial sums, added up in the order in which they stand. Begin with sum_parts."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from moelora.kernels.gpu.launch import cdiv, launch

BLOCK = 1024


def sum_parts(
    parts_SRO: Float[Tensor, "S R O"], out_dtype: torch.dtype, *, times: int = 1, apart: int = 0
) -> Float[Tensor, "R O"]:
    """The sum over S of fp32 parts, rounded once, in a tensor of its own. Each part is contiguous, like a slice.

    Where `parts_SRO` is a slice, each of the S may go on in it: `times` slices in all, their rows `apart` rows apart.
    """
    out_RO = parts_SRO.new_empty(parts_SRO.shape[1:], dtype=out_dtype)
    if out_RO.numel():
        more_stride = apart * parts_SRO.stride(1)
        arguments = (parts_SRO, out_RO, parts_SRO.shape[0], parts_SRO.stride(0), more_stride, out_RO.numel())
        constants = {"TIMES": times, "BLOCK": BLOCK}
        launch(_sum_parts, (cdiv(out_RO.numel(), BLOCK),), arguments, constants, warps=4, stages=2)
    return out_RO


@triton.jit
@no_type_check
def _sum_parts(parts_ptr, out_ptr, parts, part_stride, more_stride, count, TIMES: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        part_at = parts_ptr + part * tl.cast(part_stride, tl.int64) + i
        for time in tl.static_range(TIMES):
            total += tl.load(part_at + time * tl.cast(more_stride, tl.int64), mask=i < count, other=0.0)
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=i < count)
