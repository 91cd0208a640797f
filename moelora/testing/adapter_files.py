"""A small PEFT adapter as the two files that a repository or a folder holds. Begin with adapter_files."""

import json

import torch
from safetensors.torch import save

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


def adapter_files(seed: int = 0, *, modules: int = 2, width: int = 4, rank: int = 4) -> dict[str, bytes]:
    """File name -> content of a random LoRA on `modules` square projections `layers.<i>.q_proj`."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for index in range(modules):
        prefix = f"base_model.model.layers.{index}.q_proj"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, width, generator=generator)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(width, rank, generator=generator)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj"]}
    return {CONFIG_NAME: json.dumps(config).encode(), WEIGHTS_NAME: save(tensors, {"format": "pt"})}
