"""The gate of each rank row: its owner's weight for a token, times the owner's scale. Begin with gates."""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def gates(experts_ptr, weights_ptr, t, is_token, owner, scale, TOP_K: tl.constexpr):
    """gate_TR of a block of tokens and rank rows, in fp32. A row that does not exist has the owner -2."""
    gate = tl.zeros((t.shape[0], owner.shape[0]), tl.float32)
    at = t.to(tl.int64) * TOP_K
    for slot in tl.static_range(TOP_K):
        expert = tl.load(experts_ptr + at + slot, mask=is_token, other=-1)
        weight = tl.load(weights_ptr + at + slot, mask=is_token, other=0.0)
        gate += tl.where(expert[:, None] == owner[None, :], weight[:, None], 0.0)
    return gate * scale[None, :]


@triton.jit
@no_type_check
def acts(experts_ptr, weights_ptr, t, is_token, TOP_K: tl.constexpr):
    """True for each token for which some expert acts."""
    some = t < 0
    at = t.to(tl.int64) * TOP_K
    for slot in tl.static_range(TOP_K):
        expert = tl.load(experts_ptr + at + slot, mask=is_token, other=-1)
        weight = tl.load(weights_ptr + at + slot, mask=is_token, other=0.0)
        some = some | ((expert >= 0) & (weight != 0))
    return some
