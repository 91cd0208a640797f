"""The gate of one request: a detector, its scale and its thresholds. Begin with Gate, then fit_gate and recalibrate.

Axes: B prompts, W windows, N held-out prompts of a request, M benign prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from moelora.continual.calibration import NAN_POLICIES, Calibration, calibrate, gate_weight
from moelora.continual.certificate import union_of
from moelora.continual.detectors import Detector
from moelora.continual.features import Windows
from moelora.continual.union import Standard, max_statistic, union_fire_spending

UNIONS = ("max_statistic", "spending")
"""How several requests share one rate of false fire; `moelora.continual.union` says how each works."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Promise:
    """What a request asked of its gate; `moelora.continual.calibration.calibrate` says what each means."""

    max_miss: float = 0.05
    max_fire: float = 0.05
    confidence: float = 0.95
    guarantee: str = "pac"
    on_conflict: str = "raise"
    nan_policy: str = "open"

    def __post_init__(self) -> None:
        if self.nan_policy not in NAN_POLICIES:
            raise ValueError(f"unknown nan_policy {self.nan_policy!r}; expected one of {NAN_POLICIES}")


@final
@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Gate:
    """Says for prompts how far a request's expert is open: 1 near the request, exactly 0 beyond its thresholds.

    Attributes:
        detector: fitted to prompts of the request.
        standard: the request's own scale of distance, on which it is compared with other requests.
        held_N: distances of held-out prompts of the request on that scale, in fp64; what its miss rate rests on.
        promise: what was asked for.
        calibration: thresholds on that scale; None before `recalibrate`, and in stacks without thresholds.
    """

    detector: Detector
    standard: Standard
    held_N: Tensor
    promise: Promise
    calibration: Calibration | None = None

    def distances(self, windows: Windows) -> Float[Tensor, " B"]:
        """Distance of each prompt on the request's scale, fp64; NaN for one with a feature that is not finite."""
        features_WSD = windows.features_WSD
        finite_W = features_WSD.isfinite().flatten(1).all(1)
        # the detector refuses what is not finite; what stands in its place is overwritten
        scores_W = self.detector.score(torch.where(finite_W[:, None, None], features_WSD, 0.0))
        return self.standard(windows.lowest(scores_W.masked_fill(~finite_W, torch.nan)))

    def weights(self, distances_B: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """The weight at each distance, fp64; exactly 0 is closed.

        Raises:
            ValueError: if the gate is not calibrated.
        """
        if self.calibration is None:
            raise ValueError("this gate has no thresholds yet; calibrate it with recalibrate(...)")
        return gate_weight(distances_B, self.calibration, nan_policy=self.promise.nan_policy)


def fit_gate(detector: Detector, request: Windows, held: Windows, promise: Promise) -> Gate:
    """A gate that has learned its request, without thresholds yet.

    Args:
        detector: not fitted, or to be fitted anew.
        request: of prompts of the request, for the fit.
        held: of other prompts of the request, which no fit has seen.
        promise: what is asked of it.

    Raises:
        ValueError: for features that are not finite, or too few of them.
    """
    detector.fit(request.features_WSD, request.row_W)
    scores_N = held.score(detector)
    standard = Standard.fit(scores_N)
    return Gate(detector=detector, standard=standard, held_N=standard(scores_N), promise=promise)


def recalibrate(gates: Sequence[Gate], benign: Windows, *, union: str) -> list[Gate]:
    """The gates with thresholds that keep their promises together, the last of them being new.

    "max_statistic" calibrates all gates on the benign prompts' distance to the closest request; the threshold of an
    earlier gate moves only where, and only as far as, the rate of them all asks for it. "spending" leaves the
    thresholds of earlier gates as they are, calibrates the new one for its share of the fire rate, and adds up.

    Args:
        gates: of all requests, in order. All but the last are calibrated.
        benign: of prompts that every gate must leave alone.
        union: see `UNIONS`.

    Raises:
        ValueError: if the promises cannot be kept together, or the scores are too few for them.
    """
    new = gates[-1]
    if union == "spending":
        share = new.promise.max_fire * union_fire_spending(len(gates))
        calibrations = [
            *(gate.calibration for gate in gates[:-1]),
            _calibration(new, replace(new.promise, max_fire=share), new.distances(benign), requests=1),
        ]
        certificates = union_of([own.certificate for own in calibrations if own is not None])
    else:
        closest_M = max_statistic([gate.distances(benign) for gate in gates])
        # each keeps its own miss rate; what the union is promised is one thing for all
        promises = [replace(new.promise, max_miss=gate.promise.max_miss) for gate in gates]
        certificates = [
            _calibration(gate, promise, closest_M, requests=len(gates)).certificate
            for gate, promise in zip(gates, promises, strict=True)
        ]
    return [
        replace(gate, calibration=Calibration(certificate=certificate))
        for gate, certificate in zip(gates, certificates, strict=True)
    ]


# --- inside -----------------------------------------------------------------------------------------------------------


def _calibration(gate: Gate, promise: Promise, benign_M: Tensor, *, requests: int) -> Calibration:
    return calibrate(
        gate.held_N,
        benign_M,
        max_miss=promise.max_miss,
        max_fire=promise.max_fire,
        confidence=promise.confidence,
        guarantee=promise.guarantee,
        on_conflict=promise.on_conflict,
        requests=requests,
        current=_hard_threshold(gate),
    )


def _hard_threshold(gate: Gate) -> float | None:
    """The one in force; None for a new gate, or one with a ramp, which keeps neither rate."""
    if gate.calibration is None or gate.calibration.tau_lo < gate.calibration.tau_hi:
        return None
    return gate.calibration.tau_hi
