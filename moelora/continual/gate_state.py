"""Gates and detectors as plain values and tensors, and back. Begin with gate_state and gate_from.

What is read may come from a stranger. Its form is checked: names, types, shapes, dtypes, signs, and the counts of the
certificate that the file itself can prove. What a detector was fitted to, no check can tell.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from moelora.continual.calibration import ON_CONFLICT, Calibration, ramp
from moelora.continual.certificate import GUARANTEES, Certificate
from moelora.continual.conformal import check_rate
from moelora.continual.detectors import Detector, SumOf
from moelora.continual.detectors.base import DetectorState
from moelora.continual.detectors.kinds import KINDS, detector_from_state, kind_of
from moelora.continual.detectors.parts import AXES, within
from moelora.continual.gate import Gate, Promise
from moelora.continual.plain_values import check_names, check_type, checked, expect, is_whole
from moelora.continual.union import Standard

SETTINGS: Mapping[str, Any] = {
    "folds": int,
    "seed": int,
    "neighbours": int,
    "directions": int | None,
    "zeta": float,
    "used": float,
    "variant": str,
}
"""Types of the detectors' settings; `parts`, those of a sum, are detectors again."""

POSITIVE = ("variance_SR", "remainder_S", "deviation_S", "deviation_used", "deviation_rest")
"""Fitted tensors that distances are divided by."""


def gate_state(gate: Gate) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A gate as JSON values and tensors."""
    description, tensors = gate.detector.state()
    values = {
        "promise": asdict(gate.promise),
        "standard": asdict(gate.standard),
        "certificate": None if gate.calibration is None else gate.calibration.certificate.to_dict(),
        "detector": description,
    }
    return values, {"held_N": gate.held_N, **{f"detector.{name}": tensor for name, tensor in tensors.items()}}


def gate_from(values: Any, tensors: Mapping[str, Tensor], what: str) -> Gate:
    """The gate that `gate_state` was taken of, on the device of the tensors.

    Tensors that it has no use for are left to the caller, who knows what is in the file.

    Raises:
        ValueError: naming the value or the tensor that is missing or cannot be, or a value that is unknown.
    """
    check_names(values, what, required=["promise", "standard", "certificate", "detector"])
    promise = checked(Promise, values["promise"], f"promise of {what}")
    for name in ("max_miss", "max_fire", "confidence"):
        check_rate(getattr(promise, name), f"{name} of {what}")
    expect(promise.guarantee in GUARANTEES, f"guarantee of {what}", f"one of {GUARANTEES}", promise.guarantee)
    expect(promise.on_conflict in ON_CONFLICT, f"on_conflict of {what}", f"one of {ON_CONFLICT}", promise.on_conflict)

    held_N = tensors.get("held_N", torch.empty(0))
    whole = held_N.ndim == 1 and len(held_N) > 0 and held_N.dtype == torch.float64 and bool(held_N.isfinite().all())
    expect(whole, f"held_N of {what}", "finite distances in fp64", held_N)
    calibration = None
    if values["certificate"] is not None:
        calibration = Calibration(certificate=_certificate(values["certificate"], held_N, what))
    return Gate(
        detector=_detector(values["detector"], within(tensors, "detector"), f"detector of {what}"),
        standard=checked(Standard, values["standard"], f"standard of {what}"),
        held_N=held_N,
        promise=promise,
        calibration=calibration,
    )


def recipe_state(detector: Detector) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A detector that need not be fitted, as JSON values and the tensors that it was made with."""
    return {"kind": detector.kind, "settings": detector._settings()}, detector._given()


def recipe_from(values: Any, tensors: Mapping[str, Tensor], what: str) -> Detector:
    """The detector that `recipe_state` was taken of, without what it was fitted to.

    Raises:
        ValueError: as `gate_from`.
    """
    check_names(values, what, required=["kind", "settings"])
    _check_settings(values, what)
    _check_tensors(tensors, what)
    return kind_of(values["kind"])._from_settings(values["settings"], tensors)


def check_own(detector: Detector) -> None:
    """Raise ValueError for a detector that is not this package's own, since nobody could read it again."""
    for own in _with_parts(detector):
        if KINDS.get(getattr(own, "kind", "")) is not type(own):
            raise ValueError(
                f"a {type(own).__name__} cannot be saved with a stack, which names its detectors by kind; expected one "
                f"of {sorted(kind.__name__ for kind in KINDS.values())}"
            )


def keeps_rows(gate: Gate) -> bool:
    """Whether a gate's detector keeps features of single rows, and not only sums over them."""
    return _of_rows(gate.detector.state().tensors)


def recipe_keeps_rows(detector: Detector) -> bool:
    """Whether one was made with features of single rows; what it may be fitted to is no part of its recipe."""
    return _of_rows(detector._given())


# --- inside -----------------------------------------------------------------------------------------------------------


def _certificate(values: Any, held_N: Tensor, what: str) -> Certificate:
    """A certificate that says of the held-out prompts what these say themselves."""
    certificate = checked(Certificate, values, f"certificate of {what}")
    for name, rate in (("miss", certificate.miss), ("fire", certificate.fire)):
        counts = 0 <= rate.seen <= rate.samples and 0 <= rate.allowed <= rate.samples
        shares = 0 <= rate.promised <= 1 and 0 <= rate.bound <= 1
        expect(counts and shares, f"{name} of certificate of {what}", "counts of its samples, and shares", rate)
    share = certificate.union_fire_bound
    expect(0 <= share <= 1, f"union_fire_bound of certificate of {what}", "a share", share)
    missed = int((ramp(held_N, certificate.tau_lo, certificate.tau_hi) < 1).sum())
    said = (certificate.miss.seen, certificate.miss.samples)
    expect(said == (missed, len(held_N)), f"misses of certificate of {what}", f"{missed} of {len(held_N)}", said)
    return certificate


def _detector(values: Any, tensors: Mapping[str, Tensor], what: str) -> Detector:
    check_names(values, what, required=["kind", "settings", "layers", "width"])
    _check_settings(values, what)
    _check_tensors(tensors, what)
    sizes = {"S": values["layers"], "D": values["width"]}
    expect(all(is_whole(size) and size > 0 for size in sizes.values()), f"layers and width of {what}", "sizes", sizes)
    for name, tensor in tensors.items():
        fits = all(sizes.get(letter, size) == size for letter, size in zip(_axes(name), tensor.shape))
        expect(fits, f"shape of {name} of {what}", f"S and D to be {sizes}", tuple(tensor.shape))
    return detector_from_state(DetectorState(values, dict(tensors)))


def _check_settings(values: Any, what: str) -> None:
    check_type(str, values["kind"], f"kind of {what}")
    settings = values["settings"]
    expect(isinstance(settings, dict), f"settings of {what}", "a mapping", settings)
    for name, value in settings.items():
        if name == "parts":
            expect(isinstance(value, list), f"parts of {what}", "a list", value)
            for number, part in enumerate(value):
                check_names(part, f"part {number} of {what}", required=["kind", "settings"])
                _check_settings(part, f"part {number} of {what}")
        else:
            expect(name in SETTINGS, f"settings of {what}", f"some of {[*SETTINGS, 'parts']}", name)
            check_type(SETTINGS[name], value, f"{name} of {what}")


def _check_tensors(tensors: Mapping[str, Tensor], what: str) -> None:
    for name, tensor in tensors.items():
        exact = tensor.dtype in (torch.float32, torch.float64) and bool(tensor.isfinite().all())
        expect(exact, f"{name} of {what}", "finite numbers in fp32 or fp64", tensor)
        if name.rpartition(".")[2] in POSITIVE:
            expect(bool((tensor > 0).all()), f"{name} of {what}", "positive numbers", tensor)


def _with_parts(detector: Detector) -> Iterable[Detector]:
    yield detector
    if isinstance(detector, SumOf):
        for part in detector.parts:
            yield from _with_parts(part)


def _of_rows(names: Iterable[str]) -> bool:
    return any({"N", "M"} & set(_axes(name)) for name in names)


def _axes(name: str) -> str:
    found = AXES.search(name)
    return found.group(1) if found else ""
