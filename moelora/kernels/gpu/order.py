"""Tokens in the order of their experts: what the sorted path walks along. Begin with sort_by_expert.

A stable counting sort on the device, one order for each of the K slots. Blocks of tokens count their experts; a prefix
over the blocks follows; then each block knows where its tokens go. A token's place among the equals of its own block
comes from comparing all pairs, whose cost does not depend on the number of experts.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, Int32
from torch import Tensor

from moelora.kernels.gpu.launch import cdiv, launch, power_of_two

CHUNK = 128
"""Experts that are looked at together."""


class Order(NamedTuple):
    """For each slot, the tokens sorted by the expert that they have there, cut into tiles of one expert each.

    F = E + 1, the last being "none": the tokens that have no expert in this slot, or for which no slot acts.

    Attributes:
        tokens_KT: token numbers, by expert and within an expert ascending. Token t of "none" stands behind all others,
            and as -1 - t.
        tiles_KN3: expert, begin and end (in `tokens_KT`) of every tile; N = ceil(T / rows) + E. Behind the experts'
            tiles come those of "none", with expert -1, and then unused ones, with expert -1 and nothing between begin
            and end.
        offsets_KF: where in `tokens_KT` each expert begins; the last one, where "none" begins.
        rows: the largest number of tokens in a tile.
    """

    tokens_KT: Int32[Tensor, "K T"]
    tiles_KN3: Int32[Tensor, "K N 3"]
    offsets_KF: Int32[Tensor, "K F"]
    rows: int


def sort_by_expert(
    ids_TK: Int[Tensor, "T K"], weights_TK: Float[Tensor, "T K"] | None, num_experts: int, rows: int
) -> Order:
    """The order of a routing, in three launches whose shapes depend on T, K and E alone.

    Args:
        ids_TK: distinct within a token; -1 for none. Rows may be strided.
        weights_TK: a token whose weights are all 0 is idle, and has no expert in any slot. None: no weight is 0.
        num_experts: E.
        rows: tokens in a tile, which is `Tile.rows` of the kernels that walk along this order.
    """
    (tokens, slots), bins = ids_TK.shape, num_experts + 1
    entries = cdiv(tokens, rows) + num_experts
    block = 128 if tokens <= 32768 else 256
    blocks = cdiv(tokens, block)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=ids_TK.device)

    order = Order(empty(slots, tokens), empty(slots, entries, 3), empty(slots, bins), rows)
    if not tokens:
        return order._replace(tiles_KN3=order.tiles_KN3.fill_(-1), offsets_KF=order.offsets_KF.zero_())

    counts_KBF, before_KBF, totals_KF = empty(slots, blocks, bins), empty(slots, blocks, bins), empty(slots, bins)
    strides = (ids_TK.stride(0), 0 if weights_TK is None else weights_TK.stride(0))
    sizes = {"K": slots, "SLOTS": power_of_two(slots), "BLOCK": block, "CHUNK": CHUNK}
    launch(
        _count,
        (blocks, slots),
        (
            ids_TK,
            weights_TK,
            counts_KBF,
            tokens,
            bins,
            *strides,
        ),
        {**sizes},
        warps=block // 32,
        stages=3,
    )
    launch(
        _sum_blocks,
        (slots, cdiv(bins, 32)),
        (
            counts_KBF,
            before_KBF,
            totals_KF,
            blocks,
            bins,
        ),
        {"BLOCKS": 32, "COLUMNS": 32},
        warps=4,
        stages=3,
    )
    launch(
        _place,
        (blocks + cdiv(entries, 32), slots),
        (
            ids_TK,
            weights_TK,
            before_KBF,
            totals_KF,
            order.tokens_KT,
            order.tiles_KN3,
            order.offsets_KF,
            tokens,
            bins,
            blocks,
            entries,
            *strides,
        ),
        {**sizes, "ROWS": rows, "ENTRIES": 32},
        warps=block // 32,
        stages=3,
    )
    return order


@triton.jit
@no_type_check
def tile_at(tiles_ptr, tokens_ptr, starts_ptr, ranks_ptr, slot, tile, num_tiles, num_tokens, ROWS: tl.constexpr):
    """One tile of an order: expert (-1: none), whether the tile is used, its tokens, which of them exist, and the
    expert's first rank row and rank; the rank of "none" is 0.
    """
    at = tiles_ptr + (slot * num_tiles + tile) * 3
    expert, begin, end = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    m = begin + tl.arange(0, ROWS)
    is_token = m < end
    entry = tl.load(tokens_ptr + slot * num_tokens + m, mask=is_token, other=0)
    token = tl.where(entry < 0, -1 - entry, entry).to(tl.int64)
    start = tl.load(starts_ptr + expert, mask=expert >= 0, other=0)
    rank = tl.load(ranks_ptr + expert, mask=expert >= 0, other=0)
    return expert, begin < end, token, is_token, start, rank


@triton.jit
@no_type_check
def _bins(
    ids_ptr, weights_ptr, t, slot, tokens, bins, ids_stride, weights_stride, K: tl.constexpr, SLOTS: tl.constexpr
):
    """Each token's expert in this slot; the last bin for none; `bins` for tokens that do not exist."""
    k = tl.arange(0, SLOTS)
    there = (t < tokens)[:, None] & (k < K)[None, :]
    ids = tl.load(ids_ptr + t.to(tl.int64)[:, None] * ids_stride + k[None, :], mask=there, other=-1).to(tl.int32)
    acts = ids >= 0
    if weights_ptr is not None:
        weights_at = weights_ptr + t.to(tl.int64)[:, None] * weights_stride + k[None, :]
        acts = acts & (tl.load(weights_at, mask=there, other=0.0) != 0)
    is_idle = tl.max(acts.to(tl.int32), 1) == 0
    own = tl.max(tl.where(k[None, :] == slot, ids, -1), 1)
    return tl.where(t < tokens, tl.where(is_idle | (own < 0), bins - 1, own), bins)


@triton.jit
@no_type_check
def _count(
    ids_ptr,
    weights_ptr,
    counts_ptr,
    tokens,
    bins,
    ids_stride,
    weights_stride,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    block, slot = tl.program_id(0), tl.program_id(1)
    t = block * BLOCK + tl.arange(0, BLOCK)
    own = _bins(ids_ptr, weights_ptr, t, slot, tokens, bins, ids_stride, weights_stride, K, SLOTS)
    counts_at = counts_ptr + (slot * tl.num_programs(0) + block) * bins
    for first in range(0, bins, CHUNK):
        f = first + tl.arange(0, CHUNK)
        tl.store(counts_at + f, tl.sum((own[:, None] == f[None, :]).to(tl.int32), 0), mask=f < bins)


@triton.jit
@no_type_check
def _sum_blocks(counts_ptr, before_ptr, totals_ptr, blocks, bins, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr):
    """How many tokens of each expert stand in earlier blocks, and in all of them."""
    slot = tl.program_id(0)
    f = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.int32)
    for first in range(0, blocks, BLOCKS):
        b = first + tl.arange(0, BLOCKS)
        at = (slot * blocks + b)[:, None] * bins + f[None, :]
        there = (b < blocks)[:, None] & (f < bins)[None, :]
        counts = tl.load(counts_ptr + at, mask=there, other=0)
        tl.store(before_ptr + at, total[None, :] + tl.cumsum(counts, 0) - counts, mask=there)
        total += tl.sum(counts, 0)
    tl.store(totals_ptr + slot * bins + f, total, mask=f < bins)


@triton.jit
@no_type_check
def _place(
    ids_ptr,
    weights_ptr,
    before_ptr,
    totals_ptr,
    tokens_ptr,
    tiles_ptr,
    offsets_ptr,
    tokens,
    bins,
    blocks,
    entries,
    ids_stride,
    weights_stride,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """The first programs put a block of tokens in its place each; the others write 32 tiles each."""
    block, slot = tl.program_id(0), tl.program_id(1)
    totals_at = totals_ptr + slot * bins
    if block < blocks:
        i = tl.arange(0, BLOCK)
        t = block * BLOCK + i
        own = _bins(ids_ptr, weights_ptr, t, slot, tokens, bins, ids_stride, weights_stride, K, SLOTS)
        is_token = t < tokens
        place = tl.load(before_ptr + (slot * blocks + block) * bins + own, mask=is_token, other=0)
        place += tl.sum(((own[:, None] == own[None, :]) & (i[None, :] < i[:, None])).to(tl.int32), 1)
        for first in range(0, bins, CHUNK):
            f = first + tl.arange(0, CHUNK)
            totals = tl.load(totals_at + f, mask=f < bins, other=0)
            place += tl.sum(tl.where(f[None, :] < own[:, None], totals[None, :], 0), 1)
        tl.store(tokens_ptr + slot * tokens + place, tl.where(own == bins - 1, -1 - t, t), mask=is_token)
    else:
        _tabulate(totals_at, tiles_ptr, offsets_ptr, block - blocks, slot, bins, entries, CHUNK, ROWS, ENTRIES)


@triton.jit
@no_type_check
def _tabulate(
    totals_at,
    tiles_ptr,
    offsets_ptr,
    block,
    slot,
    bins,
    entries,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    n = block * ENTRIES + tl.arange(0, ENTRIES)
    # of the experts whose tiles all stand before tile n: their number, their tiles and their tokens
    expert, tiles_before, begin = n * 0, n * 0, n * 0
    all_tiles, all_tokens = block * 0, block * 0
    for first in range(0, bins, CHUNK):
        f = first + tl.arange(0, CHUNK)
        counts = tl.load(totals_at + f, mask=f < bins, other=0)
        tiles = (counts + ROWS - 1) // ROWS
        is_before = (f < bins)[None, :] & ((all_tiles + tl.cumsum(tiles, 0))[None, :] <= n[:, None])
        expert += tl.sum(is_before.to(tl.int32), 1)
        tiles_before += tl.sum(tl.where(is_before, tiles[None, :], 0), 1)
        begin += tl.sum(tl.where(is_before, counts[None, :], 0), 1)
        if block == 0:
            offsets = all_tokens + tl.cumsum(counts, 0) - counts
            tl.store(offsets_ptr + slot * bins + f, offsets, mask=f < bins)
        all_tiles += tl.sum(tiles, 0)
        all_tokens += tl.sum(counts, 0)

    count = tl.load(totals_at + expert, mask=expert < bins, other=0)
    end = begin + count
    begin = tl.minimum(begin + (n - tiles_before) * ROWS, end)
    at = tiles_ptr + (slot * entries + n) * 3
    tl.store(at, tl.where(expert < bins - 1, expert, -1), mask=n < entries)
    tl.store(at + 1, begin, mask=n < entries)
    tl.store(at + 2, tl.minimum(begin + ROWS, end), mask=n < entries)
