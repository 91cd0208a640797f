"""ScatterMoE's mixture of LoRA from its published source, which stands beside this repository and is never part of it.

    git clone https://github.com/shawntan/scattermoe PATH     # Apache-2.0; seen at 47b5e15, version 0.3.0

As its `examples/molora.py` does it: two `ParallelExperts` with nothing between them, the second one gated.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from benchmarks.gpu.peers import RoutedLinear, Weights


def scatter_builder(path: Path | None) -> Callable[[Weights], nn.Module]:
    """How a ScatterMoE layer is made from the checkout at `path`.

    Raises:
        FileNotFoundError: when a layer is made and no checkout was named.
    """

    def build(weights: Weights) -> nn.Module:
        if path is None:
            raise FileNotFoundError("no checkout of ScatterMoE was named; pass --scattermoe PATH")
        if str(path) not in sys.path:
            sys.path.insert(0, str(path))
        return ScatterMixture(weights, importlib.import_module("scattermoe"))

    return build


@final
class ScatterMixture(RoutedLinear):
    """`scattermoe.mlp.MLP` with the identity for its activation, for any output width."""

    def __init__(self, weights: Weights, scattermoe: Any) -> None:
        super().__init__(weights)
        num_experts, rank, in_features = weights.A_ERD.shape
        self.flatten_sort_count = scattermoe.flatten_sort_count
        with torch.device(weights.base_OD.device):
            self.shrink = scattermoe.ParallelExperts(num_experts, in_features, rank)
            self.expand = scattermoe.ParallelExperts(num_experts, rank, weights.B_ERO.shape[-1])

        # its own layout for our numbers: (experts, out, in)
        del self.A_ERD, self.B_ERO
        dtype, train = weights.base_OD.dtype, weights.train_experts
        self.shrink.weight = nn.Parameter(weights.A_ERD.to(dtype, copy=True), requires_grad=train)
        self.expand.weight = nn.Parameter(
            weights.B_ERO.to(dtype).transpose(1, 2).contiguous().clone(), requires_grad=train
        )

    def delta(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        order = self.flatten_sort_count(experts_TK, num_experts=self.shrink.num_experts)
        hidden_NR = self.shrink(x_TD, self.top_k, *order, grouped_out=True)
        return self.expand(hidden_NR, 1, *order, grouped_in=True, gates=weights_TK.to(x_TD.dtype))
