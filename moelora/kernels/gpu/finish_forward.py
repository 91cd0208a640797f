"""What follows the products of the forward pass: the router's choice, and the rank rows' gated values.

Begin with finish_forward.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from moelora.kernels.gpu.choose import choose, store_choice
from moelora.kernels.gpu.launch import cdiv, launch, power_of_two
from moelora.kernels.gpu.pack import num_parts

ROWS = 32
COLUMNS = 128


class Choice(NamedTuple):
    """How a router chooses, as data; `moelora.routers.learned.Learned` says what each means."""

    num_experts: int
    top_k: int
    temperature: float
    combine: str


class Chosen(NamedTuple):
    """The answers of Q routers; `logits_QTE` is anything where no router answered."""

    experts_QTK: Tensor
    weights_QTK: Tensor
    logits_QTE: Tensor

    def router_of(self, projection: int) -> int:
        """The number of the router that answered for a projection: its own, or the only one."""
        return projection if self.experts_QTK.shape[0] > 1 else 0


def new_chosen(choice: Choice, routers: int, tokens: int, device: torch.device) -> Chosen:
    """Room for the answers of Q routers."""
    slots = (routers, tokens, choice.top_k)
    return Chosen(
        torch.empty(slots, dtype=torch.int64, device=device),
        torch.empty(slots, dtype=torch.float32, device=device),
        torch.empty(routers, tokens, choice.num_experts, dtype=torch.float32, device=device),
    )


def finish_forward(
    parts_STN: Tensor,
    chosen: Chosen,
    choice: Choice | None,
    tail_scale: float,
    owner_PR: Tensor,
    scale_PE: Tensor,
    dtype: torch.dtype,
    *,
    keeps: bool,
) -> tuple[Tensor | None, Tensor]:
    """Add the parts up, choose, and gate: S_TPR (None unless `keeps`) and S_TPR * gate, in this dtype.

    Args:
        parts_STN: from `product`: P * R columns of rank rows, then those of each of Q routers, if there are any.
        chosen: what acts. Where `choice` is given it is written here, else read.
        choice: how the routers choose.
        tail_scale: of their scores.
        owner_PR, scale_PE: whose the rows are; one row for all projections may be spread with stride 0.
    """
    (split, tokens, total), (projections, count) = parts_STN.shape, owner_PR.shape
    routers, _, top_k = chosen.experts_QTK.shape
    gated_TPR = torch.empty(tokens, projections, count, dtype=dtype, device=parts_STN.device)
    S_TPR = torch.empty_like(gated_TPR) if keeps else None
    tail = 0 if choice is None else (total - projections * count) // routers
    rows = max(1, min(ROWS if top_k <= 4 else ROWS // 2, 4096 // max(tail, COLUMNS)))
    programs = max(projections if count else 0, routers if choice is not None else 0)
    if tokens and programs:
        launch(
            _finish_forward,
            (cdiv(tokens, rows), programs),
            (
                parts_STN,
                S_TPR,
                gated_TPR,
                *chosen,
                owner_PR,
                scale_PE,
                tokens,
                total,
                count,
                projections,
                scale_PE.shape[1],
                owner_PR.stride(0),
                scale_PE.stride(0),
                1.0 if choice is None else tail_scale / choice.temperature,
            ),
            {
                "ROWS": rows,
                "COLUMNS": max(16, min(COLUMNS, power_of_two(count))),
                "BLOCKS": cdiv(count, COLUMNS),
                "SPLIT": split,
                "TAIL": tail,
                "PARTS": num_parts(dtype),
                "SHARED": routers == 1,
                "TOP_K": top_k,
                "COMBINE": "given" if choice is None else choice.combine,
            },
            warps=4,
            stages=2,
        )
    return S_TPR, gated_TPR


@triton.jit
@no_type_check
def _finish_forward(
    parts_ptr,
    s_ptr,
    gated_ptr,
    experts_ptr,
    weights_ptr,
    logits_ptr,
    owner_ptr,
    scale_ptr,
    tokens,
    total,
    count,
    projections,
    num_experts,
    owner_stride,
    scale_stride,
    tail_scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SPLIT: tl.constexpr,
    TAIL: tl.constexpr,
    PARTS: tl.constexpr,
    SHARED: tl.constexpr,
    TOP_K: tl.constexpr,
    COMBINE: tl.constexpr,
):
    K_PAD: tl.constexpr = triton.next_power_of_2(TOP_K)
    projection = tl.program_id(1)
    router = 0 if SHARED else projection
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_token = t < tokens
    part_size = tl.cast(tokens, tl.int64) * total
    parts_at = parts_ptr + t.to(tl.int64)[:, None] * total
    slots = tl.arange(0, K_PAD)[None, :]

    # who acts: as the scores say, or as it was given
    mine = tl.cast(router, tl.int64) * tokens
    if TAIL:
        m = tl.arange(0, TAIL)
        scores = tl.zeros((ROWS, TAIL), tl.float32)
        for part in range(SPLIT):
            scores_at = parts_at + part * part_size + projections * count + router * TAIL + m[None, :]
            scores += tl.load(scores_at, mask=is_token[:, None], other=0.0)
        logits = tl.sum(tl.reshape(scores, (ROWS, PARTS, TAIL // PARTS)), axis=1) * tail_scale
        ids, weights = choose(logits, num_experts, TAIL // PARTS, TOP_K, COMBINE)
        if (not SHARED) or projection == 0:
            store_choice(
                ids,
                weights,
                logits,
                t,
                is_token,
                experts_ptr + mine * TOP_K,
                weights_ptr + mine * TOP_K,
                logits_ptr + mine * num_experts,
                num_experts,
                TAIL // PARTS,
                TOP_K,
            )
    else:
        slots_at = (mine + t)[:, None] * TOP_K + slots
        there = is_token[:, None] & (slots < TOP_K)
        ids = tl.load(experts_ptr + slots_at, mask=there, other=-1).to(tl.int32)
        weights = tl.load(weights_ptr + slots_at, mask=there, other=0.0)

    for block in tl.static_range(BLOCKS):
        r = block * COLUMNS + tl.arange(0, COLUMNS)
        mask = is_token[:, None] & (r < count)[None, :]
        value = tl.zeros((ROWS, COLUMNS), tl.float32)
        for part in range(SPLIT):
            values_at = parts_at + part * part_size + projection * count + r[None, :]
            value += tl.load(values_at, mask=mask, other=0.0)

        # each row by its owner's weight; what is closed is zero, whatever it holds
        owner = tl.load(owner_ptr + projection * owner_stride + r, mask=r < count, other=-2)
        scale = tl.load(scale_ptr + projection * scale_stride + owner, mask=r < count, other=0.0)
        gate = tl.zeros((ROWS, COLUMNS), tl.float32)
        for slot in tl.static_range(TOP_K):
            expert = tl.sum(tl.where(slots == slot, ids, 0), axis=1)
            weight = tl.sum(tl.where(slots == slot, weights, 0.0), axis=1)
            gate += tl.where(expert[:, None] == owner[None, :], weight[:, None], 0.0)
        gate = gate * scale[None, :]
        place = (t.to(tl.int64)[:, None] * projections + projection) * count + r[None, :]
        if s_ptr is not None:
            tl.store(s_ptr + place, value.to(s_ptr.dtype.element_ty), mask=mask)
        gated = tl.where(gate != 0, value * gate, 0.0)
        tl.store(gated_ptr + place, gated.to(gated_ptr.dtype.element_ty), mask=mask)
