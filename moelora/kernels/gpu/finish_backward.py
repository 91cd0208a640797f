"""What follows the products of the backward pass, all in rank space. Begin with finish_backward.

With dSg = dY @ B.T, the gradient of the gated values: dS = dSg * gate; an expert's weight gets scale times the sum over
its rows of S * dSg, and through the router's choice the scores get theirs.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from moelora.kernels.gpu.finish_forward import Choice, Chosen
from moelora.kernels.gpu.gate import acts, gates
from moelora.kernels.gpu.launch import cdiv, launch, power_of_two

ROWS = 16
COLUMNS = 64


class RankGradients(NamedTuple):
    """Gradients in rank space.

    Attributes:
        rank_TN: of the values of the rank rows, dS (P * R columns), and behind them M of the scores before the
            temperature: for each router as many as `pack.padded` says. In x's dtype; where that has 16 bits, what
            rounding takes from the scores' gradients follows in as many columns more, and what that rounding takes
            (`score_parts`), so that a router learns in fp32. Zeros up to `score_columns`.
        gated_TPR: not a gradient: S * gate, of which dB is made.
        dweights_QTK: of the weights; None where they are a router's, whose scores have it all.
    """

    rank_TN: Tensor
    gated_TPR: Tensor
    dweights_QTK: Tensor | None


def score_columns(routers: int, part_rows: int, dtype: torch.dtype) -> int:
    """Columns that the scores of Q routers take in `RankGradients.rank_TN`."""
    return max(16, power_of_two(routers * part_rows * score_parts(dtype))) if part_rows else 0


def score_parts(dtype: torch.dtype) -> int:
    """In how many numbers a score's gradient stands there, so that they hold the 24 bits of fp32, or nearly (fp16)."""
    return {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}[dtype]


def finish_backward(
    parts_STN: Tensor,
    S_TPR: Tensor,
    chosen: Chosen,
    owners_PR: Tensor,
    scales_PE: Tensor,
    choice: Choice | None,
    part_rows: int,
    given: tuple[Tensor | None, Tensor | None] = (None, None),
) -> RankGradients:
    """Add the parts of dY @ B.T up and follow them to the gates and the router.

    Args:
        parts_STN: (S, T, P * R).
        chosen: the answers of one router for all projections, or of one for each.
        choice: how the routers choose, if they are a part of the op.
        part_rows: columns that a router takes in `rank_TN`; 0 without routers.
        given: gradients that come from elsewhere, of weights_QTK and logits_QTE.
    """
    (split, tokens, _), (_, projections, count) = parts_STN.shape, S_TPR.shape
    routers, _, top_k = chosen.experts_QTK.shape
    columns = score_columns(routers, part_rows, S_TPR.dtype)
    rank_TN = torch.empty(tokens, projections * count + columns, dtype=S_TPR.dtype, device=S_TPR.device)
    gated_TPR = torch.empty_like(S_TPR)
    dweights_QTK = torch.empty_like(chosen.weights_QTK) if choice is None else None
    rows = max(1, min(ROWS, 4096 // max(part_rows, COLUMNS)))
    if tokens:
        launch(
            _finish_backward,
            (cdiv(tokens, rows),),
            (
                parts_STN,
                S_TPR,
                *chosen,
                owners_PR,
                scales_PE,
                *given,
                rank_TN,
                gated_TPR,
                dweights_QTK,
                tokens,
                count,
                scales_PE.shape[1],
                owners_PR.stride(0),
                scales_PE.stride(0),
                1.0 if choice is None else 1 / choice.temperature,
                rank_TN.stride(0),
            ),
            {
                "ROWS": rows,
                "COLUMNS": COLUMNS,
                "SPLIT": split,
                "PROJECTIONS": projections,
                "BLOCKS": cdiv(count, COLUMNS),
                "SHARED": routers == 1,
                "ROUTERS": routers,
                "TOP_K": top_k,
                "SLOTS": power_of_two(top_k),
                "COMBINE": "given" if choice is None else choice.combine,
                "PART_ROWS": max(1, part_rows),
                "LOGIT_COLUMNS": columns,
                "SCORE_PARTS": score_parts(S_TPR.dtype),
            },
            warps=4,
            stages=2,
        )
    return RankGradients(rank_TN, gated_TPR, dweights_QTK)


@triton.jit
@no_type_check
def _store_router(
    dweight,
    experts_ptr,
    weights_ptr,
    logits_ptr,
    given_weights_ptr,
    given_logits_ptr,
    dweights_ptr,
    dlogits_ptr,
    t,
    is_token,
    slot,
    router,
    tokens,
    num_experts,
    scale,
    rank_stride,
    routers,
    TOP_K: tl.constexpr,
    COMBINE: tl.constexpr,
    PART_ROWS: tl.constexpr,
    SCORE_PARTS: tl.constexpr,
):
    """From the gradient of the chosen weights, (rows, slots), to what leaves the kernel."""
    row = router * tl.cast(tokens, tl.int64) + t
    at, mask = row[:, None] * TOP_K + slot[None, :], is_token[:, None] & (slot < TOP_K)[None, :]
    if COMBINE == "given":
        tl.store(dweights_ptr + at, dweight, mask=mask)
    else:
        if given_weights_ptr is not None:
            dweight += tl.load(given_weights_ptr + at, mask=mask, other=0.0)
        expert = tl.arange(0, PART_ROWS)
        is_expert = is_token[:, None] & (expert < num_experts)[None, :]
        logits_at = row[:, None] * num_experts + expert[None, :]

        # p of the experts that share in the softmax, and the gradient of each p
        share = tl.zeros((t.shape[0], PART_ROWS), tl.float32)
        gradient = tl.zeros((t.shape[0], PART_ROWS), tl.float32)
        for k in tl.static_range(TOP_K):
            chosen = tl.load(experts_ptr + row * TOP_K + k, mask=is_token, other=-1)
            mine = chosen[:, None] == expert[None, :]
            weight = tl.load(weights_ptr + row * TOP_K + k, mask=is_token, other=0.0)
            share += tl.where(mine, weight[:, None], 0.0)
            gradient += tl.where(mine, tl.sum(tl.where(slot[None, :] == k, dweight, 0.0), axis=1)[:, None], 0.0)
        if COMBINE == "softmax" or COMBINE == "unit":
            logits = tl.load(logits_ptr + logits_at, mask=is_expert, other=float("-inf"))
            top = tl.max(logits, axis=1)
            share = tl.exp(logits - tl.where(is_token, top, 0.0)[:, None])
            share = share / tl.where(is_token, tl.sum(share, axis=1), 1.0)[:, None]
        if COMBINE == "constant":
            dlogits = tl.zeros((t.shape[0], PART_ROWS), tl.float32)
        else:
            dlogits = share * (gradient - tl.sum(share * gradient, axis=1)[:, None])
        if given_logits_ptr is not None:
            dlogits += tl.load(given_logits_ptr + logits_at, mask=is_expert, other=0.0)
        dlogits = tl.where(is_expert, dlogits * scale, 0.0)
        scores_at = dlogits_ptr + t.to(tl.int64)[:, None] * rank_stride + router * PART_ROWS + expert[None, :]
        for part in tl.static_range(SCORE_PARTS):
            rounded = dlogits.to(dlogits_ptr.dtype.element_ty)
            tl.store(scores_at + part * routers * PART_ROWS, rounded, mask=is_token[:, None])
            dlogits = dlogits - rounded.to(tl.float32)


@triton.jit
@no_type_check
def _finish_backward(
    parts_ptr,
    s_ptr,
    experts_ptr,
    weights_ptr,
    logits_ptr,
    owner_ptr,
    scale_ptr,
    given_weights_ptr,
    given_logits_ptr,
    rank_ptr,
    gated_ptr,
    dweights_ptr,
    tokens,
    count,
    num_experts,
    owner_stride,
    scale_stride,
    logits_scale,
    rank_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SHARED: tl.constexpr,
    ROUTERS: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    COMBINE: tl.constexpr,
    PART_ROWS: tl.constexpr,
    LOGIT_COLUMNS: tl.constexpr,
    SCORE_PARTS: tl.constexpr,
):
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_token = t < tokens
    slot = tl.arange(0, SLOTS)
    total = PROJECTIONS * count
    part_size = tl.cast(tokens, tl.int64) * total
    dweight = tl.zeros((ROWS, SLOTS), tl.float32)

    for projection in tl.static_range(PROJECTIONS):
        router = 0 if SHARED else projection
        mine = experts_ptr + router * tl.cast(tokens, tl.int64) * TOP_K
        my_weights = weights_ptr + router * tl.cast(tokens, tl.int64) * TOP_K
        active = acts(mine, my_weights, t, is_token, TOP_K)
        for block in tl.static_range(BLOCKS):
            r = block * COLUMNS + tl.arange(0, COLUMNS)
            is_row = r < count
            mask = is_token[:, None] & is_row[None, :]
            at = t.to(tl.int64)[:, None] * total + projection * count + r[None, :]
            dsg = tl.zeros((ROWS, COLUMNS), tl.float32)
            for part in range(SPLIT):
                dsg += tl.load(parts_ptr + part * part_size + at, mask=mask, other=0.0)
            s = tl.load(s_ptr + at, mask=mask, other=0.0)

            owner = tl.load(owner_ptr + projection * owner_stride + r, mask=is_row, other=-2)
            scale = tl.load(scale_ptr + projection * scale_stride + owner, mask=is_row, other=0.0)
            gate = gates(mine, my_weights, t, is_token, owner, scale, TOP_K)
            opened = gate != 0
            ds = tl.where(opened, dsg * gate, 0.0).to(rank_ptr.dtype.element_ty)
            tl.store(rank_ptr + t.to(tl.int64)[:, None] * rank_stride + projection * count + r[None, :], ds, mask=mask)
            gated = tl.where(opened, s.to(tl.float32) * gate, 0.0)
            tl.store(gated_ptr + at, gated.to(gated_ptr.dtype.element_ty), mask=mask)

            value = s.to(tl.float32) * dsg * scale[None, :]
            for k in tl.static_range(TOP_K):
                expert = tl.load(mine + t.to(tl.int64) * TOP_K + k, mask=is_token, other=-1)
                chosen = (expert[:, None] == owner[None, :]) & active[:, None]
                share = tl.sum(tl.where(chosen, value, 0.0), axis=1)
                dweight += tl.where(slot[None, :] == k, share[:, None], 0.0)
        if not SHARED or projection == PROJECTIONS - 1:
            _store_router(
                dweight,
                experts_ptr,
                weights_ptr,
                logits_ptr,
                given_weights_ptr,
                given_logits_ptr,
                dweights_ptr,
                rank_ptr + total,
                t,
                is_token,
                slot,
                router,
                tokens,
                num_experts,
                logits_scale,
                rank_stride,
                ROUTERS,
                TOP_K,
                COMBINE,
                PART_ROWS,
                SCORE_PARTS,
            )
            dweight = tl.zeros((ROWS, SLOTS), tl.float32)

    if LOGIT_COLUMNS > ROUTERS * PART_ROWS * SCORE_PARTS:
        m = tl.arange(0, LOGIT_COLUMNS)
        tl.store(
            rank_ptr + t.to(tl.int64)[:, None] * rank_stride + total + m[None, :],
            tl.zeros((ROWS, LOGIT_COLUMNS), rank_ptr.dtype.element_ty),
            mask=is_token[:, None] & (m >= ROUTERS * PART_ROWS * SCORE_PARTS)[None, :],
        )
