"""Adapters for tests, written by PEFT itself on a tiny model, with random factors that do something."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import moelora
from moelora.testing import tiny

# PEFT refuses to adapt these, because a fused kernel may bypass them; moelora proves that they are called
REFUSED_BY_PEFT: dict[str, tuple[str, ...]] = dict.fromkeys(
    ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"), ("out_proj",)
)


def main_output(output) -> Tensor:
    """The tensor that a model is used for."""
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        if name in output:
            return output[name]
    raise KeyError(list(output))


def sites_of(family: str, *, every: int = 1) -> list[str]:
    """Paths that both moelora and PEFT adapt in a tiny model."""
    paths = [site.path for site in moelora.resolve_targets(tiny.model(family)).sites]
    return [path for path in paths if not path.endswith(REFUSED_BY_PEFT.get(family, ("/",)))][::every]


def peft_model(
    family: str,
    folder: Path | None = None,
    *,
    seed: int = 0,
    rank: int = 4,
    every: int = 1,
    std: float = 0.1,
    paths: list[str] | None = None,
    **options,
) -> Any:
    """A tiny model with one PEFT LoRA, saved to `folder`: mixed ranks and alphas, all factors random."""
    paths = sites_of(family, every=every) if paths is None else paths
    config = LoraConfig(
        r=rank,
        lora_alpha=8,
        target_modules=paths,
        rank_pattern={paths[0]: 2},
        alpha_pattern={paths[-1]: 5},
        fan_in_fan_out=family == "gpt2",
        **options,
    )
    model = get_peft_model(tiny.model(family), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, std, generator=generator)
    if folder is not None:
        model.save_pretrained(str(folder))
    return model.eval()
