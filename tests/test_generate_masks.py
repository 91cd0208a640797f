"""Padding during generation: which tokens count, in prefill, decoding, beams, static caches and behind an encoder."""

import pytest
import torch
from generating import PLAIN, cache_name, encoder_inputs, left_padded, patched, prompt
from transformers import DynamicCache, StaticCache

import moelora


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral", "mamba", "jamba", "granitemoehybrid"])
def test_a_recording_counts_the_real_tokens(family, options):
    """Prefill with left padding, then one token a row and step: padding is marked, and nothing else."""
    model = patched(family)
    inputs = left_padded([prompt(1, 4)[0], prompt(1, 6)[0], prompt(1, 3)[0]])
    with moelora.record(model) as recording:
        model.generate(**inputs, max_new_tokens=4, **PLAIN, **options)

    for site in model._moelora.layers:
        sizes = [call.experts_TK.shape[0] for call in recording.calls(site)]
        assert sizes == [18, 3, 3, 3], site
        valid = recording.valid(site)
        assert torch.equal(valid[:18], inputs["attention_mask"].flatten().bool()), site
        assert valid[18:].all()
        assert recording[site].experts_TK.shape == recording[site].weights_TK.shape == (27, 2)


@torch.no_grad()
def test_a_recording_counts_every_beam():
    """The model repeats the rows: so does the recording."""
    model = patched("llama")
    inputs = left_padded([prompt(1, 4)[0], prompt(1, 6)[0]])
    with moelora.record(model) as recording:
        model.generate(**inputs, max_new_tokens=3, num_beams=3, **PLAIN)

    site = next(iter(recording))
    assert [call.experts_TK.shape[0] for call in recording.calls(site)] == [36, 6, 6]
    assert int(recording.valid(site)[:36].sum()) == 3 * 10


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoders_padding_is_known_on_both_sides(family, options):
    """The encoder, called before the model itself, and the cross-attention's keys and values use its mask."""
    model = patched(family)
    inputs = encoder_inputs(model)
    with moelora.record(model) as recording:
        model.generate(**inputs, max_new_tokens=3, **PLAIN, **options)

    real = inputs["attention_mask"].flatten().bool()
    assert not real.all()
    readers = [site for site, layer in model._moelora.layers.items() if layer.reads_encoder]
    assert len(readers) == 4
    for site in model._moelora.layers:
        if ".encoder." in f".{site}" or site in readers:
            assert torch.equal(recording.valid(site), real), site
        else:
            assert recording.valid(site).all()
            assert recording.valid(site).shape == (6,), site


@torch.no_grad()
def test_a_decoders_own_padding_is_no_encoders():
    """Decoder and encoder of equal length, both padded, in one forward: each site has its own mask."""
    model = patched("bart")
    inputs = encoder_inputs(model, length=6)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    with moelora.record(model) as recording:
        model(**inputs, decoder_input_ids=prompt(length=6), decoder_attention_mask=mask)

    decoder, reader = (f"model.decoder.layers.0.{name}" for name in ("self_attn.q_proj", "encoder_attn.k_proj"))
    assert torch.equal(recording.valid(decoder), mask.flatten().bool())
    assert torch.equal(recording.valid(reader), inputs["attention_mask"].flatten().bool())


@torch.no_grad()
@pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
def test_a_four_dimensional_mask_tells_its_padding(additive):
    """A mask that somebody built themselves: tokens that do not see themselves are padding."""
    model = patched("llama")
    inputs = left_padded([prompt(1, 4)[0], prompt(1, 6)[0]])
    real = inputs["attention_mask"].bool()
    mask = torch.ones(6, 6).tril().bool() & real[:, None, None, :]
    positions = (real.cumsum(1) - 1).clamp(min=0)
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with moelora.record(model) as recording:
        model(input_ids=inputs["input_ids"], attention_mask=mask, position_ids=positions)

    assert all(torch.equal(recording.valid(site), real.flatten()) for site in recording)


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_chunked_prefill_keeps_the_mask(cache):
    """A long prompt in pieces: the mask covers past and present, and each piece takes its own columns."""
    model = patched("llama")
    inputs = left_padded([prompt(1, 4)[0], prompt(1, 8)[0]])
    past = StaticCache(model.config, max_cache_len=16) if cache == "static" else DynamicCache(config=model.config)
    with moelora.record(model) as recording:
        for begin in (0, 3, 6):
            ids = inputs["input_ids"][:, begin : begin + 3]
            mask = inputs["attention_mask"][:, : begin + ids.shape[1]]
            model(input_ids=ids, attention_mask=mask, **{cache_name(model): past}, use_cache=True)

    site = next(iter(recording))
    pieces = [part.flatten() for part in inputs["attention_mask"].bool().split(3, dim=1)]
    assert torch.equal(recording.valid(site), torch.cat(pieces))
