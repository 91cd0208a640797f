"""A mixture as a folder: what is written, and how it is read back. Begin with write_mixture.

moelora_config.json     schema version, options, sites, and for each expert its source, commit, hash, ranks and scales
routers.safetensors     the routers, and parameters of the base model that were trained beside them
experts/000/ ...        experts as plain PEFT folders, where they are included
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import moelora
from moelora.bank import Expert
from moelora.config import SCHEMA_VERSION
from moelora.integrations.adapter_file import CONFIG_NAME as ADAPTER_CONFIG_NAME
from moelora.integrations.adapter_file import WEIGHTS_NAME
from moelora.integrations.peft_folder import adapter_tensors, write_adapter
from moelora.layer import MoELoRALinear
from moelora.manifest import CONFIG_NAME, RELOADABLE
from moelora.mixture import Mixture

TENSORS_NAME = "routers.safetensors"
CHECKPOINT_NAME = "model.safetensors"
"""Where Trainer looks for the weights of a checkpoint that it resumes from."""

PLACE = re.compile(r"experts/[0-9]{3,}")
"""Where an included expert is, and nothing beyond the folder."""


def write_mixture(
    root: nn.Module,
    mixture: Mixture,
    folder: Path,
    *,
    include_experts: bool,
    reloadable: Collection[str] = RELOADABLE,
) -> None:
    """Write a mixture. Experts that cannot be read again from where they came are always included.

    Args:
        root: the patched model.
        mixture: of that model.
        folder: made if it does not exist. A mixture that lies there is replaced, with its experts.
        include_experts: whether all experts are included.
        reloadable: kinds of sources that whoever loads the mixture can read from.

    Raises:
        ValueError: if a parameter is not whole, as under FSDP or ZeRO, or not finite. Nothing is written then.
    """
    # what the last training call chose belongs to what is saved
    mixture.hooks.balance()

    # everything that may be refused comes first
    entries, included = [], {}
    for index, name in enumerate(mixture.names):
        parts = parts_of(mixture, index)
        trainable = any(layer.bank.trainable[index] for layer in mixture.layers.values())
        shared_A = any(layer.bank.shared[index] for layer in mixture.layers.values())
        source = dict(mixture.sources[index])
        own = trainable or name in mixture.changed or source["kind"] not in reloadable
        place = f"experts/{index:03d}" if include_experts or own else None
        if place is not None:
            included[place] = {path: expert for path, expert in parts.items() if expert.rank}
            if source["kind"] != "hub":
                # a path on somebody's disk says nothing to others
                source["location"] = Path(str(source["location"])).name
        entries.append(
            {
                "name": name,
                "source": source,
                "folder": place,
                "sha256": source["sha256"],
                "trainable": trainable,
                "shared_A": shared_A,
                "ranks": {path: expert.rank for path, expert in parts.items() if expert.rank},
                "scales": {path: expert.scale for path, expert in parts.items() if expert.rank},
            }
        )
    tensors = saved_tensors(root, mixture)
    check_whole(tensors)
    for place, parts in included.items():
        check_whole({f"{place}/{name}": tensor for name, tensor in adapter_tensors(parts).items()})

    # the manifest goes first and comes last, so that a folder with a manifest is a whole one
    folder.mkdir(parents=True, exist_ok=True)
    earlier = _places_in(folder)
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    for entry in entries:
        if entry["folder"] is not None:
            place = folder / entry["folder"]
            write_adapter(
                place,
                included[entry["folder"]],
                base_model=mixture.base_model.get("name"),
                fan_in_fan_out=any(site["fan_in_fan_out"] for site in mixture.sites.values()),
            )
            with open(place / WEIGHTS_NAME, "rb") as file:
                entry["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    _remove_experts(folder, earlier - set(included))
    save_file(tensors, folder / TENSORS_NAME, metadata={"format": "pt"})
    manifest = {
        "schema_version": list(SCHEMA_VERSION),
        "moelora_version": moelora.__version__,
        "base_model": mixture.base_model,
        "config": mixture.config.to_dict(),
        "sites": mixture.sites,
        "experts": entries,
    }
    (folder / CONFIG_NAME).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def write_checkpoint(
    root: nn.Module, mixture: Mixture, folder: Any, *, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """A mixture folder from which Trainer can resume: the same, and all trained tensors under the model's own names."""
    folder = Path(folder)
    write_mixture(root, mixture, folder, include_experts=False)
    state = root.state_dict() if state_dict is None else state_dict
    names = trained_names(root, mixture)
    missing = sorted(names - set(state))
    if missing:
        raise ValueError(f"the state dict to save lacks {len(missing)} trained tensors, such as {missing[:3]}")
    tensors = {name: state[name].detach().cpu().contiguous().clone() for name in sorted(names)}
    check_whole(tensors)
    save_file(tensors, folder / CHECKPOINT_NAME, metadata={"format": "pt"})


def trained_names(root: nn.Module, mixture: Mixture) -> set[str]:
    """Names, in the patched model, of all that training changes: routers with their buffers, and what has gradients."""
    trained = {name for name, parameter in root.named_parameters() if parameter.requires_grad}
    routers = {f"{site}.router.{name}" for site, layer in mixture.layers.items() for name in layer.router.state_dict()}
    rows = {
        f"{site}.bank.{name}" for site, layer in mixture.layers.items() for name, _ in layer.bank.named_parameters()
    }
    return trained | routers | rows


def saved_tensors(root: nn.Module, mixture: Mixture) -> dict[str, Tensor]:
    """What `routers.safetensors` holds: routers by site, a shared one once, and trained parameters of the base."""
    tensors = {}
    for site, layer in owners(mixture.layers).items():
        for name, value in layer.router.state_dict().items():
            tensors[f"router/{site}/{name}"] = value.detach().cpu().contiguous().clone()
    for name, parameter in trained_base(root, mixture).items():
        tensors[f"base/{name}"] = parameter.detach().cpu().contiguous().clone()
    return tensors


def trained_base(root: nn.Module, mixture: Mixture) -> dict[str, nn.Parameter]:
    """Parameters of the base model that somebody has made trainable since it was patched, such as a new head."""
    return {name: value for name, value in base_parameters(root, mixture).items() if value.requires_grad}


def base_parameters(root: nn.Module, mixture: Mixture) -> dict[str, nn.Parameter]:
    """All parameters but those of banks and routers, under their names in the patched model."""
    inside = tuple(f"{site}.{part}." for site in mixture.layers for part in ("bank", "router"))
    return {name: value for name, value in root.named_parameters() if not name.startswith(inside)}


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The contents of `routers.safetensors`.

    Raises:
        ValueError: if it is missing, damaged, or holds NaN.
    """
    path = folder / TENSORS_NAME
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} holds no whole mixture: it has no {TENSORS_NAME}; moelora.save writes one")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}; save or download the mixture again") from error
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"{len(broken)} tensors in {str(path)!r} hold NaN or Inf, such as {broken[:3]}")
    return tensors


def put_tensors(root: nn.Module, mixture: Mixture, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors of `routers.safetensors` into a patched model.

    Raises:
        ValueError: naming what is missing, left over or of another shape; nothing is changed then.
    """
    places: dict[str, Tensor] = {}
    for site, layer in owners(mixture.layers).items():
        places |= {f"router/{site}/{name}": value for name, value in layer.router.state_dict().items()}
    parameters = base_parameters(root, mixture)
    base = {key: key.removeprefix("base/") for key in tensors if key.startswith("base/")}
    places |= {key: parameters[name] for key, name in base.items() if name in parameters}
    missing, unknown = sorted(set(places) - set(tensors)), sorted(set(tensors) - set(places))
    shapes = [key for key in tensors if key in places and tensors[key].shape != places[key].shape]
    if missing or unknown or shapes:
        raise ValueError(
            f"{TENSORS_NAME} does not fit this model: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}, {len(shapes)} of another shape {shapes[:3]}"
        )
    with torch.no_grad():
        for key, tensor in tensors.items():
            places[key].copy_(tensor)
    for name in base.values():
        parameters[name].requires_grad_()


def owners(layers: Mapping[str, MoELoRALinear]) -> dict[str, MoELoRALinear]:
    """The first layer of each router; routers that serve several sites are saved once."""
    first: dict[int, str] = {}
    for site, layer in layers.items():
        first.setdefault(id(layer.router), site)
    return {site: layers[site] for site in first.values()}


def check_whole(tensors: Mapping[str, Tensor]) -> None:
    """Refuse to save tensors that are shards or not finite: a checkpoint that cannot be used is found out too late."""
    sharded = [name for name, tensor in tensors.items() if type(tensor).__name__ == "DTensor" or not tensor.numel()]
    if sharded:
        raise ValueError(
            f"{len(sharded)} parameters are sharded or empty, such as {sharded[:3]}; gather the full parameters first"
        )
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"{len(broken)} tensors hold NaN or Inf, such as {broken[:3]}; the training has diverged")


def parts_of(mixture: Mixture, index: int) -> dict[str, Expert]:
    """One expert's factors at every site."""
    return {path: layer.bank.expert(index) for path, layer in mixture.layers.items()}


def _places_in(folder: Path) -> set[str]:
    """Where the mixture that lies in a folder has its experts; none, if there is no manifest that can be read."""
    try:
        manifest = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        named = {str(entry["folder"]) for entry in manifest["experts"]}
    except (OSError, ValueError, LookupError, TypeError):
        return set()
    return {place for place in named if PLACE.fullmatch(place)}


def _remove_experts(folder: Path, places: Collection[str]) -> None:
    """Experts of an earlier save may have been taken out for a reason, and are not left lying about."""
    for place in (folder / name for name in sorted(places)):
        for name in (ADAPTER_CONFIG_NAME, WEIGHTS_NAME):
            (place / name).unlink(missing_ok=True)
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()
