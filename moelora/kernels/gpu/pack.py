"""Factors in the dtype and the order of the products. Begin with pack.

Trained rows are fp32 and x mostly is not: once a call, a projection's rows of A and B and its router's weight are brought
to x's dtype in one launch. A router scores in fp32: its weight is cut into three 16-bit parts whose sum is the fp32
number, and the scores by the parts are added up.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

FP16_SCALE = 256.0
"""Times this, the small parts of a router's weight are no subnormal fp16 numbers."""

BLOCK = 2048


class Packed(NamedTuple):
    """Factors of P projections of one input, as the products read them.

    Attributes:
        A_PRD, B_list: the rank rows.
        tails_QMD: the routers' weights. A router has M rows: the parts of its weight, each with as many rows as
            `padded` says.
        tail_scale: what the scores by `tails_QMD` are to be multiplied by.
    """

    A_PRD: Tensor
    B_list: list[Tensor]
    tails_QMD: Tensor | None
    tail_scale: float


def padded(experts: int, dtype: torch.dtype) -> int:
    """Rows that one part of a router's weight takes: a power of two, so that a whole router has at least 16."""
    return max(16 if dtype is torch.float32 else 4, triton.next_power_of_2(experts))


def num_parts(dtype: torch.dtype) -> int:
    """Parts of a router's weight: itself in fp32, else three and one of zeros, to be a power of two."""
    return 1 if dtype is torch.float32 else 4


def pack(A_list: list[Tensor], B_list: list[Tensor], gates: list[Tensor], dtype: torch.dtype) -> Packed:
    """The factors of P projections and the weights of their Q routers (none, one for all, or one each)."""
    projections, (rows, width) = len(A_list), A_list[0].shape
    experts = gates[0].shape[0] if gates else 0
    part_rows = padded(experts, dtype) if gates else 0

    # what has the dtype already is taken as it is
    keeps_A = projections == 1 and A_list[0].dtype is dtype and A_list[0].is_contiguous()
    A_PRD = A_list[0][None] if keeps_A else A_list[0].new_empty(projections, rows, width, dtype=dtype)
    packed_B = [
        B if B.dtype is dtype and B.is_contiguous() else torch.empty_like(B, dtype=dtype, memory_format=torch.contiguous_format)
        for B in B_list
    ]
    shape = (len(gates), num_parts(dtype) * part_rows, width)
    tails_QMD = torch.empty(shape, dtype=dtype, device=A_PRD.device) if gates else None
    scale = FP16_SCALE if dtype is torch.float16 else 1.0

    for index in range(projections):
        A, B = A_list[index].contiguous(), B_list[index].contiguous()
        elements_A = 0 if keeps_A else A.numel()
        elements_B = 0 if packed_B[index] is B_list[index] else B.numel()
        gate = gates[index].contiguous() if index < len(gates) else None
        blocks_A, blocks_B = triton.cdiv(elements_A, BLOCK), triton.cdiv(elements_B, BLOCK)
        blocks_gate = 0 if gate is None else shape[1] * triton.cdiv(width, BLOCK)
        if blocks_A + blocks_B + blocks_gate:
            _pack[(blocks_A + blocks_B + blocks_gate,)](
                A,
                A_PRD[index],
                elements_A,
                B,
                packed_B[index],
                elements_B,
                A if gate is None else gate,
                A_PRD if tails_QMD is None or gate is None else tails_QMD[index],
                blocks_A,
                blocks_B,
                experts,
                width,
                scale,
                PART_ROWS=max(1, part_rows),
                PARTS=num_parts(dtype),
                BLOCK=BLOCK,
                num_warps=8,
            )
    return Packed(A_PRD, packed_B, tails_QMD, 1 / scale)


@triton.jit
@no_type_check
def _pack(
    a_ptr,
    a_to,
    elements_a,
    b_ptr,
    b_to,
    elements_b,
    gate_ptr,
    gate_to,
    blocks_a,
    blocks_b,
    experts,
    width,
    scale,
    PART_ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    here = tl.program_id(0)
    places = tl.arange(0, BLOCK)
    if here < blocks_a:
        at = here.to(tl.int64) * BLOCK + places
        values = tl.load(a_ptr + at, mask=at < elements_a, other=0.0)
        tl.store(a_to + at, values.to(a_to.dtype.element_ty), mask=at < elements_a)
    elif here < blocks_a + blocks_b:
        at = (here - blocks_a).to(tl.int64) * BLOCK + places
        values = tl.load(b_ptr + at, mask=at < elements_b, other=0.0)
        tl.store(b_to + at, values.to(b_to.dtype.element_ty), mask=at < elements_b)
    else:
        blocks = tl.cdiv(width, BLOCK)
        row = (here - blocks_a - blocks_b) // blocks
        d = ((here - blocks_a - blocks_b) % blocks) * BLOCK + places
        expert = row % PART_ROWS
        rest = tl.load(gate_ptr + expert.to(tl.int64) * width + d, mask=(d < width) & (expert < experts), other=0.0)
        rest = rest.to(tl.float32) * scale
        value = rest.to(gate_to.dtype.element_ty)
        if PARTS > 1:
            # the next part is what the parts before it leave
            for part in tl.static_range(1, PARTS):
                if row // PART_ROWS >= part:
                    rest = rest - value.to(tl.float32)
                    value = rest.to(gate_to.dtype.element_ty)
            if row // PART_ROWS == PARTS - 1:
                value = tl.zeros_like(value)
        tl.store(gate_to + row.to(tl.int64) * width + d, value, mask=d < width)
