"""Arrow: adapters are chosen by what their own factors say, without training. Begin with ArrowRouter."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from moelora.bank import ExpertBank
from moelora.routers.linear import linear_in_fp32
from moelora.routers.prototype_router import PrototypeRouter
from moelora.routers.prototypes import shared_prototype
from moelora.routing import Routing
from moelora.tape import Tape


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrow:
    """Options of the Arrow router. The defaults are PEFT's.

    Attributes:
        top_k: how many experts act on a token, K. A site with fewer experts uses all it has.
        temperature: divides the scores.
    """

    top_k: int = 3
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")

    def build(self, in_features: int, available: Sequence[bool], generator: torch.Generator | None) -> "ArrowRouter":
        """A router for a site with this input width; `available` says which experts have rows there."""
        return ArrowRouter(self, in_features, available)


@final
class ArrowRouter(PrototypeRouter):
    """z_e = |x . v_e| / temperature, with the unit vector v_e that expert e's weight change lengthens most.

    The K best act, weighted by a softmax over them. x is not normalised, so this is no cosine: long inputs choose more
    sharply. The absolute value is there because the sign of a singular vector means nothing. A router for several sites
    takes the vector of their maps together (`shared_prototype`).

    Prototypes are taken from the factors when a model is patched or an expert is added. Experts that are trained
    afterwards keep the old ones until `moelora.warm_start(model)` takes them anew; fresh ones, whose B is zero, have
    none and are never chosen.

    Source: Ostapenko et al. 2024 (arXiv 2405.11157), section 4.1.
    """

    def __init__(self, config: Arrow, in_features: int, available: Sequence[bool]) -> None:
        super().__init__(in_features, available, most=config.top_k)
        self.config = config

    def forward(self, x_TD: Float[Tensor, "T D"], tape: Tape) -> Routing:
        return self.choose(linear_in_fp32(x_TD, self.prototype_ED).abs() / self.config.temperature)

    @torch.no_grad()
    def start_from(self, banks: Sequence[ExpertBank], experts: Sequence[int]) -> None:
        for expert in experts:
            self.prototype_ED[expert].copy_(shared_prototype([bank.expert(expert) for bank in banks]))

    def extra_repr(self) -> str:
        return f"in_features={self.prototype_ED.shape[1]}, experts={self.num_experts}, {self.config}"
