"""How sure a figure is. Begin with clopper_pearson for rates and seeds_interval for runs.

Every interval is two-sided, with half of 1 - confidence on either side. All but the bootstrap's need SciPy.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moelora.metrics.detection import placements, sorted_scores


class Interval(NamedTuple):
    """From `low` to `high`, both included."""

    low: float
    high: float


def clopper_pearson(events: int, trials: int, confidence: float = 0.95) -> Interval:
    """Of the rate behind so many events in independent trials. It covers at least at the confidence, for every rate.

    Quantiles of Beta(k, n - k + 1) and Beta(k + 1, n - k). Clopper and Pearson (1934).

    Raises:
        ValueError: unless 0 <= events <= trials, trials >= 1 and 0 < confidence < 1.
    """
    from scipy import special

    tail = _tail(confidence)
    if not 0 <= events <= trials or trials < 1:
        raise ValueError(f"expected one trial or more and 0 <= events <= trials, got {events} of {trials}")
    low = float(special.betaincinv(events, trials - events + 1, tail)) if events else 0.0
    high = float(special.betainccinv(events + 1, trials - events, tail)) if events < trials else 1.0
    return Interval(low, high)


def seeds_interval(values_S: Float[Tensor, " S"], confidence: float = 0.95) -> Interval:
    """Of the mean over seeds: mean -+ t * s / sqrt(S), t of Student's distribution with S - 1 degrees of freedom.

    It speaks of the runs' own spread, as if a run's figure were normal; with few seeds it is wide, as it must be.

    Raises:
        ValueError: for fewer than two seeds, or a value that is NaN or infinite.
    """
    from scipy import special

    tail = _tail(confidence)
    exact_S = _finite(values_S)
    seeds = len(exact_S)
    if seeds < 2:
        raise ValueError(f"an interval over seeds needs two or more, got {seeds}; run more, or report the value alone")
    half = float(special.stdtrit(seeds - 1, 1 - tail)) * exact_S.std().item() / math.sqrt(seeds)
    return Interval(exact_S.mean().item() - half, exact_S.mean().item() + half)


def bootstrap_interval(
    statistic: Callable[[Tensor], Tensor | float],
    values_NX: Float[Tensor, "N *X"],
    generator: torch.Generator,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Interval:
    """Of a statistic of N independent rows: percentiles of its values on rows drawn with replacement. Efron (1979).

    Too narrow for few rows, and empty of meaning for a maximum or minimum.

    Args:
        statistic: takes rows, in fp64 and as many as there are, and gives one number.
        values_NX: the rows; what belongs to one item stays in one row.
        generator: on the CPU; draws the rows.
        resamples: how often.
        confidence: of the interval.

    Raises:
        ValueError: for fewer than two rows or 100 resamples, values or statistics that are NaN or infinite.
    """
    tail = _tail(confidence)
    exact_NX = _finite(values_NX)
    rows = len(exact_NX)
    if rows < 2 or resamples < 100:
        raise ValueError(f"expected two rows and 100 resamples or more, got {rows} and {resamples}")
    drawn = (exact_NX[torch.randint(rows, (rows,), generator=generator)] for _ in range(resamples))
    results_N = _finite(torch.tensor([float(statistic(rows_NX)) for rows_NX in drawn], dtype=torch.float64))
    low, high = results_N.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(low, high)


def auroc_interval(
    forget_scores_N: Float[Tensor, " N"], benign_scores_M: Float[Tensor, " M"], confidence: float = 0.95
) -> Interval:
    """Of `auroc`, by DeLong's variance on the logit scale, which stays within [0, 1]; it draws nothing.

    DeLong, DeLong and Clarke-Pearson (1988): var = var(V_N) / N + var(V_M) / M, where V is the share of the other side
    that a score is on the right side of. Where the two sides do not overlap at all, that variance is 0 (and every
    bootstrap sample is perfect), though the truth is not certain. The interval is then Clopper and Pearson's for
    min(N, M) pairs of which each score is in one at most: these are independent, and all are in order.

    Raises:
        ValueError: as in `auroc`; for fewer than two scores of a kind; or if all scores are one number.
    """
    from scipy import special

    tail = _tail(confidence)
    forget_N, benign_M = sorted_scores(forget_scores_N, "forget"), sorted_scores(benign_scores_M, "benign")
    pairs = min(len(forget_N), len(benign_M))
    if pairs < 2:
        raise ValueError(
            f"expected two scores or more of each kind, got {len(forget_N)} forget, {len(benign_M)} benign"
        )
    if min(forget_N[0], benign_M[0]) == max(forget_N[-1], benign_M[-1]):
        raise ValueError(
            f"all scores are {forget_N[0].item()}: a constant detects nothing, and its AUROC has no interval"
        )

    # no overlap: DeLong has nothing to say
    benign_V, forget_V = placements(forget_N, benign_M), 1 - placements(benign_M, forget_N)
    area = benign_V.mean().item()
    if area in (0.0, 1.0):
        return clopper_pearson(pairs if area else 0, pairs, confidence)

    deviation = math.sqrt(benign_V.var().item() / len(benign_M) + forget_V.var().item() / len(forget_N))
    half = float(special.ndtri(1 - tail)) * deviation / (area * (1 - area))
    centre = math.log(area / (1 - area))
    return Interval(float(special.expit(centre - half)), float(special.expit(centre + half)))


# --- inside -----------------------------------------------------------------------------------------------------------


def _tail(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie strictly between 0 and 1, got {confidence}")
    return (1 - confidence) / 2


def _finite(values_NX: Tensor) -> Tensor:
    if not values_NX.isfinite().all():
        raise ValueError(f"{int((~values_NX.isfinite()).sum())} values are NaN or infinite, so there is no interval")
    return values_NX.detach().cpu().double()
