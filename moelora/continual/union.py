"""Several requests, one rate of false fire. Begin with max_statistic.

A benign input is disturbed if *any* gate opens. Four independent gates with a fire rate of 5 % disturb 19 % of benign
inputs. Two ways to bound the union:

- `max_statistic`: calibrate on the benign inputs' distance to the closest request, again after each new one. A
  threshold that still keeps the rate stays.
- `union_fire_spending`: give the requests of an open-ended stream shares of one rate, and never calibrate again.

Misses are bounded for each request by its own forget scores, either way.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from moelora.continual.conformal import sorted_scores


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Standard:
    """A request's own scale of distance, (s - mean) / deviation, which makes distances to several requests comparable.

    Increasing, so that it moves order statistics and thresholds along. Fit it on the request's held-out forget scores,
    also where these are calibrated on afterwards: their thresholds do not change, and benign scores have no part in it.
    """

    mean: float
    deviation: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0 < self.deviation < math.inf):
            raise ValueError(f"expected a finite mean and a positive deviation, got {self.mean} and {self.deviation}")

    @classmethod
    def fit(cls, forget_scores_N: Float[Tensor, " N"]) -> "Standard":
        """The mean and the standard deviation of these scores.

        Raises:
            ValueError: if they are not finite, fewer than two, or all equal.
        """
        sorted_N = sorted_scores(forget_scores_N, "forget")
        if len(sorted_N) < 2 or sorted_N[0] == sorted_N[-1]:
            raise ValueError(
                f"expected at least two different forget scores, got {len(sorted_N)} without a difference; scores "
                "of the inputs that a detector was fitted on may all be equal, held-out ones are not"
            )
        return cls(mean=float(sorted_N.mean()), deviation=float(sorted_N.std()))

    def __call__(self, scores_X: Float[Tensor, "*X"]) -> Float[Tensor, "*X"]:
        """The distances on the request's scale, in fp64."""
        return (scores_X.double() - self.mean) / self.deviation


def max_statistic(scores_by_request: Sequence[Float[Tensor, " N"]]) -> Float[Tensor, " N"]:
    """How close each input is to the request that it is closest to: the *minimum* of its distances over the requests.

    The largest of the detectors' alarms, in the literature's words; distances are small where a detector is alarmed. Of
    benign inputs, calibrate each request on it:

        z = [standard(scores_N) for standard, scores_N in zip(standards, benign_scores)]
        calibrate(standard(forget_scores_N), max_statistic(z), ..., requests=len(z))

    Every threshold then lies at or below the one tau_B that the minimum allows, so where any gate opens the minimum is
    at or below tau_B, and that happens to a share of at most max_fire: no sum over requests, and the loss of sharpness
    is only what the detectors do not have in common. NaN stays NaN.

    Args:
        scores_by_request: for each request, the distances of the same inputs, on one scale (`Standard`).

    Raises:
        ValueError: if there is none.
    """
    if not scores_by_request:
        raise ValueError("expected the scores of at least one request")
    return torch.stack([scores_N.double() for scores_N in scores_by_request]).amin(0)


def union_fire_spending(number: int) -> float:
    """6 / (pi^2 t^2): the share of one fire rate that request number t may spend, the first being 1.

    The shares of all t sum to 1, however many requests come (Basel series), so that the union fires on at most the
    whole rate. The price is paid in samples: request 10 gets 0.6 % of it.

    Raises:
        ValueError: for a number below 1.
    """
    if number < 1:
        raise ValueError(f"requests are numbered from 1, got {number}")
    return 6 / (math.pi * number) ** 2
