"""From O3's boundary distance to its weight, as published and as released. Begin with TwoGaussians."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

HALVINGS = 200
"""More than enough to find a median to the last bit."""


@final
@dataclass(frozen=True, kw_only=True)
class TwoGaussians:
    """The half-half mixture of a Gaussian of D_used's boundary distances and one of D_rest's.

    Attributes:
        mean_used, deviation_used, mean_rest, deviation_rest: of the two.
        median: where its distribution function is a half.
    """

    mean_used: Float[Tensor, ""]
    deviation_used: Float[Tensor, ""]
    mean_rest: Float[Tensor, ""]
    deviation_rest: Float[Tensor, ""]
    median: Float[Tensor, ""]

    @classmethod
    def paper(cls, used_N: Float[Tensor, " N"], rest_M: Float[Tensor, " M"]) -> "TwoGaussians":
        """Each with its own deviation, about the mixture's median. O3, above eq. 13."""
        mean_used, mean_rest = used_N.mean(), rest_M.mean()
        mixture = cls(
            mean_used=mean_used,
            deviation_used=_deviation(used_N),
            mean_rest=mean_rest,
            deviation_rest=_deviation(rest_M),
            median=mean_used,
        )
        low, high = torch.minimum(mean_used, mean_rest), torch.maximum(mean_used, mean_rest)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            below = mixture.cumulative(middle[None])[0] < 0.5
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return cls(
            mean_used=mixture.mean_used,
            deviation_used=mixture.deviation_used,
            mean_rest=mixture.mean_rest,
            deviation_rest=mixture.deviation_rest,
            median=high,
        )

    @classmethod
    def code(cls, used_N: Float[Tensor, " N"], rest_M: Float[Tensor, " M"]) -> "TwoGaussians":
        """Both with D_rest's deviation, about the midpoint of their means, as in the released code."""
        mean_used, mean_rest, deviation = used_N.mean(), rest_M.mean(), _deviation(rest_M)
        return cls(
            mean_used=mean_used,
            deviation_used=deviation,
            mean_rest=mean_rest,
            deviation_rest=deviation.clone(),
            median=(mean_used + mean_rest) / 2,
        )

    def cumulative(self, distance_B: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """P_mix(d), the distribution function of the mixture."""
        used_B = torch.special.ndtr((distance_B - self.mean_used) / self.deviation_used)
        rest_B = torch.special.ndtr((distance_B - self.mean_rest) / self.deviation_rest)
        return (used_B + rest_B) / 2

    def typicality(self, distance_B: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """u = 1 - max(p, p') + min(p, p') with p = P_mix(d), p' = P_mix(2 median - d).

        1 at the median, 0 in both tails: a row is as untypical for being too near as for being too far. O3, eq. 13.
        """
        p_B, mirrored_B = self.cumulative(distance_B), self.cumulative(2 * self.median - distance_B)
        return 1 - (p_B - mirrored_B).abs()


def weight_eq13(typicality_B: Float[Tensor, " B"], zeta: float = 10.0) -> Float[Tensor, " B"]:
    """sigmoid(zeta * u). O3, eq. 13. u is at least 0, so this is **at least 0.5**, for any input whatsoever."""
    return torch.sigmoid(zeta * typicality_B)


def weight_code_scienceqa(typicality_B: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """With w = sigmoid(10 u - 2): 1.2 where w > 0.9; w where 0.3 <= w < 0.4; otherwise 0, between 0.4 and 0.9 too.

    As in the released code for ScienceQA: not monotone, and above 1.
    """
    w_B = torch.sigmoid(10 * typicality_B - 2)
    partly_B = torch.where((w_B >= 0.3) & (w_B < 0.4), w_B, 0.0)
    return torch.where(w_B > 0.9, 1.2, partly_B)


def weight_code_tofu(typicality_B: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """With w = sigmoid(10 u - 2): 1 where w >= 0.32; 10 w^2 where 0.2 <= w < 0.32; otherwise 0.

    As in the released code for TOFU: it jumps at both cut-offs, and 10 w^2 passes 1 just below the upper one.
    """
    w_B = torch.sigmoid(10 * typicality_B - 2)
    partly_B = torch.where(w_B >= 0.2, 10 * w_B.square(), 0.0)
    return torch.where(w_B >= 0.32, 1.0, partly_B)


def _deviation(values_N: Tensor) -> Tensor:
    """Standard deviation; never 0, so that a Gaussian of equal values is a step and not NaN."""
    return values_N.std(correction=0).clamp(min=1e-12)
