"""The dense path: two products over all rank rows, gated in between. Begin with forward.

It costs T x R whatever is chosen, and needs no order of the tokens; up to some hundred rows the products take no longer
than reading x and writing the output. One pass over x serves A and the router, and all projections of the same input.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelora.kernels.gpu.expand import expand
from moelora.kernels.gpu.finish_backward import finish_backward, score_columns, score_parts
from moelora.kernels.gpu.finish_forward import Chosen, finish_forward, new_chosen
from moelora.kernels.gpu.gram import gram
from moelora.kernels.gpu.linear import Add, add_to_base, input_gradient
from moelora.kernels.gpu.pack import Packed, pack_backward, pack_forward, padded
from moelora.kernels.gpu.problem import Problem
from moelora.kernels.gpu.product import product
from moelora.kernels.gpu.reduce import sum_parts
from moelora.kernels.gpu.side_stream import SideStream
from moelora.kernels.gpu.tiles import rule, tile_for

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


def forward(problem: Problem, *, keeps: bool) -> tuple[list[Tensor], Chosen, Tensor | None]:
    """The outputs, what acts, and S_TPR, the values of the rank rows before the gate (None unless `keeps`)."""
    x_TD, choice, owners = problem.x_TD, problem.choice, problem.owners
    packed = pack_forward(problem.A_list, problem.B_list, problem.gates, x_TD.dtype)
    tokens, (projections, rows, _) = x_TD.shape[0], packed.A_PRD.shape
    tile = tile_for("shrink", x_TD.shape, projections * rows, x_TD.dtype)

    # who acts: given, or chosen by the pass over x that the rank rows need, or by one of its own where experts are many
    tails_QMD = packed.tails_QMD
    if choice is None:
        chosen = given_choice(problem)
    elif tails_QMD is not None and tails_QMD.shape[1] > LARGEST_TAIL:
        chosen, choice, tails_QMD = choose_alone(problem, packed), None, None
    else:
        chosen = new_chosen(choice, len(problem.gates), tokens, x_TD.device)
    parts_STN = product(x_TD, packed.A_PRD, tails_QMD, tile, dropout=problem.dropout, seed=problem.seed)
    S_TPR, gated_TPR = finish_forward(
        parts_STN, chosen, choice, packed.tail_scale, owners.owner_PR, owners.scale_PE, x_TD.dtype, keeps=keeps
    )

    outputs = []
    for projection, B_RO in enumerate(packed.B_list):
        router = chosen.router_of(projection)
        idle = None if problem.every_token else (chosen.experts_QTK[router], chosen.weights_QTK[router])
        outputs.append(mix(problem, projection, partial(_expand, gated_TPR[:, projection], B_RO, idle=idle)))
    return outputs, chosen, S_TPR


def choose_alone(problem: Problem, packed: Packed) -> Chosen:
    """What the routers choose, in a pass over x of their own."""
    x_TD, tails_QMD, choice, owners = problem.x_TD, packed.tails_QMD, problem.choice, problem.owners
    assert tails_QMD is not None
    assert choice is not None
    (tokens, width), routers = x_TD.shape, len(problem.gates)
    rows_1ND = tails_QMD.reshape(1, -1, width)
    parts_STN = product(x_TD, rows_1ND, None, tile_for("shrink", x_TD.shape, rows_1ND.shape[1], x_TD.dtype))
    chosen = new_chosen(choice, routers, tokens, x_TD.device)
    no_rows = owners.owner_PR[:, :0]
    finish_forward(parts_STN, chosen, choice, packed.tail_scale, no_rows, owners.scale_PE, x_TD.dtype, keeps=False)
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
    x_TD, dtype, choice = problem.x_TD, problem.x_TD.dtype, problem.choice
    (tokens, _), (_, projections, rows) = x_TD.shape, S_TPR.shape
    part_rows = padded(choice.num_experts, dtype) if choice is not None else 0
    columns = score_columns(len(problem.gates), part_rows, dtype)
    rows_ND, B_list = pack_backward(problem.A_list, problem.B_list, problem.gates, columns, dtype)

    # dY @ B.T of each projection, side by side
    tile = tile_for("shrink", (tokens, problem.out_width(0)), rows, dtype)
    parts_STN = torch.empty(tile.split, tokens, projections * rows, dtype=torch.float32, device=x_TD.device)
    for projection, grad_TO in enumerate(grads):
        mine_STR = parts_STN[:, :, projection * rows : (projection + 1) * rows]
        if grad_TO is None:
            mine_STR.zero_()
        else:
            product(grad_TO, B_list[projection][None], None, tile, out_STN=mine_STR)
    rank = finish_backward(
        parts_STN, S_TPR, chosen, problem.owners.owner_PR, problem.owners.scale_PE, choice, part_rows, given
    )

    def of_factors() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        wanted = range(projections if needs.B else 0)
        dB = [_grad_B(problem, rank.gated_TPR, grads, projection) for projection in wanted]
        return dB, *_grad_A(problem, rank.rank_TN, part_rows, needs)

    add = partial(_expand_x, problem, rank.rank_TN, rows_ND)
    return beside_the_base(problem, grads, needs, of_factors, add, rank.dweights_QTK)


def beside_the_base(
    problem: Problem,
    grads: list[Tensor | None],
    needs: Needs,
    of_factors: Callable[[], tuple[list[Tensor], list[Tensor], list[Tensor]]],
    add: Add,
    dweights_QTK: Tensor | None,
) -> Gradients:
    """All gradients: those of the factors (B, A, routers), which mostly read memory, beside the base's product.

    `add` adds the mixture's part to dx.
    """
    large = bool(problem.weights_OD) and needs.x and problem.x_TD.shape[0] >= rule("beside_tokens")
    side = SideStream(problem.x_TD.device, wanted=large)
    dB, dA, dgates = side.run(of_factors)
    dx_TD = input_gradient(grads, problem.weights_OD, problem.x_TD, add) if needs.x else None
    side.join([*dB, *dA, *dgates])
    return Gradients(dx_TD, dA, dB, dgates, dweights_QTK)


def mix(problem: Problem, projection: int, add: Add, *, with_bias: bool = True) -> Tensor:
    """The output of one projection, given what adds its mixture to a base, and whether it can add the bias too."""
    if problem.bases:
        base_TO = problem.bases[projection]
        return add(torch.empty_like(base_TO, memory_format=torch.contiguous_format), base_TO=base_TO, bias_O=None)
    bias_O = problem.biases_O[projection] if problem.biases_O else None
    fresh = problem.every_token and (with_bias or bias_O is None)
    return add_to_base(problem.x_TD, problem.weights_OD[projection], bias_O, add, every_token=fresh)


def given_choice(problem: Problem) -> Chosen:
    """What was given, as if routers had chosen it."""
    assert problem.experts_QTK is not None
    assert problem.weights_QTK is not None
    return Chosen(problem.experts_QTK, problem.weights_QTK, problem.weights_QTK)


def _expand(left_TR: Tensor, right_RO: Tensor, out_TO: Tensor, **to: Any) -> Tensor:
    """`expand` with its tile; an addition reads what it adds to, and has a tile of its own."""
    kernel = "expand" if to["base_TO"] is None else "expand_add"
    return expand(left_TR, right_RO, out_TO, tile_for(kernel, out_TO.shape, left_TR.shape[1], left_TR.dtype), **to)


def _expand_x(problem: Problem, rank_TN: Tensor, rows_ND: Tensor, out_TD: Tensor, **to: Any) -> Tensor:
    """The mixture's part of dx. With dropout the router's part, which knows none, comes after the experts'."""
    if not problem.dropout:
        return _expand(rank_TN, rows_ND, out_TD, **to)
    count = len(problem.A_list) * problem.rows
    _expand(rank_TN[:, :count], rows_ND[:count], out_TD, dropout=problem.dropout, seed=problem.seed, **to)
    if rank_TN.shape[1] > count:
        _expand(rank_TN[:, count:], rows_ND[count:], out_TD, base_TO=out_TD, bias_O=None)
    return out_TD


def _grad_B(problem: Problem, gated_TPR: Tensor, grads: list[Tensor | None], projection: int) -> Tensor:
    B_RO, grad_TO = problem.B_list[projection], grads[projection]
    if grad_TO is None:
        return torch.zeros_like(B_RO)
    tile = tile_for("gram", grad_TO.shape, B_RO.shape[0], grad_TO.dtype)
    return sum_parts(gram(gated_TPR[:, projection], None, grad_TO, tile), B_RO.dtype)


def _grad_A(problem: Problem, rank_TN: Tensor, part_rows: int, needs: Needs) -> tuple[list[Tensor], list[Tensor]]:
    """Of A and of the routers, in one pass over x."""
    if not needs.A and not (needs.router and problem.gates):
        return [], []
    x_TD, rows = problem.x_TD, problem.rows
    count = len(problem.A_list) * rows
    left_TN = rank_TN[:, : count if needs.A else 0]
    tail_TM = rank_TN[:, count:] if needs.router and problem.gates else None
    run = partial(gram, wide_TO=x_TD, tile=tile_for("gram", x_TD.shape, left_TN.shape[1] or 16, x_TD.dtype))
    if tail_TM is not None and tail_TM.shape[1] > LARGEST_TAIL:
        tail_SMD = run(tail_TM, None)
        parts_SND = run(left_TN, None, dropout=problem.dropout, seed=problem.seed)
    else:
        parts_SND = run(left_TN, tail_TM, dropout=problem.dropout, seed=problem.seed)
        tail_SMD = parts_SND[:, left_TN.shape[1] :]

    dA, dgates = [], []
    if needs.A:
        for projection, A_RD in enumerate(problem.A_list):
            dA.append(sum_parts(parts_SND[:, projection * rows : (projection + 1) * rows], A_RD.dtype))
    if needs.router:
        dgates = gate_gradients(problem, tail_SMD, part_rows)
    return dA, dgates


def gate_gradients(problem: Problem, tail_SMD: Tensor, part_rows: int) -> list[Tensor]:
    """Of the routers' weights, from the products of x with the columns of their scores; of all their parts."""
    made, apart = [], len(problem.gates) * part_rows
    for router, gate_ED in enumerate(problem.gates):
        first = router * part_rows
        mine_SED = tail_SMD[:, first : first + gate_ED.shape[0]]
        made.append(sum_parts(mine_SED, gate_ED.dtype, times=score_parts(problem.x_TD.dtype), apart=apart))
    return made
