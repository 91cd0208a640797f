"""Thresholds that hold for the calibration set at hand, at a stated confidence. Begin with certified_forget_threshold.

A conformal threshold keeps its rate on average over calibration sets; with one fixed set of N scores the rate is Beta
distributed, and may be more than twice the promised one where N is small. Here it is at most the promised rate with
confidence 1 - delta over the draw of the set ("probably approximately correct"): the threshold may leave j calibration
scores on the wrong side, the largest j with P(Bin(N, rate) <= j) <= delta. Ties can only make the true rate smaller.

Source: Vovk (2012), training-conditional validity, https://arxiv.org/abs/1209.2673; Clopper and Pearson (1934).
"""

from bisect import bisect_left, bisect_right

from jaxtyping import Float
from scipy import special
from torch import Tensor

from moelora.continual.conformal import (
    benign_order_statistic,
    check_rate,
    forget_order_statistic,
    one_minus,
    sorted_scores,
)


def allowed_exceedances(samples: int, rate: float, confidence: float = 0.95) -> int | None:
    """How many of the calibration scores may lie on the wrong side for a rate to be certified.

    The largest j with P(Bin(samples, rate) <= j) <= 1 - confidence; None if even j = 0 is too many.
    """
    _check(rate, confidence)
    # the probability grows with j: count those that are small enough
    counts = range(samples + 1)
    allowed = bisect_right(counts, one_minus(confidence), key=lambda j: _binomial_cdf(j, samples, rate)) - 1
    return allowed if allowed >= 0 else None


def smallest_sample(rate: float, confidence: float = 0.95, exceedances: int = 0) -> int:
    """How many scores it takes to certify a rate with so many exceedances.

    Raises:
        ValueError: if it would take more than 10^12.
    """
    _check(rate, confidence)

    def enough(samples: int) -> bool:
        return _binomial_cdf(exceedances, samples, rate) <= one_minus(confidence)

    most = exceedances + 1
    while not enough(most):
        most *= 2
        if most > 10**12:
            raise ValueError(f"no sample of at most 10^12 scores certifies a rate of {rate} at {confidence} confidence")
    return bisect_left(range(most), True, lo=exceedances, key=enough)


def upper_bound(exceedances: int, samples: int, confidence: float = 0.95) -> float:
    """One-sided Clopper-Pearson bound: a true rate above it shows so few exceedances with a chance of 1 - confidence.

    The quantile of Beta(exceedances + 1, samples - exceedances). The rate beyond a threshold that leaves so many of the
    calibration scores outside has the same distribution, so this bounds that too.

    Raises:
        ValueError: unless 0 <= exceedances <= samples.
    """
    check_rate(confidence, "confidence")
    if not 0 <= exceedances <= samples:
        raise ValueError(f"expected between 0 and {samples} exceedances, got {exceedances}")
    if exceedances == samples:
        return 1.0
    return float(special.betaincinv(exceedances + 1, samples - exceedances, confidence))


def certified_forget_threshold(scores_N: Float[Tensor, " N"], miss: float, confidence: float = 0.95) -> float:
    """tau_U: closing strictly above it misses a share of at most `miss`, with this confidence.

    Raises:
        ValueError: if the scores are too few to certify that, saying how many it takes.
    """
    sorted_N = sorted_scores(scores_N, "forget")
    return forget_order_statistic(
        sorted_N, certified_exceedances(len(sorted_N), miss, confidence, scores="forget", event="miss")
    )


def certified_benign_threshold(scores_N: Float[Tensor, " N"], fire: float, confidence: float = 0.95) -> float:
    """tau_B: opening at or below it fires on a share of at most `fire`, with this confidence.

    Raises:
        ValueError: if the scores are too few to certify that, saying how many it takes.
    """
    sorted_N = sorted_scores(scores_N, "benign")
    return benign_order_statistic(
        sorted_N, certified_exceedances(len(sorted_N), fire, confidence, scores="benign", event="fire")
    )


def certified_exceedances(samples: int, rate: float, confidence: float, *, scores: str, event: str) -> int:
    """`allowed_exceedances`, or an error.

    Raises:
        ValueError: if the scores are too few for the rate; `scores` and `event` name them in the message.
    """
    allowed = allowed_exceedances(samples, rate, confidence)
    if allowed is None:
        best = upper_bound(0, samples, confidence)
        raise ValueError(
            f"{samples} {scores} scores cannot certify a {event} rate of {rate:.3g} at {confidence:.3g} confidence: it "
            f"takes at least {smallest_sample(rate, confidence)}, and {samples} certify no rate below {best:.3g}; "
            "hold out more, or promise less"
        )
    return allowed


# --- inside -----------------------------------------------------------------------------------------------------------


def _binomial_cdf(exceedances: int, samples: int, rate: float) -> float:
    """P(Bin(samples, rate) <= exceedances)."""
    if exceedances >= samples:
        return 1.0
    return float(special.betaincc(exceedances + 1, samples - exceedances, rate))


def _check(rate: float, confidence: float) -> None:
    check_rate(rate, "rate")
    check_rate(confidence, "confidence")
