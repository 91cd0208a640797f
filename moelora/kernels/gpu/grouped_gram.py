"""Gradients of the factors: each pick's few numbers times its token's wide row, by expert. Begin with grouped_gram.

The wide axis stands on the M side of the product, which on Hopper has 64 rows at least; a rank has fewer.

Of `Tile` are read: rows (wide columns), columns (of P), inner (tokens in a step), split, warps, stages.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32
from torch import Tensor

from moelora.kernels.gpu.launch import cdiv, launch
from moelora.kernels.gpu.order import Order
from moelora.kernels.gpu.precision import dot_precision
from moelora.kernels.gpu.reduce import sum_parts
from moelora.kernels.gpu.tile import Tile


def grouped_gram(
    s_TKP: Float[Tensor, "T K P"],
    weights_TK: Float[Tensor, "T K"] | None,
    scale_E: Float[Tensor, " E"] | None,
    wide_TO: Float[Tensor, "T O"],
    order: Order,
    starts_E: Int32[Tensor, " E"],
    ranks_E: Int32[Tensor, " E"],
    total_rows: int,
    tile: Tile,
) -> Float[Tensor, "R O"]:
    """For row j of expert e: the sum over its picks of s_j * weight * scale * wide_T, in fp32.

    With the gate, s and dY this is dB; without, and with ds and x, dA. Experts without tokens get zeros. The experts
    own all of the `total_rows` rows.
    """
    (tokens, slots, P), width = s_TKP.shape, wide_TO.shape[1]
    if not tokens:
        return torch.zeros(total_rows, width, dtype=torch.float32, device=s_TKP.device)
    parts_SRO = torch.empty(tile.split, total_rows, width, dtype=torch.float32, device=s_TKP.device)
    columns = min(P, tile.columns)
    if parts_SRO.numel():
        launch(
            _gram,
            (cdiv(width, tile.rows), starts_E.shape[0] * (P // columns), tile.split),
            (
                s_TKP,
                weights_TK,
                scale_E,
                wide_TO,
                parts_SRO,
                order.tokens_KT,
                order.offsets_KF,
                starts_E,
                ranks_E,
                tokens,
                width,
                total_rows,
                order.offsets_KF.shape[1],
                0 if weights_TK is None else weights_TK.stride(0),
                wide_TO.stride(0),
            ),
            {
                "K": slots,
                "P": P,
                "ROWS": tile.rows,
                "COLUMNS": columns,
                "INNER": tile.inner,
                "PRECISION": dot_precision(s_TKP.dtype),
            },
            warps=tile.warps,
            stages=tile.stages,
        )
    return parts_SRO[0] if tile.split == 1 else sum_parts(parts_SRO, torch.float32)


@triton.jit
@no_type_check
def _gram(
    s_ptr,
    weights_ptr,
    scale_ptr,
    wide_ptr,
    parts_ptr,
    tokens_ptr,
    offsets_ptr,
    starts_ptr,
    ranks_ptr,
    tokens,
    width,
    total_rows,
    bins,
    weights_stride,
    wide_stride,
    K: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # programs of one expert run side by side: whole rows of its tokens are read together
    expert, block = tl.program_id(1) // (P // COLUMNS), tl.program_id(1) % (P // COLUMNS)
    part, parts = tl.program_id(2), tl.num_programs(2)
    rank = tl.load(ranks_ptr + expert)
    if block * COLUMNS >= rank:
        return

    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_column = o < width
    j = block * COLUMNS + tl.arange(0, COLUMNS)
    if weights_ptr is not None:
        scale = tl.load(scale_ptr + expert)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for slot in range(K):
        begin = tl.load(offsets_ptr + slot * bins + expert)
        end = tl.load(offsets_ptr + slot * bins + expert + 1)
        share = tl.cdiv(tl.cdiv(end - begin, parts), INNER) * INNER
        begin += part * share
        end = tl.minimum(begin + share, end)
        for first in range(begin, end, INNER):
            m = first + tl.arange(0, INNER)
            is_token = m < end
            token = tl.load(tokens_ptr + slot * tokens + m, mask=is_token, other=0).to(tl.int64)
            s_at = s_ptr + (token * K + slot)[:, None] * P + j[None, :]
            s = tl.load(s_at, mask=is_token[:, None], other=0.0)
            if weights_ptr is not None:
                weight = tl.load(weights_ptr + token * weights_stride + slot, mask=is_token, other=0.0)
                s = (s.to(tl.float32) * (weight * scale)[:, None]).to(s_ptr.dtype.element_ty)
            wide_at = wide_ptr + token[:, None] * wide_stride + o[None, :]
            wide = tl.load(wide_at, mask=is_token[:, None] & is_column[None, :], other=0.0)
            acc = tl.dot(tl.trans(wide), s, acc, input_precision=PRECISION)

    row = part * total_rows + tl.load(starts_ptr + expert) + j
    at = parts_ptr + row.to(tl.int64)[None, :] * width + o[:, None]
    tl.store(at, acc, mask=(j < rank)[None, :] & is_column[:, None])
