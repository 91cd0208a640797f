"""The probe forward: which modules are really called, in eval and in train mode, and what each of them reads.

Begin with `probe`. It runs the model twice on a few tokens, under `no_grad`, with hooks that count; afterwards the
model is exactly as before. A projection that some fused path reads by its weight is not called, and patching it would
train nothing.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moelora.integrations.example_inputs import example_inputs
from moelora.integrations.preserve import preserved

MODES = ("eval", "train")
LENGTH = 4


class ProbeError(ValueError):
    """The probe forward could not be run; the cause is chained."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a module: its place among all calls, the numbers of the tensors it read, and the widths it met.

    Two calls with the same number among their `inputs` read the same tensor: equal memory, shape and version.
    """

    order: int
    inputs: tuple[int, ...]
    width_in: int | None
    width_out: int | None


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """All calls that the probe saw: mode -> module path -> its calls in order. A path that was not called has none."""

    calls: dict[str, dict[str, tuple[Call, ...]]]

    def called(self, path: str) -> bool:
        """Whether the module was called in eval and in train mode."""
        return all(self.calls[mode].get(path) for mode in MODES)

    def of(self, path: str, mode: str = "eval") -> tuple[Call, ...]:
        """The calls of one module in one mode."""
        return self.calls[mode].get(path, ())

    def first(self, path: str) -> Call:
        """The first call in eval mode; the module must have been called."""
        return self.calls["eval"][path][0]

    def reads(self, path: str) -> tuple[tuple[int, ...], ...]:
        """What tells groups apart: the first input of every call, in both modes."""
        return tuple(tuple(call.inputs[0] for call in self.of(path, mode) if call.inputs) for mode in MODES)


def probe(model: nn.Module, paths: Collection[str], inputs: Any = None) -> ProbeReport:
    """Run the model once in eval and once in train mode and report the calls of the modules at `paths`.

    `inputs`: a mapping of keyword arguments, a tuple or list of arguments, or one tensor; None makes them from a
    `transformers` config. Raises `ProbeError` if that is impossible or the forward fails.
    """
    args, kwargs = _arguments(model, inputs)
    calls: dict[str, dict[str, tuple[Call, ...]]] = {}
    with preserved(model):
        for mode in MODES:
            _quieten(model, training=mode == "train")
            with _recording(model, paths) as record, torch.no_grad():
                try:
                    model(*args, **kwargs)
                except Exception as error:
                    raise ProbeError(
                        f"the probe forward of {type(model).__name__} failed in {mode} mode "
                        f"with {_described(args, kwargs)}: {type(error).__name__}: {error}; "
                        "pass probe_inputs= (a dict of keyword arguments, or a tuple of arguments) that it can run"
                    ) from error
            calls[mode] = record.result()
    return ProbeReport(calls=calls)


def _arguments(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if inputs is None:
        # a head that pools the last real token cannot take two rows without a pad token
        text = getattr(model, "config", None)
        batch = 1 if getattr(text, "pad_token_id", None) is None else 2
        generator = torch.Generator().manual_seed(0)
        try:
            return (), dict(example_inputs(model, batch=batch, length=LENGTH, generator=generator))
        except (ValueError, AttributeError) as error:
            raise ProbeError(f"no inputs for the probe forward: {error}") from error
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    raise ProbeError(
        "probe_inputs must be a mapping of keyword arguments, a tuple of arguments or a tensor, "
        f"got {type(inputs).__name__}"
    )


def _described(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    named = [(str(place), value) for place, value in enumerate(args)] + list(kwargs.items())
    return ", ".join(f"{name}: {list(v.shape) if isinstance(v, Tensor) else type(v).__name__}" for name, v in named)


def _quieten(model: nn.Module, *, training: bool) -> None:
    """Set the mode, and switch off what skips layers by chance or runs them twice; `preserved` puts it back."""
    configs = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None
    }
    for owner in (*model.modules(), *configs.values()):
        for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
            if isinstance(getattr(owner, name, None), float):
                setattr(owner, name, 0.0)
        # some fused paths are taken only in training without a cache
        if training and getattr(owner, "use_cache", None) is True:
            vars(owner)["use_cache"] = False
    for module in model.modules():
        module.training = training
        if getattr(module, "gradient_checkpointing", False) is True:
            vars(module)["gradient_checkpointing"] = False
        module._compiled_call_impl = None


class _Record:
    """The calls of one forward. It keeps the tensors alive, so that an address means one tensor only."""

    def __init__(self) -> None:
        self.calls: dict[str, list[Call]] = {}
        self.order = 0
        self.numbers: dict[tuple[Any, ...], int] = {}
        self.kept: list[Tensor] = []

    def number(self, tensor: Tensor) -> int:
        version = 0 if tensor.is_inference() else tensor._version
        address = tensor.data_ptr() if tensor.device.type != "meta" and tensor.layout == torch.strided else 0
        key = (address or id(tensor), tuple(tensor.shape), version, tensor.dtype)
        self.kept.append(tensor)
        return self.numbers.setdefault(key, len(self.numbers))

    def add(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        call = Call(
            order=self.order,
            inputs=tuple(self.number(tensor) for tensor in tensors),
            width_in=_width(tensors[0]) if tensors else None,
            width_out=_width(output) if isinstance(output, Tensor) else None,
        )
        self.order += 1
        self.calls.setdefault(path, []).append(call)

    def result(self) -> dict[str, tuple[Call, ...]]:
        return {path: tuple(calls) for path, calls in self.calls.items()}


def _width(tensor: Tensor) -> int | None:
    return tensor.shape[-1] if tensor.ndim else None


@contextmanager
def _recording(model: nn.Module, paths: Collection[str]) -> Iterator[_Record]:
    record = _Record()
    handles = []
    seen: set[int] = set()
    for path in paths:
        module = model.get_submodule(path)
        if id(module) in seen:
            continue
        seen.add(id(module))

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
            record.add(path, args, kwargs, output)

        handles.append(module.register_forward_hook(note, with_kwargs=True))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
