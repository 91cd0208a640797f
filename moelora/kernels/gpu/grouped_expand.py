"""Each pick's few numbers times the rows of its expert, added to the pick's token. Begin with grouped_expand.

One launch for each slot: within a slot every token stands in exactly one tile, so every row of the output has one
writer, and the sum over slots has one order.

Of `Tile` are read: rows (tokens; those of the order), columns (of the output), inner (of P), warps, stages.
"""

from typing import no_type_check

import triton
import triton.language as tl
from jaxtyping import Float, Int32
from torch import Tensor

from moelora.kernels.gpu.launch import cdiv, launch, power_of_two
from moelora.kernels.gpu.order import Order, tile_at
from moelora.kernels.gpu.precision import dot_precision
from moelora.kernels.gpu.tile import Tile


def grouped_expand(
    s_TKP: Float[Tensor, "T K P"],
    weights_TK: Float[Tensor, "T K"] | None,
    scale_E: Float[Tensor, " E"] | None,
    B_RO: Float[Tensor, "R O"],
    out_TO: Float[Tensor, "T O"],
    order: Order,
    starts_E: Int32[Tensor, " E"],
    ranks_E: Int32[Tensor, " E"],
    *,
    accumulate: bool,
    tile: Tile,
    extra: tuple[Float[Tensor, "T C"], Float[Tensor, "C O"]] | None = None,
) -> None:
    """Writes into `out_TO` the sum over slots of (s * weight * scale) @ B_e.

    Args:
        s_TKP: contiguous, as `grouped_shrink` gives it.
        weights_TK, scale_E: the gate, applied in fp32 before s is rounded again. None: no gate.
        B_RO: any rows of the experts; in a backward pass, A.
        out_TO: rows may be strided.
        accumulate: add to what `out_TO` holds, and leave the rows of tokens without an expert untouched. Otherwise
            every row is written, those without an expert too (with 0, or with their part of `extra`).
        extra: two factors (of one dtype) of a product that is added to all tokens: the router's part of dx.
    """
    (tokens, slots, P), width = s_TKP.shape, out_TO.shape[1]
    assert tile.rows == order.rows, (tile, order.rows)
    entries = order.tiles_KN3.shape[1]
    for slot in range(slots if tokens else 0):
        left_TC, right_CO = extra if extra is not None and slot == 0 else (None, None)
        depth = 0 if left_TC is None else left_TC.shape[1]
        launch(
            _expand,
            (cdiv(width, tile.columns), entries),
            (
                s_TKP,
                weights_TK,
                scale_E,
                B_RO,
                out_TO,
                left_TC,
                right_CO,
                order.tiles_KN3,
                order.tokens_KT,
                starts_E,
                ranks_E,
                slot,
                tokens,
                width,
                depth,
                0 if weights_TK is None else weights_TK.stride(0),
                B_RO.stride(0),
                out_TO.stride(0),
                0 if left_TC is None else left_TC.stride(0),
                0 if right_CO is None else right_CO.stride(0),
            ),
            {
                "K": slots,
                "P": P,
                "ROWS": tile.rows,
                "COLUMNS": tile.columns,
                "INNER": min(P, tile.inner),
                "EXTRA": max(16, min(64, power_of_two(depth))),
                "ADD": accumulate or slot > 0,
                "PRECISION": dot_precision(s_TKP.dtype),
                "EXTRA_PRECISION": dot_precision(s_TKP.dtype if left_TC is None else left_TC.dtype),
            },
            warps=tile.warps,
            stages=tile.stages,
        )


@triton.jit(do_not_specialize=["slot"])
@no_type_check
def _expand(
    s_ptr,
    weights_ptr,
    scale_ptr,
    B_ptr,
    out_ptr,
    left_ptr,
    right_ptr,
    tiles_ptr,
    tokens_ptr,
    starts_ptr,
    ranks_ptr,
    slot,
    tokens,
    width,
    depth,
    weights_stride,
    B_stride,
    out_stride,
    left_stride,
    right_stride,
    K: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    EXTRA: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    EXTRA_PRECISION: tl.constexpr,
):
    # the columns of one tile run side by side: whole rows of the output go to memory together
    tile = tl.program_id(1)
    expert, is_used, token, is_token, start, rank = tile_at(
        tiles_ptr, tokens_ptr, starts_ptr, ranks_ptr, slot, tile, tl.num_programs(1), tokens, ROWS
    )
    if ADD and left_ptr is None:
        is_used = expert >= 0
    if not is_used:
        return

    o = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = o < width
    out_at = out_ptr + token[:, None] * out_stride + o[None, :]
    is_out = is_token[:, None] & is_column[None, :]
    if ADD:
        before = tl.load(out_at, mask=is_out, other=0.0)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + token * weights_stride + slot, mask=is_token & (expert >= 0), other=0.0)
        gate = weight * tl.load(scale_ptr + expert, mask=expert >= 0, other=0.0)

    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    s_at = s_ptr + (token * K + slot)[:, None] * P
    # a single step is no loop
    for first in range(0, P if INNER == P else rank, INNER):
        j = first + tl.arange(0, INNER)
        s = tl.load(s_at + j[None, :], mask=is_token[:, None] & (j < rank)[None, :], other=0.0)
        if weights_ptr is not None:
            s = (s.to(tl.float32) * gate[:, None]).to(s_ptr.dtype.element_ty)
        B_at = B_ptr + (start + j).to(tl.int64)[:, None] * B_stride + o[None, :]
        is_factor = (j < rank)[:, None] & is_column[None, :]
        B = tl.load(B_at, mask=is_factor, other=0.0, eviction_policy="evict_last")
        acc = tl.dot(s, B, acc, input_precision=PRECISION)
    if left_ptr is not None:
        for first in range(0, depth, EXTRA):
            c = first + tl.arange(0, EXTRA)
            left_at = left_ptr + token[:, None] * left_stride + c[None, :]
            left = tl.load(left_at, mask=is_token[:, None] & (c < depth)[None, :], other=0.0)
            right_at = right_ptr + c.to(tl.int64)[:, None] * right_stride + o[None, :]
            right = tl.load(right_at, mask=(c < depth)[:, None] & is_column[None, :], other=0.0)
            acc = tl.dot(left, right, acc, input_precision=EXTRA_PRECISION)

    if ADD:
        acc += before.to(tl.float32)
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=is_out)
