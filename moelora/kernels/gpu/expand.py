"""From rank rows to the wide axis: out = base + left @ right. Begin with expand.

The second half of a mixture (left = S * gate, right = B), and its gradient with respect to x (left = dS and the scores'
gradient, right = A and the router).
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from moelora.kernels.gpu.dropout import keep
from moelora.kernels.gpu.gate import acts
from moelora.kernels.gpu.launch import cdiv, launch, power_of_two
from moelora.kernels.gpu.precision import dot_precision
from moelora.kernels.gpu.tile import Tile, fitted


def expand(
    left_TR: Tensor,
    right_RO: Tensor,
    out_TO: Tensor,
    tile: Tile,
    *,
    base_TO: Tensor | None = None,
    bias_O: Tensor | None = None,
    idle: tuple[Tensor, Tensor] | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Write out = base + dropped(left @ right) + bias into `out_TO`; rows of all may be strided.

    Args:
        base_TO: what is added to; `out_TO` itself for an addition in place, None for a fresh output.
        idle: ids and weights (T, K): a token without an acting expert gets its base, bit for bit.
        dropout, seed: the elements of the product that fall out, as in `product`.
        tile: reads rows (tokens), columns (of O), inner (of R), split (programs that share a block of tokens), warps,
            stages. A tile of no rows stands for cuBLAS, where nothing but the product is asked for.
    """
    (tokens, width), count = out_TO.shape, left_TR.shape[1]
    if not tokens:
        return out_TO
    if not tile.rows and base_TO is None and bias_O is None and not dropout:
        return torch.mm(left_TR, right_RO, out=out_TO)
    if not tile.rows:
        tile = Tile(rows=128, columns=128, inner=64, split=4, warps=8, stages=2)
    if dropout:
        # the counters' arithmetic takes the registers of half a tile
        tile = tile._replace(rows=64, columns=min(64, tile.columns), warps=8)
    inner = max(16, min(tile.inner, power_of_two(count)))
    if width % tile.columns or count % inner:
        # masks in every step take the registers of a large tile
        tile = tile._replace(rows=64, columns=128 // left_TR.element_size(), warps=8)
    columns = min(tile.columns, max(16, power_of_two(width)))
    blocks = cdiv(count, inner)
    rows_too = (inner * tile.rows, 0) if blocks > 1 else (0, inner * tile.rows)
    tile = fitted(tile, inner * columns + rows_too[0], rows_too[1], left_TR)
    tiles = cdiv(width, columns)
    split = min(tile.split, tiles)
    base = out_TO if base_TO is None else base_TO
    experts_TK, weights_TK = (None, None) if idle is None else idle
    launch(
        _expand,
        (cdiv(tokens, tile.rows) * split,),
        (
            left_TR,
            right_RO,
            base,
            out_TO,
            bias_O,
            experts_TK,
            weights_TK,
            seed,
            tokens,
            width,
            count,
            split,
            cdiv(tiles, split),
            left_TR.stride(0),
            right_RO.stride(0),
            base.stride(0),
            out_TO.stride(0),
            dropout,
        ),
        {
            "ROWS": tile.rows,
            "COLUMNS": columns,
            "INNER": inner,
            "BLOCKS": blocks,
            "EVEN": width % columns == 0 and tiles % split == 0 and count % inner == 0,
            "TOP_K": 0 if idle is None else idle[0].shape[1],
            "ADD": base_TO is not None,
            "IN_PLACE": base_TO is out_TO,
            "BIAS": bias_O is not None,
            "DROPOUT": dropout > 0,
            "PRECISION": dot_precision(left_TR.dtype),
        },
        warps=tile.warps,
        stages=tile.stages,
    )
    return out_TO


@triton.jit
@no_type_check
def _expand(
    left_ptr,
    right_ptr,
    base_ptr,
    out_ptr,
    bias_ptr,
    experts_ptr,
    weights_ptr,
    seed_ptr,
    tokens,
    width,
    count,
    split,
    per,
    left_stride,
    right_stride,
    base_stride,
    out_stride,
    dropout,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
    TOP_K: tl.constexpr,
    ADD: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    t = (tl.program_id(0) // split) * ROWS + tl.arange(0, ROWS)
    is_token = t < tokens
    r = tl.arange(0, INNER)
    left_at = left_ptr + t.to(tl.int64)[:, None] * left_stride + r[None, :]
    if TOP_K:
        active = acts(experts_ptr, weights_ptr, t, is_token, TOP_K)
    if BLOCKS == 1:
        # read once for all columns
        left = tl.load(left_at, mask=is_token[:, None] & (r < count)[None, :], other=0.0)
    if DROPOUT:
        seed = tl.load(seed_ptr)

    first = (tl.program_id(0) % split) * per
    for tile in range(first, first + per):
        n = tile * COLUMNS + tl.arange(0, COLUMNS)
        is_column = n < width
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        if BLOCKS == 1:
            right_at = right_ptr + r.to(tl.int64)[:, None] * right_stride + n[None, :]
            if EVEN:
                right = tl.load(right_at)
            else:
                right = tl.load(right_at, mask=(r < count)[:, None] & is_column[None, :], other=0.0)
            acc = tl.dot(left, right, acc, input_precision=PRECISION)
        else:
            for block in range(BLOCKS):
                row = block * INNER + r
                some = tl.load(left_at + block * INNER, mask=is_token[:, None] & (row < count)[None, :], other=0.0)
                right_at = right_ptr + row.to(tl.int64)[:, None] * right_stride + n[None, :]
                if EVEN:
                    right = tl.load(right_at)
                else:
                    right = tl.load(right_at, mask=(row < count)[:, None] & is_column[None, :], other=0.0)
                acc = tl.dot(some, right, acc, input_precision=PRECISION)
        if DROPOUT:
            acc = tl.where(keep(seed, t, n, width, dropout), acc / (1 - dropout), 0.0)
        if BIAS:
            acc += tl.load(bias_ptr + n, mask=is_column, other=0.0).to(tl.float32)[None, :]

        mask = is_token[:, None] & is_column[None, :]
        if ADD:
            base = tl.load(base_ptr + t.to(tl.int64)[:, None] * base_stride + n[None, :], mask=mask, other=0.0)
            acc += base.to(tl.float32)
        value = acc.to(out_ptr.dtype.element_ty)
        if TOP_K:
            if IN_PLACE:
                mask = mask & active[:, None]
            else:
                value = tl.where(active[:, None], value, base)
        tl.store(out_ptr + t.to(tl.int64)[:, None] * out_stride + n[None, :], value, mask=mask)
