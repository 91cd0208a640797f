"""The models of `model.py`: a Llama of 1.1 B parameters, and what each provider makes of it. Begin with builders."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import ArrowConfig, LoraConfig, get_peft_model
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import moelora
from benchmarks.gpu.peers import SCALE
from benchmarks.gpu.providers import ARROW, BASE, BASE_AGAIN, MOELORA, PEFT, SHARED
from benchmarks.gpu.shared_input import fill
from moelora import Learned, MoELoRAConfig

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
RANK, EXPERTS, TOP_K = 16, 8, 2

UNMASKED = "sdpa_unmasked"
"""Causal attention for which transformers builds no mask, and so does not ask the device whether it needs one."""

AttentionInterface.register(UNMASKED, sdpa_attention_forward)


def tinyllama(layers: int, *, tiny: bool) -> LlamaConfig:
    """The shape of TinyLlama 1.1 B; `tiny` is a shape for a CPU."""
    if tiny:
        return LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=128,
        )
    return LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=2048,
    )


def random_llama(config: LlamaConfig, device: torch.device) -> Any:
    """A Llama in bf16 with random weights, frozen."""
    torch.manual_seed(0)
    with device:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.requires_grad_(False)


def pretrained(name: str, device: torch.device) -> Any:
    """A model from the hub or a folder, in bf16, frozen."""
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    return model.to(device).requires_grad_(False)


def builders(base: Any, backend: str) -> dict[str, Callable[[], Any]]:
    """How each provider makes its model; all but the base work on a copy."""
    return {
        BASE: lambda: base,
        PEFT: lambda: peft_single(copy.deepcopy(base)),
        ARROW: lambda: peft_arrow(copy.deepcopy(base)),
        SHARED: lambda: mixture(copy.deepcopy(base), backend, share_router=True),
        MOELORA: lambda: mixture(copy.deepcopy(base), backend, share_router=False),
        BASE_AGAIN: lambda: base,
    }


def peft_single(model: Any) -> Any:
    """PEFT with one LoRA, in the base's dtype."""
    wrapped = get_peft_model(model, lora(), autocast_adapter_dtype=False)
    fill(wrapped, "lora_B")
    return wrapped


def peft_arrow(model: Any) -> Any:
    """PEFT's Arrow over as many LoRAs as moelora has experts, as `peft.create_arrow_model` puts them together."""
    names = [f"task_{number}" for number in range(EXPERTS)]
    wrapped = get_peft_model(model, lora(), adapter_name=names[0], autocast_adapter_dtype=False)
    for name in names[1:]:
        wrapped.add_adapter(name, lora(), autocast_adapter_dtype=False)
    fill(wrapped, "lora_B")

    arrow = ArrowConfig(top_k=TOP_K)
    arrow.task_adapter_names, arrow.gks_adapter_names = names, []
    wrapped.add_adapter("arrow_router", lora(arrow), autocast_adapter_dtype=False)
    wrapped.set_adapter("arrow_router")
    return wrapped


def lora(arrow: ArrowConfig | None = None) -> LoraConfig:
    """One LoRA, or Arrow's router over those that are there."""
    return LoraConfig(r=RANK, lora_alpha=int(SCALE * RANK), target_modules=TARGETS, arrow_config=arrow)


def mixture(model: Any, backend: str, *, share_router: bool) -> Any:
    """moelora with fresh experts that do something; its losses on the routings are on, as they are by default."""
    config = MoELoRAConfig(router=Learned(top_k=TOP_K), share_router=share_router, backend=backend)
    moelora.patch_model(model, num_experts=EXPERTS, rank=RANK, targets=TARGETS, config=config)
    fill(model, "B_trainable_RO")
    return model
