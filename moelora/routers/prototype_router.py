"""What routers share whose experts are known by one vector each, a buffer. Begin with PrototypeRouter."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moelora.routers.rows import RowRouter
from moelora.routing import NO_EXPERT, Routing
from moelora.tape import Tape


class PrototypeRouter(RowRouter):
    """The K experts whose prototypes fit a token best act; what fits means is its subclasses' own.

    An expert without a prototype (zeros) is never chosen: nothing is known of it, and its score of 0 would still give
    it a share of the softmax. Where no expert has one, the base model answers alone.

    Attributes:
        prototype_ED: one row for each expert, a buffer: saved, and never trained.
        most: how many experts act on a token at most, where the site has as many.
    """

    every_token = False
    prototype_ED: Tensor
    most: int
    top_k: int

    def __init__(self, in_features: int, available: Sequence[bool], *, most: int) -> None:
        super().__init__()
        self.most = most
        self._set_available(available)
        self.register_buffer("prototype_ED", torch.zeros(len(available), in_features))

    @abstractmethod
    def forward(self, x_TD: Float[Tensor, "T D"], tape: Tape) -> Routing: ...

    # --- for subclasses -------------------------------------------------------------------------------------------

    def choose(self, scores_TE: Float[Tensor, "T E"]) -> Routing:
        """The K best of those that have a prototype, with a softmax over them as weights."""
        known_E = self.available_E & (self.prototype_ED != 0).any(dim=-1)
        best_TK, experts_TK = scores_TE.masked_fill(~known_E, -torch.inf).topk(self.top_k, dim=-1)

        # a finite stand-in: a softmax over nothing but -inf is no number, and neither is its gradient
        empty_TK = ~known_E[experts_TK]
        lowest = torch.finfo(best_TK.dtype).min
        weights_TK = best_TK.masked_fill(empty_TK, lowest).softmax(dim=-1).masked_fill(empty_TK, 0.0)

        # where nobody is known, the scores are all 0: losses and reports take a distribution from them
        logits_TE = scores_TE.masked_fill(~known_E & known_E.any(), -torch.inf)
        return Routing(experts_TK.masked_fill(empty_TK, NO_EXPERT), weights_TK, logits_TE)

    def _rows(self) -> dict[str, Tensor]:
        return {"prototype_ED": self.prototype_ED}

    def _set_available(self, available: Sequence[bool], device: torch.device | None = None) -> None:
        super()._set_available(available, device)
        self.top_k = min(self.most, sum(available))
