"""Save a stack, put it on its base model again, share it. Begin with save_stack and load_stack.

A stack's folder is that of a mixture with all its experts (`moelora.folder`), and two files beside it, which
`moelora.continual.stack_manifest` describes. `moelora.load` reads the mixture alone, which does not run without gates.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import nn

import moelora
from moelora.continual.continual_stack import ContinualStack, Task
from moelora.continual.features import HiddenStates, Windows, text_config
from moelora.continual.gate import Gate
from moelora.continual.stack import Stack
from moelora.continual.stack_card import about
from moelora.continual.stack_manifest import (
    BOUND,
    STACK_NAME,
    STACK_SCHEMA_VERSION,
    STACK_TENSORS_NAME,
    StackEntry,
    StackManifest,
    digest_of,
    read_stack,
)
from moelora.continual.stack_state import manifest_of, refuse_features
from moelora.continual.unlearning_stack import Request, UnlearningStack
from moelora.folder import check_whole, write_mixture
from moelora.integrations.hub import upload_folder
from moelora.lifecycle import set_trainable
from moelora.manifest import Manifest, read_manifest
from moelora.mixture import find_mixture
from moelora.patch import refuse_patched, unpatch_model
from moelora.saving import load, locate_mixture, mixture_card

This = TypeVar("This", bound=Stack)


def save_stack(stack: Stack, folder: Path, *, include_features: bool = False) -> None:
    """Write a stack's mixture, gates and certificates to a folder. A stack that lies there is replaced.

    Args:
        stack: with an expert at least.
        folder: made if it does not exist.
        include_features: whether detectors may be written that keep features of single texts.

    Raises:
        ValueError: for a stack without experts, features that are not the model's own hidden states, a detector that
            is not this package's own, or one that keeps features of single texts without `include_features`; and as
            `moelora.save`. Nothing is written then.
    """
    manifest = manifest_of(stack)
    if not include_features:
        refuse_features(manifest)
    values, fitted = manifest.state()
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in fitted.items()}
    check_whole(tensors)

    # the digests tell a stack.json that was left behind by a save that did not end
    root, mixture = find_mixture(stack.model)
    write_mixture(root, mixture, folder, include_experts=True)
    save_file(tensors, folder / STACK_TENSORS_NAME, metadata={"format": "pt"})
    versions = {"schema_version": list(STACK_SCHEMA_VERSION), "moelora_version": moelora.__version__}
    digests = {name: digest_of(folder / name) for name in BOUND}
    text = json.dumps({**versions, "digests": digests, **values}, indent=2, allow_nan=False)
    (folder / STACK_NAME).write_text(text + "\n", encoding="utf-8")


def load_stack(
    cls: type[This],
    model: nn.Module,
    folder_or_repo_id: "str | Path",
    *,
    revision: str | None = None,
    token: "str | bool | None" = None,
    endpoint: str | None = None,
    cache_dir: Any = None,
    local_files_only: bool = False,
) -> This:
    """Put a saved stack on its base model.

    Everything is read, checked and tried on the base model before that is changed.

    Args:
        cls: the class of the stack.
        model: the base model that the stack was made on.
        folder_or_repo_id: what `save_stack` or `push_stack` wrote.
        revision, token, endpoint, cache_dir, local_files_only: as in `moelora.load`.

    Raises:
        ValueError: naming what is missing, malformed, or does not fit. The model is as it was then.
    """
    refuse_patched(model)
    hub = {"token": token, "endpoint": endpoint, "cache_dir": cache_dir, "local_files_only": local_files_only}
    folder, _ = locate_mixture(folder_or_repo_id, revision, hub)
    saved = read_stack(folder, cls.__name__)
    mixture = read_manifest(folder)
    try:
        features = HiddenStates(model, **saved.features)
        stack = cls(model, detector=saved.recipe, features=features, **saved.settings)
        entries = _tried(saved, model)
    except ValueError as error:
        base = mixture.base_model.get("name") or mixture.base_model.get("class")
        raise ValueError(
            f"the stack in {str(folder)!r} does not fit this model: {error} (its base is {base})"
        ) from error
    _check_mixture(saved, mixture, stack)

    load(model, folder)
    try:
        set_trainable(model, routers=False, experts=False)
        _put_in(stack, entries)
    except BaseException:
        unpatch_model(model)
        raise
    return stack


def push_stack(
    stack: Stack,
    repo_id: str,
    *,
    include_features: bool = False,
    private: bool = True,
    token: "str | bool | None" = None,
    endpoint: str | None = None,
    commit_message: str = "Upload a stack of LoRA experts",
    metrics: "Mapping[str, Any] | None" = None,
) -> str:
    """Save a stack with a model card and upload it.

    Args:
        stack: as in `save_stack`.
        repo_id: on the hub.
        include_features: as in `save_stack`; whoever may read the repository reads them.
        private: whether a new repository is; a stack holds statistics of its texts, so it is unless this is False.
        token, endpoint, commit_message, metrics: as in `moelora.push_to_hub`.

    Returns:
        The address of the commit.

    Raises:
        ValueError: as `save_stack`, and if the hub refuses.
    """
    manifest = manifest_of(stack)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_stack(stack, folder, include_features=include_features)
        card = mixture_card(folder, repo_id, metrics, about=about(manifest))
        (folder / "README.md").write_text(card, encoding="utf-8")
        pushed = upload_folder(
            folder, repo_id, token=token, endpoint=endpoint, private=private, commit_message=commit_message
        )
    return pushed.url


# --- inside -----------------------------------------------------------------------------------------------------------


def _tried(saved: StackManifest, model: nn.Module) -> list[StackEntry]:
    """The entries with their gates on the model's device, each asked once for features as the model's are.

    The model itself does not run: transformers would leave hooks on it.

    Raises:
        ValueError: for a detector that cannot score such features.
    """
    device = next(model.parameters()).device
    return [replace(entry, gate=_tried_gate(entry.gate, saved, model, device)) for entry in saved.entries]


def _tried_gate(gate: Gate | None, saved: StackManifest, model: nn.Module, device: torch.device) -> Gate | None:
    if gate is None:
        return None
    state = gate.detector.state().description
    layers, width = len(saved.features["layers"]), getattr(text_config(model), "hidden_size", None) or state["width"]
    features_WSD = torch.full((1, layers, width), width**-0.5, device=device)
    windows = Windows(features_WSD, torch.zeros(1, dtype=torch.long, device=device), 1)
    gate.detector.to(device)
    try:
        distance_B = gate.distances(windows)
    except RuntimeError as error:
        raise ValueError(f"a {type(gate.detector).__name__} that was saved cannot score: {error}") from error
    if not distance_B.isfinite().all():
        raise ValueError(
            f"a {type(gate.detector).__name__} that was saved gives a prompt the distance {distance_B.tolist()}, "
            "expected a finite number"
        )
    return replace(gate, held_N=gate.held_N.to(device))


def _check_mixture(saved: StackManifest, mixture: Manifest, stack: Stack) -> None:
    """The mixture must be the one that this stack makes."""
    names, found = [entry.name for entry in saved.entries], [entry.name for entry in mixture.experts]
    if names != found:
        raise ValueError(
            f"{STACK_NAME} speaks of the experts {names}, but the mixture has {found}; save the stack again"
        )
    if elsewhere := [entry.name for entry in mixture.experts if entry.folder is None]:
        raise ValueError(
            f"the experts {elsewhere} do not lie in the stack's folder, as all of a stack's do; save it again"
        )
    if mixture.config != stack._experts.config:
        raise ValueError(
            f"the mixture has other options than those of its stack: {mixture.config}, expected "
            f"{stack._experts.config}; save the stack again"
        )


def _put_in(stack: Stack, entries: list[StackEntry]) -> None:
    """Make these the stack's own, and let their gates decide."""
    if isinstance(stack, UnlearningStack):
        stack._requests = [
            Request(entry.name, entry.gate, entry.losses, entry.overlap) for entry in entries if entry.gate is not None
        ]
        stack._hand_over_gates()
    elif isinstance(stack, ContinualStack):
        stack._tasks = [Task(entry.name, entry.gate, entry.losses, entry.overlap) for entry in entries]
        stack._set_gates([entry.gate for entry in entries if entry.gate is not None])
