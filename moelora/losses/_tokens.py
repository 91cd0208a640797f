"""Means over the tokens that count."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def token_mean(values_TX: Float[Tensor, "T *X"], valid_T: Bool[Tensor, " T"] | None) -> Float[Tensor, "*X"]:
    """Mean over the valid tokens; 0 where there is none."""
    if valid_T is None:
        return values_TX.sum(0) / max(values_TX.shape[0], 1)
    # where, not times: what stands in padding may be anything
    mask = valid_T.reshape(-1, *[1] * (values_TX.ndim - 1))
    return torch.where(mask, values_TX, 0).sum(0) / valid_T.sum().clamp(min=1)


def num_available(logits_TE: Float[Tensor, "T E"]) -> Float[Tensor, ""]:
    """How many experts can be chosen at this site: those whose logits are not -inf."""
    if not logits_TE.shape[0]:
        return logits_TE.new_tensor(float(logits_TE.shape[1]))
    return (logits_TE[0] > -torch.inf).sum().to(logits_TE.dtype)


def entropy(probabilities_XE: Float[Tensor, "*X E"]) -> Float[Tensor, "*X"]:
    """Shannon entropy in nats; an expert of probability 0 adds nothing, to the gradient neither."""
    positive = probabilities_XE > 0
    safe_XE = torch.where(positive, probabilities_XE, 1)
    return -(safe_XE * safe_XE.log()).sum(-1)
