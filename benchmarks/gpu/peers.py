"""Who is compared, one projection each: a frozen linear, PEFT, mixtures in torch, moelora. Begin with Weights.

Every mixture computes y = W x + scale * sum over the chosen e of g_e * B_e (A_e x), with g the softmax over the top-k
logits. Peers hold their experts in the base's dtype, their fastest; moelora as it comes: fp32 where experts are
trained, the base's dtype where they are frozen. Routers are fp32 parameters. Peers multiply by them in the base's dtype
and go on in fp32, as Mixtral and MixLoRA do: that is cheaper than the fp32 product that moelora promises.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, final

import torch
from einops import einsum
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

import moelora
from benchmarks.gpu.providers import BASE, COMPILED, DENSE, GROUPED, LOOP, MOELORA, PEFT, PEFT_FP32
from moelora import Learned, MoELoRAConfig

SCALE = 2.0
"""alpha / rank with alpha = 2 * rank, moelora's default."""


class Weights(NamedTuple):
    """The numbers of one projection: a base and a mixture.

    Attributes:
        base_OD: frozen; its dtype is the layer's.
        router_ED: fp32.
        A_ERD, B_ERO: fp32 factors.
        top_k: experts of a token.
        train_experts: whether the factors get gradients; the router always does.
    """

    base_OD: Tensor
    router_ED: Tensor
    A_ERD: Tensor
    B_ERO: Tensor
    top_k: int
    train_experts: bool = True


def draw_weights(
    in_features: int,
    out_features: int,
    *,
    num_experts: int,
    rank: int,
    top_k: int,
    dtype: torch.dtype,
    device: torch.device,
    train_experts: bool = True,
) -> Weights:
    """Random numbers, always the same ones; what the mixture adds is about half as large as the base's output."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.empty(shape, device=device).normal_(0, std, generator=generator)

    return Weights(
        normal(out_features, in_features, std=in_features**-0.5).to(dtype),
        normal(num_experts, in_features, std=0.02),
        normal(num_experts, rank, in_features, std=in_features**-0.5),
        normal(num_experts, rank, out_features, std=0.3 * rank**-0.5),
        top_k,
        train_experts,
    )


def expected_output(weights: Weights, x_TD: Tensor) -> Tensor:
    """The mixture in fp32, for a few tokens."""
    x_TD, base_OD = x_TD.float(), weights.base_OD.float()
    chosen_TK, experts_TK = (x_TD @ weights.router_ED.T).topk(weights.top_k, dim=-1)
    gate_TE = torch.zeros(len(x_TD), len(weights.router_ED), device=x_TD.device)
    gate_TE = gate_TE.scatter(1, experts_TK, chosen_TK.softmax(-1))
    hidden_TER = einsum(x_TD, weights.A_ERD, "t d, e r d -> t e r")
    delta_TO = einsum(hidden_TER * gate_TE[..., None], weights.B_ERO, "t e r, e r o -> t o")
    return x_TD @ base_OD.T + SCALE * delta_TO


def frozen_linear(weights: Weights) -> nn.Linear:
    """The base alone."""
    linear = nn.Linear(weights.base_OD.shape[1], weights.base_OD.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weights.base_OD, requires_grad=False)
    return linear


# --- mixtures in torch ------------------------------------------------------------------------------------------------


class RoutedLinear(nn.Module, ABC):
    """A frozen linear plus a routed mixture; how the mixture is computed is `delta`."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        dtype, train = weights.base_OD.dtype, weights.train_experts
        self.base, self.top_k = frozen_linear(weights), weights.top_k
        self.router_ED = nn.Parameter(weights.router_ED.clone())
        self.A_ERD = nn.Parameter(weights.A_ERD.to(dtype, copy=True), requires_grad=train)
        self.B_ERO = nn.Parameter(weights.B_ERO.to(dtype, copy=True), requires_grad=train)

    def forward(self, x_TD: Tensor) -> Tensor:
        logits_TE = F.linear(x_TD, self.router_ED.to(x_TD.dtype)).float()
        chosen_TK, experts_TK = logits_TE.topk(self.top_k, dim=-1)
        return self.base(x_TD) + self.delta(x_TD, experts_TK, SCALE * chosen_TK.softmax(dim=-1))

    @abstractmethod
    def delta(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """What the chosen experts add."""


@final
class DenseMixture(RoutedLinear):
    """Two matrix products over all experts, gated in between."""

    def delta(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        gate_TE = x_TD.new_zeros(len(x_TD), len(self.A_ERD)).scatter(1, experts_TK, weights_TK.to(x_TD.dtype))
        hidden_TER = F.linear(x_TD, self.A_ERD.flatten(0, 1)).unflatten(1, self.A_ERD.shape[:2])
        return (hidden_TER * gate_TE[..., None]).flatten(1) @ self.B_ERO.flatten(0, 1)


@final
class LoopMixture(RoutedLinear):
    """Expert by expert, each on its own tokens, added up with index_add: PEFT's, MixLoRA's and MoE-PEFT's way."""

    def delta(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        delta_TO = x_TD.new_zeros(len(x_TD), self.B_ERO.shape[-1])
        for expert in range(len(self.A_ERD)):
            token_N, slot_N = (experts_TK == expert).nonzero(as_tuple=True)
            output_NO = F.linear(x_TD.index_select(0, token_N), self.A_ERD[expert]) @ self.B_ERO[expert]
            delta_TO.index_add_(0, token_N, output_NO * weights_TK[token_N, slot_N, None].to(x_TD.dtype))
        return delta_TO


@final
class GroupedMixture(RoutedLinear):
    """Tokens sorted by expert, two grouped matrix products, sorted back: transformers' `grouped_mm` experts."""

    def delta(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        sorted_N, order_N = experts_TK.flatten().sort()
        experts_E = torch.arange(len(self.A_ERD), device=x_TD.device)
        ends_E = torch.searchsorted(sorted_N, experts_E, right=True).int()

        # index_select: the backward pass of plain indexing sorts
        rows_ND = x_TD.index_select(0, order_N // self.top_k)
        hidden_NR = F.grouped_mm(rows_ND, self.A_ERD.transpose(1, 2), offs=ends_E)
        output_NO = F.grouped_mm(hidden_NR, self.B_ERO, offs=ends_E)

        output_TKO = output_NO.index_select(0, order_N.argsort()).unflatten(0, experts_TK.shape)
        return (weights_TK.to(x_TD.dtype)[:, None] @ output_TKO)[:, 0]


# --- layers of packages -----------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A model of one projection, for packages that patch models."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.proj = frozen_linear(weights)

    def forward(self, x: Tensor) -> Tensor:
        """The projection."""
        return self.proj(x)


def peft_single(weights: Weights, *, in_fp32: bool) -> nn.Module:
    """PEFT with the first expert as its one LoRA, in fp32 as it comes by default, or in the base's dtype."""
    rank = weights.A_ERD.shape[1]
    config = LoraConfig(r=rank, lora_alpha=int(SCALE * rank), target_modules=["proj"])
    model: Any = get_peft_model(Block(weights), config, autocast_adapter_dtype=in_fp32)
    layer = model.base_model.model.proj
    layer.lora_A["default"].weight.data.copy_(weights.A_ERD[0])
    layer.lora_B["default"].weight.data.copy_(weights.B_ERO[0].T)
    return layer


def moelora_layer(weights: Weights, backend: str) -> nn.Module:
    """The projection as `moelora.patch_model` leaves it, without the hooks around a model."""
    model: Any = Block(weights)
    probe = torch.zeros(1, weights.base_OD.shape[1], dtype=weights.base_OD.dtype, device=weights.base_OD.device)
    moelora.patch_model(
        model,
        num_experts=len(weights.A_ERD),
        rank=weights.A_ERD.shape[1],
        targets=["proj"],
        config=MoELoRAConfig(router=Learned(top_k=weights.top_k), backend=backend),
        probe_inputs=probe,
    )
    model.proj.bank.A_trainable_RD.data.copy_(weights.A_ERD.flatten(0, 1))
    model.proj.bank.B_trainable_RO.data.copy_(weights.B_ERO.flatten(0, 1))
    model.proj.router.weight_ED.data.copy_(weights.router_ED)
    if not weights.train_experts:
        moelora.set_trainable(model)
    return model.proj


# --- all of them ------------------------------------------------------------------------------------------------------


def builders(backend: str = "auto") -> dict[str, Callable[[Weights], nn.Module]]:
    """How each layer is made, by the provider's name; ScatterMoE comes from `scatter.py`, if at all."""
    return {
        BASE: frozen_linear,
        PEFT: lambda weights: peft_single(weights, in_fp32=False),
        PEFT_FP32: lambda weights: peft_single(weights, in_fp32=True),
        DENSE: DenseMixture,
        COMPILED: compiled_dense,
        LOOP: LoopMixture,
        GROUPED: GroupedMixture,
        MOELORA: lambda weights: moelora_layer(weights, backend),
    }


def compiled_dense(weights: Weights) -> nn.Module:
    """`DenseMixture` under torch.compile; what was compiled for other shapes is forgotten."""
    torch.compiler.reset()
    layer = DenseMixture(weights)
    layer.compile(fullgraph=True, dynamic=False)
    return layer
