"""Routing by ids that come from outside: tasks, domains, modalities. Begin with GivenRouter."""

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
class Given:
    """Options of the given router: it has none. Ids come from `moelora.given_experts(model, ids)`."""

    reads_ids: ClassVar[bool] = True

    def build(self, in_features: int, available: Sequence[bool], generator: torch.Generator | None) -> "GivenRouter":
        """A router for a site with this input width; `available` says which experts have rows there."""
        return GivenRouter(available)


@final
class GivenRouter(RowRouter):
    """The expert that was named acts, at the scale it was trained at; -1 is the base model.

    An expert without rows at a site leaves the base as it is there, as its adapter alone would.
    """

    every_token = False

    def __init__(self, available: Sequence[bool]) -> None:
        super().__init__()
        self._set_available(available)

    def forward(self, x_TD: Float[Tensor, "T D"], tape: Tape) -> Routing:
        experts_TK = self.present(tape.given_ids(x_TD.device))
        return Routing(experts_TK, (experts_TK >= 0).to(torch.float32))
