"""Bring the layers' distances to one scale, by rows that the distances were not fitted to. Begin with cross_fitted."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

Terms = Callable[[Tensor], Tensor]
"""A fitted distance: features_BSD to one fp64 term for each row and layer, terms_BS."""


@final
@dataclass(frozen=True, kw_only=True)
class Standard:
    """Mean and deviation of each layer's term on rows of the request that the term was not fitted to."""

    mean_S: Float[Tensor, " S"]
    deviation_S: Float[Tensor, " S"]

    def total(self, terms_BS: Float[Tensor, "B S"]) -> Float[Tensor, " B"]:
        """Sum over layers of (term - mean) / deviation: about 0 for the request, in deviations beyond it."""
        return ((terms_BS - self.mean_S) / self.deviation_S).sum(-1)


def cross_fitted(
    fit: Callable[[Tensor], Terms], features_NSD: Tensor, row_N: Tensor, *, folds: int, seed: int
) -> Standard:
    """Fit the term to all folds but one, apply it to that one, for each fold; mean and deviation over all rows.

    Values on the fitted rows themselves would be worthless: with fewer rows than dimensions they are nearly constant,
    and far below those of any other row (all equal n - 1 under a pseudo-inverse).

    Raises:
        ValueError: for too few rows, or a term that is the same for all.
    """
    fold_N = fold_of(row_N, folds, seed).to(features_NSD.device)
    terms_NS = features_NSD.new_empty(features_NSD.shape[:2], dtype=torch.float64)
    for fold in range(folds):
        held_N = fold_N == fold
        terms_NS[held_N] = fit(features_NSD[~held_N])(features_NSD[held_N])
    deviation_S, mean_S = torch.std_mean(terms_NS, dim=0)
    for layer, deviation in enumerate(deviation_S.tolist()):
        if not deviation > 0:
            raise ValueError(
                f"all rows are equally far from the others in layer {layer} of the features, so distances have no "
                "scale; are the rows copies of each other?"
            )
    return Standard(mean_S=mean_S, deviation_S=deviation_S)


def fold_of(row_N: Int[Tensor, " N"], folds: int, seed: int) -> Int[Tensor, " N"]:
    """A random fold for each row; rows of one prompt share theirs.

    Raises:
        ValueError: for fewer than two prompts a fold.
    """
    prompts, index_N = row_N.unique(return_inverse=True)
    if len(prompts) < 2 * folds:
        raise ValueError(
            f"a fit with {folds} folds needs features of at least {2 * folds} prompts, got {len(prompts)}; "
            "add prompts of the request"
        )
    order_P = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))
    return (order_P % folds)[index_N]


def check_folds(folds: int) -> None:
    """Raise ValueError unless there is something to fit and something to hold out."""
    if folds < 2:
        raise ValueError(f"folds must be at least 2, got {folds}")
