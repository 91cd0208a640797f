"""REINFORCE with a leave-one-out baseline, over M samples of each example. Begin with leave_one_out."""

from jaxtyping import Float
from torch import Tensor


def leave_one_out(loss_BMX: Float[Tensor, "B M *X"]) -> Float[Tensor, "B M *X"]:
    """(L_m - mean_m L_m) / (M - 1), without gradient: how much worse a sample is than the others of its example.

    It is (1/M) (L_m - mean of the other samples' L), the textbook form of the leave-one-out baseline; ReMix,
    https://arxiv.org/abs/2603.10160, section 4.

    Args:
        loss_BMX: losses of M samples of B examples, of a whole example or at each position.

    Raises:
        ValueError: for fewer than two samples, which leave none to compare with.
    """
    M = loss_BMX.shape[1]
    if M < 2:
        raise ValueError(f"a leave-one-out baseline needs at least 2 samples, got {M}")
    loss_BMX = loss_BMX.detach()
    return (loss_BMX - loss_BMX.mean(1, keepdim=True)) / (M - 1)


def rloo_surrogate(advantage_BMX: Float[Tensor, "B M *X"], log_prob_BMX: Float[Tensor, "B M *X"]) -> Float[Tensor, ""]:
    """mean_b sum_m adv_bm * log Q_bm, whose gradient estimates that of the expected loss without bias.

    Its value means nothing. Where there are positions (X), each has its own advantage and log-probability.

    Args:
        advantage_BMX: from `leave_one_out`; no gradient flows into it.
        log_prob_BMX: log-probability of what each sample has chosen.
    """
    return (advantage_BMX.detach() * log_prob_BMX).flatten(1).sum(1).mean()
