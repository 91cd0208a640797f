"""Each token times the rows of its own experts, the wide axis summed over. Begin with grouped_shrink.

The same loop serves forward (x times A) and backward (dY times B). Rows of x are fetched where they lie, and results
are stored where their token is, so nothing of x's width is ever permuted or copied. P is the largest rank, filled up
to a power of two of at least 16; what lies behind an expert's own rank is 0, and so is what has no expert.

Of `Tile` are read: rows (tokens; those of the order), columns (of P), inner (of the wide axis), warps, stages.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32
from torch import Tensor

from moelora.kernels.gpu.launch import launch, power_of_two
from moelora.kernels.gpu.order import Order, tile_at
from moelora.kernels.gpu.precision import dot_precision
from moelora.kernels.gpu.reduce import sum_parts
from moelora.kernels.gpu.tile import Tile


def padded_rank(widest: int) -> int:
    """P: columns that a rank takes in compact tensors."""
    return max(16, power_of_two(widest))


def grouped_shrink(
    x_TD: Float[Tensor, "T D"],
    A_RD: Float[Tensor, "R D"],
    order: Order,
    starts_E: Int32[Tensor, " E"],
    ranks_E: Int32[Tensor, " E"],
    widest: int,
    tile: Tile,
) -> Float[Tensor, "T K P"]:
    """s_TKP = x_T · A_e for the rows of the expert e that token T has in slot K, in x's dtype."""
    (tokens, width), (slots, entries) = x_TD.shape, order.tiles_KN3.shape[:2]
    assert tile.rows == order.rows, (tile, order.rows)
    P = padded_rank(widest)
    s_TKP = x_TD.new_empty(tokens, slots, P)
    columns = min(P, tile.columns)
    if tokens:
        launch(
            _shrink,
            (entries, slots, P // columns),
            (
                x_TD,
                A_RD,
                s_TKP,
                order.tiles_KN3,
                order.tokens_KT,
                starts_E,
                ranks_E,
                tokens,
                width,
                x_TD.stride(0),
                A_RD.stride(0),
            ),
            {
                "P": P,
                "ROWS": tile.rows,
                "COLUMNS": columns,
                "INNER": tile.inner,
                "EVEN": width % tile.inner == 0,
                "PRECISION": dot_precision(x_TD.dtype),
            },
            warps=tile.warps,
            stages=tile.stages,
        )
    return s_TKP


def grouped_shrink_backward(
    grad_TO: Float[Tensor, "T O"],
    B_RO: Float[Tensor, "R O"],
    s_TKP: Float[Tensor, "T K P"],
    weights_TK: Float[Tensor, "T K"],
    scale_E: Float[Tensor, " E"],
    order: Order,
    starts_E: Int32[Tensor, " E"],
    ranks_E: Int32[Tensor, " E"],
    tile: Tile,
) -> tuple[Float[Tensor, "T K P"], Float[Tensor, "T K"]]:
    """Gradients of s (in its dtype) and of the weights (fp32), from the gradient of the output.

    With u = dY_T · B_e: ds = u * weight * scale and dweight = scale * <s, u>.
    """
    (tokens, width), (_, slots, P) = grad_TO.shape, s_TKP.shape
    assert tile.rows == order.rows, (tile, order.rows)
    ds_TKP = s_TKP.new_empty(s_TKP.shape)
    columns = min(P, tile.columns)
    parts_STK = torch.empty(P // columns, tokens, slots, dtype=torch.float32, device=s_TKP.device)
    if tokens:
        launch(
            _shrink_backward,
            (order.tiles_KN3.shape[1], slots, P // columns),
            (
                grad_TO,
                B_RO,
                s_TKP,
                weights_TK,
                scale_E,
                ds_TKP,
                parts_STK,
                order.tiles_KN3,
                order.tokens_KT,
                starts_E,
                ranks_E,
                tokens,
                width,
                grad_TO.stride(0),
                B_RO.stride(0),
                weights_TK.stride(0),
            ),
            {
                "P": P,
                "ROWS": tile.rows,
                "COLUMNS": columns,
                "INNER": tile.inner,
                "EVEN": width % tile.inner == 0,
                "PRECISION": dot_precision(grad_TO.dtype),
            },
            warps=tile.warps,
            stages=tile.stages,
        )
    return ds_TKP, parts_STK[0] if columns == P else sum_parts(parts_STK, torch.float32)


@triton.jit
@no_type_check
def _multiply(
    wide_ptr,
    factor_ptr,
    token,
    is_token,
    row,
    is_row,
    depth,
    width,
    wide_stride,
    factor_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of a wide tensor times rows of a factor, in fp32. Depth is its width, or 0 where there is nothing to do."""
    d = tl.arange(0, INNER)
    wide_at = wide_ptr + token[:, None] * wide_stride + d[None, :]
    factor_at = factor_ptr + row.to(tl.int64)[None, :] * factor_stride + d[:, None]
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, depth, INNER):
        if EVEN:
            wide = tl.load(wide_at, mask=is_token[:, None], other=0.0)
            factor = tl.load(factor_at, mask=is_row[None, :], other=0.0, eviction_policy="evict_last")
        else:
            inside = first + d < width
            wide = tl.load(wide_at, mask=is_token[:, None] & inside[None, :], other=0.0)
            factor = tl.load(factor_at, mask=is_row[None, :] & inside[:, None], other=0.0, eviction_policy="evict_last")
        acc = tl.dot(wide, factor, acc, input_precision=PRECISION)
        wide_at += INNER
        factor_at += INNER
    return acc


@triton.jit
@no_type_check
def _multiply_tile(
    wide_ptr,
    factor_ptr,
    tiles_ptr,
    tokens_ptr,
    starts_ptr,
    ranks_ptr,
    tokens,
    width,
    wide_stride,
    factor_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """This program's tile: expert, tokens, which of them exist, columns of P, and the products of the two."""
    # the tiles of one expert run side by side, so that its rows stay in L2
    tile, slot, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    expert, _, token, is_token, start, rank = tile_at(
        tiles_ptr, tokens_ptr, starts_ptr, ranks_ptr, slot, tile, tl.num_programs(0), tokens, ROWS
    )
    j = part * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.where(part * COLUMNS < rank, width, 0)
    acc = _multiply(
        wide_ptr,
        factor_ptr,
        token,
        is_token,
        start + j,
        j < rank,
        depth,
        width,
        wide_stride,
        factor_stride,
        ROWS,
        COLUMNS,
        INNER,
        EVEN,
        PRECISION,
    )
    return expert, token, is_token, j, acc


@triton.jit
@no_type_check
def _shrink(
    x_ptr,
    A_ptr,
    s_ptr,
    tiles_ptr,
    tokens_ptr,
    starts_ptr,
    ranks_ptr,
    tokens,
    width,
    x_stride,
    A_stride,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    _, token, is_token, j, s = _multiply_tile(
        x_ptr,
        A_ptr,
        tiles_ptr,
        tokens_ptr,
        starts_ptr,
        ranks_ptr,
        tokens,
        width,
        x_stride,
        A_stride,
        ROWS,
        COLUMNS,
        INNER,
        EVEN,
        PRECISION,
    )
    slot, slots = tl.program_id(1), tl.num_programs(1)
    s_at = s_ptr + (token * slots + slot)[:, None] * P + j[None, :]
    tl.store(s_at, s.to(s_ptr.dtype.element_ty), mask=is_token[:, None])


@triton.jit
@no_type_check
def _shrink_backward(
    grad_ptr,
    B_ptr,
    s_ptr,
    weights_ptr,
    scale_ptr,
    ds_ptr,
    dweights_ptr,
    tiles_ptr,
    tokens_ptr,
    starts_ptr,
    ranks_ptr,
    tokens,
    width,
    grad_stride,
    B_stride,
    weights_stride,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert, token, is_token, j, u = _multiply_tile(
        grad_ptr,
        B_ptr,
        tiles_ptr,
        tokens_ptr,
        starts_ptr,
        ranks_ptr,
        tokens,
        width,
        grad_stride,
        B_stride,
        ROWS,
        COLUMNS,
        INNER,
        EVEN,
        PRECISION,
    )
    slot, slots, part = tl.program_id(1), tl.num_programs(1), tl.program_id(2)
    has_expert = is_token & (expert >= 0)
    scale = tl.load(scale_ptr + expert, mask=expert >= 0, other=0.0)
    weight = tl.load(weights_ptr + token * weights_stride + slot, mask=has_expert, other=0.0)
    pick = token * slots + slot
    at = pick[:, None] * P + j[None, :]
    s = tl.load(s_ptr + at, mask=has_expert[:, None], other=0.0).to(tl.float32)
    dweights_at = dweights_ptr + part.to(tl.int64) * tokens * slots + pick
    tl.store(dweights_at, tl.sum(s * u, 1) * scale, mask=is_token)
    tl.store(ds_ptr + at, (u * (weight * scale)[:, None]).to(ds_ptr.dtype.element_ty), mask=is_token[:, None])
