"""The picked path, for few tokens, as in decoding: every pick reads the rows of its own expert. Begin with forward.

Its cost depends neither on the number of experts nor on what else there is, but for the router's own weight. While a
CUDA graph is captured, what comes before the expand runs on a second stream beside the base's product.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moelora.kernels.gpu.choose import choose_experts
from moelora.kernels.gpu.dense import given_choice
from moelora.kernels.gpu.finish_forward import Chosen
from moelora.kernels.gpu.picked import picked_expand, picked_shrink, router_logits
from moelora.kernels.gpu.problem import Problem
from moelora.kernels.gpu.side_stream import SideStream
from moelora.kernels.gpu.tiles import tile_for


def forward(problem: Problem) -> tuple[list[Tensor], Chosen]:
    """The outputs and what acts."""
    side = SideStream(problem.x_TD.device)
    chosen, parts = side.run(lambda: _shrink(problem))
    in_place = not problem.bases
    bases = problem.bases or _bases(problem)
    side.join([*parts, *(chosen if problem.gates else ())])

    outputs = []
    for projection, base_TO in enumerate(bases):
        out_TO = base_TO if in_place else torch.empty_like(base_TO, memory_format=torch.contiguous_format)
        router = chosen.router_of(projection)
        index = problem.owners
        picked_expand(
            parts[projection],
            chosen.experts_QTK[router],
            chosen.weights_QTK[router],
            index.scale_PE[projection],
            problem.B_list[projection],
            index.starts_PE[projection],
            index.ranks_PE[projection],
            base_TO,
            out_TO,
            tile_for("picked_expand", out_TO.shape, problem.widest, problem.x_TD.dtype),
        )
        outputs.append(out_TO)
    return outputs, chosen


def _bases(problem: Problem) -> list[Tensor]:
    biases = problem.biases_O or [None] * len(problem.weights_OD)
    return [F.linear(problem.x_TD, weight, bias) for weight, bias in zip(problem.weights_OD, biases, strict=True)]


def _shrink(problem: Problem) -> tuple[Chosen, list[Tensor]]:
    """What acts, and x times the rows of A of every pick, in parts."""
    x_TD, choice = problem.x_TD, problem.choice
    if choice is None:
        chosen = given_choice(problem)
    else:
        answers = []
        for gate_ED in problem.gates:
            tile = tile_for("router_logits", x_TD.shape, choice.num_experts, problem.x_TD.dtype)
            parts_CTE = router_logits(x_TD, gate_ED, tile)
            answers.append(choose_experts(parts_CTE, choice.temperature, choice.top_k, choice.combine))
        chosen = Chosen(*(part[0][None] if len(answers) == 1 else torch.stack(part) for part in zip(*answers)))

    parts = []
    for projection, A_RD in enumerate(problem.A_list):
        router = chosen.router_of(projection)
        starts_E, ranks_E = problem.owners.starts_PE[projection], problem.owners.ranks_PE[projection]
        tile = tile_for("picked_shrink", x_TD.shape, problem.widest, problem.x_TD.dtype)
        ids_TK = chosen.experts_QTK[router]
        parts.append(picked_shrink(x_TD, A_RD, ids_TK, starts_E, ranks_E, problem.widest, tile))
    return chosen, parts
