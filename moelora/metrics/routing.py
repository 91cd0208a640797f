"""What a router does, in numbers: pure functions of routings. Begin with expert_load and agreement.

    with moelora.record(model) as recording:
        model(**inputs)
    load_E = expert_load(recording[site], num_experts, valid_T=recording.valid(site))

`valid_T` says which tokens are no padding; None means all. Shares are of the absolute weights: an expert that acts with
a negative weight acts.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moelora.routing import NO_EXPERT, Routing, dense_weights


def expert_load(
    routing: Routing, num_experts: int, *, valid_T: Bool[Tensor, " T"] | None = None
) -> Float[Tensor, " E"]:
    """Share of the choices that fell on each expert, whatever its weight; sums to 1, or to 0 if nothing was chosen."""
    experts_TK = _valid(routing.experts_TK, valid_T)
    count_E = torch.bincount(experts_TK[experts_TK != NO_EXPERT], minlength=num_experts).double()
    return count_E / count_E.sum().clamp(min=1)


def routing_entropy(routing: Routing, *, valid_T: Bool[Tensor, " T"] | None = None) -> Float[Tensor, ""]:
    """Mean entropy, in nats, of the distribution softmax(logits) that a token's experts are chosen from.

    0 where one expert has it all, log E where all are equal.

    Raises:
        ValueError: for a routing that has no logits, since it was given and not computed.
    """
    if routing.logits_TE is None:
        raise ValueError("this routing was given, not computed, so it has no distribution; measure expert_load instead")
    log_p_TE = _valid(routing.logits_TE, valid_T).double().log_softmax(dim=-1)
    # an expert that cannot be chosen has p = 0, and 0 log 0 is 0
    return -(log_p_TE.exp() * log_p_TE.clamp(min=-1e30)).sum(-1).mean()


def effective_support(weights_TK: Float[Tensor, "T K"]) -> Float[Tensor, " T"]:
    """How many experts a token really uses: (sum |w|)^2 / sum w^2.

    1 for a single expert, n for n equal weights, 0 where no expert acts. Grendar (2006), as in ReMix (arXiv 2603.10160,
    eq. 3).
    """
    absolute_TK = weights_TK.double().abs()
    squares_T = absolute_TK.square().sum(-1)
    return torch.where(squares_T > 0, absolute_TK.sum(-1).square() / squares_T.clamp(min=1e-300), 0.0)


def specialisation(
    routing: Routing,
    label_T: Int[Tensor, " T"],
    num_experts: int,
    *,
    valid_T: Bool[Tensor, " T"] | None = None,
) -> Float[Tensor, ""]:
    """Mutual information, in nats, between a token's label (domain, task) and its expert.

    A token with several experts counts in parts, as its weights say. 0 if the choice says nothing of the label,
    log(min(labels, experts)) if it says all. Tokens without an expert are left out.
    """
    shares_TE = _shares(routing, num_experts, valid_T)
    label_T = _valid(label_T, valid_T)
    acts_T = shares_TE.sum(-1) > 0
    names, label_T = label_T[acts_T].unique(return_inverse=True)
    joint_LE = shares_TE.new_zeros(len(names), num_experts).index_add_(0, label_T, shares_TE[acts_T])
    joint_LE = joint_LE / joint_LE.sum().clamp(min=1)
    independent_LE = joint_LE.sum(1, keepdim=True) * joint_LE.sum(0, keepdim=True)
    return (torch.special.xlogy(joint_LE, joint_LE) - torch.special.xlogy(joint_LE, independent_LE)).sum()


def agreement(
    routing: Routing, true_T: Int[Tensor, " T"], num_experts: int, *, valid_T: Bool[Tensor, " T"] | None = None
) -> Float[Tensor, ""]:
    """Share of the tokens whose strongest expert is the true one; a token without an expert agrees with -1.

    Raises:
        ValueError: if there is no token.
    """
    shares_TE = _shares(routing, num_experts, valid_T)
    true_T = _valid(true_T, valid_T)
    if not len(true_T):
        raise ValueError("there is no token to agree on; valid_T leaves none")
    strongest_T = torch.where(shares_TE.sum(-1) > 0, shares_TE.argmax(-1), NO_EXPERT)
    return (strongest_T == true_T).double().mean()


def _shares(routing: Routing, num_experts: int, valid_T: Tensor | None) -> Tensor:
    """Each token's absolute weights over all experts, divided by their sum; zeros where no expert acts."""
    weights_TE = _valid(dense_weights(routing, num_experts), valid_T).double().abs()
    total_T1 = weights_TE.sum(-1, keepdim=True)
    return weights_TE / torch.where(total_T1 > 0, total_T1, 1.0)


def _valid(values: Tensor, valid_T: Tensor | None) -> Tensor:
    return values if valid_T is None else values[valid_T]
