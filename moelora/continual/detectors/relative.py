"""Mahalanobis distance less that from benign text. Begin with RelativeMahalanobis."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import Tensor

from moelora.continual.detectors.base import Detector
from moelora.continual.detectors.folds import Standard, Terms, check_folds, cross_fitted
from moelora.continual.detectors.gaussian import LayerGaussians
from moelora.continual.detectors.parts import moved, part_from, tensors_of, within


@dataclass(frozen=True, kw_only=True)
class FittedRelative:
    """What `RelativeMahalanobis` learns."""

    gaussians: LayerGaussians
    background: LayerGaussians
    standard: Standard


@final
class RelativeMahalanobis(Detector):
    """Sum over layers of the standardised d(z) - d_0(z), where d_0 is the distance under one background Gaussian.

    Ren et al. (2021), https://arxiv.org/abs/2106.09022: what is odd for the request and for all text alike, such as a
    rare script, no longer counts. The reverse of the medal: a row far from everything may look near.

    Args:
        background: `LayerGaussians.fit(benign_NSD)`, which several requests can share.
        folds: of the cross-fit.
        seed: of the folds.
    """

    kind: ClassVar[str] = "relative_mahalanobis"
    background: LayerGaussians
    folds: int
    seed: int

    def __init__(self, background: LayerGaussians, *, folds: int = 5, seed: int = 0) -> None:
        check_folds(folds)
        self.background, self.folds, self.seed = background, folds, seed

    def _fit(self, features_NSD: Tensor, row_N: Tensor) -> FittedRelative:
        expected, came = tuple(self.background.mean_SD.shape), tuple(features_NSD.shape[1:])
        if expected != came:
            raise ValueError(
                f"the background has features of (layers, width) {expected}, the request {came}; take both alike"
            )
        background = moved(self.background, features_NSD.device)

        def fit(kept_NSD: Tensor) -> Terms:
            gaussians = LayerGaussians.fit(kept_NSD)
            return lambda features_BSD: gaussians.distances(features_BSD) - background.distances(features_BSD)

        return FittedRelative(
            gaussians=LayerGaussians.fit(features_NSD),
            background=background,
            standard=cross_fitted(fit, features_NSD, row_N, folds=self.folds, seed=self.seed),
        )

    def _score(self, fitted: FittedRelative, features_BSD: Tensor) -> Tensor:
        return fitted.standard.total(
            fitted.gaussians.distances(features_BSD) - fitted.background.distances(features_BSD)
        )

    def _settings(self) -> dict[str, Any]:
        return {"folds": self.folds, "seed": self.seed}

    def _given(self) -> dict[str, Tensor]:
        return {f"background.{name}": tensor for name, tensor in tensors_of(self.background).items()}

    def _restore(self, tensors: Mapping[str, Tensor]) -> FittedRelative:
        return part_from(FittedRelative, tensors)

    @classmethod
    def _from_settings(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "RelativeMahalanobis":
        return cls(part_from(LayerGaussians, within(tensors, "background")), **settings)
