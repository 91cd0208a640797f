"""From rank rows to the wide axis: out = base + (left * gate) @ right. Begin with expand.

The second half of a mixture (left = S, right = B), and its gradient with respect to x (left = dS, right = A, with the
router's part as a tail).
"""

from typing import NamedTuple, no_type_check

import triton
import triton.language as tl
from torch import Tensor

from moelora.kernels.gpu.dropout import keep
from moelora.kernels.gpu.gate import acts, gates
from moelora.kernels.gpu.precision import dot_precision
from moelora.kernels.gpu.tile import Tile


class Gate(NamedTuple):
    """Which experts act on a token, and whose each rank row is."""

    experts_TK: Tensor
    weights_TK: Tensor
    owner_R: Tensor
    scale_E: Tensor


class Tail(NamedTuple):
    """The router's part of the gradient: scale * left @ right, where each router has `part_rows` columns of left.

    Its rows in `right_QMD` are the first `part_rows` of M.
    """

    left_TM: Tensor
    right_QMD: Tensor
    part_rows: int
    scale: float


def expand(
    left_TR: Tensor,
    right_RO: Tensor,
    out_TO: Tensor,
    tile: Tile,
    *,
    base_TO: Tensor | None = None,
    bias_O: Tensor | None = None,
    gate: Gate | None = None,
    tail: Tail | None = None,
    skip_idle: bool = False,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Write out = base + dropped((left * gate) @ right) + tail + bias into `out_TO`; rows of all may be strided.

    Args:
        base_TO: what is added to; `out_TO` itself for an addition in place, None for a fresh output.
        skip_idle: a token without an acting expert gets its base, bit for bit.
        dropout, seed: the elements of the product that fall out, as in `product`.
        tile: reads rows (tokens), columns (of O), inner (of R), split (programs that share a block of tokens), warps,
            stages.
    """
    (tokens, width), count = out_TO.shape, left_TR.shape[1]
    if not tokens:
        return out_TO
    inner = max(16, min(tile.inner, triton.next_power_of_2(max(count, 1))))
    columns = min(tile.columns, max(16, triton.next_power_of_2(width)))
    tiles = triton.cdiv(width, columns)
    split = min(tile.split, tiles)
    tail_columns = 0 if tail is None else tail.left_TM.shape[1]
    _expand[(triton.cdiv(tokens, tile.rows) * split,)](
        left_TR,
        right_RO,
        *((left_TR, right_RO) if tail is None else tail[:2]),
        out_TO if base_TO is None else base_TO,
        out_TO,
        bias_O,
        *((left_TR, left_TR, left_TR, left_TR) if gate is None else gate),
        seed,
        tokens,
        width,
        count,
        split,
        triton.cdiv(tiles, split),
        left_TR.stride(0),
        right_RO.stride(0),
        0 if tail is None else tail.left_TM.stride(0),
        0 if tail is None else tail.right_QMD.shape[0] * tail.part_rows,
        0 if tail is None else tail.right_QMD.shape[1],
        1.0 if tail is None else tail.scale,
        (out_TO if base_TO is None else base_TO).stride(0),
        out_TO.stride(0),
        dropout,
        ROWS=tile.rows,
        COLUMNS=columns,
        INNER=inner,
        BLOCKS=triton.cdiv(count, inner),
        EVEN=width % columns == 0 and tiles % split == 0 and count % inner == 0,
        TAIL=0 if tail is None else max(16, triton.next_power_of_2(tail_columns)),
        PART_ROWS=1 if tail is None else tail.part_rows,
        TOP_K=0 if gate is None else gate.experts_TK.shape[1],
        ADD=base_TO is not None,
        IN_PLACE=base_TO is out_TO,
        BIAS=bias_O is not None,
        SKIP_IDLE=skip_idle,
        DROPOUT=dropout > 0,
        PRECISION=dot_precision(left_TR.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out_TO


@triton.jit
@no_type_check
def _gated(
    left_ptr, experts_ptr, weights_ptr, owner_ptr, scale_ptr, t, is_token, r, count, left_stride, TOP_K: tl.constexpr
):
    """A block of the left side, gated; a row whose gate is closed is zero whatever it holds."""
    mask = is_token[:, None] & (r < count)[None, :]
    left = tl.load(left_ptr + t.to(tl.int64)[:, None] * left_stride + r[None, :], mask=mask, other=0.0)
    if TOP_K:
        owner = tl.load(owner_ptr + r, mask=r < count, other=-2)
        scale = tl.load(scale_ptr + owner, mask=owner >= 0, other=0.0)
        gate = gates(experts_ptr, weights_ptr, t, is_token, owner, scale, TOP_K)
        left = tl.where(gate != 0, left.to(tl.float32) * gate, 0.0).to(left.dtype)
    return left


@triton.jit
@no_type_check
def _expand(
    left_ptr,
    right_ptr,
    tail_left_ptr,
    tail_right_ptr,
    base_ptr,
    out_ptr,
    bias_ptr,
    experts_ptr,
    weights_ptr,
    owner_ptr,
    scale_ptr,
    seed_ptr,
    tokens,
    width,
    count,
    split,
    per,
    left_stride,
    right_stride,
    tail_stride,
    tail_count,
    tail_rows,
    tail_scale,
    base_stride,
    out_stride,
    dropout,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
    TAIL: tl.constexpr,
    PART_ROWS: tl.constexpr,
    TOP_K: tl.constexpr,
    ADD: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BIAS: tl.constexpr,
    SKIP_IDLE: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    t = (tl.program_id(0) // split) * ROWS + tl.arange(0, ROWS)
    is_token = t < tokens
    r = tl.arange(0, INNER)
    if SKIP_IDLE:
        active = acts(experts_ptr, weights_ptr, t, is_token, TOP_K)
    if BLOCKS == 1:
        left = _gated(
            left_ptr, experts_ptr, weights_ptr, owner_ptr, scale_ptr, t, is_token, r, count, left_stride, TOP_K
        )
    if TAIL:
        m = tl.arange(0, TAIL)
        tail_left = tl.load(
            tail_left_ptr + t.to(tl.int64)[:, None] * tail_stride + m[None, :],
            mask=is_token[:, None] & (m < tail_count)[None, :],
            other=0.0,
        )
        tail_row = (m // PART_ROWS) * tail_rows + m % PART_ROWS
    if DROPOUT:
        seed = tl.load(seed_ptr)

    first = (tl.program_id(0) % split) * per
    for tile in range(first, first + per):
        n = tile * COLUMNS + tl.arange(0, COLUMNS)
        is_column = n < width
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for block in tl.static_range(BLOCKS):
            row = block * INNER + r
            right_at = right_ptr + row.to(tl.int64)[:, None] * right_stride + n[None, :]
            if EVEN:
                right = tl.load(right_at)
            else:
                right = tl.load(right_at, mask=(row < count)[:, None] & is_column[None, :], other=0.0)
            if BLOCKS > 1:
                left = _gated(
                    left_ptr, experts_ptr, weights_ptr, owner_ptr, scale_ptr, t, is_token, row, count, left_stride, TOP_K
                )
            acc = tl.dot(left, right, acc, input_precision=PRECISION)
        if DROPOUT:
            acc = tl.where(keep(seed, t, n, width, dropout), acc / (1 - dropout), 0.0)
        if TAIL:
            tail_right = tl.load(
                tail_right_ptr + tail_row.to(tl.int64)[:, None] * width + n[None, :],
                mask=(m < tail_count)[:, None] & is_column[None, :],
                other=0.0,
            )
            acc += tl.dot(tail_left, tail_right, input_precision=PRECISION) * tail_scale
        if BIAS:
            acc += tl.load(bias_ptr + n, mask=is_column, other=0.0).to(tl.float32)[None, :]

        mask = is_token[:, None] & is_column[None, :]
        if ADD:
            base = tl.load(base_ptr + t.to(tl.int64)[:, None] * base_stride + n[None, :], mask=mask, other=0.0)
            acc += base.to(tl.float32)
        value = acc.to(out_ptr.dtype.element_ty)
        if SKIP_IDLE:
            if IN_PLACE:
                mask = mask & active[:, None]
            else:
                value = tl.where(active[:, None], value, base)
        tl.store(out_ptr + t.to(tl.int64)[:, None] * out_stride + n[None, :], value, mask=mask)
