"""The interface of all detectors. Begin with Detector.

Axes: N rows that a detector is fitted to, B rows that it scores, S layers, D width, R directions of a layer.

A detector is a recipe, and what a fit made of data is a dataclass of tensors beside it (`parts.py`), which two pure
functions make and read. All pass `moelora.testing.detector_contract`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moelora.continual.detectors.parts import moved, tensors_of

This = TypeVar("This", bound="Detector")

ROWS_AT_ONCE = 256
"""How many rows are scored at a time: in fp64 they need several times the memory of their features."""


class DetectorState(NamedTuple):
    """A fitted detector as what a file can hold.

    Attributes:
        description: JSON values: kind, settings, layers, width.
        tensors: by names that end in their axes.
    """

    description: dict[str, Any]
    tensors: dict[str, Tensor]


class Detector(ABC):
    """Scores how far a row's features are from those that it was fitted to; larger is farther.

    Attributes:
        kind: its name in a saved state.
    """

    kind: ClassVar[str]
    _fitted: Any = None
    _shape: tuple[int, int] = (0, 0)

    @torch.no_grad()
    def fit(self: This, features_NSD: Float[Tensor, "N S D"], row_N: Int[Tensor, " N"] | None = None) -> This:
        """Learn the request that these features are from; what was fitted before is forgotten.

        The same features give the same detector: what is drawn at random is drawn from the detector's own seed.

        Args:
            features_NSD: of prompts of the request, one row for each prompt or window of one.
            row_N: for windows, the prompt that each is from. Windows of a prompt overlap, so they are never on both
                sides of a split. None if every row is a prompt of its own.

        Raises:
            ValueError: for features that are not finite, or too few of them.
        """
        check_features(features_NSD)
        if row_N is None:
            row_N = torch.arange(len(features_NSD))
        self._fitted = self._fit(features_NSD, row_N.cpu())
        self._shape = (features_NSD.shape[1], features_NSD.shape[2])
        return self

    @torch.no_grad()
    def score(self, features_BSD: Float[Tensor, "B S D"]) -> Float[Tensor, " B"]:
        """Distance of each row from the request, fp32, finite; larger is farther.

        Computed in fp64, which neither autocast nor TF32 touches.

        Raises:
            ValueError: before a fit, for another number of layers or width, for features on another device, or for
                some that are not finite: a gate decides about such rows before it asks.
        """
        fitted = self._check_for_scores(features_BSD)
        chunks = [self._score(fitted, chunk_BSD) for chunk_BSD in features_BSD.split(ROWS_AT_ONCE)]
        return torch.cat(chunks).float()

    def state(self) -> DetectorState:
        """What is needed to score again, bit for bit; statistics of the data, so keep it as carefully as these.

        Raises:
            ValueError: before a fit.
        """
        layers, width = self._shape
        description = {"kind": self.kind, "settings": self._settings(), "layers": layers, "width": width}
        return DetectorState(description, tensors_of(self._need_fitted()))

    @classmethod
    def from_state(cls: type[This], state: DetectorState) -> This:
        """The detector that `state` was taken of; `detector_from_state` also finds the class.

        Raises:
            ValueError: for the state of another kind, or one whose tensors are missing, misshapen or not finite.
        """
        description = state.description
        if description.get("kind") != cls.kind:
            raise ValueError(f"expected the state of a {cls.kind!r} detector, got {description.get('kind')!r}")
        detector = cls._from_settings(description["settings"], state.tensors)
        detector._fitted = detector._restore(state.tensors)
        detector._shape = (int(description["layers"]), int(description["width"]))
        return detector

    def to(self: This, device: torch.device | str) -> This:
        """Move what was fitted to a device, in place.

        Raises:
            ValueError: before a fit.
        """
        self._fitted = moved(self._need_fitted(), device)
        return self

    # --- what a detector implements -------------------------------------------------------------------------------

    @abstractmethod
    def _fit(self, features_NSD: Tensor, row_N: Tensor) -> Any:
        """A dataclass of tensors, or a tuple of such, on the device of the features."""

    @abstractmethod
    def _score(self, fitted: Any, features_BSD: Tensor) -> Tensor:
        """fp64 distances by what `_fit` returned."""

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """The constructor's arguments as JSON values."""

    def _given(self) -> dict[str, Tensor]:
        """Tensors that the constructor was given, under the names by which `_from_settings` finds them."""
        return {}

    @abstractmethod
    def _restore(self, tensors: Mapping[str, Tensor]) -> Any:
        """What `_fit` returned, from its tensors."""

    @classmethod
    def _from_settings(cls: type[This], settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> This:
        return cls(**settings)

    # --- inside ---------------------------------------------------------------------------------------------------

    def _need_fitted(self) -> Any:
        if self._fitted is None:
            raise ValueError(f"this {type(self).__name__} is not fitted yet; call fit(features_NSD) first")
        return self._fitted

    def _check_for_scores(self, features_BSD: Tensor) -> Any:
        fitted = self._need_fitted()
        check_features(features_BSD)
        if tuple(features_BSD.shape[1:]) != self._shape:
            raise ValueError(
                f"this detector was fitted to features of (layers, width) {self._shape}, "
                f"got {tuple(features_BSD.shape[1:])}; take the features as they were taken for the fit"
            )
        device = next(iter(tensors_of(fitted).values())).device
        if features_BSD.device != device:
            raise ValueError(
                f"the features are on {features_BSD.device}, the detector on {device}; call detector.to(device) first"
            )
        return fitted


def check_features(features_NSD: Tensor) -> None:
    """Raise ValueError unless these are finite numbers of shape (rows, layers, width)."""
    if features_NSD.ndim != 3 or not features_NSD.is_floating_point() or 0 in features_NSD.shape[1:]:
        raise ValueError(
            f"features must be floating-point numbers of shape (rows, layers, width), got {features_NSD.dtype} "
            f"{tuple(features_NSD.shape)}"
        )
    finite_NSD = features_NSD.isfinite()
    if not finite_NSD.all():
        finite_N = finite_NSD.flatten(1).all(1)
        bad = (~finite_N).nonzero()[:, 0].tolist()
        raise ValueError(
            f"features of {len(bad)} of {len(finite_N)} rows are NaN or infinite, such as rows {bad[:5]}; a distance "
            "of them means nothing, so decide about such rows before they come here"
        )
