"""Products over tokens: left.T @ wide, for the gradients of factors. Begin with gram.

dB = (S * gate).T @ dY, and dA = dS.T @ x with the router's gradient in the same pass over x.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from moelora.kernels.gpu.dropout import keep
from moelora.kernels.gpu.launch import cdiv, launch, power_of_two
from moelora.kernels.gpu.precision import dot_precision
from moelora.kernels.gpu.tile import Tile, fitted, for_rows, for_tail


def gram(
    left_TN: Tensor,
    tail_TM: Tensor | None,
    wide_TO: Tensor,
    tile: Tile,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """[left, tail].T @ wide in fp32, in `tile.split` parts over the tokens that are still to be added: (S, N + M, O).

    Args:
        left_TN: any number of columns, also 0; rows of all may be strided.
        tail_TM: a few more columns (16, 32, 64 or 128), taken along in the same pass.
        tile: reads rows (of O), columns (of N), inner (tokens of a step), split, warps and stages.
        dropout, seed: elements of `wide` that `left`, but not the tail, misses, as in `product`.
    """
    (tokens, width), count = wide_TO.shape, left_TN.shape[1]
    tail = 0 if tail_TM is None else tail_TM.shape[1]
    total = count + tail
    make = torch.empty if tokens else torch.zeros
    parts_SNO = make(tile.split, total, width, dtype=torch.float32, device=wide_TO.device)
    if not tokens or not total:
        return parts_SNO
    columns = max(16, min(tile.columns, power_of_two(count)))
    blocks = max(1, cdiv(count, columns))
    tile = for_tail(for_rows(tile, left_TN, tail_TM, wide_TO), wide_TO)
    tile = fitted(tile, tile.inner * (tile.rows + columns + tail), 0, wide_TO)
    step = cdiv(cdiv(tokens, tile.split), tile.inner) * tile.inner
    launch(
        _gram,
        (cdiv(width, tile.rows) * blocks, tile.split),
        (
            left_TN,
            left_TN if tail_TM is None else tail_TM,
            wide_TO,
            parts_SNO,
            seed,
            tokens,
            width,
            count,
            blocks,
            step,
            total,
            left_TN.stride(0),
            0 if tail_TM is None else tail_TM.stride(0),
            wide_TO.stride(0),
            dropout,
        ),
        {
            "ROWS": tile.rows,
            "COLUMNS": columns,
            "INNER": tile.inner,
            "TAIL": tail,
            "HAS_LEFT": count > 0,
            "EVEN": step * tile.split == tokens,
            "DROPOUT": dropout > 0,
            "PRECISION": dot_precision(wide_TO.dtype),
        },
        warps=tile.warps,
        stages=tile.stages,
    )
    return parts_SNO


@triton.jit
@no_type_check
def _gram(
    left_ptr,
    tail_ptr,
    wide_ptr,
    parts_ptr,
    seed_ptr,
    tokens,
    width,
    count,
    blocks,
    step,
    total,
    left_stride,
    tail_stride,
    wide_stride,
    dropout,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    TAIL: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    EVEN: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # the wide axis is the dot's first: with the rank there, few rows would leave the tensor core's fast instruction
    block = tl.program_id(0) % blocks
    o = (tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)
    n = block * COLUMNS + tl.arange(0, COLUMNS)
    is_wide, is_column = o < width, n < count
    part = tl.program_id(1)
    begin = part * step
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    if TAIL:
        m = tl.arange(0, TAIL)
        tail_acc = tl.zeros((ROWS, TAIL), tl.float32)
    if DROPOUT:
        seed = tl.load(seed_ptr)

    t = (begin + tl.arange(0, INNER)).to(tl.int64)
    wide_at = wide_ptr + t[:, None] * wide_stride + o[None, :]
    left_at = left_ptr + t[:, None] * left_stride + n[None, :]
    if TAIL:
        tail_at = tail_ptr + t[:, None] * tail_stride + m[None, :]
    for offset in range(0, step, INNER):
        is_token = begin + offset + tl.arange(0, INNER) < tokens
        if EVEN:
            wide = tl.load(wide_at, mask=is_wide[None, :], other=0.0)
        else:
            wide = tl.load(wide_at, mask=is_token[:, None] & is_wide[None, :], other=0.0)
        if TAIL:
            if EVEN:
                tail = tl.load(tail_at)
            else:
                tail = tl.load(tail_at, mask=is_token[:, None], other=0.0)
            tail_acc = tl.dot(tl.trans(wide), tail, tail_acc, input_precision=PRECISION)
            tail_at += INNER * tail_stride
        if HAS_LEFT:
            if EVEN:
                left = tl.load(left_at, mask=is_column[None, :], other=0.0)
            else:
                left = tl.load(left_at, mask=is_token[:, None] & is_column[None, :], other=0.0)
            if DROPOUT:
                kept = keep(seed, begin + offset + tl.arange(0, INNER), o, width, dropout)
                wide = tl.where(kept, wide / (1 - dropout), 0.0).to(left.dtype)
            acc = tl.dot(tl.trans(wide), left, acc, input_precision=PRECISION)
            left_at += INNER * left_stride
        wide_at += INNER * wide_stride

    to = parts_ptr + (part * total).to(tl.int64) * width + o[:, None]
    if HAS_LEFT:
        at = to + (n.to(tl.int64) * width)[None, :]
        tl.store(at, acc, mask=is_wide[:, None] & is_column[None, :])
    if TAIL:
        if block == 0:
            tail_to = to + ((count + m).to(tl.int64) * width)[None, :]
            tl.store(tail_to, tail_acc, mask=is_wide[:, None])
