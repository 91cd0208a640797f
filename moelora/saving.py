"""Save a mixture, load it, share it, export it. Begin with save and load."""

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

import moelora
from moelora.folder import Manifest, parts_of, read_manifest, read_tensors, write_mixture
from moelora.integrations.adapters import load_adapters
from moelora.integrations.card import model_card
from moelora.integrations.hub import download_mixture, upload_folder
from moelora.integrations.peft_folder import concatenate, write_adapter
from moelora.mixture import Mixture, find_mixture
from moelora.patch import carry_out, describe_base, refuse_patched, unpatch_model
from moelora.plan import Plan, make_plan

logger = logging.getLogger("moelora")


def save(model: nn.Module, folder: "str | Path", *, include_experts: bool = False) -> None:
    """Write the routers and a manifest of the experts to a folder.

    Experts stay where they came from, pinned by commit and hash; with `include_experts` they are copied in as plain
    PEFT folders, as trained and in-memory ones always are. Parameters of the base model that were made trainable are
    saved too. Nothing touches the network.

    Raises:
        ValueError: if the model is not patched, or its parameters are sharded or not finite.
    """
    root, mixture = find_mixture(model)
    write_mixture(root, mixture, Path(folder), include_experts=include_experts)


def load(
    model: nn.Module,
    folder_or_repo_id: "str | Path",
    *,
    experts: "Mapping[str, Any] | None" = None,
    revision: str | None = None,
    token: "str | bool | None" = None,
    endpoint: str | None = None,
    cache_dir: Any = None,
    local_files_only: bool = False,
    progress: bool | None = None,
    probe_inputs: Any = None,
) -> Any:
    """Patch a base model with a saved mixture. The logits are those of the saved model, bit for bit.

    Args:
        model: the base model that the mixture was made on.
        folder_or_repo_id: what `save` wrote, or the hub id of what `push_to_hub` wrote (also `id@revision`).
        experts: new places of experts that have moved, name to source.
        revision, token, endpoint, cache_dir, local_files_only, progress, probe_inputs: as in `patch_model`.

    Returns:
        The same model object.

    Raises:
        ValueError: naming what differs: the base, an expert's file, a site, a router. The model is as it was then.
    """
    refuse_patched(model)
    hub = {"token": token, "endpoint": endpoint, "cache_dir": cache_dir, "local_files_only": local_files_only}
    folder = _locate(str(folder_or_repo_id), revision, hub)
    manifest = read_manifest(folder)
    _check_base(model, manifest)

    sources = {entry["name"]: _source(entry, folder, experts or {}) for entry in manifest.experts}
    adapters = load_adapters(sources, strict=False, progress=progress, **hub)
    for entry, adapter in zip(manifest.experts, adapters, strict=True):
        expected = entry["source"].get("sha256")
        if entry["folder"] is None and expected is not None and adapter.source.sha256 != expected:
            raise ValueError(
                f"expert {adapter.name!r} is not the one this mixture was saved with: the sha-256 of its weights is "
                f"{adapter.source.sha256}, expected {expected}"
            )

    plan = make_plan(
        model,
        adapters,
        config=manifest.config,
        targets=lambda path, module: path in manifest.sites,
        strict=False,
        probe_inputs=probe_inputs,
    )
    _check_plan(plan, manifest)
    carry_out(model, plan)
    try:
        _, mixture = find_mixture(model)
        mixture.sources = [dict(entry["source"]) for entry in manifest.experts]
        for layer in mixture.layers.values():
            trainable = [index for index, entry in enumerate(manifest.experts) if entry["trainable"]]
            layer.bank.set_trainable(trainable)
        read_tensors(model, mixture, folder)
    except ValueError:
        unpatch_model(model)
        raise
    return model


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    include_experts: bool = False,
    private: bool = False,
    token: "str | bool | None" = None,
    endpoint: str | None = None,
    commit_message: str = "Upload a mixture of LoRA experts",
    metrics: "Mapping[str, Any] | None" = None,
) -> str:
    """Save a mixture with a model card and upload it.

    Experts that came from a local folder are included, since nobody else could load them.

    Returns:
        The address of the commit.

    Raises:
        ValueError: as `save`, and if the hub refuses.
    """
    root, mixture = find_mixture(model)
    local = any(source["kind"] == "folder" for source in mixture.sources)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_mixture(root, mixture, folder, include_experts=include_experts or local)
        (folder / "README.md").write_text(_card(folder, repo_id, metrics), encoding="utf-8")
        pushed = upload_folder(
            folder, repo_id, token=token, endpoint=endpoint, private=private, commit_message=commit_message
        )
    return pushed.url


def export_adapter(model: nn.Module, folder: "str | Path", *, weights: "str | Mapping[str, float]") -> None:
    """Write a fixed mixture of experts as one plain PEFT LoRA, exact: the experts' rank rows stand one after the other.

    Args:
        model: a patched model.
        folder: where `adapter_config.json` and `adapter_model.safetensors` go.
        weights: weight of each expert, on top of its own trained scale; or one expert's name, for weight 1.

    Raises:
        ValueError: for an unknown name, or if no expert has a weight.
    """
    _, mixture = find_mixture(model)
    wanted = {weights: 1.0} if isinstance(weights, str) else dict(weights)
    indices = {mixture.index(name): float(weight) for name, weight in wanted.items()}
    if not any(indices.values()):
        raise ValueError("all weights are zero; the mixture would be the base model")
    parts = {index: parts_of(mixture, index) for index in indices}
    experts = {
        path: concatenate([(parts[index][path], weight) for index, weight in indices.items()])
        for path in mixture.layers
    }
    write_adapter(
        Path(folder),
        experts,
        base_model=mixture.base_model.get("name"),
        fan_in_fan_out=any(site["fan_in_fan_out"] for site in mixture.sites.values()),
    )


def _locate(place: str, revision: str | None, hub: dict[str, Any]) -> Path:
    """The local folder of a mixture: as it is, or downloaded."""
    if Path(place).expanduser().is_dir():
        return Path(place).expanduser()
    if place.startswith((".", "/", "~")):
        raise ValueError(f"there is no folder {place!r}")
    repo_id, _, own_revision = place.partition("@")
    folder, _ = download_mixture(repo_id, revision=own_revision or revision, **hub)
    return folder


def _source(entry: Mapping[str, Any], folder: Path, moved: Mapping[str, Any]) -> Any:
    """Where to read an expert from: a new place, the mixture's own folder, or where it came from."""
    name, source = entry["name"], entry["source"]
    if name in moved:
        return moved[name]
    if entry["folder"] is not None:
        return folder / entry["folder"]
    if source["kind"] == "folder":
        if not Path(source["location"]).is_dir():
            raise ValueError(
                f"expert {name!r} was read from {source['location']!r}, which is not there; say where it is now with "
                f"experts={{{name!r}: ...}}, or save the mixture with include_experts=True"
            )
        return Path(source["location"])
    subfolder = f":{source['subfolder']}" if source.get("subfolder") else ""
    return f"{source['location']}@{source['commit']}{subfolder}"


def _check_base(model: nn.Module, manifest: Manifest) -> None:
    own = describe_base(model)
    for key in ("model_type", "parameters"):
        if own[key] != manifest.base_model.get(key):
            raise ValueError(
                f"this is not the base model of the mixture: its {key} is {own[key]!r}, "
                f"expected {manifest.base_model.get(key)!r} ({manifest.base_model.get('name')})"
            )


def _check_plan(plan: Plan, manifest: Manifest) -> None:
    """The experts must stand where they stood."""
    paths = {site.path for site in plan.sites}
    missing = sorted(set(manifest.sites) - paths)
    if missing:
        raise ValueError(f"{len(missing)} sites of the mixture are not in this model, such as {missing[:3]}")
    for site in plan.sites:
        expected = tuple(entry["ranks"].get(site.path, 0) for entry in manifest.experts)
        if plan.ranks(site.path) != expected:
            raise ValueError(
                f"the experts at {site.path!r} have the ranks {plan.ranks(site.path)}, but were saved with {expected}; "
                "an expert has changed at its source"
            )


def _card(folder: Path, repo_id: str, metrics: "Mapping[str, Any] | None") -> str:
    manifest = read_manifest(folder)
    return model_card(
        {
            "repo_id": repo_id,
            "base_model": manifest.base_model.get("name"),
            "router": manifest.config.to_dict()["router"],
            "sites": list(manifest.sites),
            "experts": [
                {
                    "name": entry["name"],
                    "source": entry["source"]["location"],
                    **{key: entry["source"].get(key) for key in ("revision", "commit", "sha256")},
                    "ranks": sorted(set(entry["ranks"].values())),
                    "scales": sorted(set(entry["scales"].values())),
                }
                for entry in manifest.experts
            ],
            "package_version": moelora.__version__,
            "metrics": metrics,
        }
    )


__all__ = ["Mixture", "export_adapter", "load", "push_to_hub", "save"]
