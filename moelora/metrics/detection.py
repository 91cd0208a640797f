"""How well a detector tells a request from other inputs. Begin with auroc.

Scores are distances: larger is farther from the request. The direction is fixed and never chosen by labels, so an AUROC
below one half is what it says: a detector that is worse than a coin.

"FPR at 95 % TPR" has two meanings, depending on which side is called positive. The names here say which is held and
which is counted, and results may differ widely: `benign_fire_rate_at_forget_recall`, `forget_miss_rate_at_benign`.
"""

import math
from decimal import Decimal
from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor


def auroc(forget_scores_N: Float[Tensor, " N"], benign_scores_M: Float[Tensor, " M"]) -> float:
    """P(benign score > forget score) + P(equal) / 2, over all N * M pairs: 1 for a perfect detector, 1/2 for a coin.

    Raises:
        ValueError: if there are no scores of a kind, or one is NaN or infinite.
    """
    forget_N, benign_M = sorted_scores(forget_scores_N, "forget"), sorted_scores(benign_scores_M, "benign")
    return placements(forget_N, benign_M).mean().item()


def benign_fire_rate_at_forget_recall(
    forget_scores_N: Float[Tensor, " N"], benign_scores_M: Float[Tensor, " M"], recall: float = 0.95
) -> float:
    """Share of benign inputs on which a gate opens that opens on at least `recall` of the forget inputs.

    The gate opens at or below the smallest threshold that does that, order statistic ceil(recall * N) of the forget
    scores. This is FPR95 with the request as positive, the convention of text-OOD code that O3 inherits.

    Raises:
        ValueError: as in `auroc`, or unless 0 < recall <= 1.
    """
    forget_N, benign_M = sorted_scores(forget_scores_N, "forget"), sorted_scores(benign_scores_M, "benign")
    threshold = forget_N[_at_least(recall, len(forget_N), "recall") - 1]
    return (benign_M <= threshold).double().mean().item()


def forget_miss_rate_at_benign(
    forget_scores_N: Float[Tensor, " N"], benign_scores_M: Float[Tensor, " M"], left_alone: float = 0.95
) -> float:
    """Share of forget inputs on which a gate stays closed that leaves at least `left_alone` of the benign ones alone.

    The gate opens strictly below the largest threshold that does that, so that ceil(left_alone * M) of the benign
    scores are at it or above. This is FPR95 with out-of-distribution inputs as positive, the convention of OpenOOD and
    pytorch-ood.

    Raises:
        ValueError: as in `auroc`, or unless 0 < left_alone <= 1.
    """
    forget_N, benign_M = sorted_scores(forget_scores_N, "forget"), sorted_scores(benign_scores_M, "benign")
    threshold = benign_M[len(benign_M) - _at_least(left_alone, len(benign_M), "left_alone")]
    return (forget_N >= threshold).double().mean().item()


def placements(sorted_N: Float[Tensor, " N"], scores_M: Float[Tensor, " M"]) -> Float[Tensor, " M"]:
    """Of each score, the share of the sorted ones that are smaller, plus half of those that are equal."""
    below_M = torch.searchsorted(sorted_N, scores_M, right=False)
    reached_M = torch.searchsorted(sorted_N, scores_M, right=True)
    return (below_M + reached_M).double() / (2 * len(sorted_N))


def sorted_scores(scores_N: Float[Tensor, " N"], name: str) -> Float[Tensor, " N"]:
    """In fp64 and on the CPU, the smallest first.

    Raises:
        ValueError: if there are none, or one is NaN or infinite.
    """
    if not len(scores_N):
        raise ValueError(f"there are no {name} scores; expected one or more")
    finite_N = scores_N.isfinite()
    if not finite_N.all():
        raise ValueError(f"{int((~finite_N).sum())} of {len(finite_N)} {name} scores are NaN or infinite")
    return scores_N.detach().cpu().double().sort().values


# --- inside -----------------------------------------------------------------------------------------------------------


def _at_least(share: float, samples: int, name: str) -> int:
    """The smallest count that is at least this share, of the decimal number that `share` stands for."""
    if not 0 < share <= 1:
        raise ValueError(f"{name} must lie in (0, 1], got {share}")
    # 0.55 is a little more than 55/100 in binary, and ceil(100 * 0.55) is 56
    return math.ceil(Fraction(Decimal(str(float(share)))) * samples)
