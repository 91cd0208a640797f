"""From held-out scores to a gate with a certificate. Begin with calibrate and gate_weight.

    calibration = calibrate(forget_scores_N, benign_scores_M, max_miss=0.05, max_fire=0.05)
    print(calibration.certificate)
    weight_T = gate_weight(scores_T, calibration)

Scores are distances: larger is farther from the request, and the gate opens where they are small. `conformal` and `pac`
hold the statistics, `certificate` what is promised, `union` how several requests share one rate of false fire.
"""

import math
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from moelora.continual.certificate import GUARANTEES, Certificate, RateBound
from moelora.continual.conformal import (
    benign_order_statistic,
    check_rate,
    conformal_exceedances,
    forget_order_statistic,
    sorted_scores,
)
from moelora.continual.pac import certified_exceedances, upper_bound

ON_CONFLICT = ("raise", "protect_forget", "protect_utility", "ramp")
"""What to do where no threshold keeps both rates; `calibrate` says what each means."""

NAN_POLICIES = ("open", "closed")
"""Whether a gate is open or closed where a score is NaN or infinite."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """A gate's thresholds and what they are good for; `gate_weight` applies them."""

    certificate: Certificate

    @property
    def tau_lo(self) -> float:
        """At or below this distance the weight is 1."""
        return self.certificate.tau_lo

    @property
    def tau_hi(self) -> float:
        """Above this distance the weight is 0, and at it too if it is not `tau_lo`."""
        return self.certificate.tau_hi


def calibrate(
    forget_scores_N: Float[Tensor, " N"],
    benign_scores_M: Float[Tensor, " M"],
    *,
    max_miss: float,
    max_fire: float,
    confidence: float = 0.95,
    guarantee: str = "pac",
    on_conflict: str = "raise",
    requests: int = 1,
    current: float | None = None,
) -> Calibration:
    """Thresholds that keep the miss rate and the fire rate, or an error.

    tau_U is the smallest threshold that misses few enough forget inputs, tau_B the largest that fires on few enough
    benign ones. If tau_U <= tau_B, both rates are kept by any hard threshold between them: by the midpoint, where each
    set gets half of the gap, or by one that is in force already. Otherwise they overlap, and `on_conflict` says what
    gives way. Which of the two it is costs no confidence.

    Args:
        forget_scores_N: distances of held-out inputs of the request, seen by nothing that made the detector.
        benign_scores_M: distances of inputs that the gate must leave alone, from the traffic it will see.
        max_miss: of forget inputs, how many may meet a closed gate.
        max_fire: of benign inputs, how many may meet an open gate.
        confidence: of the certified rates and of every bound in the certificate.
        guarantee: "pac", rates that hold for these calibration sets with this confidence (`pac`), or "marginal", on
            average over calibration sets (`conformal`), which fewer scores support.
        on_conflict: "raise"; "protect_forget", threshold tau_U; "protect_utility", threshold tau_B; "ramp", the weight
            falls linearly from tau_B to tau_U, which keeps neither rate.
        requests: of how many requests the benign scores are the `max_statistic`: their fire rate is then that of the
            union, as long as no request goes beyond tau_B.
        current: a threshold in force. It stays where both rates can be kept by it, and moves no further than they ask.

    Raises:
        ValueError: if the scores are too few for a rate (saying how many it takes), not finite, or in conflict with no
            policy named (saying what can be had).
    """
    if guarantee not in GUARANTEES:
        raise ValueError(f"unknown guarantee {guarantee!r}; expected one of {GUARANTEES}")
    if on_conflict not in ON_CONFLICT:
        raise ValueError(f"unknown on_conflict {on_conflict!r}; expected one of {ON_CONFLICT}")
    if requests < 1:
        raise ValueError(f"requests must be at least 1, got {requests}")
    if requests > 1 and on_conflict in ("protect_forget", "ramp"):
        raise ValueError(
            f"with benign scores over {requests} requests, on_conflict={on_conflict!r} could raise this request's "
            "threshold above what keeps the others' certificates true; use 'raise' or 'protect_utility', or calibrate "
            "every request on its own benign scores and join the certificates with union_of"
        )
    check_rate(confidence, "confidence")
    forget_N, benign_M = sorted_scores(forget_scores_N, "forget"), sorted_scores(benign_scores_M, "benign")

    # what each set allows by itself
    allowed_miss = _exceedances(guarantee, len(forget_N), max_miss, confidence, scores="forget", event="miss")
    allowed_fire = _exceedances(guarantee, len(benign_M), max_fire, confidence, scores="benign", event="fire")
    tau_U = forget_order_statistic(forget_N, allowed_miss)
    tau_B = benign_order_statistic(benign_M, allowed_fire)

    # what both allow together
    if tau_U <= tau_B:
        outcome = "both_kept"
        tau_lo = tau_hi = tau_U + (tau_B - tau_U) / 2 if current is None else min(max(current, tau_U), tau_B)
    elif on_conflict == "protect_forget":
        outcome = on_conflict
        tau_lo = tau_hi = tau_U
    elif on_conflict == "protect_utility":
        outcome = on_conflict
        tau_lo = tau_hi = tau_B
    elif on_conflict == "ramp":
        outcome = on_conflict
        # forget scores equal to tau_U are not among the missed, so their weight must not be 0
        tau_lo, tau_hi = tau_B, math.nextafter(tau_U, math.inf)
    else:
        raise ValueError(_conflict(forget_N, benign_M, tau_U, tau_B, max_miss, max_fire, confidence))

    # A kept rate is bounded by the rank of its order statistic; one that gave way by a count at a threshold from the
    # other set, which its own scores had no part in. Either fails only where that count is far below its mean, so the
    # two together are no likelier to fail than one.
    missed = int((ramp(forget_N, tau_lo, tau_hi) < 1).sum())
    fired = int((ramp(benign_M, tau_lo, tau_hi) > 0).sum())
    miss_kept, fire_kept = (outcome in ("both_kept", policy) for policy in ("protect_forget", "protect_utility"))
    miss = RateBound(
        promised=max_miss,
        samples=len(forget_N),
        allowed=allowed_miss,
        seen=missed,
        bound=upper_bound(allowed_miss if miss_kept else missed, len(forget_N), confidence),
        kept=miss_kept,
    )
    fire = RateBound(
        promised=max_fire,
        samples=len(benign_M),
        allowed=allowed_fire,
        seen=fired,
        bound=upper_bound(allowed_fire if fire_kept else fired, len(benign_M), confidence),
        kept=fire_kept,
    )
    certificate = Certificate(
        guarantee=guarantee,
        confidence=confidence,
        outcome=outcome,
        tau_lo=tau_lo,
        tau_hi=tau_hi,
        miss=miss,
        fire=fire,
        requests=requests,
        union_fire_bound=fire.bound,
        union_confidence=confidence,
    )
    return Calibration(certificate=certificate)


def gate_weight(
    scores_X: Float[Tensor, "*X"], calibration: Calibration, nan_policy: str = "open"
) -> Float[Tensor, "*X"]:
    """The weight of a gate's expert at these distances, by `ramp` between the calibration's thresholds."""
    return ramp(scores_X, calibration.tau_lo, calibration.tau_hi, nan_policy)


def ramp(scores_X: Float[Tensor, "*X"], tau_lo: float, tau_hi: float, nan_policy: str = "open") -> Float[Tensor, "*X"]:
    """1 at or below tau_lo, exactly 0 at or above tau_hi, a straight line in between; a step if they are equal.

    Monotone, Lipschitz with 1 / (tau_hi - tau_lo), never above 1, with no tail that keeps a closed gate ajar. Scores
    are compared in fp64, so that rounding a threshold moves none to its other side; and a weight in between is never
    rounded to 1 or 0. The weights have the scores' dtype, at least fp32.

    Args:
        scores_X: distances; larger is farther from the request.
        tau_lo, tau_hi: the thresholds.
        nan_policy: the weight where a score is NaN or infinite: "open", 1, so that a failing detector shows nothing
            that was to be forgotten, or "closed", 0.

    Raises:
        ValueError: for an unknown policy, or unless tau_lo <= tau_hi.
    """
    if nan_policy not in NAN_POLICIES:
        raise ValueError(f"unknown nan_policy {nan_policy!r}; expected one of {NAN_POLICIES}")
    if not tau_lo <= tau_hi:
        raise ValueError(f"expected tau_lo <= tau_hi, got {tau_lo} and {tau_hi}")
    exact_X = scores_X.double()
    dtype = torch.promote_types(scores_X.dtype, torch.float32)
    open_X = exact_X <= tau_lo
    weight_X = open_X.to(dtype)

    # in between, if there is anything
    if tau_lo < tau_hi:
        limits = torch.finfo(dtype)
        slope_X = ((tau_hi - exact_X) / (tau_hi - tau_lo)).to(dtype).clamp(limits.tiny, 1 - limits.eps)
        weight_X = torch.where(open_X | (exact_X >= tau_hi), weight_X, slope_X)

    return torch.where(exact_X.isfinite(), weight_X, 1.0 if nan_policy == "open" else 0.0)


# --- inside -----------------------------------------------------------------------------------------------------------


def _exceedances(guarantee: str, samples: int, rate: float, confidence: float, *, scores: str, event: str) -> int:
    if guarantee == "pac":
        return certified_exceedances(samples, rate, confidence, scores=scores, event=event)
    return conformal_exceedances(samples, rate, scores=scores, event=event)


def _conflict(
    forget_N: Tensor, benign_M: Tensor, tau_U: float, tau_B: float, max_miss: float, max_fire: float, confidence: float
) -> str:
    fired, missed = int((benign_M <= tau_U).sum()), int((forget_N > tau_B).sum())
    fire = upper_bound(fired, len(benign_M), confidence)
    miss = upper_bound(missed, len(forget_N), confidence)
    return (
        f"forget and benign scores overlap, so no threshold keeps both rates. A miss rate of {max_miss:.3g} takes a "
        f"threshold of {tau_U:.6g}, which fires on {fired} of {len(benign_M)} benign scores (a rate of up to "
        f"{fire:.3g}); a fire rate of {max_fire:.3g} takes {tau_B:.6g}, which misses {missed} of {len(forget_N)} "
        f"forget scores (a rate of up to {miss:.3g}). Improve the detector, promise less, or name what gives way with "
        f"on_conflict='protect_forget', 'protect_utility' or 'ramp'"
    )
