"""Losses on the likelihood of whole answers. Begin with sequence_nll, then npo and simnpo.

    forget = npo(sequence_total_nll(logits_BLV, labels_BL), reference_total_nll_B, beta=0.1)
    refusal = sequence_nll(refusal_logits_BLV, refusal_labels_BL).mean()

Teaching a refusal is plain cross-entropy to its text: the mean of `sequence_nll`. What must not be forgotten has a term
of its own, weighed by whoever adds it.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""The label of positions that do not count."""


def sequence_nll(logits_BLV: Float[Tensor, "B L V"], labels_BL: Int[Tensor, "B L"]) -> Float[Tensor, " B"]:
    """-(1/|y|) log p(y | x): the mean over a sequence's labelled tokens.

    Args:
        logits_BLV: a causal language model's; position l predicts label l + 1.
        labels_BL: aligned with the input, not shifted; -100 for prompt and padding.

    Raises:
        ValueError: for a sequence in which no token is labelled.
    """
    nll_BL, counts_BL = _token_nll(logits_BLV, labels_BL)
    return nll_BL.sum(1) / counts_BL.sum(1)


def sequence_total_nll(logits_BLV: Float[Tensor, "B L V"], labels_BL: Int[Tensor, "B L"]) -> Float[Tensor, " B"]:
    """-log p(y | x): the sum over a sequence's labelled tokens, with the arguments and errors of `sequence_nll`."""
    return _token_nll(logits_BLV, labels_BL)[0].sum(1)


def gradient_ascent(nll_B: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """-(1/B) sum_b nll_b: makes the answers unlikely, without end.

    It has no lower bound, so it takes the rest of the model along unless training stops early. Yao et al. (2023),
    https://arxiv.org/abs/2310.10683.
    """
    return -nll_B.mean()


def npo(total_nll_B: Float[Tensor, " B"], reference_total_nll_B: Float[Tensor, " B"], beta: float) -> Float[Tensor, ""]:
    """-(2/beta) mean log sigmoid(-beta log(pi / pi_ref)): negative preference optimisation.

    Zhang et al. (2024), eq. 3, https://arxiv.org/abs/2404.05868. Its gradient is that of `gradient_ascent`, each answer
    weighed by 2 pi^beta / (pi^beta + pi_ref^beta), which is 1 at the start and fades as the answer is forgotten. For
    beta towards 0 the weight stays 1. Never below 0.

    Args:
        total_nll_B: `sequence_total_nll` of the model that unlearns. Sums: with means per token it is another loss.
        reference_total_nll_B: the same by the model before unlearning; no gradient goes there.
        beta: how soon an answer counts as forgotten; the paper uses 0.1.

    Raises:
        ValueError: unless beta is positive.
    """
    _check_beta(beta)
    return -(2 / beta) * F.logsigmoid(beta * (total_nll_B - reference_total_nll_B.detach())).mean()


def simnpo(mean_nll_B: Float[Tensor, " B"], beta: float, gamma: float) -> Float[Tensor, ""]:
    """-(2/beta) mean log sigmoid(-(beta/|y|) log pi - gamma): `npo` by length instead of by a reference.

    Fan et al. (2024), https://arxiv.org/abs/2410.07163. gamma stands outside beta, as in the paper; code that subtracts
    a margin from the mean loss first has gamma = beta * margin. Never below 0.

    Args:
        mean_nll_B: `sequence_nll`, the mean per token.
        beta: how soon an answer counts as forgotten; the authors' models use 0.7 to 5.5.
        gamma: how much more than even unlikely an answer must be; 0 in most of the authors' models.

    Raises:
        ValueError: unless beta is positive.
    """
    _check_beta(beta)
    return -(2 / beta) * F.logsigmoid(beta * mean_nll_B - gamma).mean()


# --- inside -----------------------------------------------------------------------------------------------------------


def _token_nll(logits_BLV: Tensor, labels_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Of each predicted token, 0 where it does not count, in at least fp32; and which do count."""
    shifted_BL = labels_BL[:, 1:]
    counts_BL = shifted_BL != IGNORED
    empty_B = ~counts_BL.any(1)
    if empty_B.any():
        raise ValueError(
            f"{int(empty_B.sum())} of {len(empty_B)} sequences have no label beyond the first position, so they have "
            f"no likelihood; expected a label other than {IGNORED} in each. Was the answer cut off?"
        )
    logits_BLV = logits_BLV[:, :-1].to(torch.promote_types(logits_BLV.dtype, torch.float32))
    nll_BL = F.cross_entropy(logits_BLV.mT, shifted_BL.long(), ignore_index=IGNORED, reduction="none")
    return nll_BL, counts_BL


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}; gradient_ascent is the limit of npo for beta towards 0")
