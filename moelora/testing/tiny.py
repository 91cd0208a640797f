"""Tiny random models of every family, built from a config in code: nothing is downloaded. Begin with `model`.

    model = tiny.model("llama")
    logits = model(**tiny.inputs(model)).logits
    tiny.adapter(model, "law-lora")                     # a folder with a random PEFT LoRA of it

Two layers, small distinct widths, float32, eval mode. No function here touches the global random state.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from moelora.bank import Expert
from moelora.integrations.example_inputs import example_inputs
from moelora.integrations.peft_folder import write_adapter
from moelora.integrations.targets import resolve_sites
from moelora.testing.tiny_configs import CONFIGS

FAMILIES: tuple[str, ...] = tuple(CONFIGS)


def model(family: str, *, seed: int = 0, **config_overrides: Any) -> Any:
    """A tiny random `transformers` model of a family, in eval mode and float32.

    `config_overrides` go to the config (`num_hidden_layers=4`, `attn_implementation="eager"`). Every parameter is
    random, biases and norms too, so that no two of them can be mistaken for one another. Typed `Any`, because what a
    model offers beyond `nn.Module` (its config, `generate`, its blocks) depends on the family.
    """
    if family not in CONFIGS:
        raise ValueError(f"unknown family {family!r}; expected one of {', '.join(FAMILIES)}")
    row = CONFIGS[family]

    with _seeded(seed):
        config = getattr(transformers, row.config)(**(deepcopy(row.options) | config_overrides))
        built: nn.Module = getattr(transformers, row.model)(config).float()
        _randomise(built)
    return built.eval()


def inputs(model: nn.Module, *, batch: int = 2, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Valid keyword arguments for a forward of a `transformers` model, random but the same for the same seed.

    Text comes with an attention mask; every second row is right-padded by two tokens. An encoder-decoder model also
    gets decoder tokens, a vision model images of its configured size, an audio model features of its configured length.
    """
    generator = torch.Generator().manual_seed(seed)
    made = example_inputs(model, batch=batch, length=length, generator=generator, decoder_length=max(length - 1, 1))

    # pad some rows, where there is text to pad
    ids = made.get("input_ids")
    if ids is not None and length > 3:
        mask = torch.ones_like(ids)
        mask[1::2, -2:] = 0
        # the end token stays the last real one, where the family pools at it
        moved = ids[1::2, -1:].clone()
        config: Any = model.config
        ids[1::2, -2:] = getattr(config.get_text_config(), "pad_token_id", None) or 0
        ids[1::2, -3:-2] = moved
        made["attention_mask"] = mask
    return made


def adapter(model: nn.Module, folder: str | Path, *, seed: int = 0, rank: int = 4) -> None:
    """Write a random LoRA for the attention and state-space projections of a model, as PEFT would have saved it."""
    generator = torch.Generator().manual_seed(seed)
    experts = {
        site.path: Expert(
            torch.randn(rank, site.in_features, generator=generator) / 8,
            torch.randn(rank, site.out_features, generator=generator) / 8,
            2.0,
        )
        for site in resolve_sites(model).sites
    }
    conv1d = any(type(model.get_submodule(path)).__name__ == "Conv1D" for path in experts)
    write_adapter(Path(folder), experts, fan_in_fan_out=conv1d)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Models draw their initial weights from the global CPU state; give them a seeded one and put the old one back."""
    state = torch.get_rng_state()
    # not torch.manual_seed, which would seed the accelerators too
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


@torch.no_grad()
def _randomise(built: nn.Module) -> None:
    """Fresh random values for all weights: matrices of about unit gain, small noise on norms, biases and decays."""
    for name, parameter in built.named_parameters():
        if parameter.ndim == 2 and name.endswith("weight") and not name.endswith("conv1d.weight"):
            parameter.normal_(std=0.7 / math.sqrt(min(parameter.shape)))
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
