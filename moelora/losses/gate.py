"""The loss that teaches a gate by names. Begin with gate_cross_entropy."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moelora.losses._tokens import token_mean


def gate_cross_entropy(
    logits_TE: Float[Tensor, "T E"], target_T: Int[Tensor, " T"], valid_T: Bool[Tensor, " T"] | None = None
) -> Float[Tensor, ""]:
    """Mean over tokens of -log softmax(z_t)[target_t]: the gate as a classifier of the task that a token is from.

    MeteoRA, Xu et al. (2025), https://arxiv.org/abs/2405.13053, computes it for every gate at every token and weighs
    it 50 times the language model's loss; log E is the value of a gate that knows nothing.

    Args:
        logits_TE: the router's scores.
        target_T: the expert that each token is for; -1 for tokens that are for none, which do not count, and neither do
            those whose expert has no rows at the site.
        valid_T: which tokens count; None for all.
    """
    named_T = target_T >= 0
    log_p_T = logits_TE.log_softmax(-1).gather(1, target_T.clamp(min=0)[:, None])[:, 0]
    counts_T = named_T & (log_p_T > -torch.inf)
    if valid_T is not None:
        counts_T = counts_T & valid_T
    return -token_mean(torch.where(counts_T, log_p_T, 0), counts_T)
