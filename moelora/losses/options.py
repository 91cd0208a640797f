"""Losses that unlearn a multiple-choice answer. Begin with option_uniform, whose optimum is chance.

Both look only at an item's own options, however many it has: a question with two is not pushed towards one in five.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def option_uniform(option_logits_BC: Float[Tensor, "B C"], valid_BC: Bool[Tensor, "B C"]) -> Float[Tensor, ""]:
    """Mean over items of KL(uniform || p) = -(1/n) sum_c log p_c - log n, with p over the item's n own options.

    0 where all options are equally likely, which is chance; knowing the answer costs, and avoiding it costs as much.
    It is the mean of `random_own_option` over its draws, less log n. Gao et al. (2025), eq. 4,
    https://arxiv.org/abs/2407.10223, draw labels instead.

    Args:
        option_logits_BC: a score of each option, of which p is the softmax: the logit of its letter, or the log
            probability of its text.
        valid_BC: which options an item has. Items that have none do not count; a loss of none is 0.
    """
    log_p_BC = _log_p(option_logits_BC, valid_BC)
    options_B = valid_BC.sum(1)
    divergence_B = -log_p_BC.sum(1) / options_B.clamp(min=1) - options_B.clamp(min=1).to(log_p_BC.dtype).log()
    return _item_mean(divergence_B, options_B > 0)


def random_own_option(
    option_logits_BC: Float[Tensor, "B C"],
    valid_BC: Bool[Tensor, "B C"],
    generator: torch.Generator,
    exclude_B: Int[Tensor, " B"] | None = None,
) -> Float[Tensor, ""]:
    """Mean over items of -log p_c for an option c drawn from the item's own, the true one among them.

    Gao et al. (2025), eq. 4 and appendix E.4, https://arxiv.org/abs/2407.10223. With the truth among the draws the best
    answer is p = 1/n: chance.

    Excluding the truth is possible, and leaks it: the best answer is then 1/(n - 1) for each of the others and 0 for
    the truth, so accuracy falls below chance, and whoever asks learns the answer from what the model avoids.

    Args:
        option_logits_BC: a score of each option, as in `option_uniform`.
        valid_BC: which options an item has. Items that have none to draw do not count; a loss of none is 0.
        generator: draws the options, the same ones whatever device the logits are on.
        exclude_B: an option of each item that is not drawn; -1 for none.
    """
    drawable_BC = valid_BC
    if exclude_B is not None:
        drawable_BC = valid_BC & (torch.arange(valid_BC.shape[1], device=valid_BC.device) != exclude_B[:, None])
    counts_B = drawable_BC.any(1)
    if not len(counts_B):
        return _item_mean(option_logits_BC.sum(1), counts_B)

    # rows with nothing to draw get a draw as well, which does not count
    weights_BC = (drawable_BC | ~counts_B[:, None]).float().to(generator.device)
    drawn_B1 = torch.multinomial(weights_BC, 1, generator=generator).to(option_logits_BC.device)
    return _item_mean(-_log_p(option_logits_BC, valid_BC).gather(1, drawn_B1)[:, 0], counts_B)


# --- inside -----------------------------------------------------------------------------------------------------------


def _log_p(option_logits_BC: Tensor, valid_BC: Tensor) -> Tensor:
    """log softmax over the valid options, in at least fp32; 0, and without gradient, elsewhere."""
    logits_BC = option_logits_BC.to(torch.promote_types(option_logits_BC.dtype, torch.float32))
    logits_BC = torch.where(valid_BC, logits_BC, -torch.inf)
    # a softmax of nothing has a NaN gradient, at which autograd's anomaly detection stops
    logits_BC = torch.where(valid_BC.any(1, keepdim=True), logits_BC, 0)
    return torch.where(valid_BC, logits_BC.log_softmax(1), 0)


def _item_mean(loss_B: Tensor, counts_B: Tensor) -> Tensor:
    return torch.where(counts_B, loss_B, 0).sum() / counts_B.sum().clamp(min=1)
