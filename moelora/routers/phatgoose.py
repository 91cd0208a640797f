"""PHATGOOSE: adapters are chosen by a gate that each was given after its training. Begin with PhatgooseRouter.

The gates are trained by `moelora.train_phatgoose` (see `moelora/phatgoose.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from moelora.routers.linear import linear_in_fp32
from moelora.routers.prototype_router import PrototypeRouter
from moelora.routing import Routing
from moelora.tape import Tape


@dataclass(frozen=True, kw_only=True, slots=True)
class Phatgoose:
    """Options of the PHATGOOSE router.

    Attributes:
        top_k: how many experts act on a token, K. A site with fewer experts uses all it has.
    """

    top_k: int = 2

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")

    def build(
        self, in_features: int, available: Sequence[bool], generator: torch.Generator | None
    ) -> "PhatgooseRouter":
        """A router for a site with this input width; `available` says which experts have rows there."""
        return PhatgooseRouter(self, in_features, available)


@final
class PhatgooseRouter(PrototypeRouter):
    """z_e = norm(x) . norm(v_e) / sqrt(D), with the gate v_e of expert e; the K best act, with a softmax over them.

    `norm` is a layer norm without gain and bias (epsilon 1e-5), so that gates of experts that were trained apart can be
    compared. An expert whose gate is not trained (zeros) is never chosen; before any is, the base model answers alone.

    Source: Muqeeth et al. 2024 (arXiv 2402.05859), section 3.
    """

    def __init__(self, config: Phatgoose, in_features: int, available: Sequence[bool]) -> None:
        super().__init__(in_features, available, most=config.top_k)
        self.config = config

    def forward(self, x_TD: Float[Tensor, "T D"], tape: Tape) -> Routing:
        width = x_TD.shape[1]
        x_TD, gate_ED = (F.layer_norm(rows.float(), (width,)) for rows in (x_TD, self.prototype_ED))
        return self.choose(linear_in_fp32(x_TD, gate_ED) / width**0.5)

    def extra_repr(self) -> str:
        return f"in_features={self.prototype_ED.shape[1]}, experts={self.num_experts}, {self.config}"
