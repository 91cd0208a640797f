"""Patched models and prompts for the tests of generation."""

import inspect

import torch

import moelora
from moelora import Learned, MoELoRAConfig
from moelora.testing import tiny

DECODERS = ["llama", "gpt2", "qwen3", "gemma3", "mixtral", "mamba", "mamba2", "jamba", "granitemoehybrid", "qwen3_next"]
ENCODER_DECODERS = ["t5", "bart", "whisper"]
PLAIN = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def patched(family, *, share_router=False, router="learned"):
    """A tiny model with four random experts and routers that decide clearly."""
    learned = Learned(top_k=2, init_std=0.5)
    config = MoELoRAConfig(router=learned if router == "learned" else moelora.Given(), share_router=share_router)
    model = moelora.patch_model(tiny.model(family), num_experts=4, rank=3, config=config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".bank." in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    if model.config.is_encoder_decoder:
        # what these families suppress or force is not the subject here
        for name in ("forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"):
            setattr(model.generation_config, name, None)
    return model


def prompt(batch=2, length=6):
    """Random tokens, always the same."""
    return torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(5))


def left_padded(prompts):
    """Prompts of different lengths as one batch, padded on the left, with its mask."""
    length = max(len(row) for row in prompts)
    ids = torch.stack([torch.cat([row.new_zeros(length - len(row)), row]) for row in prompts])
    mask = torch.stack([torch.arange(length) >= length - len(row) for row in prompts])
    return {"input_ids": ids, "attention_mask": mask.long()}


def encoder_inputs(model, length=9):
    """Inputs of an encoder-decoder model without those of its decoder; the second row is padded where it is text."""
    inputs = tiny.inputs(model, length=length)
    del inputs["decoder_input_ids"]
    return inputs


def cache_name(model):
    """What a model calls its cache, as an argument and in its output: the name changed in transformers 5.24."""
    known = inspect.signature(model.forward).parameters
    return next(name for name in ("cache", "past_key_values", "cache_params") if name in known)
