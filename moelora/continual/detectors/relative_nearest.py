"""Distance to the nearest fitted rows less that to the nearest benign ones. Begin with RelativeNearest."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

from jaxtyping import Float
from torch import Tensor

from moelora.continual.detectors.base import Detector, check_features
from moelora.continual.detectors.folds import Standard, Terms, check_folds, cross_fitted
from moelora.continual.detectors.gaussian import unit_length
from moelora.continual.detectors.nearest import nearest_terms
from moelora.continual.detectors.parts import part_from


@dataclass(frozen=True, kw_only=True)
class FittedRelativeNearest:
    """What `RelativeNearest` keeps: the features of every fitted row, and of every benign one."""

    bank_NSD: Float[Tensor, "N S D"]
    background_MSD: Float[Tensor, "M S D"]
    standard: Standard


@final
class RelativeNearest(Detector):
    """Sum over layers of the standardised d(z) - d_0(z), where d is the distance of `Nearest` and d_0 from benign rows.

    Where a request and benign text have borders of many pieces, such as single intents, this follows them, and
    `RelativeMahalanobis`, with one Gaussian each, cannot. Far from both, the difference says little: add an absolute
    distance, `SumOf(RelativeMahalanobis(...), RelativeNearest(...), Nearest())`.

    The logarithm of a ratio of densities by their nearest neighbours, up to scale, where distances are small against
    their differences: Loftsgaarden and Quesenberry (1965), A nonparametric estimate of a multivariate density function.

    **It stores features of the data it was fitted to**, as `Nearest` does, and of the benign texts.

    Args:
        background_MSD: features of benign texts, such as `HiddenStates` gives of them; several requests can share them.
        neighbours: how many cosines are averaged, on either side.
        folds: of the cross-fit.
        seed: of the folds.

    Raises:
        ValueError: for fewer benign rows than neighbours, or features that are not finite.
    """

    kind: ClassVar[str] = "relative_nearest"
    background_MSD: Tensor
    neighbours: int
    folds: int
    seed: int

    def __init__(
        self, background_MSD: Float[Tensor, "M S D"], *, neighbours: int = 5, folds: int = 5, seed: int = 0
    ) -> None:
        check_folds(folds)
        check_features(background_MSD)
        if not 1 <= neighbours <= len(background_MSD):
            raise ValueError(
                f"neighbours must be from 1 to the number of benign rows, {len(background_MSD)}, got {neighbours}"
            )
        # fp32 of unit length, as it is kept: twice is the same as once
        self.background_MSD = unit_length(background_MSD).float()
        self.neighbours, self.folds, self.seed = neighbours, folds, seed

    def _fit(self, features_NSD: Tensor, row_N: Tensor) -> FittedRelativeNearest:
        expected, came = tuple(self.background_MSD.shape[1:]), tuple(features_NSD.shape[1:])
        if expected != came:
            raise ValueError(
                f"the background has features of (layers, width) {expected}, the request {came}; take both alike"
            )
        background_MSD = self.background_MSD.to(features_NSD.device)

        def fit(kept_NSD: Tensor) -> Terms:
            return self._terms(kept_NSD, background_MSD)

        standard = cross_fitted(fit, features_NSD, row_N, folds=self.folds, seed=self.seed)
        return FittedRelativeNearest(
            bank_NSD=unit_length(features_NSD).float(), background_MSD=background_MSD, standard=standard
        )

    def _score(self, fitted: FittedRelativeNearest, features_BSD: Tensor) -> Tensor:
        return fitted.standard.total(self._terms(fitted.bank_NSD, fitted.background_MSD)(features_BSD))

    def _settings(self) -> dict[str, Any]:
        return {"neighbours": self.neighbours, "folds": self.folds, "seed": self.seed}

    def _given(self) -> dict[str, Tensor]:
        return {"background_MSD": self.background_MSD}

    def _restore(self, tensors: Mapping[str, Tensor]) -> FittedRelativeNearest:
        return part_from(FittedRelativeNearest, tensors)

    @classmethod
    def _from_settings(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "RelativeNearest":
        if "background_MSD" not in tensors:
            raise ValueError("these are not the tensors of a RelativeNearest: missing ['background_MSD']")
        return cls(tensors["background_MSD"], **settings)

    def _terms(self, bank_NSD: Tensor, background_MSD: Tensor) -> Terms:
        own = nearest_terms(bank_NSD, self.neighbours, self.folds)
        benign = nearest_terms(background_MSD, self.neighbours, self.folds)
        return lambda features_BSD: own(features_BSD) - benign(features_BSD)
