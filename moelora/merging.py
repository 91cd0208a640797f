"""Fold a mixture that is the same for every token into the base model. Begin with merge."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from einops import einsum
from torch import Tensor, nn

from moelora.bank import ExpertBank
from moelora.frozen_linear import HOOKS
from moelora.kernels.fused import PLAIN
from moelora.layer import MoELoRALinear
from moelora.mixture import Mixture, find_mixture
from moelora.patch import unpatch_model
from moelora.routers.gated import refuse_leaving_gates
from moelora.routers.task_embedding import TaskEmbedding, TaskEmbeddingRouter

CONV1D = ("transformers.pytorch_utils", "Conv1D")
"""Module and name of GPT-2's projection, whose weight is stored (in, out)."""


@torch.no_grad()
def merge(model: nn.Module, *, task: str | None = None, weights: "str | Mapping[str, float] | None" = None) -> Any:
    """Add a fixed mixture of the experts to the base's weights, and take the mixture out.

        W' = W + sum over e of  g_e * scale_e * B_e A_e

    and the biases of experts that have one are added to the base's in the same way.

    The sum is computed in fp64 and rounded once, to the base's dtype. So the outputs are those of the mixture up to the
    rounding of W', which in 16 bits may lose a part of a small expert; in fp32 they agree to some 1e-6.

    Everything is computed before anything is changed: for a while the patched projections are in memory twice. The
    base's weights stay changed; to have them back, load the model again.

    Args:
        model: a patched model.
        task: of a mixture with `TaskEmbedding`, whose gate is the same for all tokens of a task (MOELoRA, Liu et al.
            2023, arXiv 2310.18339).
        weights: weight of each expert, on top of its own trained scale; or one expert's name, for weight 1. This
            mixture takes the place of the router, as in `use_experts`.

    Returns:
        The model, which is a plain one now, with the flags of `requires_grad` that it had before it was patched.

    Raises:
        ValueError: for a router that looks at the token, experts that unlearn behind gates, an unknown name, a
            quantised or tied weight, a bias that the base has no place for. The model is as it was then.
    """
    root, mixture = find_mixture(model)
    refuse_leaving_gates(mixture.config.router)
    weights_of = _weights_by_site(mixture, task, weights)
    for site, layer in mixture.layers.items():
        _check_base(site, layer, weights_of[site])
    _check_untied(root, mixture, weights_of)

    merged: list[tuple[Tensor, Tensor]] = []
    for site, layer in mixture.layers.items():
        for old, new in _merged(layer, weights_of[site]):
            if not torch.isfinite(new).all():
                raise ValueError(f"the merged weight of {site!r} is not finite in {new.dtype}; nothing was changed")
            merged.append((old, new))

    unpatch_model(model)
    for old, new in merged:
        old.copy_(new)
    return model


# --- inside -----------------------------------------------------------------------------------------------------------


def _weights_by_site(
    mixture: Mixture, task: str | None, weights: "str | Mapping[str, float] | None"
) -> dict[str, dict[int, float]]:
    """What each expert weighs at each site, by id; only those that weigh anything."""
    router = mixture.config.router
    if task is not None and weights is not None:
        raise ValueError("pass either task= or weights=, not both: each says what the mixture is")
    if weights is not None:
        named = {weights: 1.0} if isinstance(weights, str) else weights
        known = {mixture.index(name): float(weight) for name, weight in named.items()}
        if not all(map(math.isfinite, known.values())):
            raise ValueError(f"weights must be finite, got {dict(named)}")
        known = {index: weight for index, weight in known.items() if weight}
        if not known:
            raise ValueError(
                f"no expert has a weight in {named}; the mixture is the base, moelora.unpatch_model has it"
            )
        return dict.fromkeys(mixture.layers, known)
    if not isinstance(router, TaskEmbedding):
        raise ValueError(
            f"only a mixture that is the same for every token can be merged: this model's router is {router}; "
            "say with weights= which mixture is meant, or keep the model patched"
        )
    if task not in router.tasks:
        raise ValueError(f"there is no task {task!r}; this model has the tasks {router.tasks}, pass task=")
    place, found = router.tasks.index(task), {}
    for site, layer in mixture.layers.items():
        assert isinstance(layer.router, TaskEmbeddingRouter)
        found[site] = dict(enumerate(layer.router.mixtures()[place].tolist()))
    return found


def _acting(bank: ExpertBank, weights: Mapping[int, float]) -> dict[int, float]:
    """The experts that change this site."""
    return {index: weight for index, weight in weights.items() if weight and bank.ranks[index]}


def _check_base(site: str, layer: MoELoRALinear, weights: Mapping[int, float]) -> None:
    """Raise unless the base's weight and bias are plain numbers that the experts' can be added to."""
    base: Any = layer.base
    acting = _acting(layer.bank, weights)
    if not acting:
        return
    kind = type(base).__module__, type(base).__name__
    if (
        (type(base) is not nn.Linear and kind != CONV1D)
        or "forward" in base.__dict__
        or any(base.__dict__[hooks] for hooks in HOOKS)
    ):
        raise ValueError(
            f"the base of {site!r} is a {'.'.join(kind)} or carries hooks, and only a plain nn.Linear or Conv1D can be "
            "merged into; load the base unquantised, or write the mixture as a LoRA with moelora.export_adapter"
        )
    for name, tensor in (("weight", base.weight), ("bias", base.bias)):
        if tensor is None:
            continue
        if type(tensor) not in PLAIN or tensor.is_meta or not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise ValueError(
                f"the {name} of {site!r} is a {type(tensor).__name__} of {tensor.dtype} on {tensor.device}; expected "
                "an ordinary tensor in 16 bits or more, not quantised, sharded or offloaded"
            )
    if base.bias is None and any(layer.bank.expert(index).bias_O is not None for index in acting):
        raise ValueError(
            f"an expert of {site!r} has a bias, and the base has none that it could be added to; "
            "write the mixture as a LoRA with moelora.export_adapter, which keeps biases"
        )


def _check_untied(root: nn.Module, mixture: Mixture, weights_of: Mapping[str, Mapping[int, float]]) -> None:
    """Raise if another module reads memory that would be changed."""
    changed = {id(layer.base): site for site, layer in mixture.layers.items() if _acting(layer.bank, weights_of[site])}
    spans = []
    for path, module in root.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.numel() and not tensor.is_meta and type(tensor) in PLAIN:
                begin = tensor.data_ptr()
                end = begin + tensor.element_size() * (1 + sum(_reach(tensor)))
                spans.append((str(tensor.device), begin, end, f"{path}.{name}", changed.get(id(module))))

    # in the order of memory, whatever begins before the furthest end so far lies over another
    furthest = None
    for span in sorted(spans, key=lambda span: span[:3]):
        if furthest is not None and span[0] == furthest[0] and span[1] < furthest[2]:
            site = span[4] or furthest[4]
            if site is not None:
                raise ValueError(
                    f"the weight of {site!r} is tied: {furthest[3]!r} and {span[3]!r} are the same memory, and merging "
                    "would change both; untie them, or write the mixture as a LoRA with moelora.export_adapter"
                )
        if furthest is None or span[0] != furthest[0] or span[2] > furthest[2]:
            furthest = span


def _reach(tensor: Tensor) -> list[int]:
    """How many elements further the last index of each axis lies."""
    return [(size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]


def _merged(layer: MoELoRALinear, weights: Mapping[int, float]) -> list[tuple[Tensor, Tensor]]:
    """The base's tensors that change, each with its new value."""
    acting = _acting(layer.bank, weights)
    if not acting:
        return []
    base: Any = layer.base
    experts = [layer.bank.expert(index) for index in acting]
    gates = [weight * expert.scale for expert, weight in zip(experts, acting.values(), strict=True)]

    # the rank rows of all experts, one after the other
    A_RD = torch.cat([expert.A_RD.double() for expert in experts])
    B_RO = torch.cat([gate * expert.B_RO.double() for expert, gate in zip(experts, gates, strict=True)])
    conv1d = type(base).__name__ == CONV1D[1]
    delta = einsum(A_RD, B_RO, "r d, r o -> d o" if conv1d else "r d, r o -> o d")

    pairs = [(base.weight, (base.weight.double() + delta).to(base.weight.dtype))]
    biases = [
        gate * expert.bias_O.double() for expert, gate in zip(experts, gates, strict=True) if expert.bias_O is not None
    ]
    if biases:
        pairs.append((base.bias, (base.bias.double() + torch.stack(biases).sum(0)).to(base.bias.dtype)))
    return pairs
