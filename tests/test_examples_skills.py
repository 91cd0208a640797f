"""The adapters that the main job mixes are whole: ten plain PEFT folders that fit the encoder, with their heads."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

import moelora

EXAMPLES = Path(__file__).parents[1] / "examples"
DOMAINS = list(json.loads((EXAMPLES / "data" / "clinc150" / "domains.json").read_text()))


@pytest.fixture(scope="module")
def encoder():
    """A model of the encoder's shape, with random weights and few words."""
    config = BertConfig(
        vocab_size=50, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    return BertModel(config).eval()


def test_ten_skills_are_small():
    """One folder a domain, at most 4 MB together."""
    folders = sorted(path.name for path in (EXAMPLES / "skills").iterdir() if path.is_dir())

    assert folders == sorted(DOMAINS)
    assert sum(path.stat().st_size for path in (EXAMPLES / "skills").rglob("*") if path.is_file()) < 4e6


def test_ten_skills_make_one_model(encoder):
    """All of them fit as experts at all 24 projections, and no two are alike."""
    moelora.patch_model(encoder, {domain: EXAMPLES / "skills" / domain for domain in DOMAINS}, progress=False)
    try:
        inputs = {"input_ids": torch.arange(1, 9)[None]}
        outputs = []
        with torch.no_grad():
            for domain in DOMAINS:
                with moelora.use_experts(encoder, domain):
                    outputs.append(encoder(**inputs).last_hidden_state)
        layers = encoder._moelora.layers
    finally:
        moelora.unpatch_model(encoder)

    assert len(layers) == 24
    assert all(layer.bank.ranks == (4,) * 10 for layer in layers.values())
    for first in range(10):
        assert all((outputs[first] - outputs[second]).abs().max() > 1e-3 for second in range(first))


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_head_answers_fifteen_intents(domain):
    """A linear map from the encoder's width, finite."""
    head = load_file(EXAMPLES / "skills" / domain / "head.safetensors")

    assert {name: tuple(tensor.shape) for name, tensor in head.items()} == {"weight": (15, 384), "bias": (15,)}
    assert all(torch.isfinite(tensor).all() for tensor in head.values())
