"""Put layers at named places of a model, and take them out again. Begin with install.

Knows nothing of Hugging Face: a model is an `nn.Module`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Place:
    """One reference to a replaced module: `parent.name` held `original`."""

    parent: nn.Module
    name: str
    original: nn.Module


def find_places(model: nn.Module, paths: Collection[str]) -> dict[str, list[Place]]:
    """Every place of the model that refers to the module at each of these paths.

    A module that is shared between blocks has several places and one path.

    Raises:
        ValueError: if a path does not exist, or two paths name the same module.
    """
    by_id: dict[int, str] = {}
    for path in paths:
        original = _module_at(model, path)
        if id(original) in by_id:
            raise ValueError(f"{path!r} and {by_id[id(original)]!r} are the same module; name it once")
        by_id[id(original)] = path

    places: dict[str, list[Place]] = {path: [] for path in paths}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None and id(child) in by_id:
                places[by_id[id(child)]].append(Place(parent, name, child))
    return places


def install(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[Place]:
    """Replace the modules at these paths, wherever the model refers to them.

    Returns:
        What was replaced, for `restore`. Nothing is changed if an error is raised.
    """
    places = find_places(model, layers)
    for path, found in places.items():
        for place in found:
            place.parent._modules[place.name] = layers[path]
    return [place for found in places.values() for place in found]


def restore(places: list[Place]) -> None:
    """Put the original module objects back."""
    for place in places:
        place.parent._modules[place.name] = place.original


def _module_at(model: nn.Module, path: str) -> nn.Module:
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"the model has no module {path!r}") from error
    if module is model:
        raise ValueError("the model itself cannot be replaced; name a module inside it")
    return module
