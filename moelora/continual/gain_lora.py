"""A gate for each task that is closed on the tasks before it. Begin with GainGate and GateConstraint.

    gate = GainGate.after(old_gate, memory, generator=generator)    # GainGate.fresh for the first task
    constraint = GateConstraint(gate, memory)
    constraint.attach(optimizer)
    ...                                                             # weigh the task's expert with gate(mean_BD)
    constraint.remove()
    memory.update(gate.inputs(mean_BD), energy=0.99)                # after the task

GainLoRA (Liang, Chen and Li, "Gated Integration of Low-Rank Adaptation for Continual Learning of Large Language
Models", NeurIPS 2025). Axes: B prompts, L length, D width of the token embeddings, H width of a gate's hidden layers
and of any layer's output, W width of any layer's input, S rows of a basis.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import final

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moelora.continual.inf_lora import extended_basis
from moelora.continual.subspace import RANK_TOLERANCE, projected


def mean_embedding(embeddings_BLD: Float[Tensor, "B L D"], mask_BL: Bool[Tensor, "B L"]) -> Float[Tensor, "B D"]:
    """Mean of the token embeddings of each prompt, padding left out: what a gate reads. At least fp32.

    Raises:
        ValueError: if a prompt has no token.
    """
    if not mask_BL.any(-1).all():
        empty = (~mask_BL.any(-1)).nonzero().flatten().tolist()
        raise ValueError(f"prompts {empty[:8]} have no token that the mask keeps; leave them out")
    wide = torch.promote_types(embeddings_BLD.dtype, torch.float32)
    # not a product with the mask: padding may hold NaN
    kept_BLD = embeddings_BLD.to(wide).masked_fill(~mask_BL[..., None], 0)
    return kept_BLD.sum(1) / mask_BL.sum(1, keepdim=True)


def gain(score: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """f(b) = |2 sigmoid(b) - 1| = |tanh(b / 2)|: in [0, 1], even, and exactly 0 at 0.

    The second form loses nothing near 0. At exactly 0 the gradient is 0.
    """
    return (score / 2).tanh().abs()


@final
class GainGate(nn.Module):
    """g(x) = f(G_{L+1} p_L) with p_l = SiLU(G_l p_{l-1}) and p_0 the mean embedding of the prompt's tokens.

    One weight for a whole prompt, in [0, 1], computed in the weights' dtype. The activation is our choice; the layers
    have no bias, as a bias could open the gate where its input is orthogonal to all it knows.

    Attributes:
        layers: G_1, ..., G_{L+1}, each with a row for each output; the last has one row.

    Raises:
        ValueError: if the widths of the layers do not follow each other, or the last has more than one row.
    """

    layers: nn.ParameterList

    def __init__(self, layers: Sequence[Float[Tensor, "_ _"]]) -> None:
        super().__init__()
        shapes = [tuple(layer.shape) for layer in layers]
        fits = all(below[0] == above[1] for below, above in pairwise(shapes))
        if not shapes or not fits or shapes[-1][0] != 1:
            raise ValueError(
                f"expected layers of shape (out, in), each as wide as the one below it and the last with one row, "
                f"got {shapes}"
            )
        self.layers = nn.ParameterList([nn.Parameter(layer.detach().clone()) for layer in layers])

    @classmethod
    def fresh(cls, widths: Sequence[int], *, generator: torch.Generator) -> "GainGate":
        """A random gate, as `nn.Linear` starts: `widths` are those of p_0, ..., p_L."""
        outs = [*widths[1:], 1]
        return cls([_uniform(wide, narrow, generator) for wide, narrow in zip(outs, widths, strict=True)])

    @classmethod
    def after(cls, previous: "GainGate", memory: "GateMemory", *, generator: torch.Generator) -> "GainGate":
        """The gate of the next task: G_1 ... G_L copied, a random G_{L+1} without its part in the memory's subspace.

        It is 0 on every input whose p_L the memory holds.

        Raises:
            ValueError: if the memory leaves no direction, so that the gate would be 0 everywhere.
        """
        width = previous.layers[-1].shape[1]
        memory.check_room(width)
        random_1W = _uniform(1, width, generator).to(previous.layers[-1])
        last_1W = projected(random_1W, memory.last_SW(width).to(random_1W.device))
        return cls([*list(previous.layers)[:-1], last_1W])

    def forward(self, mean_BD: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
        """The gate of each prompt."""
        return gain(einsum(self._hidden(mean_BD)[-1], self.layers[-1][0], "b w, w -> b"))

    @torch.no_grad()
    def inputs(self, mean_BD: Float[Tensor, "B D"]) -> list[Float[Tensor, "B _"]]:
        """p_0, ..., p_L: what each layer reads, for `GateMemory.update`."""
        return self._hidden(mean_BD)

    def _hidden(self, mean_BD: Tensor) -> list[Tensor]:
        hidden = [mean_BD.to(self.layers[0].dtype)]
        for layer_HW in list(self.layers)[:-1]:
            hidden.append(nn.functional.silu(einsum(hidden[-1], layer_HW, "b w, h w -> b h")))
        return hidden


@final
class GateMemory:
    """For each layer of the gates, the subspace of what it has read on all old tasks.

    Attributes:
        bases: an orthonormal basis for each layer, fp64; empty before the first task.
    """

    bases: list[Tensor]

    def __init__(self) -> None:
        self.bases = []

    def update(self, inputs: Sequence[Float[Tensor, "B _"]], energy: float) -> None:
        """Take in what the layers read on a finished task, by `extended_basis` in each.

        The bound on the gate is as good as the energy: with 1 it is zero on these very inputs, with less it is small
        where the left-out directions are weak.

        Raises:
            ValueError: if the number of layers is another than before, for an energy out of range, or inputs that are
                not finite; nothing is added then.
        """
        if self.bases and len(inputs) != len(self.bases):
            raise ValueError(f"expected the inputs of {len(self.bases)} layers, got {len(inputs)}")
        olds = self.bases or [read.new_zeros(0, read.shape[1], dtype=torch.float64) for read in inputs]
        self.bases = [extended_basis(old, read, energy) for old, read in zip(olds, inputs, strict=True)]

    def last_SW(self, width: int) -> Float[Tensor, "S W"]:
        """The basis of the last layer, of this width; without rows before the first task."""
        return self.bases[-1] if self.bases else torch.zeros(0, width, dtype=torch.float64)

    def check_room(self, width: int) -> None:
        """Raise ValueError if the last layer's basis spans everything."""
        if self.bases and len(self.bases[-1]) >= width:
            raise ValueError(
                f"the old tasks fill all {width} directions that the last layer of the gate reads, so a new gate would "
                "be closed everywhere; use wider layers, or a smaller energy in GateMemory.update"
            )


@final
class GateConstraint:
    """Keeps a gate closed on old tasks while it is trained: no layer moves along what it has read on them.

    The last layer starts without its part in the memory's subspace. Of the others the change is constrained, not the
    value: G_l - G_l at the start has no part in the subspace, so on old tasks each layer reads and gives what it did,
    and the last one still gives 0 (Proposition 3.1 of the source). Every gradient is projected in a hook, and once
    attached every layer after each optimiser step: Adam and weight decay leave the subspace although no gradient does.

    The zero holds for inputs whose p_0, ..., p_L all lie in the stored subspaces. It says nothing of other inputs, be
    they as harmless as the old tasks: calibrate the gate for those (`moelora.continual.calibration`). Move the gate to
    its device before it is constrained.

    Raises:
        ValueError: if the memory has another number of layers or other widths than the gate, or leaves the last layer
            no direction. The gate is untouched then.
    """

    def __init__(self, gate: GainGate, memory: GateMemory) -> None:
        layers = list(gate.layers)
        widths, known = [layer.shape[1] for layer in layers], [basis_SW.shape[1] for basis_SW in memory.bases]
        if known and widths != known:
            raise ValueError(f"expected a gate whose layers read widths {known}, as the memory has them, got {widths}")
        memory.check_room(widths[-1])
        self._layers: list[nn.Parameter] = layers
        bases = memory.bases or [layer.new_zeros(0, layer.shape[1]) for layer in layers]
        self._bases: list[Tensor] = [basis.to(layer.device) for basis, layer in zip(bases, layers, strict=True)]
        last_1W = projected(layers[-1].detach(), self._bases[-1])
        if not last_1W.norm() > RANK_TOLERANCE * layers[-1].detach().norm():
            raise ValueError(
                "the last layer of the gate lies in the subspace of the old tasks, so nothing is left of it; "
                "make the gate with GainGate.after"
            )
        with torch.no_grad():
            layers[-1].copy_(last_1W)
        self._starts: list[Tensor] = [layer.detach().clone() for layer in layers]
        self._handles: list[RemovableHandle] = []
        for layer, basis_SW in zip(layers, self._bases, strict=True):
            self._handles.append(layer.register_hook(lambda grad, basis_SW=basis_SW: projected(grad, basis_SW)))

    @torch.no_grad()
    def project_(self) -> None:
        """Take from every layer the part of its change that lies in the subspace, in place."""
        for layer, start, basis_SW in zip(self._layers, self._starts, self._bases, strict=True):
            layer.copy_(start + projected(layer - start, basis_SW))

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Project the gate after every step of this optimiser.

        Raises:
            ValueError: if the optimiser does not hold all layers.
        """
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not all(id(layer) in held for layer in self._layers):
            raise ValueError(
                "the optimizer does not hold all layers of the gate; give it gate.parameters(), or freeze the others"
            )
        self._handles.append(optimizer.register_step_post_hook(lambda *_: self.project_()))

    def remove(self) -> None:
        """Take all hooks away: the gate is free again, and keeps its values."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


# --- inside -----------------------------------------------------------------------------------------------------------


def _uniform(rows: int, width: int, generator: torch.Generator) -> Tensor:
    bound = width**-0.5
    return torch.empty(rows, width, device=generator.device).uniform_(-bound, bound, generator=generator)
