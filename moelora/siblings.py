"""Layers that read the same input, as q, k and v do, and run as one operator. Begin with Siblings."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, final

import torch

from moelora.frozen_linear import frozen_linear
from moelora.kernels.fused import Linear
from moelora.kernels.gate import LinearGate

if TYPE_CHECKING:
    from moelora.layer import MoELoRALinear

MOST = 4
"""Layers that run together: the backward pass's kernel in rank space is unrolled over them."""


class Together(NamedTuple):
    """What an operator for several layers needs to know of them."""

    layers: "tuple[MoELoRALinear, ...]"
    linears: list[Linear]
    gates: list[LinearGate]


@final
class Siblings:
    """The layers of one model that read the same input.

    The first of them that is called computes the outputs of all and hands them on over the tape. That holds while all
    are alike: plain frozen linears, linear routers of one kind, experts of the same ranks and scales. Each call looks
    anew, since any of it may change.
    """

    layers: "tuple[MoELoRALinear, ...]"

    def __init__(self, layers: "Sequence[MoELoRALinear]") -> None:
        self.layers = tuple(layers)

    def together(self, dtype: torch.dtype) -> Together | None:
        """All of them, if they can run as one."""
        layers, linears, gates, kinds = self.layers, [], [], []
        if not 1 < len(layers) <= MOST:
            return None
        for layer in layers:
            linear, gate = frozen_linear(layer.base, dtype), layer.router.linear_gate()
            if linear is None or gate is None:
                return None
            settings = (layer.backend, layer.dropout, layer.training, layer.shared_router, layer.router.num_experts)
            kinds.append((layer.bank.layout, *settings, linear.bias_O is None, *gate[1:]))
            linears.append(linear)
            gates.append(gate)
        if layers[0].router.num_experts != len(layers[0].bank):
            return None
        one_router = all(layer.router is layers[0].router for layer in layers)
        if any(kind != kinds[0] for kind in kinds) or layers[0].shared_router != one_router:
            return None
        return Together(layers, linears, gates[:1] if one_router else gates)
