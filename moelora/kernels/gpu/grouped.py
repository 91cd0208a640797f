"""The sorted path: each token meets the rows of its own experts alone. Begin with forward.

For many rows: its cost does not grow with the number of experts. The tokens are sorted by expert, one order for each of
the K slots; x is fetched row by row where it lies, and the output is written slot by slot.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from moelora.kernels.gpu.dense import Gradients, Needs, beside_the_base, choose_alone, gate_gradients, given_choice, mix
from moelora.kernels.gpu.finish_backward import finish_backward, score_columns
from moelora.kernels.gpu.finish_forward import Chosen
from moelora.kernels.gpu.gram import gram
from moelora.kernels.gpu.grouped_expand import grouped_expand
from moelora.kernels.gpu.grouped_gram import grouped_gram
from moelora.kernels.gpu.grouped_shrink import grouped_shrink, grouped_shrink_backward, padded_rank
from moelora.kernels.gpu.order import Order, sort_by_expert
from moelora.kernels.gpu.pack import Packed, pack_backward, pack_forward, padded
from moelora.kernels.gpu.problem import Problem
from moelora.kernels.gpu.tiles import tile_for


def kept_shape(tokens: int, top_k: int, widest: int) -> tuple[int, int, int]:
    """Shape of what one projection keeps for the backward pass."""
    return tokens, top_k, padded_rank(widest)


def forward(problem: Problem, *, keeps: bool) -> tuple[list[Tensor], Chosen, Tensor | None]:
    """The outputs, what acts, and S_PTKP, the values of the rank rows of each pick before the gate (if it `keeps`)."""
    packed = pack_forward(problem.A_list, problem.B_list, problem.gates, problem.x_TD.dtype)
    chosen = choose_alone(problem, packed) if problem.gates else given_choice(problem)
    orders = _orders(problem, chosen)
    tile = tile_for("grouped_shrink", problem.x_TD.shape, padded_rank(problem.widest), problem.x_TD.dtype)

    outputs, kept = [], []
    for projection in range(len(problem.A_list)):
        order, index = orders[chosen.router_of(projection)], _index(problem, projection)
        S_TKP = grouped_shrink(problem.x_TD, packed.A_PRD[projection], order, *index, problem.widest, tile)
        add = partial(_expand_one, problem, packed, S_TKP, chosen, order, projection)
        outputs.append(mix(problem, projection, add, with_bias=False))
        kept.append(S_TKP)
    if not keeps:
        return outputs, chosen, None
    return outputs, chosen, kept[0][None] if len(kept) == 1 else torch.stack(kept)


def backward(
    problem: Problem,
    chosen: Chosen,
    S_PTKP: Tensor,
    grads: list[Tensor | None],
    given: tuple[Tensor | None, Tensor | None],
    needs: Needs,
) -> Gradients:
    """Gradients of everything, as in `dense.backward`."""
    dtype = problem.x_TD.dtype
    part_rows = padded(problem.choice.num_experts, dtype) if problem.choice is not None else 0
    columns = score_columns(len(problem.gates), part_rows, dtype)
    rows_ND, B_list = pack_backward(problem.A_list, problem.B_list, problem.gates, columns, dtype)
    orders = _orders(problem, chosen)
    P = padded_rank(problem.widest)

    # in rank space, projection by projection
    dS = []
    dweights_QTK = torch.zeros_like(chosen.weights_QTK) if given[0] is None else given[0].clone()
    for projection, grad_TO in enumerate(grads):
        router = chosen.router_of(projection)
        order, S_TKP = orders[router], S_PTKP[projection]
        if grad_TO is None:
            dS.append(torch.zeros_like(S_TKP))
            continue
        dS_TKP, dweights_TK = grouped_shrink_backward(
            grad_TO,
            B_list[projection],
            S_TKP,
            chosen.weights_QTK[router],
            problem.owners.scale_PE[projection],
            order,
            *_index(problem, projection),
            tile_for("grouped_shrink", grad_TO.shape, P, dtype)._replace(rows=order.rows),
        )
        dweights_QTK[router] += dweights_TK
        dS.append(dS_TKP)

    # through the routers' choice to their scores
    scores_TM = None
    if problem.choice is not None:
        scores_TM = _through_choice(problem, chosen, dweights_QTK, given[1], part_rows)

    def of_factors() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        every = range(len(grads))
        dB = [_grad_B(problem, chosen, orders, S_PTKP, grads, each) for each in every] if needs.B else []
        dA = [_grad_A(problem, chosen, orders, dS, grads, each) for each in every] if needs.A else []
        if scores_TM is None or not needs.router:
            return dB, dA, []
        return dB, dA, _grad_gates(problem, scores_TM, part_rows)

    add = partial(_expand_x, problem, rows_ND, dS, scores_TM, chosen, orders)
    return beside_the_base(problem, grads, needs, of_factors, add, None if problem.gates else dweights_QTK)


def _grad_B(
    problem: Problem, chosen: Chosen, orders: list[Order], S_PTKP: Tensor, grads: Any, projection: int
) -> Tensor:
    B_RO, grad_TO, router = problem.B_list[projection], grads[projection], chosen.router_of(projection)
    if grad_TO is None:
        return torch.zeros_like(B_RO)
    tile = tile_for("grouped_gram", grad_TO.shape, padded_rank(problem.widest), grad_TO.dtype)
    gate = (chosen.weights_QTK[router], problem.owners.scale_PE[projection])
    index = _index(problem, projection)
    return grouped_gram(S_PTKP[projection], *gate, grad_TO, orders[router], *index, problem.rows, tile).to(B_RO.dtype)


def _grad_A(
    problem: Problem, chosen: Chosen, orders: list[Order], dS: list[Tensor], grads: Any, projection: int
) -> Tensor:
    A_RD, x_TD, order = problem.A_list[projection], problem.x_TD, orders[chosen.router_of(projection)]
    if grads[projection] is None:
        return torch.zeros_like(A_RD)
    tile = tile_for("grouped_gram", x_TD.shape, padded_rank(problem.widest), x_TD.dtype)
    index = _index(problem, projection)
    return grouped_gram(dS[projection], None, None, x_TD, order, *index, problem.rows, tile).to(A_RD.dtype)


def _grad_gates(problem: Problem, scores_TM: Tensor, part_rows: int) -> list[Tensor]:
    x_TD = problem.x_TD
    parts_SMD = gram(scores_TM, None, x_TD, tile_for("gram", x_TD.shape, scores_TM.shape[1], x_TD.dtype))
    return gate_gradients(problem, parts_SMD, part_rows)


def _through_choice(
    problem: Problem, chosen: Chosen, dweights_QTK: Tensor, grad_logits: Tensor | None, part_rows: int
) -> Tensor:
    """The scores' gradient, from that of the weights: what `finish_backward` does where there are no rank rows."""
    x_TD, routers, index = problem.x_TD, len(problem.gates), problem.owners
    no_parts, no_values = x_TD.new_empty(1, x_TD.shape[0], 0), x_TD.new_empty(x_TD.shape[0], routers, 0)
    given = (dweights_QTK, grad_logits)
    rank = finish_backward(
        no_parts, no_values, chosen, index.owner_PR, index.scale_PE, problem.choice, part_rows, given
    )
    return rank.rank_TN


def _orders(problem: Problem, chosen: Chosen) -> list[Order]:
    """One order of the tokens for each router."""
    rows = tile_for("grouped_shrink", problem.x_TD.shape, padded_rank(problem.widest), problem.x_TD.dtype).rows
    experts = problem.owners.scale_PE.shape[1]
    return [
        sort_by_expert(experts_TK, None if problem.every_token else weights_TK, experts, rows)
        for experts_TK, weights_TK in zip(chosen.experts_QTK, chosen.weights_QTK, strict=True)
    ]


def _index(problem: Problem, projection: int) -> tuple[Tensor, Tensor]:
    return problem.owners.starts_PE[projection], problem.owners.ranks_PE[projection]


def _expand_one(
    problem: Problem,
    packed: Packed,
    S_TKP: Tensor,
    chosen: Chosen,
    order: Order,
    projection: int,
    out_TO: Tensor,
    **to: Any,
) -> Tensor:
    base_TO = to["base_TO"]
    assert to["bias_O"] is None
    if base_TO is not None and base_TO is not out_TO:
        out_TO.copy_(base_TO)
    tile = tile_for("grouped_expand", out_TO.shape, padded_rank(problem.widest), problem.x_TD.dtype)
    grouped_expand(
        S_TKP,
        chosen.weights_QTK[chosen.router_of(projection)],
        problem.owners.scale_PE[projection],
        packed.B_list[projection],
        out_TO,
        order,
        *_index(problem, projection),
        accumulate=base_TO is not None,
        tile=tile._replace(rows=order.rows),
    )
    return out_TO


def _expand_x(
    problem: Problem,
    rows_ND: Tensor,
    dS: list[Tensor],
    scores_TM: Tensor | None,
    chosen: Chosen,
    orders: list[Order],
    out_TD: Tensor,
    **to: Any,
) -> Tensor:
    tile = tile_for("grouped_expand", out_TD.shape, padded_rank(problem.widest), out_TD.dtype)
    rows = problem.rows
    for projection, dS_TKP in enumerate(dS):
        order = orders[chosen.router_of(projection)]
        grouped_expand(
            dS_TKP,
            None,
            None,
            rows_ND[projection * rows : (projection + 1) * rows],
            out_TD,
            order,
            *_index(problem, projection),
            accumulate=to["base_TO"] is not None or projection > 0,
            tile=tile._replace(rows=order.rows),
            extra=(scores_TM, rows_ND[len(dS) * rows :]) if scores_TM is not None and projection == 0 else None,
        )
    return out_TD
