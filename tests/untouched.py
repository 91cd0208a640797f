"""Nothing happened to this model: the check behind every test of an error."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def traces(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that patching may change, but the values of its tensors."""
    return {
        "modules": {name: id(module) for name, module in model.named_modules(remove_duplicate=False)},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": {name: [len(vars(module)[kind]) for kind in HOOKS] for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
        "parameters": {name: (id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters()},
        "random state": torch.get_rng_state().tolist(),
    }


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """What runs inside leaves no trace on the model: no attribute, hook, flag, module or value."""
    before = traces(model)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    yield
    assert traces(model) == before
    now = model.state_dict()
    assert now.keys() == values.keys()
    assert all(torch.equal(now[name], value) for name, value in values.items())
