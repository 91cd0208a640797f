"""Continual learning in numbers, from one matrix. Begin with final_accuracy and forgetting.

    accuracy_JJ[i, j]       accuracy on task j after training on task i; rows are moments, columns are tasks

NaN says "not measured". Each function names the entries it needs, and raises where one of them was not measured: most
papers fill the lower triangle, diagonal included, which is enough for all but `forgetting` and `forward_transfer`. Any
score may stand for accuracy, as long as larger is better. Results are floats, computed in fp64.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def final_accuracy(accuracy_JJ: Float[Tensor, "J J"]) -> float:
    """ACC = (1/J) sum_j a[J, j]: the mean over all tasks at the end. Also called AP or Last-Acc.

    Raises:
        ValueError: if the last row was not all measured.
    """
    exact_JJ = _measured(accuracy_JJ, _last_row(len(accuracy_JJ)), "final_accuracy")
    return exact_JJ[-1].mean().item()


def average_accuracy(accuracy_JJ: Float[Tensor, "J J"]) -> float:
    """AAA = (1/J) sum_i ACC_i with ACC_i = (1/i) sum_{j<=i} a[i, j]: the mean so far, averaged over moments.

    Also called anytime accuracy or Inc-Acc.

    Raises:
        ValueError: if the lower triangle was not all measured.
    """
    lower_JJ = _lower(len(accuracy_JJ))
    exact_JJ = _measured(accuracy_JJ, lower_JJ, "average_accuracy")
    return (torch.where(lower_JJ, exact_JJ, 0).sum(1) / lower_JJ.sum(1)).mean().item()


def backward_transfer(accuracy_JJ: Float[Tensor, "J J"]) -> float:
    """BWT = (1/(J-1)) sum_{j<J} (a[J, j] - a[j, j]): negative where later tasks cost earlier ones.

    Lopez-Paz and Ranzato (2017), https://arxiv.org/abs/1706.08840. Some papers print its negative.

    Raises:
        ValueError: if there is one task only, or the last row or the diagonal was not all measured.
    """
    tasks = _several(accuracy_JJ, "backward_transfer")
    needed_JJ = _last_row(tasks) | torch.eye(tasks, dtype=torch.bool)
    exact_JJ = _measured(accuracy_JJ, needed_JJ, "backward_transfer")
    return (exact_JJ[-1] - exact_JJ.diagonal())[:-1].mean().item()


def forgetting(accuracy_JJ: Float[Tensor, "J J"]) -> float:
    """FM = (1/(J-1)) sum_{j<J} (max_{l<J} a[l, j] - a[J, j]): what was lost since a task's best moment.

    Chaudhry et al. (2018), https://arxiv.org/abs/1801.10112. The maximum is over every earlier moment, also those
    before the task was trained on, so it needs the upper triangle; `forgetting_since_trained` does without.

    Raises:
        ValueError: if there is one task only, or a column but the last was not all measured.
    """
    tasks = _several(accuracy_JJ, "forgetting")
    needed_JJ = torch.arange(tasks).expand(tasks, tasks) < tasks - 1
    exact_JJ = _measured(accuracy_JJ, needed_JJ, "forgetting")
    return (exact_JJ[:-1, :-1].amax(0) - exact_JJ[-1, :-1]).mean().item()


def forgetting_since_trained(accuracy_JJ: Float[Tensor, "J J"]) -> float:
    """`forgetting` with the maximum over j <= l < J: since the task was trained on. Needs the lower triangle only.

    Raises:
        ValueError: if there is one task only, or a column but the last was not measured from the diagonal down.
    """
    tasks = _several(accuracy_JJ, "forgetting_since_trained")
    needed_JJ = _lower(tasks) & (torch.arange(tasks) < tasks - 1)
    exact_JJ = _measured(accuracy_JJ, needed_JJ, "forgetting_since_trained")
    since_JJ = torch.where(needed_JJ, exact_JJ, -torch.inf)
    return (since_JJ[:-1, :-1].amax(0) - exact_JJ[-1, :-1]).mean().item()


def forward_transfer(accuracy_JJ: Float[Tensor, "J J"], untouched_J: Float[Tensor, " J"]) -> float:
    """FWT = (1/(J-1)) sum_{j>=2} (a[j-1, j] - b_j): what the tasks before it bring to a task not yet trained on.

    Lopez-Paz and Ranzato (2017), https://arxiv.org/abs/1706.08840.

    Args:
        accuracy_JJ: needs the diagonal above the main one.
        untouched_J: b, the accuracies of the model before any training; the first is not used.

    Raises:
        ValueError: if there is one task only, or a needed entry was not measured.
    """
    tasks = _several(accuracy_JJ, "forward_transfer")
    needed_JJ = torch.eye(tasks, dtype=torch.bool).roll(1, 1) & ~_lower(tasks)
    exact_JJ = _measured(accuracy_JJ, needed_JJ, "forward_transfer")
    exact_J = untouched_J.detach().cpu().double()
    if not exact_J[1:].isfinite().all():
        raise ValueError(
            f"forward_transfer needs the untouched model's accuracy on all but the first task: {untouched_J}"
        )
    return (exact_JJ.diagonal(1) - exact_J[1:]).mean().item()


def persistence_loss(residual_JJ: Float[Tensor, "J J"]) -> float:
    """(1/(J-1)) sum_{j<J} (a[J, j] - a[j, j]) of what a model still knows of each request: positive where it came back.

    For unlearning, a[i, j] is the accuracy on request j after serving request i, where smaller is better. The formula
    is that of `backward_transfer` and reads the other way: later requests must not bring back what earlier ones took.

    Raises:
        ValueError: if there is one request only, or the last row or the diagonal was not all measured.
    """
    tasks = _several(residual_JJ, "persistence_loss")
    needed_JJ = _last_row(tasks) | torch.eye(tasks, dtype=torch.bool)
    exact_JJ = _measured(residual_JJ, needed_JJ, "persistence_loss")
    return (exact_JJ[-1] - exact_JJ.diagonal())[:-1].mean().item()


# --- inside -----------------------------------------------------------------------------------------------------------


def _measured(accuracy_JJ: Tensor, needed_JJ: Bool[Tensor, "J J"], name: str) -> Tensor:
    """The matrix in fp64, if every needed entry is finite."""
    if accuracy_JJ.ndim != 2 or accuracy_JJ.shape[0] != accuracy_JJ.shape[1] or not len(accuracy_JJ):
        raise ValueError(f"{name} expects a square matrix, moments by tasks, got shape {tuple(accuracy_JJ.shape)}")
    exact_JJ = accuracy_JJ.detach().cpu().double()
    missing = (needed_JJ & ~exact_JJ.isfinite()).nonzero().tolist()
    if missing:
        raise ValueError(
            f"{name} needs {int(needed_JJ.sum())} entries, of which {len(missing)} are NaN or infinite, first at "
            f"[moment, task] = {missing[:4]} counted from 0; measure them, or take a metric that does without"
        )
    return exact_JJ


def _several(accuracy_JJ: Tensor, name: str) -> int:
    if len(accuracy_JJ) < 2:
        raise ValueError(f"{name} compares moments, so it needs two tasks or more, got {len(accuracy_JJ)}")
    return len(accuracy_JJ)


def _lower(tasks: int) -> Tensor:
    return torch.ones(tasks, tasks, dtype=torch.bool).tril()


def _last_row(tasks: int) -> Tensor:
    return (torch.arange(tasks) == tasks - 1)[:, None].expand(tasks, tasks)
