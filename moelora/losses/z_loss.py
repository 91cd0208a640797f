"""The loss that keeps router scores small."""

from jaxtyping import Bool, Float
from torch import Tensor

from moelora.losses._tokens import token_mean


def z_loss(logits_TE: Float[Tensor, "T E"], valid_T: Bool[Tensor, " T"] | None = None) -> Float[Tensor, ""]:
    """Mean squared log-partition, mean_t (logsumexp_e z_te)^2. Zoph et al. (2022), eq. 5, https://arxiv.org/abs/2202.08906."""
    return token_mean(logits_TE.logsumexp(-1).square(), valid_T)
