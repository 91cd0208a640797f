"""Save a mixture, load it, share it, export it. Begin with save and load."""

import math
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

import moelora
from moelora.base_model import check_base
from moelora.collector import collector_paused
from moelora.folder import parts_of, put_tensors, read_tensors, write_mixture
from moelora.integrations.adapters import Adapter, load_adapters
from moelora.integrations.card import model_card
from moelora.integrations.hub import download_mixture, upload_folder
from moelora.integrations.peft_folder import concatenate, write_adapter
from moelora.manifest import ExpertEntry, Manifest, read_manifest
from moelora.mixture import find_mixture
from moelora.patch import carry_out, refuse_patched, unpatch_model
from moelora.plan import ExpertPlan, Plan, make_plan
from moelora.routers.gated import refuse_leaving_gates


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


@collector_paused()
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
    folder, from_hub = locate_mixture(folder_or_repo_id, revision, hub)
    manifest = read_manifest(folder)
    tensors = read_tensors(folder)
    restored = [_name_in_base(key.removeprefix("base/"), manifest) for key in tensors if key.startswith("base/")]
    check_base(model, manifest.base_model, sites=manifest.sites, restored=restored)

    moved = dict(experts or {})
    if unknown := sorted(set(moved) - {entry.name for entry in manifest.experts}):
        raise ValueError(f"the mixture has no experts {unknown}; it has {[entry.name for entry in manifest.experts]}")
    sources = {entry.name: _source(entry, folder, moved, from_hub=from_hub) for entry in manifest.experts}
    adapters = load_adapters(sources, strict=False, progress=progress, **hub)
    for entry, adapter in zip(manifest.experts, adapters, strict=True):
        _check_adapter(entry, adapter)

    plan = make_plan(
        model,
        adapters,
        config=manifest.config,
        targets=lambda path, module: path in manifest.sites,
        strict=False,
        probe_inputs=probe_inputs,
    )
    plan = _as_saved(plan, manifest)
    carry_out(model, plan)
    try:
        _, mixture = find_mixture(model)
        put_tensors(model, mixture, tensors)
    except BaseException:
        unpatch_model(model)
        raise
    mixture.base_model = manifest.base_model
    for number, entry in enumerate(manifest.experts):
        if entry.name not in moved:
            mixture.sources[number] = entry.source.to_dict()
            if entry.folder is not None:
                mixture.changed.add(entry.name)
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

    Experts that did not come from a hub are included, since nobody else could load them.

    Returns:
        The address of the commit.

    Raises:
        ValueError: as `save`, and if the hub refuses.
    """
    root, mixture = find_mixture(model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_mixture(root, mixture, folder, include_experts=include_experts, reloadable=["hub"])
        (folder / "README.md").write_text(mixture_card(folder, repo_id, metrics), encoding="utf-8")
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
        ValueError: for an unknown name, a weight that is not finite, if no expert has a weight, or for experts that
            unlearn behind gates.
    """
    _, mixture = find_mixture(model)
    refuse_leaving_gates(mixture.config.router)
    wanted = {weights: 1.0} if isinstance(weights, str) else dict(weights)
    indices = {mixture.index(name): float(weight) for name, weight in wanted.items()}
    if not all(map(math.isfinite, indices.values())):
        raise ValueError(f"weights must be finite, got {wanted}")
    if not any(indices.values()):
        raise ValueError(f"no expert has a weight in {wanted}; the mixture would be the base model")
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


def locate_mixture(place: "str | Path", revision: str | None, hub: dict[str, Any]) -> tuple[Path, bool]:
    """The local folder of a mixture, as it is or downloaded, and whether it was downloaded.

    Raises:
        ValueError: if it is not there, or the hub does not give it.
    """
    folder = Path(place).expanduser()
    if folder.is_dir():
        return folder, False
    if isinstance(place, Path) or place.startswith((".", "/", "~")):
        raise ValueError(f"there is no folder {str(place)!r}; expected one that moelora.save wrote, or a hub id")
    repo_id, _, own_revision = place.partition("@")
    folder, _ = download_mixture(repo_id, revision=own_revision or revision, **hub)
    return folder, True


def _source(entry: ExpertEntry, folder: Path, moved: Mapping[str, Any], *, from_hub: bool) -> Any:
    """Where to read an expert from: a new place, the mixture's own folder, or where it came from."""
    name, source = entry.name, entry.source
    if name in moved:
        return moved[name]
    if entry.folder is not None:
        return folder / entry.folder
    if source.kind == "folder":
        if from_hub:
            raise ValueError(
                f"expert {name!r} lies on the disk of whoever made this mixture; ask for one that was pushed with "
                f"moelora.push_to_hub, or say with experts={{{name!r}: ...}} where you have it"
            )
        if not Path(source.location).is_dir():
            raise ValueError(
                f"expert {name!r} was read from {source.location!r}, which is not there; say where it is now with "
                f"experts={{{name!r}: ...}}, or save the mixture with include_experts=True"
            )
        return Path(source.location)
    return f"{source.location}@{source.commit}" + (f":{source.subfolder}" if source.subfolder else "")


def _check_adapter(entry: ExpertEntry, adapter: Adapter) -> None:
    """The weights must be the ones that were saved; in memory they have no digest to compare."""
    if entry.sha256 is not None and adapter.source.sha256 != entry.sha256:
        raise ValueError(
            f"expert {entry.name!r} is not the one this mixture was saved with: the sha-256 of its weights at "
            f"{str(adapter.source)!r} is {adapter.source.sha256}, expected {entry.sha256}"
        )


def _as_saved(plan: Plan, manifest: Manifest) -> Plan:
    """The plan with every expert as it stood: the same sites and ranks, its exact scales, frozen or trainable."""
    missing = sorted(set(manifest.sites) - {site.path for site in plan.sites})
    if missing:
        raise ValueError(f"{len(missing)} sites of the mixture are not in this model, such as {missing[:3]}")
    experts = tuple(
        _expert_as_saved(expert, entry) for expert, entry in zip(plan.experts, manifest.experts, strict=True)
    )
    return replace(plan, experts=experts)


def _expert_as_saved(expert: ExpertPlan, entry: ExpertEntry) -> ExpertPlan:
    assert expert.factors is not None
    factors = {path: found for path, found in expert.factors.items() if path in entry.ranks}
    differing = [
        path
        for path, rank in entry.ranks.items()
        if path not in factors
        or factors[path].A_RD.shape[0] != rank
        or not math.isclose(factors[path].scale, entry.scales[path], rel_tol=1e-9)
    ]
    if differing or len(factors) < len(expert.factors):
        raise ValueError(
            f"expert {entry.name!r} has changed at its source: its ranks or scales at {len(differing)} of "
            f"{len(entry.ranks)} sites are not those that were saved, such as {differing[:3]}"
        )
    exact = {path: replace(found, scale=entry.scales[path]) for path, found in factors.items()}
    return replace(expert, factors=exact, trainable=entry.trainable, shared_A=entry.shared_A)


def _name_in_base(name: str, manifest: Manifest) -> str:
    """The name that a parameter of the patched model has in the base."""
    site = name.rpartition(".base.")[0]
    return f"{site}.{name.removeprefix(f'{site}.base.')}" if site in manifest.sites else name


AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForImageClassification": "AutoModelForImageClassification",
}
"""The transformers class that loads a base, by the ending of its own class name; "AutoModel" for any other."""


def mixture_card(
    folder: Path,
    repo_id: str,
    metrics: "Mapping[str, Any] | None",
    *,
    about: "Mapping[str, Any] | None" = None,
) -> str:
    """README.md for a saved mixture; `about` says more of it, or other things, by the keys of `model_card`."""
    manifest = read_manifest(folder)
    base_class = str(manifest.base_model.get("class"))
    experts = [
        {
            "name": entry.name,
            "source": entry.source.to_dict(),
            "folder": entry.folder,
            "sha256": entry.sha256,
            "ranks": entry.ranks,
            "scales": entry.scales,
        }
        for entry in manifest.experts
    ]
    auto_classes = (auto_class for ending, auto_class in AUTO_CLASSES.items() if base_class.endswith(ending))
    return model_card(
        {
            "repo_id": repo_id,
            "base_model": manifest.base_model.get("name"),
            "auto_class": next(auto_classes, "AutoModel"),
            "router": manifest.config.to_dict()["router"],
            "sites": list(manifest.sites),
            "experts": experts,
            "package_version": moelora.__version__,
            "metrics": metrics,
            **(about or {}),
        }
    )
