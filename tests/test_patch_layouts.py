"""Adapters on bases of another layout through the front door: fused and split projections, names of transformers 4."""

from typing import Any

import pytest
import torch
import transformers
from front_door import WEIGHTS, alone, assert_same, lora, output_of
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

import moelora
from moelora.mixture import find_mixture
from moelora.testing import tiny


def fused_and_split() -> tuple[nn.Module, nn.Module]:
    """A Phi-3, whose projections are fused, and a Llama that computes the same from split ones."""
    shape: dict[str, Any] = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    fused = tiny.model("phi3")
    split = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()
    weights = {}
    for key, value in fused.state_dict().items():
        if "qkv_proj" in key:
            for part, piece in zip("qkv", value.split([32, 16, 16]), strict=True):
                weights[key.replace("qkv_proj", f"{part}_proj")] = piece
        elif "gate_up_proj" in key:
            for part, piece in zip(("gate", "up"), value.chunk(2), strict=True):
                weights[key.replace("gate_up_proj", f"{part}_proj")] = piece
        else:
            weights[key] = value
    split.load_state_dict(weights)
    assert_same(output_of(split), output_of(fused))
    return fused, split


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:.*have invalid shape")
@pytest.mark.parametrize("lora_bias", [False, True], ids=["", "with bias"])
def test_a_split_adapter_on_a_fused_base(lora_bias, tmp_path):
    """q, k, v and gate go to qkv_proj and gate_up_proj, with differing ranks and scales and a part missing."""
    fused, split = fused_and_split()
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"],
        rank_pattern={"k_proj": 2},
        alpha_pattern={"v_proj": 3},
        exclude_modules=r".*layers\.1.*v_proj",
        lora_bias=lora_bias,
    )
    expected = lora("llama", tmp_path / "split", config, model=split)

    model = moelora.patch_model(fused, [tmp_path / "split"], router="given")

    assert {path.rpartition(".")[2] for path in find_mixture(model)[1].layers} == {"qkv_proj", "o_proj", "gate_up_proj"}
    assert_same(alone(model, "split"), expected)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:.*have invalid shape")
@pytest.mark.parametrize("lora_bias", [False, True], ids=["", "with bias"])
def test_a_fused_adapter_on_a_split_base(lora_bias, tmp_path):
    """qkv_proj and gate_up_proj of an adapter are cut for the split projections."""
    fused, split = fused_and_split()
    targets = ["qkv_proj", "gate_up_proj", "o_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, rank_pattern={"qkv_proj": 3}, lora_bias=lora_bias)
    expected = lora("phi3", tmp_path / "fused", config, model=fused)

    model = moelora.patch_model(split, [tmp_path / "fused"], router="given")

    assert len(find_mixture(model)[1].layers) == 2 * 6
    assert_same(alone(model, "fused"), expected)


def test_an_adapter_for_interleaved_heads_is_refused_on_a_split_base(tmp_path):
    """query_key_value mixes q, k and v head by head: which rows are whose is not guessed."""
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["query_key_value"])
    lora("gpt_neox", tmp_path / "neox", config)
    folder = tmp_path / "neox"
    tensors = load_file(folder / WEIGHTS)
    renamed = {
        key.replace("gpt_neox.layers", "model.layers").replace("attention.", "self_attn."): value
        for key, value in tensors.items()
    }
    save_file(renamed, folder / WEIGHTS)

    with pytest.raises(moelora.AdapterError, match="per head in query_key_value"):
        moelora.patch_model(tiny.model("llama"), [folder])


def test_a_vit_adapter_named_by_transformers_4(tmp_path):
    """transformers 5 renamed ViT's projections; an adapter of before acts at the same ones."""
    config = LoraConfig(r=3, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj", "fc1"])
    expected = lora("vit", tmp_path / "vit", config)
    old = {
        "vit.layers.": "vit.encoder.layer.",
        "attention.q_proj": "attention.attention.query",
        "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
    }
    tensors = load_file(tmp_path / "vit" / WEIGHTS)
    renamed = {}
    for key, value in tensors.items():
        for new, before in old.items():
            key = key.replace(new, before)
        renamed[key] = value
    save_file(renamed, tmp_path / "vit" / WEIGHTS)

    model = moelora.patch_model(tiny.model("vit"), [tmp_path / "vit"], router="given")

    assert not set(renamed) & set(tensors)
    assert_same(alone(model, "vit"), expected)


def composite() -> nn.Module:
    """A tiny Llava: a vision tower of one family beside a language model of another."""
    small: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**small, vocab_size=50),
        vision_config=transformers.CLIPVisionConfig(**small, image_size=8, patch_size=4),
        image_token_index=49,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlavaForConditionalGeneration(config).eval()


def test_a_composite_models_adapter_named_by_transformers_4(tmp_path):
    """The renames of sub-models are known too: a Llava adapter with factors in both towers finds them all."""
    tower = "vision_tower.vision_model"
    new = {
        "model.language_model.layers.1.self_attn.q_proj": "language_model.model.layers.1.self_attn.q_proj",
        "model.vision_tower.encoder.layers.0.self_attn.q_proj": f"{tower}.encoder.layers.0.self_attn.q_proj",
    }
    tensors = {}
    for path in new.values():
        tensors |= {f"base_model.model.{path}.lora_A.weight": torch.randn(2, 16)}
        tensors |= {f"base_model.model.{path}.lora_B.weight": torch.randn(16, 2)}

    images = {"input_ids": torch.full((1, 6), 49), "pixel_values": torch.randn(1, 3, 8, 8)}
    images["input_ids"][:, 4:] = 3
    source = (tensors, {"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    model = moelora.patch_model(
        composite(),
        {"seen": source},
        router="given",
        probe_inputs=images,
    )

    assert set(find_mixture(model)[1].layers) == set(new)
    moelora.add_expert(model, source, name="again")
    base = composite()(**images).logits
    with moelora.use_experts(model, "seen"):
        seen = model(**images).logits
    with moelora.use_experts(model, "again"):
        assert torch.equal(model(**images).logits, seen)
    assert (seen - base).abs().max() > 1e-3
