"""What routers share that score experts by a linear map. Begin with LinearRouter."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from moelora.routers.rows import RowRouter
from moelora.routing import Routing
from moelora.tape import Tape


class LinearRouter(RowRouter):
    """z = W x, without bias, in fp32; what follows from the scores is its subclasses' own.

    Attributes:
        weight_ED: one row for each expert; a prototype of the inputs that the expert is for.
        most: how many experts act on a token at most, where the site has as many.
    """

    every_token = True
    weight_ED: nn.Parameter
    most: int
    top_k: int

    def __init__(
        self,
        in_features: int,
        available: Sequence[bool],
        *,
        most: int,
        init_std: float,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.most = most
        self._set_available(available)
        shape = (len(available), in_features)
        self.weight_ED = nn.Parameter(torch.empty(shape).normal_(0, init_std, generator=generator))

    @abstractmethod
    def forward(self, x_TD: Float[Tensor, "T D"], tape: Tape) -> Routing: ...

    def extra_repr(self) -> str:
        return f"in_features={self.weight_ED.shape[1]}, experts={self.num_experts}"

    # --- for subclasses -------------------------------------------------------------------------------------------

    def scores(self, x_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        """z = W x in fp32, -inf for experts without rows at the site."""
        logits_TE = linear_in_fp32(x_TD, self.weight_ED)
        return logits_TE if self.all_available else logits_TE.masked_fill(~self.available_E, -torch.inf)

    def _rows(self) -> dict[str, Tensor]:
        return {"weight_ED": self.weight_ED}

    def _set_available(self, available: Sequence[bool], device: torch.device | None = None) -> None:
        super()._set_available(available, device)
        # a site with fewer experts uses all it has
        self.top_k = min(self.most, sum(available))


def linear_in_fp32(x_TD: Float[Tensor, "T D"], weight_ED: Float[Tensor, "E D"]) -> Float[Tensor, "T E"]:
    """x W^T in fp32, whatever autocast wants: in bf16 the ties between experts fall by chance.

    Top-k would then depend on the batch.
    """
    device = x_TD.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return linear_in_fp32(x_TD, weight_ED)
    if x_TD.dtype is not torch.float32 or weight_ED.dtype is not torch.float32:
        x_TD, weight_ED = x_TD.float(), weight_ED.float()
    return F.linear(x_TD, weight_ED)
