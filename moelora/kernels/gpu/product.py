"""Tokens times rows: x @ rows.T, the wide axis summed over. Begin with product.

The shrink of the forward pass (x times A, with the router's rows in the same pass over x) and of the backward pass
(dY times B).
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


def product(
    x_TD: Tensor,
    rows_PRD: Tensor,
    tails_QMD: Tensor | None,
    tile: Tile,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    out_STN: Tensor | None = None,
) -> Tensor:
    """x @ [rows; tails].T in fp32, in `tile.split` parts along D that are still to be added: (S, T, P * R + Q * M).

    Args:
        x_TD: rows may be strided.
        rows_PRD: R rows, also 0, for each of P projections of the same input.
        tails_QMD: M more rows (16, 32, 64 or 128), of all projections together (Q = 1) or of each (Q = P), which are
            taken along in the same pass.
        tile: reads rows (tokens), columns (of R), inner (of D), split, warps and stages.
        dropout: probability with which `rows`, but not `tails`, miss an element of x.
        seed: one integer on the device, for dropout.
        out_STN: where the parts go, if not into a new tensor.
    """
    (tokens, width), (projections, count, _) = x_TD.shape, rows_PRD.shape
    routers, tail = (0, 0) if tails_QMD is None else tails_QMD.shape[:2]
    total = projections * count + routers * tail
    parts_STN = out_STN
    if parts_STN is None:
        parts_STN = torch.empty(tile.split, tokens, total, dtype=torch.float32, device=x_TD.device)
    if not tokens or not total:
        return parts_STN
    columns = max(16, min(tile.columns, power_of_two(count)))
    blocks = max(1, cdiv(count, columns))
    tile = for_tail(for_rows(tile, x_TD, rows_PRD), x_TD)
    tile = fitted(tile, tile.inner * (tile.rows + columns + tail), 0, x_TD)
    step = cdiv(cdiv(width, tile.split), tile.inner) * tile.inner
    is_even = step * tile.split == width
    launch(
        _product,
        (cdiv(tokens, tile.rows) * projections * blocks, tile.split),
        (
            x_TD,
            rows_PRD,
            tails_QMD,
            parts_STN,
            seed,
            tokens,
            width,
            count,
            projections,
            blocks,
            step,
            x_TD.stride(0),
            parts_STN.stride(0),
            parts_STN.stride(1),
            dropout,
        ),
        {
            "ROWS": tile.rows,
            "COLUMNS": columns,
            "INNER": tile.inner,
            "TAIL": tail,
            "SHARED": routers == 1,
            "HAS_ROWS": count > 0,
            "EVEN": is_even,
            "DROPOUT": dropout > 0,
            "PRECISION": dot_precision(x_TD.dtype),
        },
        # masks along the summed axis take registers
        warps=tile.warps if is_even or x_TD.dtype is torch.float32 else 8,
        stages=tile.stages,
    )
    return parts_STN


@triton.jit
@no_type_check
def _product(
    x_ptr,
    rows_ptr,
    tails_ptr,
    parts_ptr,
    seed_ptr,
    tokens,
    width,
    count,
    projections,
    blocks,
    step,
    x_stride,
    part_stride,
    parts_stride,
    dropout,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    TAIL: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    EVEN: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # programs on the same tokens stand side by side, so that only the first reads x from memory
    here = tl.program_id(0) % (projections * blocks)
    t = (tl.program_id(0) // (projections * blocks)) * ROWS + tl.arange(0, ROWS)
    projection, block = here // blocks, here % blocks
    part = tl.program_id(1)
    begin = part * step

    n = block * COLUMNS + tl.arange(0, COLUMNS)
    d = begin + tl.arange(0, INNER)
    is_token, is_row = t < tokens, n < count
    x_at = x_ptr + t.to(tl.int64)[:, None] * x_stride + d[None, :]
    rows_at = rows_ptr + (projection * count + n).to(tl.int64)[None, :] * width + d[:, None]
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    if TAIL:
        router = 0 if SHARED else projection
        m = router * TAIL + tl.arange(0, TAIL)
        tails_at = tails_ptr + m.to(tl.int64)[None, :] * width + d[:, None]
        tail_acc = tl.zeros((ROWS, TAIL), tl.float32)
    if DROPOUT:
        seed = tl.load(seed_ptr)

    for offset in range(0, step, INNER):
        inside = begin + offset + tl.arange(0, INNER) < width
        if EVEN:
            x = tl.load(x_at, mask=is_token[:, None], other=0.0)
        else:
            x = tl.load(x_at, mask=is_token[:, None] & inside[None, :], other=0.0)
        if TAIL:
            if EVEN:
                tails = tl.load(tails_at)
            else:
                tails = tl.load(tails_at, mask=inside[:, None], other=0.0)
            # the router's scores are fp32 whatever the caller allows to the rest
            tail_acc = tl.dot(x, tails, tail_acc, input_precision="tf32x3")
            tails_at += INNER
        if HAS_ROWS:
            if EVEN:
                rows = tl.load(rows_at, mask=is_row[None, :], other=0.0)
            else:
                rows = tl.load(rows_at, mask=is_row[None, :] & inside[:, None], other=0.0)
            if DROPOUT:
                kept = keep(seed, t, begin + offset + tl.arange(0, INNER), width, dropout)
                x = tl.where(kept, x / (1 - dropout), 0.0).to(rows.dtype)
            acc = tl.dot(x, rows, acc, input_precision=PRECISION)
            rows_at += INNER
        x_at += INNER

    to = parts_ptr + part.to(tl.int64) * part_stride + t.to(tl.int64)[:, None] * parts_stride
    if HAS_ROWS:
        tl.store(to + projection * count + n[None, :], acc, mask=is_token[:, None] & is_row[None, :])
    if TAIL:
        if (block == 0) & ((projection == 0) | (not SHARED)):
            tl.store(to + projections * count + m[None, :], tail_acc, mask=is_token[:, None])
