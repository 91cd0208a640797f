"""Projections that an operator may compute itself, together with their mixture. Begin with frozen_linear."""

import torch
from torch import nn

from moelora.kernels.fused import PLAIN, Linear

FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
HOOKS = (*FORWARD_HOOKS, "_backward_hooks", "_backward_pre_hooks")


def frozen_linear(base: nn.Module, dtype: torch.dtype) -> Linear | None:
    """The base as a plain linear in this dtype; None where it is more than that, or is trained.

    A subclass, a hook, a replaced forward or a tensor of a special kind (quantised, sharded) does something that only
    calling the module does.
    """
    # each look is a check that compiled code makes at every call
    hooks = HOOKS if torch.is_grad_enabled() else FORWARD_HOOKS
    if type(base) is not nn.Linear or "forward" in base.__dict__ or any(base.__dict__[name] for name in hooks):
        return None
    for tensor in (base.weight, base.bias):
        if tensor is None:
            continue
        if type(tensor) not in PLAIN or tensor.dtype is not dtype or not tensor.is_contiguous():
            return None
        if tensor.requires_grad and torch.is_grad_enabled():
            return None
    return Linear(base.weight, base.bias)
