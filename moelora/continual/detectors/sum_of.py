"""Several detectors as one. Begin with SumOf."""

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from moelora.continual.detectors.base import Detector
from moelora.continual.detectors.parts import within


@final
class SumOf(Detector):
    """The sum of several detectors' scores, such as `SumOf(Mahalanobis(), Nearest())`.

    Its parts are to be standardised by cross-fitting, as those two are: scores of any other scale drown each other.
    The given detectors are recipes: what is fitted belongs to the sum, and they stay as they were.
    """

    kind: ClassVar[str] = "sum"
    parts: tuple[Detector, ...]

    def __init__(self, *parts: Detector) -> None:
        if len(parts) < 2:
            raise ValueError(f"a sum is of at least two detectors, got {len(parts)}")
        self.parts = parts

    def _fit(self, features_NSD: Tensor, row_N: Tensor) -> tuple[Any, ...]:
        return tuple(part._fit(features_NSD, row_N) for part in self.parts)

    def _score(self, fitted: tuple[Any, ...], features_BSD: Tensor) -> Tensor:
        return torch.stack([part._score(own, features_BSD) for part, own in zip(self.parts, fitted, strict=True)]).sum(
            0
        )

    def _settings(self) -> dict[str, Any]:
        return {"parts": [{"kind": part.kind, "settings": part._settings()} for part in self.parts]}

    def _given(self) -> dict[str, Tensor]:
        return {
            f"{number}.{name}": tensor
            for number, part in enumerate(self.parts)
            for name, tensor in part._given().items()
        }

    def _restore(self, tensors: Mapping[str, Tensor]) -> tuple[Any, ...]:
        return tuple(part._restore(within(tensors, str(number))) for number, part in enumerate(self.parts))

    @classmethod
    def _from_settings(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "SumOf":
        # not at the top: the table of kinds holds this class
        from moelora.continual.detectors.kinds import kind_of

        return cls(
            *(
                kind_of(part["kind"])._from_settings(part["settings"], within(tensors, str(number)))
                for number, part in enumerate(settings["parts"])
            )
        )
