"""The dense path: two products over all rank rows, gated in between. Begin with forward.

It costs T x R whatever is chosen, and needs no order of the tokens; up to some hundred rows the products take no longer
than reading x and writing the output. One pass over x serves A and the router, and all projections of the same input.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from moelora.kernels.gpu.expand import Gate, Tail, expand
from moelora.kernels.gpu.finish_backward import finish_backward
from moelora.kernels.gpu.finish_forward import Chosen, finish_forward
from moelora.kernels.gpu.gram import gram
from moelora.kernels.gpu.linear import Add, add_to_base, input_gradient
from moelora.kernels.gpu.pack import Packed, pack, padded
from moelora.kernels.gpu.problem import Problem
from moelora.kernels.gpu.product import product
from moelora.kernels.gpu.reduce import sum_parts
from moelora.kernels.gpu.tiles import tile_for

LARGEST_TAIL = 128
"""Rows of a router that still go along with those of A; more are a product of their own."""


class Needs(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    A: bool
    B: bool
    router: bool


class Gradients(NamedTuple):
    """The gradients that were wanted; in the dtype of what they belong to."""

    x_TD: Tensor | None
    A_list: list[Tensor]
    B_list: list[Tensor]
    gates: list[Tensor]
    weights_QTK: Tensor | None


def forward(problem: Problem) -> tuple[list[Tensor], Chosen, Tensor]:
    """The outputs, what the routers chose, and S_TPR, the values of the rank rows before the gate."""
    packed = pack(problem.A_list, problem.B_list, problem.gates, problem.x_TD.dtype)
    S_TPR, chosen = shrink(problem, packed)
    outputs = [
        mix(problem, projection, partial(_expand_one, problem, packed, S_TPR, chosen, projection))
        for projection in range(len(problem.A_list))
    ]
    return outputs, chosen, S_TPR


def shrink(problem: Problem, packed: Packed) -> tuple[Tensor, Chosen]:
    """x times the rows of A, and what acts: as it was given, or as the routers choose by the same pass over x."""
    x_TD, choice, tails_QMD = problem.x_TD, problem.choice, packed.tails_QMD
    (tokens, width), (projections, rows, _) = x_TD.shape, packed.A_PRD.shape
    routers = len(problem.gates)
    tile = tile_for("shrink", tokens, width, projections * rows)
    run = partial(product, x_TD, tile=tile, dropout=problem.dropout, seed=problem.seed)

    if tails_QMD is not None and tails_QMD.shape[1] > LARGEST_TAIL:
        chosen = choose_alone(problem, packed)
        S_TPR, _ = finish_forward(run(packed.A_PRD, None), projections, rows, 0, None, 1.0, x_TD.dtype)
        return S_TPR, chosen
    parts_STN = run(packed.A_PRD, tails_QMD)
    S_TPR, made = finish_forward(parts_STN, projections, rows, routers, choice, packed.tail_scale, x_TD.dtype)
    return S_TPR, given_choice(problem) if made is None else made


def choose_alone(problem: Problem, packed: Packed) -> Chosen:
    """What the routers choose, in a pass over x of their own."""
    x_TD, tails_QMD = problem.x_TD, packed.tails_QMD
    assert tails_QMD is not None
    (tokens, width), routers = x_TD.shape, len(problem.gates)
    rows_1MD = tails_QMD.reshape(1, -1, width)
    tile = tile_for("shrink", tokens, width, rows_1MD.shape[1])
    parts_STN = product(x_TD, rows_1MD, None, tile)
    _, chosen = finish_forward(parts_STN, 1, 0, routers, problem.choice, packed.tail_scale, x_TD.dtype)
    assert chosen is not None
    return chosen


def backward(
    problem: Problem,
    chosen: Chosen,
    S_TPR: Tensor,
    grads: list[Tensor | None],
    given: tuple[Tensor | None, Tensor | None],
    needs: Needs,
) -> Gradients:
    """Gradients of everything, from those of the outputs and `given`, those of the weights and the scores."""
    x_TD, dtype = problem.x_TD, problem.x_TD.dtype
    (tokens, width), (_, projections, rows) = x_TD.shape, S_TPR.shape
    packed = pack(problem.A_list, problem.B_list, problem.gates, dtype)

    # dY @ B.T of each projection, side by side
    tile = tile_for("shrink", tokens, problem.out_width(0), rows)
    parts_STN = torch.empty(tile.split, tokens, projections * rows, dtype=torch.float32, device=x_TD.device)
    for projection, grad_TO in enumerate(grads):
        mine_STR = parts_STN[:, :, projection * rows : (projection + 1) * rows]
        if grad_TO is None:
            mine_STR.zero_()
        else:
            product(grad_TO, packed.B_list[projection][None], None, tile, out_STN=mine_STR)
    part_rows = padded(problem.choice.num_experts, dtype) if problem.choice is not None else 0
    rank = finish_backward(
        parts_STN, S_TPR, chosen, problem.index.owner_PR, problem.index.scale_PE, problem.choice, part_rows, given
    )

    dA, dgates, dx_TD = [], [], None
    dB = [_grad_B(problem, rank.gated_TPR, grads, projection) for projection in range(projections)] if needs.B else []
    dS_TN = rank.dS_TPR.reshape(tokens, projections * rows)
    if needs.A or needs.router:
        dA, dgates = _grad_A(problem, dS_TN, rank.dlogits_TM, part_rows, needs)
    if needs.x:
        tail = None
        if rank.dlogits_TM is not None and packed.tails_QMD is not None:
            tail = Tail(rank.dlogits_TM, packed.tails_QMD, part_rows, packed.tail_scale)
        add = partial(_expand_x, problem, dS_TN, packed.A_PRD.reshape(-1, width), tail)
        dx_TD = input_gradient(grads, problem.weights_OD, x_TD, add)
    return Gradients(dx_TD, dA, dB, dgates, rank.dweights_QTK)


def mix(problem: Problem, projection: int, add: Add, *, with_bias: bool = True) -> Tensor:
    """The output of one projection, given what adds its mixture to a base, and whether it can add the bias too."""
    if problem.bases:
        base_TO = problem.bases[projection]
        return add(torch.empty_like(base_TO, memory_format=torch.contiguous_format), base_TO=base_TO, bias_O=None)
    bias_O = problem.biases_O[projection] if problem.biases_O else None
    fresh = problem.every_token and (with_bias or bias_O is None)
    return add_to_base(problem.x_TD, problem.weights_OD[projection], bias_O, add, every_token=fresh)


def _expand_one(problem: Problem, packed: Packed, S_TPR: Tensor, chosen: Chosen, projection: int, out_TO: Tensor, **to):
    router = projection if chosen.experts_QTK.shape[0] > 1 else 0
    gate = Gate(
        chosen.experts_QTK[router],
        chosen.weights_QTK[router],
        problem.index.owner_PR[projection],
        problem.index.scale_PE[projection],
    )
    tile = tile_for("expand" if to["base_TO"] is None else "expand_add", *out_TO.shape, problem.rows)
    B_RO = packed.B_list[projection]
    return expand(S_TPR[:, projection], B_RO, out_TO, tile, gate=gate, skip_idle=not problem.every_token, **to)


def _expand_x(problem: Problem, dS_TN: Tensor, A_ND: Tensor, tail: Tail | None, out_TO: Tensor, **to) -> Tensor:
    tile = tile_for("expand" if to["base_TO"] is None else "expand_add", *out_TO.shape, A_ND.shape[0])
    return expand(dS_TN, A_ND, out_TO, tile, tail=tail, dropout=problem.dropout, seed=problem.seed, **to)


def _grad_B(problem: Problem, gated_TPR: Tensor, grads: list[Tensor | None], projection: int) -> Tensor:
    B_RO, grad_TO = problem.B_list[projection], grads[projection]
    if grad_TO is None:
        return torch.zeros_like(B_RO)
    tile = tile_for("gram", *grad_TO.shape, B_RO.shape[0])
    return sum_parts(gram(gated_TPR[:, projection], None, grad_TO, tile), B_RO.dtype)


def _grad_A(
    problem: Problem, dS_TN: Tensor, dlogits_TM: Tensor | None, part_rows: int, needs: Needs
) -> tuple[list[Tensor], list[Tensor]]:
    """Of A and of the routers, in one pass over x."""
    x_TD, rows = problem.x_TD, problem.rows
    left_TN = dS_TN if needs.A else dS_TN[:, :0]
    tail_TM = dlogits_TM if needs.router else None
    tile = tile_for("gram", *x_TD.shape, left_TN.shape[1] or rows)
    run = partial(gram, wide_TO=x_TD, tile=tile)
    if tail_TM is not None and tail_TM.shape[1] > LARGEST_TAIL:
        tail_SMD = run(tail_TM, None)
        parts_SND = run(left_TN, None, dropout=problem.dropout, seed=problem.seed)
    else:
        parts_SND = run(left_TN, tail_TM, dropout=problem.dropout, seed=problem.seed)
        tail_SMD = parts_SND[:, left_TN.shape[1] :]

    dA, dgates = [], []
    if needs.A:
        for projection, A_RD in enumerate(problem.A_list):
            mine_SRD = parts_SND[:, projection * rows : (projection + 1) * rows]
            dA.append(sum_parts(mine_SRD, A_RD.dtype))
    if needs.router:
        for router, gate_ED in enumerate(problem.gates):
            first = router * part_rows
            dgates.append(sum_parts(tail_SMD[:, first : first + gate_ED.shape[0]], gate_ED.dtype))
    return dA, dgates


def given_choice(problem: Problem) -> Chosen:
    """What was given, as if routers had chosen it."""
    assert problem.experts_QTK is not None
    assert problem.weights_QTK is not None
    return Chosen(problem.experts_QTK, problem.weights_QTK, problem.weights_QTK)
