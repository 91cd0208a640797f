"""What gates leave alone, by the byte: numbers under autocast, weights and buffers, and everything else of a model."""

import copy

import pytest
import torch
from gated_mixtures import BOTH, CLOSED, Say, Told, bits, call, digest, patched, same_bits, tensors, whole_state
from generating import PLAIN, left_padded, prompt

import moelora
from moelora import Gated, MoELoRAConfig
from moelora.testing import tiny


def batch():
    """Three prompts of different lengths with the positions that `generate` gives them."""
    padded = left_padded([prompt(1, 6)[0], prompt(1, 3)[0], prompt(1, 5)[0]])
    return padded | {"position_ids": (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)}


@pytest.mark.parametrize("gates", [Say, Told])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_closed_is_the_base_under_autocast_too(gates, dtype, attention):
    """Logits, hidden states, keys and values, in a model with dropout, which is off; autocast stays as it is."""
    base = tiny.model("llama", attn_implementation=attention, attention_dropout=0.5).to(dtype)
    model = patched(base=copy.deepcopy(base))
    for autocast in (torch.bfloat16, torch.float16, None):
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            expected = tensors(call(base, **batch()))
            assert same_bits(tensors(call(model, gates(CLOSED), **batch())), expected)
            mixed = tensors(call(model, gates(CLOSED, BOTH, CLOSED), **batch()))
            for found, right in zip(mixed, expected, strict=True):
                assert torch.equal(bits(found[::2]), bits(right[::2]))
            assert not torch.equal(mixed[0][1], expected[0][1])
            assert torch.is_autocast_enabled("cpu") == (autocast is not None)
            if autocast is not None:
                assert torch.get_autocast_dtype("cpu") == autocast
                assert expected[0].dtype == autocast


@pytest.mark.parametrize("gates", [Say, Told])
def test_experts_dropout_is_off(gates):
    """It is for training: in evaluation a closed gate draws nothing and an open one gives the same twice."""
    base = tiny.model("llama")
    config = MoELoRAConfig(router=Gated(), dropout=0.5)
    model = moelora.patch_model(copy.deepcopy(base), num_experts=2, rank=2, config=config).eval()
    state = torch.get_rng_state()
    assert same_bits(tensors(call(model, gates(CLOSED), **batch())), tensors(call(base, **batch())))
    assert same_bits(*(tensors(call(model, gates(BOTH), **batch())) for _ in range(2)))
    assert torch.equal(torch.get_rng_state(), state)


def everything(model):
    """What a model is besides its tensors: flags, configurations, ties, the objects that it is made of, its hooks."""
    modules = dict(model.named_modules())
    return {
        "training": {name: module.training for name, module in modules.items()},
        "modules": {name: id(module) for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "hooks": {
            name: len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in modules.items()
        },
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "generation": model.generation_config.to_dict(),
        "tied": model.lm_head.weight is model.model.embed_tokens.weight,
    }


@pytest.mark.parametrize("gates", [Say, Told])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_nothing_is_left_behind(gates, attention):
    """Patch, set gates, generate with some closed and some open, unpatch: the model is the one that it was."""
    model = tiny.model("llama", attn_implementation=attention, tie_word_embeddings=True)
    model.generation_config.update(top_k=7, pad_token_id=0)
    ways = ({}, {"cache_implementation": "static", "disable_compile": True}, {"num_beams": 2})
    # transformers leaves things of its own on a model: hooks for hidden states, the length of the last static cache
    expected = tensors(call(model, **batch()))
    tokens = [model.generate(prompt(), **PLAIN, **options, max_new_tokens=3) for options in ways]
    model.model.layers[1].mlp.train()
    before, weights = everything(model), digest(whole_state(model))
    assert before["tied"]

    moelora.patch_model(model, num_experts=2, rank=2, config=MoELoRAConfig(router=Gated()))
    for rows in ([CLOSED], [CLOSED, BOTH], [BOTH]):
        moelora.set_gates(model, gates(*rows))
        for options, right in zip(ways, tokens, strict=True):
            found = model.generate(prompt(), **PLAIN, **options, max_new_tokens=3)
            assert rows != [CLOSED] or torch.equal(found, right)
    assert everything(model)["config"] == before["config"]
    assert everything(model)["attention"] == attention
    assert everything(model)["generation"] == before["generation"]
    moelora.unpatch_model(model)

    assert everything(model) == before
    assert digest(whole_state(model)) == weights
    assert same_bits(tensors(call(model, **batch())), expected)


def test_a_thousand_toggles_write_nothing():
    """Not a parameter, not a buffer, those too that no checkpoint holds; and each answer is the one of its gates."""
    model = patched(base=tiny.model("llama", tie_word_embeddings=True))
    names = whole_state(model)
    assert any("inv_freq" in name for name in names)
    before = digest(names)
    gates = {row: Told(list(row)) for row in (tuple(CLOSED), tuple(BOTH))}
    answers = {row: tensors(call(model, gates[row])) for row in gates}
    for step in range(1000):
        row = tuple(BOTH if step % 2 else CLOSED)
        moelora.set_gates(model, gates[row])
        if step % 100 < 2:
            assert same_bits(tensors(call(model)), answers[row])
    assert digest(whole_state(model)) == before
    assert not same_bits(*answers.values())
