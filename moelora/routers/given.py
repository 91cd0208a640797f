"""Routing by ids that come from outside: tasks, domains, modalities. Begin with GivenRouter."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from moelora.routers.base import AbstractRouter
from moelora.routing import NO_EXPERT, Routing
from moelora.tape import Tape


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """Options of the given router: it has none. Ids come from `moelora.given_experts(model, ids)`."""

    reads_ids: ClassVar[bool] = True

    def build(self, in_features: int, available: Sequence[bool], generator: torch.Generator | None) -> "GivenRouter":
        """A router for a site with this input width; `available` says which experts have rows there."""
        return GivenRouter(available)


@final
class GivenRouter(AbstractRouter):
    """The expert that was named acts, at the scale it was trained at; -1 is the base model.

    An expert without rows at a site leaves the base as it is there, as its adapter alone would.
    """

    every_token = False

    def __init__(self, available: Sequence[bool]) -> None:
        super().__init__()
        self._set_available(available)

    def forward(self, x_TD: Float[Tensor, "T D"], tape: Tape) -> Routing:
        experts_TK = tape.given_ids(x_TD.device)
        if not self.all_available:
            absent_TK = ~self.available_E[experts_TK.clamp(min=0)]
            experts_TK = experts_TK.masked_fill(absent_TK, NO_EXPERT)
        return Routing(experts_TK, (experts_TK >= 0).to(torch.float32))

    def keep_experts(self, order: Sequence[int]) -> None:
        self._set_available([bool(self.available_E[index]) for index in order], self.available_E.device)

    def add_experts(self, available: Sequence[bool]) -> None:
        self._set_available([*self.available_E.tolist(), *available], self.available_E.device)
