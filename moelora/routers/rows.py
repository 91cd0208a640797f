"""What routers share whose experts are rows of tensors, or nothing but names. Begin with RowRouter."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moelora.routers.base import AbstractRouter
from moelora.routing import NO_EXPERT, Routing
from moelora.tape import Tape


class RowRouter(AbstractRouter):
    """Experts come and go by their rows in `_rows`, and in what `_set_available` makes of who is there."""

    @abstractmethod
    def forward(self, x_TD: Float[Tensor, "T D"], tape: Tape) -> Routing: ...

    def keep_experts(self, order: Sequence[int]) -> None:
        keep = torch.tensor(list(order), dtype=torch.long)
        for name, tensor in self._rows().items():
            self._put(name, tensor.detach()[keep.to(tensor.device)])
        self._set_available([bool(self.available_E[index]) for index in order], self.available_E.device)

    def add_experts(self, available: Sequence[bool]) -> None:
        for name, tensor in self._rows().items():
            rows = tensor.new_zeros(len(available), *tensor.shape[1:])
            self._put(name, torch.cat([tensor.detach(), rows]))
        self._set_available([*self.available_E.tolist(), *available], self.available_E.device)

    # --- for subclasses -------------------------------------------------------------------------------------------

    def present(self, experts_X: Int[Tensor, "*X"]) -> Int[Tensor, "*X"]:
        """These ids, -1 in place of experts without rows at the site."""
        if self.all_available:
            return experts_X
        return experts_X.masked_fill(~self.available_E[experts_X.clamp(min=0)], NO_EXPERT)

    def _rows(self) -> dict[str, Tensor]:
        """Parameters and buffers that have a row for each expert, by attribute."""
        return {}

    def _put(self, name: str, tensor: Tensor) -> None:
        old = getattr(self, name)
        setattr(self, name, nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor)
