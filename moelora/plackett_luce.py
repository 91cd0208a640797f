"""The probability of a choice that is drawn without replacement. Begin with ordered_log_prob.

`topk(z + Gumbel noise)` draws K of E experts one after the other, each with its softmax probability among those that
are left (Plackett-Luce).
"""

from itertools import permutations

import torch
from jaxtyping import Float, Int
from torch import Tensor

MOST_UNORDERED = 3
"""The largest K whose orders are all summed over: K! of them."""


def gumbel_like(logits_TE: Float[Tensor, "T E"], generator: torch.Generator | None = None) -> Float[Tensor, "T E"]:
    """Standard Gumbel noise, -log(Exp(1)), in the shape of these scores."""
    exponential_TE = torch.empty_like(logits_TE).exponential_(generator=generator)
    return -exponential_TE.clamp(min=torch.finfo(logits_TE.dtype).tiny).log()


def ordered_log_prob(logits_TE: Float[Tensor, "T E"], experts_TK: Int[Tensor, "T K"]) -> Float[Tensor, " T"]:
    """log Q of an ordered draw: sum_j [ z_{i_j} - logsumexp of z over the experts not in i_1 .. i_{j-1} ].

    ReMix, https://arxiv.org/abs/2603.10160, section 4, which writes the denominator as 1 - sum of the q drawn before;
    that difference cancels where one expert has nearly all the probability, a masked logsumexp does not.

    Args:
        logits_TE: the scores that were drawn from; -inf for experts that cannot be drawn.
        experts_TK: the experts in the order of the draw, distinct within a token.
    """
    chosen_TK = logits_TE.gather(1, experts_TK)
    left_TE, log_prob_T = logits_TE, logits_TE.new_zeros(logits_TE.shape[0])
    for slot in range(experts_TK.shape[1]):
        log_prob_T = log_prob_T + chosen_TK[:, slot] - left_TE.logsumexp(-1)
        left_TE = left_TE.scatter(1, experts_TK[:, slot : slot + 1], -torch.inf)
    return log_prob_T


def unordered_log_prob(logits_TE: Float[Tensor, "T E"], experts_TK: Int[Tensor, "T K"]) -> Float[Tensor, " T"]:
    """log of the probability that these experts are drawn in any order: the sum of Q over their K! orders.

    Its gradient has the same mean as `ordered_log_prob`'s and less variance, since the loss does not depend on the
    order (Rao-Blackwell). Ours; ReMix takes the ordered draw.

    Raises:
        ValueError: for more than three experts, whose orders are too many.
    """
    K = experts_TK.shape[1]
    if K > MOST_UNORDERED:
        raise ValueError(
            f"the log-probability of an unordered choice sums over all orders, which is for up to {MOST_UNORDERED} "
            f"experts per token, got {K}; take log_prob='ordered'"
        )
    orders = [ordered_log_prob(logits_TE, experts_TK[:, list(order)]) for order in permutations(range(K))]
    return torch.stack(orders).logsumexp(0)
