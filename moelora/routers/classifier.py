"""Routing by a classifier of the whole input: scenarios of noise, languages, tenants. Begin with ClassifierRouter.

The classifier itself is any function, handed over with `moelora.set_classifier` (see `moelora/classifying.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from moelora.routers.rows import RowRouter
from moelora.routing import Routing
from moelora.tape import Tape


@dataclass(frozen=True, kw_only=True, slots=True)
class Classifier:
    """Options of the classifier's router: it has none. Ids come from the function in `moelora.set_classifier`."""

    reads_ids: ClassVar[bool] = True

    def build(
        self, in_features: int, available: Sequence[bool], generator: torch.Generator | None
    ) -> "ClassifierRouter":
        """A router for a site; `available` says which experts have rows there."""
        return ClassifierRouter(available)


@final
class ClassifierRouter(RowRouter):
    """The expert that the classifier named acts, at the scale it was trained at; -1 is the base model.

    Source: adapter sets for scenarios of noise behind a classifier (arXiv 2502.01709).
    """

    every_token = False

    def __init__(self, available: Sequence[bool]) -> None:
        super().__init__()
        self._set_available(available)

    def forward(self, x_TD: Float[Tensor, "T D"], tape: Tape) -> Routing:
        if not tape.has_ids:
            raise ValueError(
                "this mixture is routed by a classifier, and it has none: functions are not saved or copied with a "
                "model; hand it over with moelora.set_classifier(model, classify)"
            )
        experts_TK = self.present(tape.given_ids(x_TD.device))
        return Routing(experts_TK, (experts_TK >= 0).to(torch.float32))
