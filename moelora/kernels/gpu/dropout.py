"""Dropout by counting: whether an element is kept follows from a seed and its place, so no mask is stored.

Begin with keep.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def keep(seed, t, d, width, dropout):
    """True for each element (t, d) of a (T, width) input that is kept; Philox, Salmon et al. 2011."""
    place = t.to(tl.int64)[:, None] * width + d[None, :]
    return tl.rand(seed, place) >= dropout
