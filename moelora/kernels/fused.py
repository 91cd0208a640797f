"""Mixtures in Triton, also of several projections of one input, and together with their frozen linears.

Begin with mix_fused; `runs` says whether it may be called.
"""

import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelora.kernels.factors import Factors
from moelora.kernels.gate import LinearGate
from moelora.kernels.torch_paths import add
from moelora.routing import Routing, dense_weights

PLAIN = (Tensor, torch.nn.Parameter)
"""Kinds of tensors that are no more than they look: not quantised, sharded or traced."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

LARGEST_TOP_K = 8
"""Experts per token up to which "auto" takes the kernels: their code grows with it."""


class Linear(NamedTuple):
    """A frozen linear that the operator computes itself."""

    weight_OD: Tensor
    bias_O: Tensor | None


_FOUND: list[ModuleType | None] = []


def operators() -> ModuleType | None:
    """The Triton operators, where they can run: beside a CUDA device, or in Triton's interpreter."""
    # a plain list: torch.compile would look through functools' caches, at a search that it cannot trace
    if not _FOUND:
        _FOUND.append(_find())
    return _FOUND[0]


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """What a linear of this input computes in: its own dtype, or autocast's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def runs(x: Tensor, backend: str, top_k: int) -> bool:
    """Whether a mixture of this input, with K experts a token, is the Triton operators'.

    Raises:
        RuntimeError: if Triton was asked for where it cannot run.
    """
    if backend == "auto":
        return x.is_cuda and arithmetic_dtype(x) in DTYPES and top_k <= LARGEST_TOP_K and operators() is not None
    if backend != "triton":
        return False
    if operators() is None or (torch.cuda.is_available() and not x.is_cuda):
        raise RuntimeError(f"backend='triton' needs Triton and CUDA tensors, got one on {x.device}; use backend='auto'")
    if arithmetic_dtype(x) not in DTYPES:
        raise RuntimeError(f"backend='triton' computes in {DTYPES}, got {arithmetic_dtype(x)}; use backend='auto'")
    return True


def mix_fused(
    x_TD: Tensor,
    bases: "Sequence[Tensor] | Sequence[Linear]",
    factors: Sequence[Factors],
    routing: "Routing | Sequence[LinearGate]",
    *,
    every_token: bool,
    dropout: float = 0.0,
) -> tuple[list[Tensor], list[Routing]]:
    """Outputs of P projections of one input, and the routing of each, in one operator.

    Args:
        x_TD: the input, in the dtype to compute in.
        bases: outputs of the bases, or frozen linears that the operator computes: of all P projections the same kind.
        factors: of each projection; all with rows in the same places.
        routing: what acts on all projections, or the linear routers that choose: one for all, or one each.
        every_token: the promise that every token has an expert.
        dropout: probability with which the experts, not the routers, miss an element of x.
    """
    ops = operators()
    assert ops is not None
    projections, first = len(factors), factors[0]
    linears = [base for base in bases if isinstance(base, Linear)]
    outputs = [base for base in bases if not isinstance(base, Linear)]
    if isinstance(routing, Routing):
        gates, given = [], [routing.experts_TK.contiguous()[None], routing.weights_TK.float().contiguous()[None]]
        temperature, top_k, combine = 1.0, routing.experts_TK.shape[1], "given"
    else:
        gates, given = [gate.weight_ED for gate in routing], []
        _, temperature, top_k, combine = routing[0]
    owners = first.owners if projections == 1 else [part.expand(projections, -1) for part in first.owners]
    lists = ops.Lists(
        x_TD,
        outputs,
        [each.A_RD for each in factors],
        [each.B_RO for each in factors],
        gates,
        given,
        [linear.weight_OD for linear in linears],
        [linear.bias_O for linear in linears if linear.bias_O is not None],
        list(owners),
        # of the device's own generator, which checkpointing and CUDA graphs restore
        [torch.randint(2**31, (1,), device=x_TD.device)] if dropout else [],
    )
    settings = ops.Settings(
        first.rows_FP.shape[1], owners[1].shape[1], top_k, temperature, combine, every_token, dropout
    )
    wanted = (x_TD, *outputs, *lists.A, *lists.B, *gates, *given)
    keeps = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in wanted)
    answer = ops.mixture(lists, settings, keeps=keeps)
    routings = [routing] if isinstance(routing, Routing) else _routings(answer)
    mixed = [
        output if factor.bias_EO is None else _add_biases(output, factor, routings[place % len(routings)], every_token)
        for place, (output, factor) in enumerate(zip(answer.outputs, factors, strict=True))
    ]
    return mixed, routings


def _routings(answer: Any) -> list[Routing]:
    """The answer of each router of the operator."""
    return [
        Routing(answer.experts_QTK[router], answer.weights_QTK[router], answer.logits_QTE[router])
        for router in range(answer.experts_QTK.shape[0])
    ]


def _add_biases(output_TO: Tensor, factors: Factors, routing: Routing, every_token: bool) -> Tensor:
    """The output with the experts' own biases: few adapters have any, so torch may do it."""
    assert factors.bias_EO is not None
    gate_TE = dense_weights(routing, factors.scale_E.shape[0]) * factors.scale_E
    delta_TO = gate_TE.to(output_TO.dtype) @ factors.bias_EO.to(output_TO.dtype)
    return add(output_TO, delta_TO, routing, every_token=every_token)


def _find() -> ModuleType | None:
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if importlib.util.find_spec("triton") is None or not (torch.cuda.is_available() or interpreted):
        return None
    from moelora.kernels.gpu import ops

    return ops
