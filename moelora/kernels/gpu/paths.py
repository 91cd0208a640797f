"""The path that a call takes, from shapes alone: forward and backward of the operators. Begin with forward."""

from types import ModuleType
from typing import Any

from torch import Tensor

from moelora.kernels.gpu import dense, grouped, picks
from moelora.kernels.gpu.finish_forward import Chosen
from moelora.kernels.gpu.problem import Problem
from moelora.kernels.gpu.tiles import rule


def forward(problem: Problem, *, keeps: bool) -> tuple[list[Tensor], Chosen, Tensor]:
    """The outputs, what acts, and what the backward pass wants to know of the rank rows (empty unless `keeps`)."""
    # few tokens, as in decoding: this path leaves nothing for a backward pass, and dropout is the dense path's
    if not keeps and not problem.dropout and problem.x_TD.shape[0] <= rule("picked_tokens"):
        outputs, chosen = picks.forward(problem)
        return outputs, chosen, problem.x_TD.new_empty(0)
    outputs, chosen, S = _kept_path(problem).forward(problem, keeps=keeps)
    return outputs, chosen, problem.x_TD.new_empty(0) if S is None else S


def backward(
    problem: Problem, chosen: Chosen, S: Tensor, grads: Any, given: Any, needs: dense.Needs
) -> dense.Gradients:
    """The gradients that are needed, by the path that the forward pass took."""
    return _kept_path(problem).backward(problem, chosen, S, grads, given, needs)


def kept_shape(problem: Problem, *, keeps: bool) -> tuple[int, ...]:
    """Shape of what the forward pass leaves for the backward pass."""
    if not keeps:
        return (0,)
    tokens, projections = problem.x_TD.shape[0], len(problem.A_list)
    if _kept_path(problem) is grouped:
        return (projections, *grouped.kept_shape(tokens, _top_k(problem), problem.widest))
    return (tokens, projections, problem.rows)


def _kept_path(problem: Problem) -> ModuleType:
    """The path that has a backward pass. It does not depend on T, so that what is kept has one shape."""
    many = problem.rows > rule("dense_rows_per_slot") * _top_k(problem)
    return grouped if many and not problem.dropout else dense


def _top_k(problem: Problem) -> int:
    if problem.choice is not None:
        return problem.choice.top_k
    assert problem.experts_QTK is not None
    return problem.experts_QTK.shape[-1]
