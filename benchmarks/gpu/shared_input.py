"""Three projections of one input, as attention has them: q of full width, k and v of a quarter. Begin with builders."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import moelora
from benchmarks.gpu.peers import SCALE
from benchmarks.gpu.providers import BASE, MOELORA, PEFT, SHARED
from moelora import AuxLosses, Learned, MoELoRAConfig

TARGETS = ["q_proj", "k_proj", "v_proj"]


class Projections(nn.Module):
    """q, k and v of one input, frozen."""

    def __init__(self, width: int, narrow: int, device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator(device).manual_seed(0)
        for name, out_features in zip(TARGETS, (width, narrow, narrow), strict=True):
            linear = nn.Linear(width, out_features, bias=False, device=device, dtype=torch.bfloat16)
            nn.init.normal_(linear.weight, std=width**-0.5, generator=generator)
            self.add_module(name, linear.requires_grad_(False))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The three outputs."""
        return tuple(self.get_submodule(name)(x) for name in TARGETS)


def builders(
    base_of: Callable[[], Projections], *, rank: int, experts: int, top_k: int, backend: str
) -> dict[str, Callable[[], nn.Module]]:
    """How each provider makes its version of the three, which is called as a whole."""
    patched = partial(patch, base_of, rank=rank, experts=experts, top_k=top_k, backend=backend)
    return {
        BASE: base_of,
        PEFT: lambda: peft_single(base_of(), rank),
        SHARED: lambda: patched(share_router=True),
        MOELORA: lambda: patched(share_router=False),
    }


def peft_single(model: nn.Module, rank: int) -> nn.Module:
    """PEFT with one LoRA on each, in the base's dtype."""
    config = LoraConfig(r=rank, lora_alpha=int(SCALE * rank), target_modules=TARGETS)
    wrapped: Any = get_peft_model(model, config, autocast_adapter_dtype=False)
    fill(wrapped, "lora_B")
    # PEFT's layers inside the model itself: its wrapper is no part of what is compared
    return wrapped.base_model.model


def patch(
    base_of: Callable[[], Projections], *, rank: int, experts: int, top_k: int, backend: str, share_router: bool
) -> nn.Module:
    """moelora on the three as a group, its hooks included; without losses on the routings."""
    model = base_of()
    weight = next(model.parameters())
    config = MoELoRAConfig(
        router=Learned(top_k=top_k), share_router=share_router, losses=AuxLosses(load_balance=0.0), backend=backend
    )
    probe = torch.zeros(1, 2, weight.shape[1], dtype=weight.dtype, device=weight.device)
    moelora.patch_model(model, num_experts=experts, rank=rank, targets=TARGETS, config=config, probe_inputs=probe)
    fill(model, "B_trainable_RO")
    return model


def fill(model: nn.Module, part: str) -> None:
    """Random numbers for the factors that start as zeros: experts that do something."""
    for name, parameter in model.named_parameters():
        if part in name:
            generator = torch.Generator(parameter.device).manual_seed(2)
            nn.init.normal_(parameter, std=0.02, generator=generator)
