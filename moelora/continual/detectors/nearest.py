"""Distance to the nearest rows that were fitted. Begin with Nearest."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from moelora.continual.detectors.base import Detector
from moelora.continual.detectors.folds import Standard, Terms, check_folds, cross_fitted
from moelora.continual.detectors.gaussian import unit_length
from moelora.continual.detectors.parts import part_from


@dataclass(frozen=True, kw_only=True)
class FittedNearest:
    """What `Nearest` keeps: the features of every fitted row."""

    bank_NSD: Float[Tensor, "N S D"]
    standard: Standard


@final
class Nearest(Detector):
    """Sum over layers of the standardised 1 - mean of the `neighbours` largest cosines with the fitted rows.

    **It stores features of the data it was fitted to**, one unit-length vector a row and layer. Such features can tell
    what the data was, so for data that is to be forgotten this is a choice to be made knowingly; `Mahalanobis` keeps
    sums over rows only.

    After Sun et al. (2022), https://arxiv.org/abs/2204.06507, who take the distance to the k-th neighbour; the mean
    depends less on a single row.

    Args:
        neighbours: how many cosines are averaged.
        folds: of the cross-fit.
        seed: of the folds.
    """

    kind: ClassVar[str] = "nearest"
    neighbours: int
    folds: int
    seed: int

    def __init__(self, *, neighbours: int = 5, folds: int = 5, seed: int = 0) -> None:
        check_folds(folds)
        if neighbours < 1:
            raise ValueError(f"neighbours must be at least 1, got {neighbours}")
        self.neighbours, self.folds, self.seed = neighbours, folds, seed

    def _fit(self, features_NSD: Tensor, row_N: Tensor) -> FittedNearest:
        def fit(kept_NSD: Tensor) -> Terms:
            return nearest_terms(kept_NSD, self.neighbours, self.folds)

        standard = cross_fitted(fit, features_NSD, row_N, folds=self.folds, seed=self.seed)
        return FittedNearest(bank_NSD=unit_length(features_NSD).float(), standard=standard)

    def _score(self, fitted: FittedNearest, features_BSD: Tensor) -> Tensor:
        return fitted.standard.total(nearest_terms(fitted.bank_NSD, self.neighbours, self.folds)(features_BSD))

    def _settings(self) -> dict[str, Any]:
        return {"neighbours": self.neighbours, "folds": self.folds, "seed": self.seed}

    def _restore(self, tensors: Mapping[str, Tensor]) -> FittedNearest:
        return part_from(FittedNearest, tensors)


def nearest_terms(bank_NSD: Float[Tensor, "N S D"], neighbours: int, folds: int) -> Terms:
    """1 - mean of the largest cosines with these rows, of each row and layer; for a fit with so many folds.

    Raises:
        ValueError: for fewer rows than neighbours.
    """
    if len(bank_NSD) < neighbours:
        raise ValueError(
            f"{neighbours} neighbours need as many rows in every {folds - 1} of {folds} folds, got {len(bank_NSD)}; "
            "add rows or take fewer neighbours"
        )

    def terms(features_BSD: Tensor) -> Tensor:
        columns = []
        for layer in range(bank_NSD.shape[1]):
            cosine_BN = unit_length(features_BSD[:, layer]) @ unit_length(bank_NSD[:, layer]).mT
            columns.append(1 - cosine_BN.topk(neighbours, dim=-1).values.mean(-1))
        return torch.stack(columns, dim=-1)

    return terms
