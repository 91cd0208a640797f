"""The interface of all routers. Begin with AbstractRouter.

A router is a subclass that implements `forward`, `keep_experts` and `add_experts`, beside a frozen config with `build`
(`RouterConfig`), which `patch_model(router=...)` takes. All pass `moelora.testing.router_contract`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moelora.bank import ExpertBank
from moelora.kernels.gate import LinearGate
from moelora.routing import Routing
from moelora.tape import Tape


class AbstractRouter(nn.Module, ABC):
    """Decides which experts act on each token.

    A router reads its input and the tape, answers with a `Routing`, and leaves nothing on itself.

    Attributes:
        num_experts: how many experts there are, E.
        top_k: how many experts act on a token at most, K.
        every_token: True if every token always gets an expert, so that layers need not look for tokens without one.
    """

    num_experts: int
    top_k: int = 1
    every_token: bool = False
    available_E: Tensor
    all_available: bool

    @abstractmethod
    def forward(self, x_TD: Float[Tensor, "T D"], tape: Tape) -> Routing:
        """Choose experts for T tokens.

        Args:
            x_TD: the site's input, flattened.
            tape: the state of the call; `tape.leading` is the shape that the input had before, without D.
        """

    @abstractmethod
    def keep_experts(self, order: Sequence[int]) -> None:
        """Keep these experts, in this order, and forget all others."""

    @abstractmethod
    def add_experts(self, available: Sequence[bool]) -> None:
        """Append new experts; `available` says which of them this site has rows for."""

    def start_from(self, banks: Sequence[ExpertBank], experts: Sequence[int]) -> None:
        """Learn what there is to know of some experts from their factors; by default nothing.

        Called when a model is patched, with all experts, and in `add_expert` with the new one; not when a saved mixture
        is loaded, whose routers know more.

        Args:
            banks: of the sites that this router answers for.
            experts: their ids.

        Raises:
            ValueError: if the router cannot work with these experts. The model is then as it was before.
        """

    def linear_gate(self) -> LinearGate | None:
        """This router as a plain linear map, or None if it is none."""
        return None

    def _set_available(self, available: Sequence[bool], device: torch.device | None = None) -> None:
        self.num_experts = len(available)
        mask = torch.tensor(list(available), dtype=torch.bool, device=device)
        self.register_buffer("available_E", mask, persistent=False)
        self.all_available = all(available)


@runtime_checkable
class RouterConfig(Protocol):
    """Options of a router: a frozen dataclass of plain values that can build it. A `top_k` among them is checked.

    To save mixtures with a router of your own, name its config: `moelora.register_router("mine", MyConfig)`.
    """

    def build(self, in_features: int, available: Sequence[bool], generator: torch.Generator | None) -> AbstractRouter:
        """A router for a site with this input width; `available` says which experts have rows there."""
        ...
