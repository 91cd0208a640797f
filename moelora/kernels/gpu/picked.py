"""The mixture for a few tokens that picked among many experts: only their rows are read. Begin with picked_shrink.

    parts_CTKP = picked_shrink(...)         x times the rows of A of each pick, in C parts
    picked_expand(parts_CTKP, ...)          base plus gate times that, times the rows of B

`router_logits` before them, with `choose_experts` of `choose.py`, makes the choice. All three are bound by memory, so
they multiply outside the tensor cores (but for a router with 16 tokens or more), and cut the summed axis into parts to
have a program for each processor.

Fields of `Tile`, powers of two but for `split`; all read `warps` and `stages`:
    picked_shrink   rows: rank rows of a program; inner: its step along D; split: parts of D.
    picked_expand   rows: rank rows, of all picks one after the other, at a time; columns: of O.
    router_logits   rows: tokens of a program; columns: its experts; inner: its step along D; split: parts of D.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from moelora.kernels.gpu.launch import cdiv, launch, power_of_two
from moelora.kernels.gpu.tile import Tile


def picked_shrink(
    x_TD: Float[Tensor, "T D"],
    A_RD: Float[Tensor, "R D"],
    ids_TK: Int[Tensor, "T K"],
    starts_E: Int[Tensor, " E"],
    ranks_E: Int[Tensor, " E"],
    widest: int,
    tile: Tile,
) -> Float[Tensor, "C T K P"]:
    """x times the rows of A of every pick, in fp32, in `tile.split` parts along D; 0 from the expert's rank on.

    P is the rank of the widest expert, `widest`, rounded up to a power of two.
    """
    (T, D), K = x_TD.shape, ids_TK.shape[1]
    P = power_of_two(max(widest, 1))
    parts_CTKP = torch.empty(tile.split, T, K, P, dtype=torch.float32, device=x_TD.device)
    if T == 0:
        return parts_CTKP

    ROWS = min(tile.rows, P)
    launch(
        _picked_shrink,
        (T * K, tile.split, cdiv(P, ROWS)),
        (
            x_TD,
            A_RD,
            ids_TK,
            starts_E,
            ranks_E,
            parts_CTKP,
            D,
            x_TD.stride(0),
            A_RD.stride(0),
            ids_TK.stride(0),
        ),
        {"K": K, "P": P, "ROWS": ROWS, "INNER": tile.inner, "STEPS": cdiv(cdiv(D, tile.split), tile.inner)},
        warps=tile.warps,
        stages=tile.stages,
    )
    return parts_CTKP


@triton.jit
@no_type_check
def _picked_shrink(
    x_TD, A_RD, ids_TK, starts_E, ranks_E, parts_CTKP,
    D, stride_x, stride_A, stride_ids,
    K: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    pick, part = tl.program_id(0), tl.program_id(1)
    token = (pick // K).to(tl.int64)
    expert = tl.load(ids_TK + token * stride_ids + pick % K).to(tl.int64)
    start = tl.load(starts_E + expert, mask=expert >= 0, other=0).to(tl.int64)
    rank = tl.load(ranks_E + expert, mask=expert >= 0, other=0)

    # an empty slot has no rows, and so reads nothing and writes zeros
    rows = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    A_rows = A_RD + (start + rows)[:, None] * stride_A
    total = tl.zeros((ROWS, INNER), tl.float32)
    for step in range(STEPS):
        columns = (part * STEPS + step) * INNER + tl.arange(0, INNER)
        mask = (rows < rank)[:, None] & (columns < D)[None, :]
        x = tl.load(x_TD + token * stride_x + columns, mask=columns < D, other=0.0)
        A = tl.load(A_rows + columns[None, :], mask=mask, other=0.0)
        total += A.to(tl.float32) * x.to(tl.float32)[None, :]

    # where a row is only filled up, 0 times an infinite x is NaN
    sums = tl.where(rows < rank, tl.sum(total, axis=1), 0.0)
    place = (part.to(tl.int64) * tl.num_programs(0) + pick) * P
    tl.store(parts_CTKP + place + rows, sums, mask=rows < P)


def picked_expand(
    parts_CTKP: Float[Tensor, "C T K P"],
    ids_TK: Int[Tensor, "T K"],
    weights_TK: Float[Tensor, "T K"],
    scale_E: Float[Tensor, " E"],
    B_RO: Float[Tensor, "R O"],
    starts_E: Int[Tensor, " E"],
    ranks_E: Int[Tensor, " E"],
    base_TO: Float[Tensor, "T O"],
    out_TO: Float[Tensor, "T O"],
    tile: Tile,
) -> None:
    """Write base plus the gated sum over the picks' rows of B to `out_TO`, which may be `base_TO` itself.

    The base's dtype is the one that gated sums are rounded to. A token none of whose picks acts keeps its base output
    bit for bit; a pick without an expert or with weight 0 is not read.
    """
    splits, T, K, P = parts_CTKP.shape
    O = base_TO.shape[1]
    assert parts_CTKP.is_contiguous()
    assert out_TO.dtype == base_TO.dtype
    if T == 0:
        return

    ROWS = min(tile.rows, power_of_two(K * P))

    launch(
        _picked_expand,
        (T, cdiv(O, tile.columns)),
        (
            parts_CTKP,
            ids_TK,
            weights_TK,
            scale_E,
            B_RO,
            starts_E,
            ranks_E,
            base_TO,
            out_TO,
            O,
            ids_TK.stride(0),
            weights_TK.stride(0),
            B_RO.stride(0),
            base_TO.stride(0),
            out_TO.stride(0),
        ),
        {
            "IN_PLACE": out_TO.data_ptr() == base_TO.data_ptr(),
            "SPLIT": splits,
            "K": K,
            "P": P,
            "ROWS": ROWS,
            "COLUMNS": tile.columns,
        },
        # several rounds over the rows leave each thread less room
        warps=tile.warps * (2 if K * P > ROWS else 1),
        stages=tile.stages,
    )


@triton.jit
@no_type_check
def _picked_expand(
    parts_CTKP, ids_TK, weights_TK, scale_E, B_RO, starts_E, ranks_E, base_TO, out_TO,
    O, stride_ids, stride_weights, stride_B, stride_base, stride_out,
    IN_PLACE: tl.constexpr, SPLIT: tl.constexpr, K: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    base = tl.load(base_TO + token * stride_base + columns, mask=columns < O, other=0.0)
    ids, weights = ids_TK + token * stride_ids, weights_TK + token * stride_weights
    parts, part_size = tl.arange(0, triton.next_power_of_2(SPLIT)), tl.num_programs(0) * (K * P)
    parts_at = parts_CTKP + token * (K * P)

    # the rows of all picks, one after the other, so that all are on their way at once
    active = 0
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, K * P, ROWS):
        rows = first + tl.arange(0, ROWS)
        slots, places = rows // P, rows % P
        expert = tl.load(ids + slots, mask=slots < K, other=-1).to(tl.int64)
        weight = tl.load(weights + slots, mask=slots < K, other=0.0)
        acts = (expert >= 0) & (weight != 0)
        active = tl.maximum(active, tl.max(acts.to(tl.int32), axis=0))

        # add the parts up, read as a tile: one by one, every thread that needs a sum would read all of its parts
        mask = acts[None, :] & (parts[:, None] < SPLIT)
        hidden = tl.sum(tl.load(parts_at + parts[:, None] * part_size + rows[None, :], mask=mask, other=0.0), axis=0)

        # gate in fp32, then round as the dense path does
        own = acts & (places < tl.load(ranks_E + expert, mask=acts, other=0))
        gate = weight * tl.load(scale_E + expert, mask=acts, other=0.0)
        gated = tl.where(own, hidden * gate, 0.0).to(base.dtype).to(tl.float32)

        # rows of no expert are not read
        B_rows = B_RO + (tl.load(starts_E + expert, mask=acts, other=0).to(tl.int64) + places) * stride_B
        B = tl.load(B_rows[:, None] + columns[None, :], mask=own[:, None] & (columns < O)[None, :], other=0.0)
        total += gated[:, None] * B.to(tl.float32)

    mixed = (base.to(tl.float32) + tl.sum(total, axis=0)).to(base.dtype)
    mask = (columns < O) & ((active > 0) | (not IN_PLACE))
    tl.store(out_TO + token * stride_out + columns, tl.where(active > 0, mixed, base), mask=mask)


def router_logits(x_TD: Float[Tensor, "T D"], W_ED: Float[Tensor, "E D"], tile: Tile) -> Float[Tensor, "C T E"]:
    """Products of every token with every row of a router's fp32 weight, in fp32, in `tile.split` parts along D."""
    (T, D), E = x_TD.shape, W_ED.shape[0]
    parts_CTE = torch.empty(tile.split, T, E, dtype=torch.float32, device=x_TD.device)
    if T == 0:
        return parts_CTE

    ROWS = min(tile.rows, power_of_two(T))
    launch(
        _router_logits,
        (cdiv(T, ROWS), cdiv(E, tile.columns), tile.split),
        (
            x_TD,
            W_ED,
            parts_CTE,
            T,
            D,
            E,
            x_TD.stride(0),
            W_ED.stride(0),
        ),
        {"ROWS": ROWS, "COLUMNS": tile.columns, "INNER": tile.inner, "STEPS": cdiv(cdiv(D, tile.split), tile.inner)},
        warps=tile.warps,
        stages=tile.stages,
    )
    return parts_CTE


@triton.jit
@no_type_check
def _router_logits(
    x_TD, W_ED, parts_CTE, T, D, E, stride_x, stride_W,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(2)
    first = tl.program_id(0) * ROWS
    rows, experts = first + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    x_rows, W_rows = x_TD + rows.to(tl.int64)[:, None] * stride_x, W_ED + experts.to(tl.int64)[:, None] * stride_W
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(STEPS):
        inner = (part * STEPS + step) * INNER + tl.arange(0, INNER)
        W = tl.load(W_rows + inner[None, :], mask=(experts < E)[:, None] & (inner < D)[None, :], other=0.0)
        W = W.to(tl.float32)
        if ROWS >= 16:
            x = tl.load(x_rows + inner[None, :], mask=(rows < T)[:, None] & (inner < D)[None, :], other=0.0)
            # three products of 11 bits give 22 bits of W, and a 16-bit x whole; plain fp32 products of 64 tokens
            # would take longer than reading W
            total = tl.dot(x.to(tl.float32), tl.trans(W), total, input_precision="tf32x3")
        else:
            # W stays in registers while the tokens go by
            for row in tl.static_range(ROWS):
                x_row = x_TD + (first + row).to(tl.int64) * stride_x
                x = tl.load(x_row + inner, mask=(inner < D) & (first + row < T), other=0.0)
                products = tl.sum(W * x.to(tl.float32)[None, :], axis=1)[None, :]
                total += tl.where(rows[:, None] == first + row, products, 0.0)

    places = (part.to(tl.int64) * T + rows)[:, None] * E + experts[None, :]
    tl.store(parts_CTE + places, total, mask=(rows < T)[:, None] & (experts < E)[None, :])
