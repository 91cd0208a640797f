"""Dropout by counting: whether an element is kept follows from a seed and its place, so no mask is stored.

Begin with keep; `new_seed` draws the seed.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor


def new_seed(device: torch.device) -> Tensor:
    """A fresh seed from the device's generator, which checkpointing and CUDA graphs restore: one integer."""
    return torch.randint(2**31, (1,), device=device, dtype=torch.int64)


@triton.jit
@no_type_check
def keep(seed, t, d, width, dropout):
    """True for each element (t, d) of a (T, width) input that is kept; Philox, Salmon et al. 2011."""
    place = t.to(tl.int64)[:, None] * width + d[None, :]
    return tl.rand(seed, place) >= dropout
