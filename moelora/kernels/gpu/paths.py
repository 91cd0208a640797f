"""The path that a call takes: forward and backward of the operators. Begin with forward."""

from typing import Any

from torch import Tensor

from moelora.kernels.gpu import dense, grouped, picks
from moelora.kernels.gpu.finish_forward import Chosen
from moelora.kernels.gpu.path import path_of
from moelora.kernels.gpu.problem import Problem


def forward(problem: Problem, *, keeps: bool) -> tuple[list[Tensor], Chosen, Tensor]:
    """The outputs, what acts, and what the backward pass wants to know of the rank rows (empty unless `keeps`)."""
    path = _path(problem, keeps=keeps)
    if path == "picked":
        outputs, chosen = picks.forward(problem)
        return outputs, chosen, problem.x_TD.new_empty(0)
    outputs, chosen, S = (grouped if path == "sorted" else dense).forward(problem, keeps=keeps)
    return outputs, chosen, problem.x_TD.new_empty(0) if S is None else S


def backward(
    problem: Problem, chosen: Chosen, S: Tensor, grads: Any, given: Any, needs: dense.Needs
) -> dense.Gradients:
    """The gradients that are needed, by the path that the forward pass took."""
    path = grouped if _path(problem, keeps=True) == "sorted" else dense
    return path.backward(problem, chosen, S, grads, given, needs)


def kept_shape(problem: Problem, *, keeps: bool) -> tuple[int, ...]:
    """Shape of what the forward pass leaves for the backward pass."""
    if not keeps:
        return (0,)
    tokens, projections = problem.x_TD.shape[0], len(problem.A_list)
    if _path(problem, keeps=True) == "sorted":
        return (projections, *grouped.kept_shape(tokens, _top_k(problem), problem.widest))
    return (tokens, projections, problem.rows)


def _top_k(problem: Problem) -> int:
    if problem.choice is not None:
        return problem.choice.top_k
    assert problem.experts_QTK is not None
    return problem.experts_QTK.shape[-1]


def _path(problem: Problem, *, keeps: bool) -> str:
    return path_of(problem.x_TD.shape[0], problem.rows, _top_k(problem), keeps=keeps, dropout=problem.dropout)
