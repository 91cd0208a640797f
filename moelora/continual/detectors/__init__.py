"""How far a prompt is from a request that was fitted, by its features. Begin with Detector, then Mahalanobis.

    detector = Mahalanobis().fit(features_NSD)          # N prompts of the request, S layers, width D
    scores_B = detector.score(features_BSD)             # larger = farther

`Mahalanobis` keeps a mean and a shrunk covariance; `Nearest` keeps the features themselves; `SumOf` adds the two;
`RelativeMahalanobis` and `RelativeNearest` also know benign text. `O3Paper` and
`O3Code` are there to trace published tables.
"""

from moelora.continual.detectors.base import Detector as Detector
from moelora.continual.detectors.base import DetectorState as DetectorState
from moelora.continual.detectors.gaussian import LayerGaussians as LayerGaussians
from moelora.continual.detectors.kinds import detector_from_state as detector_from_state
from moelora.continual.detectors.mahalanobis import Mahalanobis as Mahalanobis
from moelora.continual.detectors.nearest import Nearest as Nearest
from moelora.continual.detectors.o3 import O3Code as O3Code
from moelora.continual.detectors.o3 import O3Paper as O3Paper
from moelora.continual.detectors.relative import RelativeMahalanobis as RelativeMahalanobis
from moelora.continual.detectors.relative_nearest import RelativeNearest as RelativeNearest
from moelora.continual.detectors.sum_of import SumOf as SumOf

__all__ = [
    "Detector",
    "DetectorState",
    "LayerGaussians",
    "Mahalanobis",
    "Nearest",
    "O3Code",
    "O3Paper",
    "RelativeMahalanobis",
    "RelativeNearest",
    "SumOf",
    "detector_from_state",
]
