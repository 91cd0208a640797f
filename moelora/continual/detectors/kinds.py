"""Which detector a saved state is of. Begin with detector_from_state."""

from moelora.continual.detectors.base import Detector, DetectorState
from moelora.continual.detectors.mahalanobis import Mahalanobis
from moelora.continual.detectors.nearest import Nearest
from moelora.continual.detectors.o3 import O3Code, O3Paper
from moelora.continual.detectors.relative import RelativeMahalanobis
from moelora.continual.detectors.relative_nearest import RelativeNearest
from moelora.continual.detectors.sum_of import SumOf

KINDS: dict[str, type[Detector]] = {
    kind.kind: kind for kind in (Mahalanobis, Nearest, SumOf, RelativeMahalanobis, RelativeNearest, O3Paper, O3Code)
}
"""The detectors of this package by the names in their states."""


def detector_from_state(state: DetectorState) -> Detector:
    """The detector that a state was taken of, whatever its kind.

    Raises:
        ValueError: for an unknown kind, or tensors that do not fit it.
    """
    return kind_of(state.description.get("kind")).from_state(state)


def kind_of(name: object) -> type[Detector]:
    """The class of a detector by its name in a state.

    Raises:
        ValueError: for an unknown name.
    """
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"unknown detector {name!r}; expected one of {', '.join(KINDS)}")
    return KINDS[name]
