"""Fitted parts: frozen dataclasses of tensors, as flat dictionaries and back. Begin with tensors_of.

A field's name ends in its axes (`mean_SD`), a scalar's in none (`radius`), and that is what is checked when parts are
read: the same letter has the same size everywhere.
"""

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part")

AXES = re.compile(r"_([A-Z]+)$")


def tensors_of(part: Any) -> dict[str, Tensor]:
    """All tensors of a dataclass, or of a tuple of dataclasses; nested names are joined by dots."""
    if isinstance(part, Tensor):
        return {"": part}
    entries = enumerate(part) if isinstance(part, tuple) else ((f.name, getattr(part, f.name)) for f in fields(part))
    return {
        f"{name}.{inner}".rstrip("."): tensor for name, held in entries for inner, tensor in tensors_of(held).items()
    }


def moved(part: Any, device: torch.device | str) -> Any:
    """The same parts on a device."""
    if isinstance(part, Tensor):
        return part.to(device)
    if isinstance(part, tuple):
        return tuple(moved(held, device) for held in part)
    return type(part)(**{f.name: moved(getattr(part, f.name), device) for f in fields(part)})


def part_from(kind: type[Part], tensors: Mapping[str, Tensor]) -> Part:
    """A dataclass from the tensors that `tensors_of` gave of it.

    Raises:
        ValueError: for names that are missing or unknown, sizes that do not fit one another, and values that are not
            finite.
    """
    wanted = _names(kind)
    if set(wanted) != set(tensors):
        missing, unknown = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
        raise ValueError(f"these are not the tensors of a {kind.__name__}: missing {missing}, unknown {unknown}")
    sizes: dict[str, int] = {}
    for name in wanted:
        tensor, found = tensors[name], AXES.search(name)
        letters = found.group(1) if found else ""
        if tensor.ndim != len(letters) or any(
            sizes.setdefault(letter, size) != size
            # each part has its own number of directions and stored rows
            for letter, size in zip((_of_part(name, letter) for letter in letters), tensor.shape)
        ):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, which does not fit the other tensors: {sizes}")
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} must hold finite floating-point numbers; was the file changed?")
    return _build(kind, tensors, "")


def within(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one nested part, without the part's name."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _names(kind: Any) -> list[str]:
    nested = {f.name: f.type for f in fields(kind)}
    return [
        f"{name}.{inner}" if inner else name
        for name, held in nested.items()
        for inner in (_names(held) if is_dataclass(held) else [""])
    ]


def _build(kind: Any, tensors: Mapping[str, Tensor], prefix: str) -> Any:
    return kind(
        **{
            f.name: _build(f.type, tensors, f"{prefix}{f.name}.")
            if is_dataclass(f.type)
            else tensors[f"{prefix}{f.name}"]
            for f in fields(kind)
        }
    )


def _of_part(name: str, letter: str) -> str:
    """S and D are the detector's, other letters the part's."""
    return letter if letter in "SD" else f"{name.rpartition('.')[0]}:{letter}"
