"""Gates that are told hidden states: a call that stays closed runs once; everything else is as if asked before it."""

import copy
from typing import Any

import pytest
import torch
from gated_mixtures import BOTH, CLOSED, FIRST, Told, bits, call, patched, plain_means, same_bits, tensors
from generating import PLAIN, cache_name, left_padded, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertForSequenceClassification, DynamicCache, StaticCache

import moelora
from moelora.routers.gated import GatedRouter
from moelora.testing import tiny

NAME = cache_name(tiny.model("llama"))
CACHES = {
    "none": lambda config: None,
    "empty": lambda config: DynamicCache(),
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=12),
}


@pytest.fixture(scope="module")
def model():
    """A mixture whose gates each test sets."""
    return patched()


@pytest.fixture(scope="module")
def counting():
    """A mixture of a model that counts its tokens' positions from the first, padding or not."""
    return patched("gpt2")


def padded():
    """Three prompts of different lengths, padded on the left, with the positions that `generate` gives them."""
    batch = left_padded([prompt(1, 6)[0], prompt(1, 3)[0], prompt(1, 5)[0]])
    return batch | {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def forwards(model, block):
    """How often a block runs, as a list that grows."""
    runs = []
    return runs, block.register_forward_hook(lambda *_: runs.append(1))


# --- what the gates are told ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gemma3", "mixtral", "opt", "bert", "albert", "modernbert", "mamba"]
)
def test_means_are_those_of_output_hidden_states(family):
    """Same numbering, same final norm; a block that a model uses twice gives two of them."""
    model = patched(family)
    gates = Told(CLOSED, layers=(2, 1))
    inputs = tiny.inputs(model)
    moelora.set_gates(model, gates)
    with torch.no_grad():
        model(**inputs)
    assert not gates.seen
    torch.testing.assert_close(gates.means[0], plain_means(model, gates, inputs))
    assert gates.means[0].dtype == torch.float32


@settings(max_examples=25)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.sampled_from(["left", "right", "none"]), st.booleans())
def test_padding_changes_nothing(counting, lengths, side, positions):
    """Prompts that fit the window are watched if their tokens stand where they would without padding."""
    lengths = [max(lengths)] * len(lengths) if side == "none" else lengths
    ids = prompt(len(lengths), max(lengths))
    place = torch.arange(max(lengths))
    place = max(lengths) - 1 - place if side == "left" else place
    mask = (place[None] < torch.tensor(lengths)[:, None]).long()
    inputs = {"input_ids": ids, "attention_mask": mask}
    if positions:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    gates = Told(CLOSED, window=7)

    call(counting, gates, **inputs)

    shifted = side == "left" and len(set(lengths)) > 1 and not positions
    if max(lengths) > 7 or shifted:
        assert (len(gates.means), len(gates.seen)) == (0, 1)
    else:
        assert (len(gates.means), len(gates.seen)) == (1, 0)
        torch.testing.assert_close(gates.means[0], plain_means(counting, gates, inputs))


def test_rows_are_measured_without_their_padding(model):
    """A batch wider than the window is watched, if its rows are not."""
    ids, mask = prompt(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[:, 7:] = 0
    gates = Told(CLOSED, window=7)
    call(model, gates, input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(gates.means[0], plain_means(model, gates, {"input_ids": ids, "attention_mask": mask}))


# --- closed, and open -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_call_runs_once_if_closed_and_twice_if_open(family, kind):
    """Closed, it is the base model's by the byte; open, as if the gates had been asked before, in the same cache."""
    base = tiny.model(family)
    model, batch = patched(family, copy.deepcopy(base)), padded()
    runs, counting = forwards(model, model.model.layers[0])
    for rows, times in (([CLOSED], 1), ([CLOSED, BOTH, FIRST], 2), ([BOTH], 2)):
        gates = Told(*rows)
        caches = [CACHES[kind](base.config) for _ in range(2)]
        layers = [] if caches[0] is None else list(caches[0].layers)
        call(model, gates)  # looks for the modules
        runs.clear()
        found = call(model, **batch, **({} if caches[0] is None else {NAME: caches[0]}))
        assert len(runs) == times
        assert (len(gates.means), len(gates.seen)) == (2, 0)

        moelora.set_gates(model, Told(*rows).__call__)
        before = {} if caches[1] is None else {NAME: caches[1]}
        right = call(base if times == 1 else model, **batch, **before)
        assert same_bits(tensors(found), tensors(right))
        if caches[0] is not None:
            assert found[NAME] is caches[0]
            assert all(layer is cached for layer, cached in zip(layers, caches[0].layers, strict=False))
            assert caches[0].get_seq_length() == 6
    counting.remove()


def test_a_static_cache_that_was_used_before(model):
    """It is emptied in place: a compiled step may hold its buffers."""
    expected = call(model, Told(BOTH).__call__, **padded())
    cache = StaticCache(config=model.config, max_cache_len=12)
    call(model, Told(CLOSED), **{NAME: cache})
    cache.reset()
    layers: list[Any] = cache.layers
    buffers = [(layer.keys, layer.values) for layer in layers]
    found = call(model, Told(BOTH), **padded(), **{NAME: cache})
    torch.testing.assert_close(found.logits, expected.logits)
    assert cache.get_seq_length() == 6
    for (keys, values), layer in zip(buffers, layers, strict=True):
        assert keys is layer.keys
        assert values is layer.values
        assert not keys[:, :, 6:].any()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("rows", [[CLOSED], [CLOSED, BOTH]])
def test_generation(model, options, static, rows):
    """Tokens and random numbers are those of gates that are asked; they are told once."""
    options = PLAIN | {"max_new_tokens": 4} | options
    if static:
        options |= {"cache_implementation": "static", "disable_compile": True}
    batch = left_padded([prompt(1, 6)[0], prompt(1, 4)[0]])
    answers = []
    for gates in (Told(*rows), Told(*rows).__call__):
        moelora.set_gates(model, gates)
        torch.manual_seed(7)
        answers.append((model.generate(**batch, **options), torch.get_rng_state()))
        if isinstance(gates, Told):
            assert (len(gates.means), len(gates.seen)) == (1, 0)
    assert torch.equal(answers[0][0], answers[1][0])
    assert torch.equal(answers[0][1], answers[1][1])


def test_a_closed_generation_asks_no_router(model, monkeypatch):
    """Nor do its single tokens, whoever has said that it is closed; a recording sees every gate closed all the same."""
    asked = []
    forward = GatedRouter.forward
    monkeypatch.setattr(GatedRouter, "forward", lambda self, *args: asked.append(1) or forward(self, *args))
    for gates in (Told(CLOSED), Told(CLOSED).__call__):
        moelora.set_gates(model, gates)
        model.generate(prompt(), **PLAIN, max_new_tokens=3)
    assert not asked
    with moelora.record(model) as recording:
        model.generate(prompt(), **PLAIN, max_new_tokens=3)
    assert asked
    assert all((recording[site].experts_TK == -1).all() for site in recording)
    moelora.set_gates(model, Told(CLOSED, FIRST))
    model.generate(prompt(), **PLAIN, max_new_tokens=3)


def test_a_conversation_goes_on_as_it_began(model):
    """A later turn asks the function, and the first turn's decision is on the cache."""
    gates = Told(CLOSED)
    cache = call(model, gates)[NAME]
    call(model, input_ids=prompt(3, 2), **{NAME: cache})
    assert (len(gates.means), len(gates.seen)) == (1, 1)
    gates.rows = [BOTH]
    with pytest.raises(ValueError, match="this turn opens the gates"):
        call(model, input_ids=prompt(3, 2), **{NAME: cache})
    with pytest.raises(ValueError, match="for which these gates were not asked"):
        call(model, Told(CLOSED), input_ids=prompt(3, 1), **{NAME: cache})


def test_a_part_of_the_model_alone(model):
    """The model inside, called without its head: closed, open, and with the decision on its cache."""
    inner, gates = model.model, Told(CLOSED)
    moelora.set_gates(model, gates)
    with torch.no_grad():
        closed = inner(prompt())
        gates.rows = [BOTH]
        opened = inner(prompt())
        with moelora.disabled(model):
            base = inner(prompt())
        with moelora.use_experts(model, {"expert0": 1.0, "expert1": 0.5}):
            right = inner(prompt())
        inner(prompt(2, 1), **{NAME: opened[NAME]})
    assert torch.equal(closed.last_hidden_state, base.last_hidden_state)
    assert torch.equal(opened.last_hidden_state, right.last_hidden_state)
    assert (len(gates.means), len(gates.seen)) == (2, 0)


def test_an_encoder_has_no_cache():
    """Texts with token types and a label each are told and taken back as well."""
    base = BertForSequenceClassification(tiny.model("bert").config).eval()
    model = patched(base=base)
    inputs = tiny.inputs(model) | {"labels": torch.tensor([0, 1])}
    inputs["token_type_ids"] = (torch.arange(7) > 3).long().expand(2, -1)
    gates = Told(CLOSED)
    moelora.set_gates(model, gates)
    with torch.no_grad():
        with moelora.disabled(model):
            base = model(**inputs).logits
        assert torch.equal(model(**inputs).logits, base)
        gates.rows = [CLOSED, BOTH]
        mixed = model(**inputs).logits
        with moelora.use_experts(model, [None, {"expert0": 1.0, "expert1": 0.5}]):
            assert torch.equal(mixed, model(**inputs).logits)
    assert torch.equal(bits(mixed[0]), bits(base[0]))
    torch.testing.assert_close(gates.means[0], plain_means(model, gates, inputs))
    assert len(gates.means) == 2


def test_hooks_of_others_see_what_is_returned():
    """Also those that were there before the patch; what they make of an output stands."""
    base, seen = tiny.model("llama"), []
    base.register_forward_hook(lambda module, args, output: seen.append(output.logits))
    base.lm_head.register_forward_hook(lambda module, args, output: output + 1)
    base.register_forward_hook(lambda module, args, output: output.logits)
    model = patched(base=base)
    seen.clear()
    moelora.set_gates(model, Told(BOTH))
    with torch.no_grad():
        found = model(prompt())
    assert len(seen) == 1
    assert found is seen[0]
