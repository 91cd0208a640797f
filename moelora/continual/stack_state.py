"""A live stack as data, and what of it may be written. Begin with manifest_of."""

from typing import Any

from moelora.continual.features import HiddenStates
from moelora.continual.gate_state import check_own, keeps_rows, recipe_keeps_rows
from moelora.continual.stack import Stack
from moelora.continual.stack_manifest import StackEntry, StackManifest
from moelora.mixture import find_mixture, root_of


def manifest_of(stack: Stack) -> StackManifest:
    """A stack as data.

    Raises:
        ValueError: for one without experts, one whose model has other experts, features that are not the hidden
            states of its own model, and detectors that are not this package's own.
    """
    experts, features, entries = stack._experts, stack.features, stack._entries
    if not entries:
        raise ValueError("this stack has no experts to save yet, so its model is the base; add one first")
    root, mixture = find_mixture(stack.model)
    names = [entry.name for entry in entries]
    if mixture.names != names:
        raise ValueError(
            f"the model's experts are {mixture.names}, those of this stack {names}; experts of a stack come and go by "
            "its own methods alone"
        )
    if not isinstance(features, HiddenStates) or root_of(features.model) is not root:
        raise ValueError(
            "the features of this stack are not the hidden states of its own model, and other encoders are not saved "
            "with it; expected features=HiddenStates(model)"
        )
    gates = [entry.gate for entry in entries if entry.gate is not None]
    for detector in (stack.detector, *(gate.detector for gate in gates)):
        check_own(detector)
    return StackManifest(
        kind=type(stack).__name__,
        settings={
            "rank": experts.rank,
            "alpha": experts.config.alpha,
            "targets": _plain_targets(experts.targets, list(mixture.layers)),
            "orthogonality": experts.orthogonality,
            "seed": stack.seed,
            **stack._own_settings(),
        },
        features={
            "layers": list(features.layers),
            "window": features.window,
            "stride": features.stride,
            "windows_at_once": features.windows_at_once,
        },
        recipe=stack.detector,
        entries=tuple(
            StackEntry(name=entry.name, gate=entry.gate, losses=entry.losses, overlap=entry.overlap)
            for entry in entries
        ),
        holds_features=recipe_keeps_rows(stack.detector) or any(map(keeps_rows, gates)),
    )


def refuse_features(manifest: StackManifest) -> None:
    """Raise ValueError if a detector keeps features of single texts."""
    if not manifest.holds_features:
        return
    names = [entry.name for entry in manifest.entries if entry.gate is not None and keeps_rows(entry.gate)]
    raise ValueError(
        f"the detectors of {names or 'coming requests'} keep features of single texts that they were made of, by which "
        "whoever has the folder can tell what these were. Use Mahalanobis, which keeps statistics only, and fewer of "
        "them with directions=; or save the features knowingly with include_features=True"
    )


# --- inside -----------------------------------------------------------------------------------------------------------


def _plain_targets(targets: Any, sites: list[str]) -> "str | list[str]":
    """Targets as JSON values: a predicate as the sites that it chose."""
    if isinstance(targets, str):
        return targets
    return sites if callable(targets) else list(targets)
