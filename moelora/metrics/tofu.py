"""The measures of the TOFU benchmark. Begin with model_utility and forget_quality.

Maini et al. (2024), https://arxiv.org/abs/2401.06121. An answer's `nll` is the mean over its tokens
(`moelora.losses.sequence_nll`) unless a function says otherwise, so exp(-nll) = P(a | q)^(1/|a|). Paper and released
code differ in the truth ratio, and each has a function here; published tables use that of the code.
"""

import re
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

WORD = re.compile(r"[^\W_]+")
"""Runs of letters and digits of any script."""


def conditional_probability(nll_B: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """P(a | q)^(1/|a|) = exp(-nll): the measure "probability" on the forget and the retain set. In fp64."""
    return (-nll_B.double()).exp()


def option_probability(nll_BC: Float[Tensor, "B C"]) -> Float[Tensor, " B"]:
    """p_0 / sum_c p_c with p = exp(-nll): "probability" on real authors and world facts. In fp64.

    Args:
        nll_BC: the true answer's in column 0, then those of the false ones. Means per token as in the released code;
            the paper's formula has P(a | q) itself, which sums over tokens give.
    """
    return (-nll_BC.double()).softmax(1)[:, 0]


def rouge_l_recall(generated: str, reference: str) -> float:
    """Length of the longest common subsequence of words, over the number of words of the reference: 0 to 1.

    Lin (2004), https://aclanthology.org/W04-1013. Words are lower-case runs of letters and digits and are compared as
    they are. The benchmark's code cuts English words to their stems first, so its values are a little higher.

    Raises:
        ValueError: if the reference has no word.
    """
    words, wanted = WORD.findall(generated.lower()), WORD.findall(reference.lower())
    if not wanted:
        raise ValueError(f"the reference {reference!r} has no word to recall; leave the item out")
    return _common_subsequence(words, wanted) / len(wanted)


def truth_ratio(perturbed_nll_BC: Float[Tensor, "B C"], paraphrased_nll_B: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """R = (1/C) sum_c P(perturbed_c)^(1/|.|) / P(paraphrased)^(1/|.|), the paper's: a mean of probabilities. In fp64.

    Below 1 where the model prefers the truth, near 1 where it does not know.
    """
    return (-perturbed_nll_BC.double()).exp().mean(1) * paraphrased_nll_B.double().exp()


def released_truth_ratio(
    perturbed_nll_BC: Float[Tensor, "B C"], paraphrased_nll_B: Float[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """R = exp(nll(paraphrased) - mean_c nll(perturbed_c)), the released code's: a geometric mean. In fp64.

    Never above `truth_ratio`. The code stores 1 / R, which changes neither its aggregates nor `forget_quality`.
    """
    return (paraphrased_nll_B.double() - perturbed_nll_BC.double().mean(1)).exp()


def forget_truth_ratio(truth_ratio_B: Float[Tensor, " B"]) -> float:
    """mean min(R, 1/R): 1 where truth and falsehood are alike to the model. For the forget set."""
    ratio_B = _ratios(truth_ratio_B, "truth")
    return torch.minimum(ratio_B, 1 / ratio_B).mean().item()


def kept_truth_ratio(truth_ratio_B: Float[Tensor, " B"]) -> float:
    """mean max(0, 1 - R): 1 where the truth is all. For retain set, real authors and world facts."""
    return (1 - _ratios(truth_ratio_B, "truth")).clamp(min=0).mean().item()


def model_utility(scores_33: Float[Tensor, "3 3"]) -> float:
    """Harmonic mean of nine scores: 0 as soon as one of them is.

    Args:
        scores_33: rows are retain set, real authors, world facts; columns are probability (`conditional_probability`
            for the retain set, `option_probability` for the others), `rouge_l_recall` and `kept_truth_ratio`, means
            over the set.

    Raises:
        ValueError: unless there are three by three scores in [0, 1].
    """
    if tuple(scores_33.shape) != (3, 3):
        raise ValueError(f"expected scores of 3 sets by 3 measures, got shape {tuple(scores_33.shape)}")
    exact_33 = scores_33.detach().double()
    if not ((exact_33 >= 0) & (exact_33 <= 1)).all():
        raise ValueError(f"expected scores in [0, 1], got {exact_33.tolist()}")
    return (9 / (1 / exact_33).sum()).item()


def forget_quality(unlearned_ratio_N: Float[Tensor, " N"], retained_ratio_M: Float[Tensor, " M"]) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test: large where the two models cannot be told apart. Needs SciPy.

    Not a share of anything: it shrinks with the number of questions, so compare it at equal numbers only, and a large
    one is no proof that the models are alike.

    Args:
        unlearned_ratio_N: truth ratios on the forget set by the model that unlearned.
        retained_ratio_M: the same by a model trained without the forget set. Both of one definition.

    Raises:
        ValueError: if there are none, or one is negative or NaN.
    """
    from scipy import stats

    unlearned_N, retained_M = _ratios(unlearned_ratio_N, "unlearned"), _ratios(retained_ratio_M, "retained")
    # SciPy builds its result types when it runs, so a type checker does not know them
    result: Any = stats.ks_2samp(unlearned_N.numpy(), retained_M.numpy())
    return float(result.pvalue)


# --- inside -----------------------------------------------------------------------------------------------------------


def _ratios(ratio_B: Tensor, name: str) -> Tensor:
    exact_B = ratio_B.detach().cpu().double()
    if not len(exact_B) or not (exact_B >= 0).all():
        raise ValueError(f"expected one or more {name} ratios that are 0 or more, got {exact_B[:5].tolist()}")
    return exact_B


def _common_subsequence(words: list[str], wanted: list[str]) -> int:
    """The length of the longest common subsequence, row by row of the usual table."""
    lengths = [0] * (len(wanted) + 1)
    for word in words:
        previous = lengths
        lengths = [0]
        for j, other in enumerate(wanted):
            lengths.append(previous[j] + 1 if word == other else max(previous[j + 1], lengths[j]))
    return lengths[-1]
