"""What follows the products of the forward pass: rank rows' values, and the router's choice. Begin with finish_forward."""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from moelora.kernels.gpu.choose import store_choice

ROWS = 32
COLUMNS = 128


class Choice(NamedTuple):
    """How a router chooses, as data; `moelora.routers.learned.Learned` says what each means."""

    num_experts: int
    top_k: int
    temperature: float
    combine: str


class Chosen(NamedTuple):
    """The answers of Q routers."""

    experts_QTK: Tensor
    weights_QTK: Tensor
    logits_QTE: Tensor


def finish_forward(
    parts_STN: Tensor, projections: int, count: int, routers: int, choice: Choice | None, tail_scale: float, dtype: torch.dtype
) -> tuple[Tensor, Chosen | None]:
    """Add the parts up: S_TPR in this dtype, and what each router chooses by its scores.

    Args:
        parts_STN: from `product`: P * R columns of rank rows, then M for each of Q routers.
        projections, count: P and R.
        routers, choice: Q, and how they choose; 0 and None without.
        tail_scale: of the scores.
        dtype: of S_TPR.
    """
    (split, tokens, total), device = parts_STN.shape, parts_STN.device
    S_TPR = torch.empty(tokens, projections, count, dtype=dtype, device=device)
    chosen = None
    if choice is not None:
        chosen = Chosen(
            torch.empty(routers, tokens, choice.top_k, dtype=torch.int64, device=device),
            torch.empty(routers, tokens, choice.top_k, dtype=torch.float32, device=device),
            torch.empty(routers, tokens, choice.num_experts, dtype=torch.float32, device=device),
        )
    if not tokens:
        return S_TPR, chosen
    tail = 0 if choice is None else (total - projections * count) // routers
    row_blocks = triton.cdiv(projections * count, COLUMNS)
    part_columns = 1 if choice is None else max(tail // 4 if dtype is not torch.float32 else tail, 1)
    rows = max(1, min(ROWS, 8192 // max(tail, COLUMNS)))
    _finish_forward[(triton.cdiv(tokens, rows), row_blocks + routers)](
        parts_STN,
        S_TPR,
        *((parts_STN, parts_STN, parts_STN) if chosen is None else chosen),
        tokens,
        total,
        projections * count,
        row_blocks,
        1 if choice is None else choice.num_experts,
        1.0 if choice is None else tail_scale / choice.temperature,
        ROWS=rows,
        COLUMNS=COLUMNS,
        SPLIT=split,
        PARTS=1 if tail == 0 else tail // part_columns,
        PART_COLUMNS=part_columns,
        TOP_K=1 if choice is None else choice.top_k,
        COMBINE="unit" if choice is None else choice.combine,
        ROUTED=choice is not None,
        num_warps=4,
    )
    return S_TPR, chosen


@triton.jit
@no_type_check
def _finish_forward(
    parts_ptr,
    s_ptr,
    experts_ptr,
    weights_ptr,
    logits_ptr,
    tokens,
    total,
    count,
    row_blocks,
    num_experts,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
    PARTS: tl.constexpr,
    PART_COLUMNS: tl.constexpr,
    TOP_K: tl.constexpr,
    COMBINE: tl.constexpr,
    ROUTED: tl.constexpr,
):
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_token = t < tokens
    part_size = tl.cast(tokens, tl.int64) * total
    parts_at = parts_ptr + t.to(tl.int64)[:, None] * total
    block = tl.program_id(1)

    if block < row_blocks:
        n = block * COLUMNS + tl.arange(0, COLUMNS)
        mask = is_token[:, None] & (n < count)[None, :]
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for part in tl.static_range(SPLIT):
            acc += tl.load(parts_at + part * part_size + n[None, :], mask=mask, other=0.0)
        tl.store(s_ptr + t.to(tl.int64)[:, None] * count + n[None, :], acc.to(s_ptr.dtype.element_ty), mask=mask)
    elif ROUTED:
        router = block - row_blocks
        m = tl.arange(0, PARTS * PART_COLUMNS)
        parts_at += count + router * PARTS * PART_COLUMNS
        acc = tl.zeros((ROWS, PARTS * PART_COLUMNS), tl.float32)
        for part in tl.static_range(SPLIT):
            acc += tl.load(parts_at + part * part_size + m[None, :], mask=is_token[:, None], other=0.0)
        logits = tl.sum(tl.reshape(acc, (ROWS, PARTS, PART_COLUMNS)), axis=1) * scale
        store_choice(
            logits,
            t,
            is_token,
            experts_ptr + router * tl.cast(tokens, tl.int64) * TOP_K,
            weights_ptr + router * tl.cast(tokens, tl.int64) * TOP_K,
            logits_ptr + router * tl.cast(tokens, tl.int64) * num_experts,
            num_experts,
            PART_COLUMNS,
            TOP_K,
            COMBINE,
        )
