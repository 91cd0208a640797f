"""Losses on how many experts act on a token, for routers that decide it themselves. Begin with over_budget."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moelora.losses._tokens import token_mean


def over_budget(
    weights_TE: Float[Tensor, "T E"], valid_T: Bool[Tensor, " T"] | None = None, *, budget: int
) -> Float[Tensor, ""]:
    """mean_t (sum of the weights below the k largest, plus k times the largest of them), with k = `budget`.

    0 where at most k experts act on each token; 1 where weights that sum to 1 are uniform over more than k experts. For
    `Sparsegen` it is LD-MoLE's hinge (see `target_k`) divided by 1 - lambda token by token, which can be said of the
    weights alone, and which teaches the scores too.

    Args:
        weights_TE: weight of each expert for each token, 0 where it was not chosen (`routing.dense_weights`).
        valid_T: which tokens count; None for all.
        budget: how many experts may act on a token, at least 1.

    Raises:
        ValueError: for a budget below 1.
    """
    _check(budget)
    if budget >= weights_TE.shape[1]:
        return token_mean(weights_TE.sum(-1) * 0, valid_T)
    beyond_TE = weights_TE.sort(dim=-1, descending=True).values[:, budget:]
    return token_mean(beyond_TE.sum(-1) + budget * beyond_TE[:, 0], valid_T)


def target_k(
    logits_TE: Float[Tensor, "T E"],
    lam_T: Float[Tensor, " T"],
    valid_T: Bool[Tensor, " T"] | None = None,
    *,
    k: int = 2,
) -> Float[Tensor, ""]:
    """mean_t ReLU(lambda_k(z_t) - lambda_t), with lambda_k(z) = 1 - (sum_{i<=k} z_(i) - k z_(k+1)), z sorted downwards.

    lambda_k is the least lambda with which a sparsegen projection of z leaves k experts. 0 where at most k act. Zhuang
    et al. (2025), LD-MoLE, https://arxiv.org/abs/2509.25684. As in its code the scores are held fixed, and the loss
    teaches lambda alone.

    Args:
        logits_TE: the router's scores, as `Sparsegen` leaves them in its `Routing`.
        lam_T: lambda of each token, `SparsegenRouter.sparsity(x_TD)[:, 0]`.
        valid_T: which tokens count; None for all.
        k: how many experts may act on a token, at least 1.

    Raises:
        ValueError: for a k below 1.
    """
    _check(k)
    if k >= logits_TE.shape[1]:
        return token_mean(lam_T * 0, valid_T)
    sorted_TE = logits_TE.detach().sort(dim=-1, descending=True).values
    # fewer than k + 1 experts at this site: no more than k can act
    enough_T = sorted_TE[:, k] > -torch.inf
    sorted_TE = torch.where(enough_T[:, None], sorted_TE[:, : k + 1], 0)
    least_T = 1 - (sorted_TE[:, :k].sum(-1) - k * sorted_TE[:, k])
    return token_mean(torch.where(enough_T, (least_T - lam_T).relu(), 0), valid_T)


def _check(count: int) -> None:
    if count < 1:
        raise ValueError(f"at least one expert acts on each token; expected a number from 1, got {count}")
