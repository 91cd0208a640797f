"""What a calibrated gate promises, in numbers and in sentences. Begin with Certificate."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from moelora.continual.conformal import check_rate, one_minus

GUARANTEES = ("pac", "marginal")
"""Whether a rate holds for the calibration set at hand, with a confidence, or on average over such sets."""

OUTCOMES = ("both_kept", "protect_forget", "protect_utility", "ramp")
"""Whether both rates are kept, or what was given up where they could not be."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class RateBound:
    """One error rate of a gate.

    Attributes:
        promised: the rate that was asked for.
        samples: how many calibration scores it rests on.
        allowed: how many of them may lie on the wrong side of a threshold that keeps the promise.
        seen: how many do at the thresholds that were chosen.
        bound: the true rate at these is at most this, at the certificate's confidence.
        kept: whether the promise holds at these.
    """

    promised: float
    samples: int
    allowed: int
    seen: int
    bound: float
    kept: bool


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """The error rates of one gate. `str` says in sentences what is guaranteed and what is not.

    One that was read from a file is a claim: what backs it are the calibration scores, which it does not hold.

    Attributes:
        guarantee: "pac" or "marginal", see `GUARANTEES`.
        confidence: of each bound, over the draw of the calibration scores.
        outcome: see `OUTCOMES`.
        tau_lo, tau_hi: the gate is open at or below the first and closed above both; at `tau_hi` it is closed too, if
            that is not the same.
        miss: of forget inputs, those with a gate that is not fully open.
        fire: of benign inputs, those with a gate that is not fully closed.
        requests: how many requests' gates the union is of.
        union_fire_bound: the share of benign inputs that meet any of these gates not fully closed is at most this.
        union_confidence: of that bound.
    """

    guarantee: str
    confidence: float
    outcome: str
    tau_lo: float
    tau_hi: float
    miss: RateBound
    fire: RateBound
    requests: int
    union_fire_bound: float
    union_confidence: float

    def __post_init__(self) -> None:
        for name, value, valid in (
            ("guarantee", self.guarantee, GUARANTEES),
            ("outcome", self.outcome, OUTCOMES),
        ):
            if value not in valid:
                raise ValueError(f"unknown {name} {value!r}; expected one of {valid}")
        if not (math.isfinite(self.tau_lo) and math.isfinite(self.tau_hi) and self.tau_lo <= self.tau_hi):
            raise ValueError(f"expected finite tau_lo <= tau_hi, got {self.tau_lo} and {self.tau_hi}")
        check_rate(self.confidence, "confidence")
        check_rate(self.union_confidence, "union_confidence")
        if self.requests < 1:
            raise ValueError(f"requests must be at least 1, got {self.requests}")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Certificate":
        """The inverse of `to_dict`.

        Raises:
            ValueError: if a field is missing, unknown, or has a value that makes no sense.
        """
        values = dict(values)
        try:
            miss, fire = RateBound(**values.pop("miss")), RateBound(**values.pop("fire"))
            return cls(miss=miss, fire=fire, **values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is not a certificate that this version can read: {error}") from error

    def __str__(self) -> str:
        miss, fire = self.miss, self.fire
        lines = [
            _sentence("forget", "a gate that is not fully open", miss, self.guarantee, self.confidence),
            _sentence("benign", "a gate that is not fully closed", fire, self.guarantee, self.confidence),
            f"Each statement has its own {_percent(self.confidence)} confidence; both hold together with at least "
            f"{_percent(max(0.0, 1 - 2 * one_minus(self.confidence)))}.",
            _UNION.format(
                requests=self.requests,
                bound=_percent(self.union_fire_bound),
                confidence=_percent(self.union_confidence),
            ),
            _OUTCOME[self.outcome].format(
                lo=self.tau_lo, hi=self.tau_hi, miss=_percent(miss.promised), fire=_percent(fire.promised)
            ),
            "Not guaranteed: anything for inputs that are not drawn as the calibration sets were (attacks, drift, "
            "another language); the rate in any chosen group of inputs; what happens where a score is NaN or infinite, "
            "which the gate's policy decides.",
            "The base weights keep what they know: this bounds access through the gate, it erases nothing.",
        ]
        return "\n".join(lines)


def union_of(certificates: Sequence[Certificate]) -> list[Certificate]:
    """The certificates of gates calibrated one by one, each with the bound on fire for all of them together.

    Bounds add up, and so do the chances that one does not hold (Boole), whatever the gates share. `union_fire_spending`
    keeps the sum small; `max_statistic` needs no sum.

    Raises:
        ValueError: if there are none, or so many that no confidence is left.
    """
    if not certificates:
        raise ValueError("expected at least one certificate")
    doubt = sum(one_minus(certificate.union_confidence) for certificate in certificates)
    if doubt >= 1:
        raise ValueError(
            f"{len(certificates)} bounds leave no confidence in their sum; calibrate each with a higher confidence, "
            "such as 1 - 0.05 / (number of requests), or calibrate on their max_statistic"
        )
    bound = min(1.0, sum(certificate.union_fire_bound for certificate in certificates))
    requests = sum(certificate.requests for certificate in certificates)
    return [
        dataclasses.replace(certificate, requests=requests, union_fire_bound=bound, union_confidence=1 - doubt)
        for certificate in certificates
    ]


# --- inside -----------------------------------------------------------------------------------------------------------

_UNION = (
    "Over {requests} request(s), at most {bound} of benign inputs meet any gate that is not fully closed, with "
    "{confidence} confidence."
)

_OUTCOME = {
    "both_kept": "Both rates are kept by one threshold, between the smallest that keeps the first and the largest that "
    "keeps the second: the gate is open at a distance of at most {lo:.6g} and closed above.",
    "protect_forget": "The scores overlap, so only the first rate is kept: the gate is open at a distance of at most "
    "{lo:.6g} and closed above.",
    "protect_utility": "The scores overlap, so only the second rate is kept: the gate is open at a distance of at "
    "most {lo:.6g} and closed above.",
    "ramp": "The scores overlap, so the weight falls from 1 at a distance of {lo:.6g} to 0 at {hi:.6g}. Neither rate "
    "is kept as promised; what holds in their place: at most {miss} of forget inputs get the weight 0, and at most "
    "{fire} of benign inputs the weight 1.",
}


def _sentence(inputs: str, event: str, rate: RateBound, guarantee: str, confidence: float) -> str:
    counts = f"{rate.seen} seen and {rate.allowed} allowed among {rate.samples}"
    bound = f"at most {_percent(rate.bound)} with {_percent(confidence)} confidence"
    if not rate.kept:
        return (
            f"NOT KEPT: of {inputs} inputs, {_percent(rate.promised)} were to meet {event}; it is {bound} ({counts})."
        )
    if guarantee == "pac":
        return (
            f"Of {inputs} inputs, at most {_percent(rate.promised)} meet {event}, with {_percent(confidence)} "
            f"confidence over the draw of the calibration set ({counts})."
        )
    return (
        f"Of {inputs} inputs, at most {_percent(rate.promised)} meet {event} on average over calibration sets; with "
        f"this one it is {bound} ({counts})."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
