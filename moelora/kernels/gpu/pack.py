"""Factors in the dtype and the order of the products. Begin with pack_forward.

Trained rows are fp32 and x mostly is not: once a call, a projection's rows of A and B and its router's weight are
brought to x's dtype in one launch. A router scores in fp32: its weight is cut into three 16-bit parts whose sum is the
fp32 number, and the scores by the parts are added up.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from moelora.kernels.gpu.launch import cdiv, launch, power_of_two

FP16_SCALE = 256.0
"""Times this, the small parts of a router's weight are no subnormal fp16 numbers."""

BLOCK = 2048


class Packed(NamedTuple):
    """Factors of P projections of one input, as the forward products read them.

    Attributes:
        A_PRD, B_list: the rank rows.
        tails_QMD: the routers' weights. A router has M rows: the parts of its weight, each with as many rows as
            `padded` says. None without routers.
        tail_scale: what the scores by `tails_QMD` are to be multiplied by.
    """

    A_PRD: Tensor
    B_list: list[Tensor]
    tails_QMD: Tensor | None
    tail_scale: float


def padded(experts: int, dtype: torch.dtype) -> int:
    """Rows that one part of a router's weight takes: a power of two, so that a whole router has at least 16."""
    return max(16 if dtype is torch.float32 else 4, power_of_two(experts))


def num_parts(dtype: torch.dtype) -> int:
    """Parts of a router's weight: itself in fp32, else three and one of zeros, to be a power of two."""
    return 1 if dtype is torch.float32 else 4


def pack_forward(A_list: list[Tensor], B_list: list[Tensor], gates: list[Tensor], dtype: torch.dtype) -> Packed:
    """The factors of P projections and the weights of their Q routers (none, one for all, or one each)."""
    (rows, width), device = A_list[0].shape, A_list[0].device
    keeps_A = len(A_list) == 1 and _is_ready(A_list[0], dtype)
    A_PRD = A_list[0][None] if keeps_A else torch.empty(len(A_list), rows, width, dtype=dtype, device=device)
    packed_B = [B if _is_ready(B, dtype) else torch.empty(B.shape, dtype=dtype, device=device) for B in B_list]
    tails_QMD, parts = None, num_parts(dtype)
    scale = FP16_SCALE if dtype is torch.float16 else 1.0
    if gates:
        part_rows = padded(gates[0].shape[0], dtype)
        tails_QMD = torch.empty(len(gates), parts * part_rows, width, dtype=dtype, device=device)
    for index, (A_RD, B_RO) in enumerate(zip(A_list, B_list, strict=True)):
        pairs = [] if keeps_A else [(A_RD, A_PRD[index])]
        pairs += [] if packed_B[index] is B_RO else [(B_RO, packed_B[index])]
        router = (gates[index], tails_QMD[index]) if tails_QMD is not None and index < len(gates) else None
        _pack_one(pairs, router, parts, scale)
    return Packed(A_PRD, packed_B, tails_QMD, 1 / scale)


def pack_backward(
    A_list: list[Tensor], B_list: list[Tensor], gates: list[Tensor], score_columns: int, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """What gradients are multiplied by: rows_ND, the rows of all A and behind them those of the routers; and all B.

    Args:
        score_columns: rows that the routers take there together, of which those behind their experts are zeros.
    """
    (rows, width), device = A_list[0].shape, A_list[0].device
    keeps_A = len(A_list) == 1 and not gates and _is_ready(A_list[0], dtype)
    shape = (len(A_list) * rows + score_columns, width)
    rows_ND = A_list[0] if keeps_A else torch.empty(shape, dtype=dtype, device=device)
    packed_B = [B if _is_ready(B, dtype) else torch.empty(B.shape, dtype=dtype, device=device) for B in B_list]
    part_rows = padded(gates[0].shape[0], dtype) if gates else 0
    for index, (A_RD, B_RO) in enumerate(zip(A_list, B_list, strict=True)):
        pairs = [] if keeps_A else [(A_RD, rows_ND[index * rows : (index + 1) * rows])]
        pairs += [] if packed_B[index] is B_RO else [(B_RO, packed_B[index])]
        router = None
        if index < len(gates):
            first = len(A_list) * rows + index * part_rows
            last = None if index == len(gates) - 1 else first + part_rows
            router = (gates[index], rows_ND[first:last])
        _pack_one(pairs, router, 1, 1.0)
    return rows_ND, packed_B


def _is_ready(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype is dtype and tensor.is_contiguous()


def _pack_one(
    pairs: list[tuple[Tensor, Tensor]], router: tuple[Tensor, Tensor] | None, parts: int, scale: float
) -> None:
    """Up to two tensors and a router's weight, each into its place, in one launch."""
    spare = pairs[0] if pairs else router
    if spare is None:
        return
    pairs = pairs + [(spare[0], spare[1][:0])] * (2 - len(pairs))
    (first, first_to), (second, second_to) = ((source.contiguous(), to) for source, to in pairs)
    gate_ED, gate_to = router if router is not None else (first, first_to[:0])
    gate_ED = gate_ED.contiguous()
    sizes = first_to.numel(), second_to.numel()
    blocks = cdiv(sizes[0], BLOCK), cdiv(sizes[1], BLOCK)
    blocks_gate = gate_to.shape[0] * cdiv(gate_to.shape[1], BLOCK)
    if not sum(blocks) + blocks_gate:
        return
    launch(
        _pack,
        (sum(blocks) + blocks_gate,),
        (first, first_to, sizes[0], second, second_to, sizes[1], gate_ED, gate_to, *blocks, *gate_ED.shape, scale),
        {"PART_ROWS": max(1, gate_to.shape[0] // parts), "PARTS": parts, "BLOCK": BLOCK},
        warps=8,
        stages=1,
    )


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
            # the next part is what the parts before it leave; the last is of zeros
            for part in tl.static_range(1, PARTS):
                if row // PART_ROWS >= part:
                    rest = rest - value.to(tl.float32)
                    value = rest.to(gate_to.dtype.element_ty)
            if row // PART_ROWS == PARTS - 1:
                value = tl.zeros_like(value)
        tl.store(gate_to + row.to(tl.int64) * width + d, value, mask=d < width)
