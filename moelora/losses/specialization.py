"""LoRA-Mixer's loss, balance and entropy in one. Begin with routing_specialization."""

from typing import Literal, get_args

from jaxtyping import Bool, Float, Int
from torch import Tensor

from moelora.losses.balance import load_balance
from moelora.losses.entropy import token_entropy

EntropySign = Literal["as_printed", "specialize"]
"""Which way LoRA-Mixer's entropy term pulls; `routing_specialization` defines both."""

Share = Literal["topk", "top1"]
"""Whose tokens LoRA-Mixer's balance term counts."""


def routing_specialization(
    logits_TE: Float[Tensor, "T E"],
    experts_TK: Int[Tensor, "T K"],
    valid_T: Bool[Tensor, " T"] | None = None,
    *,
    entropy: EntropySign,
    alpha: float = 1.0,
    lam: float = 1.0,
    f: Share = "topk",
) -> Float[Tensor, ""]:
    """alpha * E sum_e f_e P_e + sign * lam * mean_t H(p_t) / log E.

    Routing specialization loss of Li et al. (2025), LoRA-Mixer, eq. 5, https://arxiv.org/abs/2507.00029, with the
    balance scaled to 1 and the entropy to [0, 1] for every E and K, so that alpha and lam carry over. Over the routings
    of a patched model the same is `AuxLosses.lora_mixer(...)`.

    The paper contradicts itself on the sign. Its text wants the entropy of each token's gate small, so that experts
    specialise; its printed formula subtracts the entropy, and minimising that makes every gate uniform. No code settles
    it, so the caller says which is meant.

    Args:
        logits_TE: the router's scores.
        experts_TK: the chosen experts; -1 counts for none.
        valid_T: which tokens count; None for all.
        entropy: "as_printed" subtracts the entropy (undecided gates), "specialize" adds it (decided ones).
        alpha: weight of the balance.
        lam: weight of the entropy.
        f: the paper defines f_e twice. "topk": the expert's share of all K assignments; "top1": its share of the
            tokens that like it best.

    Raises:
        ValueError: for an unknown `entropy` or `f`.
    """
    if f not in get_args(Share):
        raise ValueError(f"unknown f {f!r}; expected one of {get_args(Share)}")
    counted = experts_TK if f == "topk" else logits_TE.detach().argmax(-1, keepdim=True)
    balance = load_balance(logits_TE, counted, valid_T)
    return alpha * balance + entropy_weight(entropy, lam) * token_entropy(logits_TE, valid_T)


def entropy_weight(entropy: EntropySign, lam: float) -> float:
    """The signed weight of `token_entropy` that a way to read LoRA-Mixer's formula stands for."""
    if entropy not in get_args(EntropySign):
        raise ValueError(f"unknown entropy {entropy!r}; expected one of {get_args(EntropySign)}")
    return -lam if entropy == "as_printed" else lam
