"""The mixture as operators of torch: one forward, one backward. Begin with `mixture`.

Both are opaque to compilers, hold no state, mutate nothing and never wait for the device, so they work under
`torch.compile(fullgraph=True)`, CUDA graphs, activation checkpointing and repeated backward passes. The derivative is
registered by hand: torch's own `register_autograd` takes several times as long for lists of tensors, and a layer is
called a hundred times in a step.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelora.kernels.fused import PLAIN
from moelora.kernels.gpu import paths
from moelora.kernels.gpu.dense import Needs
from moelora.kernels.gpu.finish_forward import Choice, Chosen
from moelora.kernels.gpu.problem import Index, Problem

LIBRARY = torch.library.Library("moelora", "DEF")

TENSORS = (
    "Tensor x, Tensor[] bases, Tensor[] A, Tensor[] B, Tensor[] gates, Tensor[] routing, "
    "Tensor[] weights, Tensor[] biases, Tensor[] owners, Tensor[] seed"
)
SETTINGS = "int widest, int num_experts, int top_k, float temperature, str combine, bool every_token, float dropout"

LIBRARY.define(f"mixture({TENSORS}, {SETTINGS}, bool keeps) -> Tensor[]")
LIBRARY.define(
    f"mixture_backward({TENSORS}, {SETTINGS}, Tensor S, Tensor?[] grads, Tensor? grad_weights, Tensor? grad_logits, "
    "bool needs_x, bool needs_A, bool needs_B, bool needs_router) -> Tensor[]"
)


class Settings(NamedTuple):
    """The settings of both operators, in the order of their schema."""

    widest: int
    num_experts: int
    top_k: int
    temperature: float
    combine: str
    every_token: bool
    dropout: float


class Lists(NamedTuple):
    """The tensors of both operators, in the order of their schema.

    `routing` is empty where routers are a part of the op, else the ids and the weights (Q, T, K). `bases` is empty
    where the op computes the bases, from `weights` and `biases`. `seed` is empty without dropout.
    """

    x: Tensor
    bases: list[Tensor]
    A: list[Tensor]
    B: list[Tensor]
    gates: list[Tensor]
    routing: list[Tensor]
    weights: list[Tensor]
    biases: list[Tensor]
    owners: list[Tensor]
    seed: list[Tensor]


class Answer(NamedTuple):
    """What the forward operator returns, sorted.

    Attributes:
        outputs: one for each projection.
        S: values of the rank rows; empty unless they are kept.
        experts_QTK, weights_QTK, logits_QTE: the routers' answers; None where the routing was given.
    """

    outputs: list[Tensor]
    S: Tensor
    experts_QTK: Tensor | None
    weights_QTK: Tensor | None
    logits_QTE: Tensor | None


def mixture(lists: Lists, settings: Settings, *, keeps: bool) -> Answer:
    """The outputs of P projections of one input, and what their routers chose; differentiable if `keeps`."""
    run = torch.ops.moelora.mixture.default if _is_watched(lists.x) else _forward_autograd
    results = run(*lists, *settings, keeps)
    projections = len(lists.A)
    answers = results[projections + 1 :] or [None, None, None]
    return Answer(list(results[:projections]), results[projections], *answers)


def problem_of(lists: Lists, settings: Settings) -> Problem:
    """The call as the paths read it."""
    choice = None
    if lists.gates:
        choice = Choice(settings.num_experts, settings.top_k, settings.temperature, settings.combine)
    experts_QTK, weights_QTK = lists.routing[:2] or (None, None)
    return Problem(
        lists.x if lists.x.stride(-1) == 1 else lists.x.contiguous(),
        lists.bases,
        lists.weights,
        lists.biases,
        lists.A,
        lists.B,
        lists.gates,
        choice,
        experts_QTK,
        weights_QTK,
        Index(*lists.owners),
        settings.widest,
        settings.every_token,
        settings.dropout,
        lists.seed[0] if lists.seed else None,
    )


# --- forward ----------------------------------------------------------------------------------------------------------


def _forward(*arguments: Any) -> list[Tensor]:
    lists, settings, keeps = _sorted(arguments, 1)
    with _own_dtype(lists.x):
        outputs, chosen, S = paths.forward(problem_of(lists, settings), keeps=keeps)
    return [*outputs, S, *(chosen if lists.gates else ())]


def _forward_fake(*arguments: Any) -> list[Tensor]:
    lists, settings, keeps = _sorted(arguments, 1)
    x, tokens, routers = lists.x, lists.x.shape[0], len(lists.gates)
    if lists.bases:
        outputs = [torch.empty_like(base, memory_format=torch.contiguous_format) for base in lists.bases]
    else:
        outputs = [x.new_empty(tokens, weight.shape[0]) for weight in lists.weights]
    S = x.new_empty(paths.kept_shape(problem_of(lists, settings), keeps=keeps))
    if not routers:
        return [*outputs, S]
    chosen = (routers, tokens, settings.top_k)
    return [
        *outputs,
        S,
        x.new_empty(chosen, dtype=torch.int64),
        x.new_empty(chosen, dtype=torch.float32),
        x.new_empty(routers, tokens, settings.num_experts, dtype=torch.float32),
    ]


def _forward_autograd(*arguments: Any) -> list[Tensor]:
    lists, settings, keeps = _sorted(arguments, 1)
    if not keeps or not torch.is_grad_enabled():
        return _below(torch.ops.moelora.mixture.default, _forward, arguments)
    flat, counts = _flatten(lists)
    return list(_Mixture.apply(counts, settings, *flat))


# --- backward ---------------------------------------------------------------------------------------------------------


def _backward(*arguments: Any) -> list[Tensor]:
    lists, settings, S, grads, grad_weights, grad_logits, *needs = _sorted(arguments, 8)
    # a gradient may be one number spread over a tensor, and the products read rows
    grads = [None if grad is None else _as_rows(grad, lists.x.dtype) for grad in grads]
    given = tuple(None if grad is None else grad.contiguous() for grad in (grad_weights, grad_logits))
    problem = problem_of(lists, settings)
    experts_QTK, weights_QTK, *logits = lists.routing
    chosen = Chosen(experts_QTK, weights_QTK, logits[0] if logits else weights_QTK)
    with _own_dtype(lists.x):
        made = paths.backward(problem, chosen, S, grads, given, Needs(*needs))
    weights = [made.weights_QTK] if made.weights_QTK is not None and needs[3] else []
    dx = [] if made.x_TD is None else [made.x_TD]
    return [*dx, *made.A_list, *made.B_list, *made.gates, *weights]


def _as_rows(grad: Tensor, dtype: torch.dtype) -> Tensor:
    grad = grad.to(dtype)
    return grad if grad.stride(-1) == 1 and grad.stride(0) >= grad.shape[1] else grad.contiguous()


def _backward_fake(*arguments: Any) -> list[Tensor]:
    lists, _, *rest = _sorted(arguments, 8)
    needs_x, needs_A, needs_B, needs_router = rest[-4:]
    made = [torch.empty_like(lists.x, memory_format=torch.contiguous_format)] if needs_x else []
    made += [torch.empty_like(A) for A in lists.A] if needs_A else []
    made += [torch.empty_like(B) for B in lists.B] if needs_B else []
    if needs_router:
        made += [torch.empty_like(gate) for gate in lists.gates]
        made += [] if lists.gates else [torch.empty_like(lists.routing[1])]
    return made


class _Mixture(torch.autograd.Function):
    """Forward and backward operator, joined. Tensors come flattened: autograd does not look into lists."""

    @staticmethod
    def forward(ctx: Any, counts: tuple[int, ...], settings: Settings, *flat: Tensor) -> tuple[Tensor, ...]:
        lists = _unflatten(flat, counts)
        results = _below(torch.ops.moelora.mixture.default, _forward, (*lists, *settings, True))
        S, *chosen = results[len(lists.A) :]
        # the outputs of the bases are not needed any more; what the routers chose is
        kept = lists._replace(bases=[], routing=chosen or lists.routing)
        ctx.save_for_backward(S, *_flatten(kept)[0])
        ctx.counts, ctx.kept_counts, ctx.settings = counts, _flatten(kept)[1], settings
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(S, *chosen[:1])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        S, *flat = ctx.saved_tensors
        lists = _unflatten(flat, ctx.kept_counts)
        projections, routers, bases = len(lists.A), len(lists.gates), ctx.counts[0]
        wanted = ctx.needs_input_grad[2:]
        firsts = _starts(ctx.counts)
        needs_x = wanted[0]
        needs_A = any(wanted[firsts[1] : firsts[2]])
        needs_B = any(wanted[firsts[2] : firsts[3]])
        needs_router = any(wanted[firsts[3] : firsts[5]])
        grad_weights, grad_logits = grads[projections + 2 :] if routers else (None, None)
        flags = (needs_x, needs_A, needs_B, needs_router)
        arguments = (*lists, *ctx.settings, S, list(grads[:projections]), grad_weights, grad_logits, *flags)
        made = _below(torch.ops.moelora.mixture_backward.default, _backward, arguments)
        made = iter(made)
        result: list[Tensor | None] = [None] * len(wanted)
        if needs_x:
            result[0] = next(made)
        result[1 : 1 + bases] = grads[:bases]
        spans = [(firsts[1], projections, needs_A), (firsts[2], projections, needs_B)]
        spans.append((firsts[3], routers, needs_router) if routers else (firsts[4] + 1, 1, needs_router))
        for first, count, needed in spans:
            for place in range(first, first + count) if needed else ():
                result[place] = next(made)
        return (None, None, *result)


def _own_dtype(x: Tensor) -> AbstractContextManager[object]:
    """The operators compute in the dtype of x, also with autocast around them: their caller has cast what is to be."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _is_watched(x: Tensor) -> bool:
    """Whether somebody traces operators or looks on. Else their bodies may run alone: lists take long to dispatch."""
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return traced or x.is_meta or type(x) not in PLAIN


def _below(operator: Any, run: Callable[..., list[Tensor]], arguments: tuple[Any, ...]) -> list[Tensor]:
    """The operator, or its body, below autograd."""
    with torch._C._AutoDispatchBelowAutograd():
        return (operator if _is_watched(arguments[0]) else run)(*arguments)


# --- lists, flat and sorted -------------------------------------------------------------------------------------------


def _sorted(arguments: tuple[Any, ...], rest: int) -> tuple[Any, ...]:
    """Positional arguments of an operator as (lists, settings, *rest)."""
    end = len(arguments) - rest
    tensors = arguments[: end - len(Settings._fields)]
    return Lists(*tensors), Settings(*arguments[len(tensors) : end]), *arguments[end:]


def _flatten(lists: Lists) -> tuple[list[Tensor], tuple[int, ...]]:
    """All tensors one after the other, x first, and the lengths of the lists."""
    x, *rest = lists
    return [x, *(tensor for part in rest for tensor in part)], tuple(len(part) for part in rest)


def _unflatten(flat: Any, counts: tuple[int, ...]) -> Lists:
    starts = _starts(counts)
    return Lists(flat[0], *(list(flat[start : start + count]) for start, count in zip(starts, counts)))


def _starts(counts: tuple[int, ...]) -> list[int]:
    """Where each list begins among the flat tensors."""
    starts = [1]
    for count in counts:
        starts.append(starts[-1] + count)
    return starts


for _name, _run, _fake in (("mixture", _forward, _forward_fake), ("mixture_backward", _backward, _backward_fake)):
    LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moelora::{_name}", _fake, lib=LIBRARY)
LIBRARY.impl("mixture", _forward_autograd, "Autograd")
