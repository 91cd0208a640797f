"""What a stack is made of beside its mixture, as data, and how it is read from a folder. Begin with read_stack.

stack.json              schema version, kind, settings, features, the detector's recipe; for each request or task its
                        promise, certificate, losses, and what its detector is
stack.safetensors       what the detectors were fitted to be, and the distances of held-out prompts
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moelora.continual.detectors import Detector
from moelora.continual.detectors.parts import within
from moelora.continual.gate import Gate
from moelora.continual.gate_state import gate_from, gate_state, keeps_rows, recipe_from, recipe_keeps_rows, recipe_state
from moelora.continual.orthogonality import Orthogonality
from moelora.continual.plain_values import check_names, check_type, checked, expect, is_number, is_whole
from moelora.folder import TENSORS_NAME
from moelora.integrations.sources import check_name
from moelora.manifest import CONFIG_NAME, check_version, version_in

STACK_NAME = "stack.json"
STACK_TENSORS_NAME = "stack.safetensors"

STACK_SCHEMA_VERSION = (1, 0)
"""Major and minor version of `stack.json`. A newer minor is read with a warning, a newer major refused."""

OPTIONS: dict[str, tuple[str, ...]] = {"UnlearningStack": ("combine", "union"), "ContinualStack": ("routing",)}
"""The stacks of `moelora.continual`, with the texts that only their constructors take."""

BOUND = (CONFIG_NAME, TENSORS_NAME, STACK_TENSORS_NAME)
"""Files whose digests `stack.json` holds, so that it is never read with a mixture of another save."""

FEATURES = ("layers", "window", "stride", "windows_at_once")
FIELDS = ("kind", "digests", "settings", "features", "detector", "holds_features", "experts")


@dataclass(frozen=True, kw_only=True)
class StackEntry:
    """One request or task of a stack; `gate` is None where nobody asks it."""

    name: str
    gate: Gate | None
    losses: tuple[float, ...]
    overlap: float


@dataclass(frozen=True, kw_only=True)
class StackManifest:
    """The contents of `stack.json` and `stack.safetensors`, checked.

    Attributes:
        kind: the stack's class, one of `OPTIONS`.
        settings: arguments of the stack's constructor.
        features: arguments of `HiddenStates`.
        recipe: the detector that each request fits a copy of.
        entries: in the order of the experts.
        holds_features: whether detectors keep features of single texts.
    """

    kind: str
    settings: dict[str, Any]
    features: dict[str, Any]
    recipe: Detector
    entries: tuple[StackEntry, ...]
    holds_features: bool

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """As the values of `stack.json`, but for versions and digests, and the tensors beside them."""
        detector, made_with = recipe_state(self.recipe)
        tensors = {f"recipe.{name}": tensor for name, tensor in made_with.items()}
        experts = []
        for number, entry in enumerate(self.entries):
            values, fitted = (None, {}) if entry.gate is None else gate_state(entry.gate)
            tensors |= {f"{place_of(number)}.{name}": tensor for name, tensor in fitted.items()}
            experts.append({"name": entry.name, "losses": list(entry.losses), "overlap": entry.overlap, "gate": values})
        values = {
            "kind": self.kind,
            "settings": {**self.settings, "orthogonality": asdict(self.settings["orthogonality"])},
            "features": self.features,
            "detector": detector,
            "holds_features": self.holds_features,
            "experts": experts,
        }
        return values, tensors


def read_stack(folder: Path, kind: str) -> StackManifest:
    """Read and check the two files of a stack.

    Raises:
        ValueError: if one is missing, malformed, of another save than the mixture beside it, of another kind of stack,
            or written by a newer major version.
    """
    values = _json(folder, kind)
    try:
        check_names(values, STACK_NAME, required=FIELDS, known=[*FIELDS, "schema_version", "moelora_version"])
        expect(values["kind"] == kind, "kind", repr(kind), values["kind"])
        check_names(values["digests"], "digests", required=BOUND)
    except ValueError as error:
        raise _malformed(folder, error) from error
    for name, digest in values["digests"].items():
        _check_digest(folder / name, digest)
    tensors = _tensors(folder / STACK_TENSORS_NAME)
    try:
        return _manifest(values, tensors)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise _malformed(folder, error) from error


def digest_of(path: Path) -> str:
    """The sha-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def place_of(number: int) -> str:
    """Where the tensors of a request or task are in `stack.safetensors`."""
    return f"{number:03d}"


# --- inside -----------------------------------------------------------------------------------------------------------


def _json(folder: Path, kind: str) -> dict[str, Any]:
    """The values of a version that can be read, of the kind that is wanted."""
    path = folder / STACK_NAME
    if not path.is_file():
        raise ValueError(
            f"{str(folder)!r} holds no stack: it has no {STACK_NAME}, which a stack's save(...) writes; a mixture "
            "without one is loaded with moelora.load"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = version_in(values)
        found = values.get("kind")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise _malformed(folder, error) from error
    check_version(version, STACK_SCHEMA_VERSION, f"the stack in {str(folder)!r}", stacklevel=6)
    if found != kind and isinstance(found, str) and found in OPTIONS:
        raise ValueError(f"{str(folder)!r} holds a {found}, expected {kind}; load it with {found}.load(model, ...)")
    return values


def _check_digest(path: Path, expected: object) -> None:
    came = digest_of(path) if path.is_file() else "missing"
    if came != expected:
        raise ValueError(
            f"{path.name} in {str(path.parent)!r} is not the one that its {STACK_NAME} was saved with: its sha-256 is "
            f"{came}, expected {repr(expected)[:80]}; another mixture was saved over the stack, or a save was "
            "interrupted: save or download it again"
        )


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}; save or download the stack again") from error


def _malformed(folder: Path, error: Exception) -> ValueError:
    what = f"no {error}" if isinstance(error, KeyError) else str(error)
    return ValueError(f"{STACK_NAME} in {str(folder)!r} is malformed: {what}; save the stack again")


def _manifest(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> StackManifest:
    experts, features = values["experts"], values["features"]
    expect(isinstance(experts, list) and len(experts) > 0, "experts", "a list", experts)
    check_names(features, "features", required=FEATURES)
    layers = features["layers"]
    expect(isinstance(layers, list) and all(map(is_whole, layers)), "layers", "a list of whole numbers", layers)
    for name in FEATURES[1:]:
        check_type(int, features[name], name)
    check_type(bool, values["holds_features"], "holds_features")
    manifest = StackManifest(
        kind=values["kind"],
        settings=_settings(values["settings"], OPTIONS[values["kind"]]),
        features=features,
        recipe=recipe_from(values["detector"], within(tensors, "recipe"), "detector"),
        entries=tuple(_entry(entry, within(tensors, place_of(number))) for number, entry in enumerate(experts)),
        holds_features=values["holds_features"],
    )
    _check_entries(manifest)
    stray = sorted(set(tensors) - set(manifest.state()[1]))
    expect(not stray, STACK_TENSORS_NAME, f"the tensors of {len(experts)} experts", stray[:5])
    return manifest


def _check_entries(manifest: StackManifest) -> None:
    """What the entries must have in common."""
    names = [entry.name for entry in manifest.entries]
    expect(len(set(names)) == len(names), "experts", "different names", names)
    gates = [entry.gate for entry in manifest.entries if entry.gate is not None]
    wanted = len(names) if manifest.settings.get("routing", "gates") == "gates" else 0
    expect(len(gates) == wanted, "gates", f"{wanted} for {len(names)} experts", len(gates))
    calibrated = sum(gate.calibration is not None for gate in gates)
    allowed = {len(gates)} if manifest.kind == "UnlearningStack" else {0, len(gates)}
    expect(calibrated in allowed, "certificates", f"{max(allowed)} for {len(gates)} gates", calibrated)
    rows = recipe_keeps_rows(manifest.recipe) or any(map(keeps_rows, gates))
    expect(manifest.holds_features is rows, "holds_features", str(rows).lower(), manifest.holds_features)


def _settings(values: Any, options: tuple[str, ...]) -> dict[str, Any]:
    check_names(values, "settings", required=["rank", "alpha", "targets", "orthogonality", "seed", *options])
    rank, targets = values["rank"], values["targets"]
    expect(is_whole(rank) and rank > 0, "rank", "a positive whole number", rank)
    expect(
        isinstance(targets, str) or (isinstance(targets, list) and all(isinstance(name, str) for name in targets)),
        "targets",
        "text or a list of texts",
        targets,
    )
    check_type(float | None, values["alpha"], "alpha")
    check_type(int, values["seed"], "seed")
    for name in options:
        check_type(str, values[name], name)
    return {**values, "orthogonality": checked(Orthogonality, values["orthogonality"], "orthogonality")}


def _entry(values: Any, tensors: Mapping[str, Tensor]) -> StackEntry:
    check_names(values, "an expert", required=["name", "losses", "overlap", "gate"])
    name, losses, overlap = check_name(values["name"]), values["losses"], values["overlap"]
    expect(isinstance(losses, list) and all(map(is_number, losses)), f"losses of {name!r}", "finite numbers", losses)
    check_type(float, overlap, f"overlap of {name!r}")
    gate = None if values["gate"] is None else gate_from(values["gate"], tensors, repr(name))
    return StackEntry(name=name, gate=gate, losses=tuple(losses), overlap=overlap)
