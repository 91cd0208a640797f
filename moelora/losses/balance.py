"""Losses that keep the experts evenly used. Begin with load_balance."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moelora.losses._tokens import num_available, token_mean


def load_balance(
    logits_TE: Float[Tensor, "T E"], experts_TK: Int[Tensor, "T K"], valid_T: Bool[Tensor, " T"] | None = None
) -> Float[Tensor, ""]:
    """E * sum_e f_e P_e: 1 at perfect balance for every E and K, at most E.

    f_e is the share of all assignments that expert e got (no gradient), P_e its mean probability. Fedus et al. (2022),
    Switch Transformers, eq. 4-6, https://arxiv.org/abs/2101.03961, with f normalised over the K slots so that K does
    not change the scale.

    Args:
        logits_TE: the router's scores.
        experts_TK: the chosen experts; -1 counts for none.
        valid_T: which tokens count; None for all.
    """
    probabilities_TE = logits_TE.softmax(-1)
    chosen_TE = torch.zeros_like(logits_TE).scatter_add(
        1, experts_TK.clamp(min=0), (experts_TK >= 0).to(logits_TE.dtype)
    )
    load_E = token_mean(chosen_TE, valid_T)
    share_E = load_E / load_E.sum().clamp(min=torch.finfo(load_E.dtype).tiny)
    experts = num_available(logits_TE)
    return (experts * (share_E.detach() * token_mean(probabilities_TE, valid_T)).sum()) * (experts > 1)


def importance(
    weights_TE: Float[Tensor, "T E"],
    valid_T: Bool[Tensor, " T"] | None = None,
    available_E: Bool[Tensor, " E"] | None = None,
) -> Float[Tensor, ""]:
    """Squared coefficient of variation of the experts' summed weights: 0 at balance, at most E - 1.

    Shazeer et al. (2017), eq. 6-7, https://arxiv.org/abs/1701.06538, with the population variance.

    Args:
        weights_TE: weight of each expert for each token, 0 where it was not chosen (`routing.dense_weights`).
        valid_T: which tokens count; None for all.
        available_E: which experts can be chosen at this site; None for all.
    """
    mean_E = token_mean(weights_TE, valid_T)
    available = torch.ones_like(mean_E) if available_E is None else available_E.to(mean_E.dtype)
    experts = available.sum().clamp(min=1)
    mean = (mean_E * available).sum() / experts
    variance = ((mean_E - mean).square() * available).sum() / experts
    return variance / mean.square().clamp(min=torch.finfo(mean.dtype).tiny)


def uniform_cross_entropy(
    logits_TE: Float[Tensor, "T E"], valid_T: Bool[Tensor, " T"] | None = None
) -> Float[Tensor, ""]:
    """-(1/E) sum_e log P_e - log E, the divergence of the mean gate P from uniform: 0 at balance.

    MoLE's balance loss, -sum_e log P_e, Wu et al. (2024), eq. 14, https://arxiv.org/abs/2404.13628, divided by E and
    shifted so that balance is 0 for every E.
    """
    mean_E = token_mean(logits_TE.softmax(-1), valid_T)
    available_E = mean_E > 0
    experts = num_available(logits_TE)
    log_E = torch.where(available_E, mean_E, 1).log()
    return (-log_E.sum() / experts - experts.log()) * (experts > 1)
