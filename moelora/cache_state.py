"""What an empty key-value cache is made of, so that a call on it can be taken back. Begin with remember.

    state = remember(cache)
    model(**inputs, past_key_values=cache)
    state.put_back()                        # the same object, empty as before

An empty cache is little: layers that nothing has been written to yet, flags, counters, and, if it is a static one that
was used before, buffers that are written in place.
"""

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

SIMPLE = (type(None), bool, int, float, str, type, torch.dtype, torch.device)
"""What a cache may have besides tensors: values that nobody changes in place."""

OURS = "_moelora"
"""How the names of what we leave on a cache begin."""


@final
class CacheState:
    """A cache's layers and all of their attributes, as they were."""

    cache: Any
    layers: list[Any]
    kept: dict[str, Any]
    parts: "list[_LayerState]"

    def __init__(self, cache: Any, layers: list[Any]) -> None:
        self.cache, self.layers, self.kept = cache, list(layers), dict(vars(cache))
        self.parts = [_LayerState(layer) for layer in layers]

    def put_back(self) -> None:
        """Make the cache what it was: the same objects, with counters as they were and buffers of zeros."""
        # the list itself too, since somebody may hold it
        self.kept["layers"][:] = self.layers
        _replace(self.cache, self.kept)
        for part in self.parts:
            part.put_back()


def remember(cache: Any) -> CacheState | None:
    """The state of a cache that holds no tokens; None where it could not be put back for certain.

    That is a cache which is no list of layers, or keeps more than tensors and plain values: states of state-space
    layers, quantised keys, tables of pages, streams of an offloaded one.
    """
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list) or not hasattr(cache, "__dict__") or vars(cache).get("layers") is not layers:
        return None
    own = [value for name, value in vars(cache).items() if name != "layers" and not name.startswith(OURS)]
    if not all(isinstance(value, SIMPLE) for value in own):
        return None
    return CacheState(cache, layers) if all(_is_plain(layer) for layer in layers) else None


class _LayerState:
    """One layer's attributes. Counters are cloned, since layers count in place; buffers are only reset."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.kept = layer, dict(vars(layer))
        tensors = [value for value in self.kept.values() if isinstance(value, Tensor)]
        self.counters = [(tensor, tensor.clone()) for tensor in tensors if tensor.numel() == 1]
        self.has_buffers = any(tensor.numel() > 1 for tensor in tensors)

    def put_back(self) -> None:
        _replace(self.layer, self.kept)
        if self.has_buffers:
            self.layer.reset()
            _replace(self.layer, self.kept)
        for tensor, before in self.counters:
            tensor.copy_(before)


def _is_plain(layer: Any) -> bool:
    if not hasattr(layer, "__dict__"):
        return False
    values = vars(layer).values()
    buffers = any(isinstance(value, Tensor) and value.numel() > 1 for value in values)
    reset: Callable[[], None] | None = getattr(layer, "reset", None)
    return all(isinstance(value, (*SIMPLE, Tensor)) for value in values) and (callable(reset) or not buffers)


def _replace(owner: Any, attributes: dict[str, Any]) -> None:
    vars(owner).clear()
    vars(owner).update(attributes)
