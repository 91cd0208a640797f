"""The default detector: Mahalanobis distance with a shrunk covariance, per layer. Begin with Mahalanobis."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import Tensor

from moelora.continual.detectors.base import Detector
from moelora.continual.detectors.folds import Standard, check_folds, cross_fitted
from moelora.continual.detectors.gaussian import LayerGaussians
from moelora.continual.detectors.parts import part_from


@dataclass(frozen=True, kw_only=True)
class FittedMahalanobis:
    """What `Mahalanobis` learns."""

    gaussians: LayerGaussians
    standard: Standard


@final
class Mahalanobis(Detector):
    """Sum over layers of the standardised Mahalanobis distance of unit-length features (`LayerGaussians`).

    Each layer's distance is standardised by its mean and deviation over rows that it was not fitted to
    (`cross_fitted`), so that no layer counts more for its scale. It needs no row twice and works with fewer rows than
    dimensions, where a pseudo-inverse gives every fitted row the same distance.

    Args:
        folds: of the cross-fit.
        seed: of the folds.
        directions: how many directions of the covariance are kept, with their mean variance for all others
            (`LayerGaussians.compressed`), to save room or to tell less of the data; None for all.

    Raises:
        ValueError: for less than 2 folds or 1 direction.
    """

    kind: ClassVar[str] = "mahalanobis"
    folds: int
    seed: int
    directions: int | None

    def __init__(self, *, folds: int = 5, seed: int = 0, directions: int | None = None) -> None:
        check_folds(folds)
        check_directions(directions)
        self.folds, self.seed, self.directions = folds, seed, directions

    def _fit(self, features_NSD: Tensor, row_N: Tensor) -> FittedMahalanobis:
        standard = cross_fitted(
            lambda kept_NSD: self._gaussians(kept_NSD).distances,
            features_NSD,
            row_N,
            folds=self.folds,
            seed=self.seed,
        )
        return FittedMahalanobis(gaussians=self._gaussians(features_NSD), standard=standard)

    def _score(self, fitted: FittedMahalanobis, features_BSD: Tensor) -> Tensor:
        return fitted.standard.total(fitted.gaussians.distances(features_BSD))

    def _settings(self) -> dict[str, Any]:
        return {"folds": self.folds, "seed": self.seed, "directions": self.directions}

    def _restore(self, tensors: Mapping[str, Tensor]) -> FittedMahalanobis:
        return part_from(FittedMahalanobis, tensors)

    def _gaussians(self, features_NSD: Tensor) -> LayerGaussians:
        gaussians = LayerGaussians.fit(features_NSD)
        return gaussians if self.directions is None else gaussians.compressed(self.directions)


def check_directions(directions: int | None) -> None:
    """Raise ValueError unless it is None or at least 1."""
    if directions is not None and directions < 1:
        raise ValueError(f"directions must be at least 1, or None for all, got {directions}")
