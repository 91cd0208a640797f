"""Routing by a gate for each expert: open, ajar or closed for a whole row. Begin with GatedRouter.

The gates themselves are any function, handed over with `moelora.set_gates` (see `moelora/gating.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from moelora.call_settings import spread_rows
from moelora.routers.rows import RowRouter
from moelora.routing import NO_EXPERT, Routing
from moelora.tape import Tape

COMBINE = ("sum", "max_single")
"""How experts with open gates act together; `Gated` says what each means."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gated:
    """Options of the gated router. The gates come from the function in `moelora.set_gates`.

    Attributes:
        combine: "sum", every expert whose gate is open acts, with the gate's weight; "max_single", only the one whose
            gate is open widest, and of several the one with the lowest id.
        mergeable: whether experts may leave their gates: `moelora.merge` and `moelora.export_adapter` refuse if not. An
            expert that unlearns something would act on all inputs then.
    """

    combine: str = "sum"
    mergeable: bool = True

    def __post_init__(self) -> None:
        if self.combine not in COMBINE:
            raise ValueError(f"unknown combine {self.combine!r}; expected one of {COMBINE}")

    def build(self, in_features: int, available: Sequence[bool], generator: torch.Generator | None) -> "GatedRouter":
        """A router for a site; `available` says which experts have rows there."""
        return GatedRouter(self, available)


@final
class GatedRouter(RowRouter):
    """y = W x + sum_e g_e Delta_e x, with a gate g_e >= 0 for each expert and row of the batch.

    A gate at exactly 0 is closed: its expert has no slot. A row whose gates are all closed is the base model's, bit for
    bit, whatever the experts hold. In an open row the kernels may still multiply closed experts by 0, so these must be
    finite there. An expert without rows at a site leaves the base as it is there, also where its gate is open widest.
    """

    every_token = False
    config: Gated
    top_k: int

    def __init__(self, config: Gated, available: Sequence[bool]) -> None:
        super().__init__()
        self.config = config
        self._set_available(available)

    def forward(self, x_TD: Float[Tensor, "T D"], tape: Tape) -> Routing:
        weights_BE = tape.current.gates_BE
        if weights_BE is None:
            raise ValueError(
                "this mixture is routed by gates, and there are none for this call; functions are not saved or copied "
                "with a model: hand them over with moelora.set_gates(model, gates), or load a saved stack with "
                "UnlearningStack.load or ContinualStack.load in place of moelora.load; and call model(...), not a part "
                "of it, since gates are asked when a call of the model begins"
            )
        weights_BK = weights_BE.to(x_TD.device)
        experts_BK = torch.arange(self.num_experts, device=x_TD.device).expand_as(weights_BK)
        if self.config.combine == "max_single":
            # among all experts, so that every site has the same one
            experts_BK = weights_BK.argmax(dim=-1, keepdim=True)
            weights_BK = weights_BK.gather(1, experts_BK)

        empty_BK = weights_BK == 0
        if not self.all_available:
            empty_BK = empty_BK | ~self.available_E[experts_BK]
        return Routing(
            spread_rows(experts_BK.masked_fill(empty_BK, NO_EXPERT), tape.leading),
            spread_rows(weights_BK.masked_fill(empty_BK, 0.0), tape.leading),
        )

    def _set_available(self, available: Sequence[bool], device: torch.device | None = None) -> None:
        super()._set_available(available, device)
        self.top_k = self.num_experts if self.config.combine == "sum" else 1


def refuse_leaving_gates(router: object) -> None:
    """Raise ValueError if this is the router of experts that must stay behind their gates."""
    if isinstance(router, Gated) and not router.mergeable:
        raise ValueError(
            "these experts unlearn something where their gates are open, and must not leave the gates: merged or "
            "exported they would act on every input. Save them with their gates (UnlearningStack.save)"
        )
