"""Losses on the entropy of the gate. Begin with mutual_information."""

from jaxtyping import Bool, Float
from torch import Tensor

from moelora.losses._tokens import entropy, num_available, token_mean


def token_entropy(logits_TE: Float[Tensor, "T E"], valid_T: Bool[Tensor, " T"] | None = None) -> Float[Tensor, ""]:
    """mean_t H(p_t) / log E, how undecided the gate is over single tokens: 0 for one-hot, 1 for uniform gates.

    H(p) = -sum_e p_e log p_e with p = softmax(z). A positive weight specialises the experts, a negative one keeps the
    gate exploring; `routing_specialization` tells the two apart by name.
    """
    experts = num_available(logits_TE)
    return token_mean(entropy(logits_TE.softmax(-1)), valid_T) / experts.clamp(min=2).log() * (experts > 1)


def mutual_information(logits_TE: Float[Tensor, "T E"], valid_T: Bool[Tensor, " T"] | None = None) -> Float[Tensor, ""]:
    """-I(token; expert) / log E = (mean_t H(p_t) - H(mean_t p_t)) / log E: -1 at best, 0 where routing says nothing.

    Lower is better: all experts used alike over the batch, and each token sure of its own. Our definition; the terms
    are those of the balance and specialisation losses of Shazeer et al. (2017) and Li et al. (2025), LoRA-Mixer.
    """
    probabilities_TE = logits_TE.softmax(-1)
    conditional = token_mean(entropy(probabilities_TE), valid_T)
    marginal = entropy(token_mean(probabilities_TE, valid_T))
    experts = num_available(logits_TE)
    return (conditional - marginal) / experts.clamp(min=2).log() * (experts > 1)
