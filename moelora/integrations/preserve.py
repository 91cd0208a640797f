"""Run something on a model and leave no trace. Begin with `preserved`."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

TABLES = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Everything that a forward, or we, may change on a model is put back at the end, also after an exception.

    Restored exactly: every attribute of every module (training flags, cached lengths), the values of buffers,
    attributes of every config, and the global random states of torch (CPU and the devices of the model), numpy and
    Python.
    """
    owners: list[Any] = list(model.modules())
    owners += list({id(config): config for config in _configs(model)}.values())
    attributes = [(owner, dict(vars(owner))) for owner in owners]
    tables = [(owner, name, dict(vars(owner)[name])) for owner in model.modules() for name in TABLES]
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if not buffer.is_meta]

    with _random_states(model):
        try:
            yield
        finally:
            for owner, before in attributes:
                _put_back(vars(owner), before)
            for owner, name, before in tables:
                _put_back(vars(owner)[name], before)
            with torch.no_grad():
                for buffer, before in values:
                    # NaN differs from itself: such a buffer is written once more, with the same values
                    if not torch.equal(buffer, before):
                        buffer.copy_(before)


def _put_back(now: dict[Any, Any], before: dict[Any, Any]) -> None:
    for key in [key for key in now if key not in before]:
        del now[key]
    for key, value in before.items():
        if key not in now or now[key] is not value:
            now[key] = value


def _configs(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "__dict__") and not isinstance(config, (Tensor, nn.Module, type)):
            yield config


@contextmanager
def _random_states(model: nn.Module) -> Iterator[None]:
    devices = {p.device for p in model.parameters()} - {torch.device("cpu"), torch.device("meta")}
    by_type: dict[str, set[int]] = {}
    for device in devices:
        by_type.setdefault(device.type, set()).add(device.index or 0)
    python, numpy = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind, indices in by_type.items():
            stack.enter_context(torch.random.fork_rng(devices=sorted(indices), device_type=kind))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
