"""Conformal p-values and thresholds: rates on average over calibration sets. Begin with forget_threshold.

A score s(x) is a distance: larger is farther from the request, and a gate opens where s <= its threshold. It can go
wrong in two ways: a *miss* is a forget input with a closed gate, a *fire* a benign input with an open one. Both bounds
need calibration scores that are exchangeable with the scores to come, and held out from whatever made the detector.
`moelora.continual.pac` gives the stronger bound, for the one calibration set at hand.

Source: Bates et al. (2023), https://arxiv.org/abs/2104.08279; ties are counted against us on both sides.
"""

import math
from decimal import Decimal
from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor


def forget_p_values(scores_T: Float[Tensor, " T"], forget_N: Float[Tensor, " N"]) -> Float[Tensor, " T"]:
    """p_U(s) = (1 + #{i: s_i >= s}) / (N + 1). Small says "not from the forget set".

    Closing only where p_U <= a misses at most a share a. In fp64.
    """
    sorted_N = sorted_scores(forget_N, "forget")
    below_T = torch.searchsorted(sorted_N, _comparable(scores_T), right=False)
    return (1 + len(sorted_N) - below_T).double() / (len(sorted_N) + 1)


def benign_p_values(scores_T: Float[Tensor, " T"], benign_N: Float[Tensor, " N"]) -> Float[Tensor, " T"]:
    """p_B(s) = (1 + #{j: s_j <= s}) / (N + 1). Small says "not benign".

    Opening only where p_B <= a fires on at most a share a. In fp64.
    """
    sorted_N = sorted_scores(benign_N, "benign")
    reached_T = torch.searchsorted(sorted_N, _comparable(scores_T), right=True)
    return (1 + reached_T).double() / (len(sorted_N) + 1)


def forget_threshold(scores_N: Float[Tensor, " N"], miss: float) -> float:
    """tau_U: closing strictly above it misses a share of at most `miss`, on average over calibration sets.

    It is the order statistic number ceil((N + 1)(1 - miss)) of the forget scores; inf, which never closes, if there are
    too few of them, fewer than 1 / miss - 1. A score equal to it opens, so ties cost nothing.
    """
    sorted_N = sorted_scores(scores_N, "forget")
    tail = tail_rank(len(sorted_N), miss)
    return forget_order_statistic(sorted_N, tail - 1) if tail else math.inf


def benign_threshold(scores_N: Float[Tensor, " N"], fire: float) -> float:
    """tau_B: opening at or below it fires on a share of at most `fire`, on average over calibration sets.

    It lies just below the order statistic number floor((N + 1) fire) of the benign scores, at the next smaller double;
    -inf, which never opens, if there are too few of them, fewer than 1 / fire - 1.

    Just below, because a score equal to the order statistic has p_B > fire: among benign scores that are all equal, a
    gate that opened at their value would always fire.
    """
    sorted_N = sorted_scores(scores_N, "benign")
    tail = tail_rank(len(sorted_N), fire)
    return benign_order_statistic(sorted_N, tail - 1) if tail else -math.inf


def tail_rank(samples: int, rate: float) -> int:
    """floor((N + 1) rate), of the decimal number that `rate` stands for: how many of N + 1 exchangeable ranks are out.

    The thresholds leave one fewer of the N calibration scores outside. 0 if N cannot support the rate.
    """
    check_rate(rate, "rate")
    return math.floor((samples + 1) * _exact(rate))


def smallest_conformal_sample(rate: float) -> int:
    """How many scores a conformal threshold needs for this rate: the smallest N with (N + 1) rate >= 1."""
    check_rate(rate, "rate")
    return math.ceil(1 / _exact(rate)) - 1


def conformal_exceedances(samples: int, rate: float, *, scores: str, event: str) -> int:
    """How many of the calibration scores a conformal threshold leaves on the wrong side.

    Raises:
        ValueError: if they are too few for the rate; `scores` and `event` name them in the message.
    """
    tail = tail_rank(samples, rate)
    if not tail:
        raise ValueError(
            f"{samples} {scores} scores cannot support a {event} rate of {rate:.3g}, not even on average: it takes at "
            f"least {smallest_conformal_sample(rate)}; hold out more, or promise less"
        )
    return tail - 1


def forget_order_statistic(sorted_N: Float[Tensor, " N"], exceedances: int) -> float:
    """The threshold with at most so many forget scores strictly above it: order statistic number N - exceedances."""
    return float(sorted_N[len(sorted_N) - 1 - exceedances])


def benign_order_statistic(sorted_N: Float[Tensor, " N"], exceedances: int) -> float:
    """The threshold with at most so many benign scores at or below it: just below order statistic exceedances + 1."""
    return math.nextafter(float(sorted_N[exceedances]), -math.inf)


def sorted_scores(scores_N: Float[Tensor, " N"], name: str) -> Float[Tensor, " N"]:
    """In fp64, the smallest first.

    Raises:
        ValueError: if a score is not finite.
    """
    finite_N = scores_N.isfinite()
    if not finite_N.all():
        raise ValueError(
            f"{int((~finite_N).sum())} of {len(finite_N)} {name} scores are NaN or infinite; repair the detector, "
            "since a bound from the others alone would not hold for inputs like these"
        )
    return scores_N.detach().double().sort().values


def check_rate(rate: float, name: str) -> None:
    """Raise ValueError unless it lies strictly between 0 and 1."""
    if not 0 < rate < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {rate}")


def one_minus(share: float) -> float:
    """1 - share, of the decimal number that `share` stands for: 1 - 0.95 is 0.05, and no more."""
    return float(1 - _exact(share))


# --- inside -----------------------------------------------------------------------------------------------------------


def _exact(rate: float) -> Fraction:
    # 0.29 is a little less than 29/100 in binary, and floor(100 * 0.29) is 28
    return Fraction(Decimal(str(float(rate))))


def _comparable(scores_T: Tensor) -> Tensor:
    if scores_T.isnan().any():
        raise ValueError("a score is NaN, which has no p-value; gate_weight says what a gate does with it")
    return scores_T.detach().double().contiguous()
