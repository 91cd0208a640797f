"""What a router answers, and the letters that name our axes. Begin with Routing.

Axis letters, everywhere in the package: T tokens (flattened), B batch, L length, D input width, O output width,
E experts, K experts chosen per token, R rank rows of a bank, P rank rows of the largest expert. A tensor's name ends in
its axes: `logits_TE`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

NO_EXPERT = -1
"""The expert id that stands for "no expert": such a slot adds nothing."""


class Routing(NamedTuple):
    """A router's answer for T tokens.

    Attributes:
        experts_TK: ids of the chosen experts, distinct within a token; `NO_EXPERT` (-1) for an empty slot.
        weights_TK: fp32 weight of each chosen expert, on top of the expert's own trained scale; 0 in an empty slot.
        logits_TE: fp32 scores of all experts before the choice, -inf for an expert that could not be chosen; None
            where the choice was given and not computed.
        log_prob_T: fp32 log-probability of the choice, for routers that are trained by reinforcement; else None.
    """

    experts_TK: Int[Tensor, "T K"]
    weights_TK: Float[Tensor, "T K"]
    logits_TE: Float[Tensor, "T E"] | None = None
    log_prob_T: Float[Tensor, " T"] | None = None

    def detach(self) -> "Routing":
        """The same routing, cut from the autograd graph."""
        experts_TK, weights_TK, logits_TE, log_prob_T = self
        return Routing(
            experts_TK.detach(),
            weights_TK.detach(),
            None if logits_TE is None else logits_TE.detach(),
            None if log_prob_T is None else log_prob_T.detach(),
        )


def dense_weights(routing: Routing, num_experts: int) -> Float[Tensor, "T E"]:
    """Weight of every expert for every token: the chosen weights scattered over all experts, 0 elsewhere.

    Ids of the same expert within a token add up; empty slots (-1) vanish.
    """
    experts_TK, weights_TK = routing.experts_TK, routing.weights_TK
    # one column more, where the empty slots fall
    spare_TE = weights_TK.new_zeros(experts_TK.shape[0], num_experts + 1)
    slots_TK = torch.where(experts_TK < 0, num_experts, experts_TK)
    return spare_TE.scatter_add(1, slots_TK, weights_TK)[:, :num_experts]


def active_tokens(routing: Routing) -> Tensor:
    """True for every token for which at least one expert acts, as a (T, 1) column."""
    return ((routing.experts_TK >= 0) & (routing.weights_TK != 0)).any(dim=-1, keepdim=True)


def join(parts: "list[Routing]") -> Routing:
    """Several routings of one site, one after the other, as one routing of all their tokens."""

    def stack(tensors: list[Tensor | None]) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present) if len(present) == len(tensors) else None

    experts, weights, logits, log_probs = zip(*parts, strict=True)
    return Routing(torch.cat(experts), torch.cat(weights), stack(list(logits)), stack(list(log_probs)))
