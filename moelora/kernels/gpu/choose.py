"""From scores to experts: top-k and the weights of the chosen. Begin with choose_experts.

`choose` and `store_choice` work on a tile of scores that a kernel holds in registers, wherever these come from: here
they are sums of partial products, in a matrix product they are its epilogue.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from moelora.kernels.gpu.launch import cdiv, launch, power_of_two


@triton.jit
@no_type_check
def choose(logits, E, E_PAD: tl.constexpr, TOP_K: tl.constexpr, COMBINE: tl.constexpr):
    """Ids and weights of the TOP_K best of E columns in each row of a (rows, E_PAD) tile, as (rows, K) tiles.

    K is TOP_K, rounded up to a power of two. Of equal scores the lowest column is first; NaN counts as the highest, as
    in `torch.topk`. Columns from E on hold anything and are never chosen. The ids of a row are below E and, for
    TOP_K <= E, distinct, whatever the scores are.
    """
    K_PAD: tl.constexpr = triton.next_power_of_2(TOP_K)
    columns = tl.arange(0, E_PAD)[None, :]
    slots = tl.arange(0, K_PAD)[None, :]
    real = columns < E
    # without NaN every comparison below has an answer
    score = tl.where(logits == logits, logits, float("inf"))

    # the best of those that are free, TOP_K times
    free = real & (score == score)
    ids = tl.zeros((logits.shape[0], K_PAD), tl.int32)
    chosen = tl.full((logits.shape[0], K_PAD), float("-inf"), tl.float32)
    for slot in tl.static_range(TOP_K):
        best = tl.max(tl.where(free, score, float("-inf")), axis=1)[:, None]
        column = tl.min(tl.where(free & (score == best), columns, E_PAD), axis=1)[:, None]
        column = tl.minimum(column, E - 1)
        free = free & (columns != column)
        ids = tl.where(slots == slot, column, ids)
        chosen = tl.where(slots == slot, best, chosen)

    # the weights that their scores give them
    highest = tl.max(chosen, axis=1)[:, None]
    if COMBINE == "renormalized":
        power = tl.exp(chosen - highest)
        weights = power / tl.sum(power, axis=1)[:, None]
    elif COMBINE == "softmax":
        mass = tl.sum(tl.exp(tl.where(real, logits, float("-inf")) - highest), axis=1)[:, None]
        weights = tl.exp(chosen - (highest + tl.log(mass)))
    elif COMBINE == "constant":
        weights = tl.full(chosen.shape, 1.0 / TOP_K, tl.float32)
    else:
        tl.static_assert(COMBINE == "unit")
        weights = tl.full(chosen.shape, 1.0, tl.float32)
    return ids, weights


@triton.jit
@no_type_check
def store_choice(
    ids,
    weights,
    logits,
    rows,
    row_mask,
    experts_ptr,
    weights_ptr,
    logits_ptr,
    E,
    E_PAD: tl.constexpr,
    TOP_K: tl.constexpr,
):
    """Write what `choose` gave for a (rows, E_PAD) tile, and the scores themselves, to rows of contiguous tensors."""
    rows = rows.to(tl.int64)[:, None]
    slots = tl.arange(0, triton.next_power_of_2(TOP_K))[None, :]
    slot_mask = row_mask[:, None] & (slots < TOP_K)
    tl.store(experts_ptr + rows * TOP_K + slots, ids, mask=slot_mask)
    tl.store(weights_ptr + rows * TOP_K + slots, weights, mask=slot_mask)
    columns = tl.arange(0, E_PAD)[None, :]
    tl.store(logits_ptr + rows * E + columns, logits, mask=row_mask[:, None] & (columns < E))


def choose_experts(
    parts_CTE: Float[Tensor, "C T E"], temperature: float, top_k: int, combine: str
) -> tuple[Int[Tensor, "T K"], Float[Tensor, "T K"], Float[Tensor, "T E"]]:
    """Ids, weights and scores of a linear router whose products come in C parts, which are added in order.

    The scores are the sums over `temperature`; `combine` says what `moelora.routers.learned` says.
    """
    splits, T, E = parts_CTE.shape
    assert 1 <= top_k <= E
    assert parts_CTE.is_contiguous()
    experts_TK = torch.empty(T, top_k, dtype=torch.int64, device=parts_CTE.device)
    weights_TK = torch.empty(T, top_k, dtype=torch.float32, device=parts_CTE.device)
    logits_TE = torch.empty(T, E, dtype=torch.float32, device=parts_CTE.device)
    if T == 0:
        return experts_TK, weights_TK, logits_TE

    # few tokens: a program for each, but for tiny tiles, which would leave lanes of its warp idle
    E_PAD = max(16, power_of_two(E))
    ROWS = max(1, 128 // E_PAD)
    launch(
        _choose_experts,
        (cdiv(T, ROWS),),
        (
            parts_CTE,
            experts_TK,
            weights_TK,
            logits_TE,
            temperature,
            T,
            E,
        ),
        {"SPLIT": splits, "ROWS": ROWS, "E_PAD": E_PAD, "TOP_K": top_k, "COMBINE": combine},
        warps=1 if E_PAD <= 256 else 4,
        stages=3,
    )
    return experts_TK, weights_TK, logits_TE


@triton.jit
@no_type_check
def _choose_experts(
    parts_CTE,
    experts_TK,
    weights_TK,
    logits_TE,
    temperature,
    T,
    E,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    E_PAD: tl.constexpr,
    TOP_K: tl.constexpr,
    COMBINE: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < T
    columns = tl.arange(0, E_PAD)[None, :]
    mask = row_mask[:, None] & (columns < E)
    offsets = rows.to(tl.int64)[:, None] * E + columns

    logits = tl.zeros((ROWS, E_PAD), tl.float32)
    for part in tl.static_range(SPLIT):
        logits += tl.load(parts_CTE + part * tl.cast(T, tl.int64) * E + offsets, mask=mask, other=0.0)
    # rounded as torch rounds it: a temperature of 1 changes nothing
    logits = tl.div_rn(logits, tl.full((ROWS, E_PAD), 1.0, tl.float32) * temperature)

    ids, weights = choose(logits, E, E_PAD, TOP_K, COMBINE)
    store_choice(ids, weights, logits, rows, row_mask, experts_TK, weights_TK, logits_TE, E, E_PAD, TOP_K)
