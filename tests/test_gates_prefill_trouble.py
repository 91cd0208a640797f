"""Calls whose hidden states gates cannot be told, which ask the function, and calls that fail, which leave nothing."""

import copy
import threading
from typing import Any

import pytest
import torch
from gated_mixtures import BOTH, CLOSED, Told, call, hooks, patched, same_bits, stop, tensors
from generating import PLAIN, cache_name, encoder_inputs, prompt
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import moelora
from moelora.cache_state import remember
from moelora.testing import tiny

NAME = cache_name(tiny.model("llama"))
CACHES = {
    "empty": lambda config: DynamicCache(),
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=12),
}


@pytest.fixture(scope="module")
def model():
    """A mixture whose gates each test sets."""
    return patched()


# --- who is asked instead ---------------------------------------------------------------------------------------------


def odd_cases():
    """Calls that cannot be watched: what is done to the model or around it, and the inputs."""
    ids = prompt(2, 6)
    causal = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    own = DynamicCache()
    own.scales = [1.0]  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "too long": {"input_ids": prompt(2, 17)},
        "embeddings": {"inputs_embeds": torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))},
        "positions": {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)},
        "left": {"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6])},
        "a hole": {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1], [1] * 6])},
        "a mask of attention": {"input_ids": ids, "attention_mask": causal},
        "answers": {"input_ids": ids, "labels": torch.tensor([[-100, -100, -100, 5, 6, 7]] * 2)},
        "another argument": {"input_ids": ids, "cu_seq_lens_q": torch.tensor([0, 6])},
        "a cache with more in it": {"input_ids": ids, NAME: own},
    }


@pytest.mark.parametrize("case", odd_cases())
def test_other_calls_ask_the_function(model, case):
    """Before the call, as any function; it is told nothing."""
    gates = Told(CLOSED, BOTH)
    moelora.set_gates(model, gates)
    inputs = odd_cases()[case]
    with torch.no_grad():
        found = model(**inputs)
        with moelora.use_experts(model, [None, {"expert0": 1.0, "expert1": 0.5}]):
            right = model(**odd_cases()[case])
    assert (len(gates.means), len(gates.seen)) == (0, 1)
    assert torch.equal(found.logits, right.logits)


def test_training_gradients_and_recordings_ask_the_function(model):
    """So does an encoder-decoder, and a cache of states."""
    gates = Told(CLOSED)
    moelora.set_gates(model, gates)
    model(prompt())
    with torch.no_grad(), moelora.record(model):
        model(prompt())
    model.train()
    with torch.no_grad():
        model(prompt())
    model.eval()
    assert (len(gates.means), len(gates.seen)) == (0, 3)

    for family, inputs in (("t5", encoder_inputs), ("mamba", lambda _: {"input_ids": prompt()})):
        other, gates = patched(family), Told(CLOSED)
        moelora.set_gates(other, gates)
        other.generate(**inputs(other), **PLAIN, max_new_tokens=2)
        assert (len(gates.means), len(gates.seen)) == (0, 1)


def test_fixed_and_disabled_come_first(model):
    """Then nobody is told anything."""
    gates = Told(BOTH)
    moelora.set_gates(model, gates)
    with torch.no_grad(), moelora.disabled(model):
        model(prompt())
    with torch.no_grad(), moelora.use_experts(model, "expert0"):
        model(prompt())
    assert not gates.means
    assert not gates.seen


def test_a_module_that_was_exchanged(model):
    """The function is asked, and the answer is right; the old module has no say."""
    model, gates = copy.deepcopy(model), Told(CLOSED)
    call(model, gates)
    model.model.norm = copy.deepcopy(model.model.norm)
    runs = []
    model.model.layers[0].register_forward_hook(lambda *_: runs.append(1))
    gates.rows = [BOTH]
    for times in (2, 1):
        with moelora.use_experts(model, {"expert0": 1.0, "expert1": 0.5}):
            right = call(model)
        runs.clear()
        assert torch.equal(call(model).logits, right.logits)
        assert len(runs) == times, "a model that has changed is not watched any more"
    assert (len(gates.means), len(gates.seen)) == (1, 2)
    with pytest.raises(ValueError, match="expected the gates to return weights of shape"):
        call(model, Told([0.0]))


def test_layers_that_the_model_does_not_have(model):
    """For the function to say."""
    gates = Told(CLOSED, layers=(1, 9))
    call(model, gates)
    assert (len(gates.means), len(gates.seen)) == (0, 1)


# --- when something goes wrong ----------------------------------------------------------------------------------------


class Failing(Told):
    """Gates that cannot tell what they are told."""

    def of_means(self, means_BSD):
        super().of_means(means_BSD)
        raise ZeroDivisionError


class Wrong(Told):
    """Gates whose weights are none."""

    def of_means(self, means_BSD):
        return super().of_means(means_BSD) * torch.nan


@pytest.mark.parametrize("kind", ["empty", "dynamic", "static"])
@pytest.mark.parametrize(("gates", "error"), [(Failing(CLOSED), ZeroDivisionError), (Wrong(BOTH), ValueError)])
def test_a_failure_leaves_the_cache_as_it_was(model, kind, gates, error):
    """And the model usable: the next call with this cache is a first one."""
    right = call(model, Told(BOTH), **{NAME: CACHES[kind](model.config)})
    before = hooks(model)
    cache = CACHES[kind](model.config)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with pytest.raises(error):
        call(model, gates, **{NAME: cache})
    assert len(gates.means) == 1
    gates.means.clear()
    assert torch.equal(torch.get_rng_state(), state)
    assert hooks(model) == before
    assert vars(cache).keys() == vars(CACHES[kind](model.config)).keys()
    assert str(cache) == str(CACHES[kind](model.config))
    assert [layer.is_initialized for layer in cache.layers] == [False] * len(cache.layers)
    assert same_bits(tensors(call(model, Told(BOTH), **{NAME: cache})), tensors(right))


def test_a_failure_empties_a_static_cache_that_was_used_before(model):
    """In place, to the last number."""
    cache = StaticCache(config=model.config, max_cache_len=12)
    call(model, Told(CLOSED), **{NAME: cache})
    cache.reset()
    layers: list[Any] = cache.layers
    buffers = [(layer.keys, layer.values) for layer in layers]
    with pytest.raises(ZeroDivisionError):
        call(model, Failing(CLOSED), **{NAME: cache})
    assert cache.get_seq_length() == 0
    for (keys, values), layer in zip(buffers, layers, strict=True):
        assert keys is layer.keys
        assert values is layer.values
        assert not keys.any()
        assert not values.any()


def test_an_interrupted_call_leaves_no_hooks():
    """Nor does one that fails. KeyboardInterrupt runs no hook: the next call takes ours off, an unpatched one too."""
    model = patched()
    call(model, Told(BOTH))
    clean = hooks(model)
    hook = model.model.layers[1].mlp.register_forward_hook(stop(RuntimeError("inside")))
    with pytest.raises(RuntimeError, match="inside"):
        call(model)
    hook.remove()
    assert hooks(model) == clean
    for then in ("call", "unpatch"):
        hook = model.model.layers[1].mlp.register_forward_hook(stop(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            call(model)
        hook.remove()
        assert len(hooks(model)) > len(clean)
        if then == "unpatch":
            moelora.unpatch_model(model)
            for _ in range(2):
                call(model)
            assert not [hook for hook in hooks(model) if "Prefill" in repr(hook)]
        else:
            call(model)
            assert hooks(model) == clean


def test_a_half_filled_cache_is_refused(model):
    """An emptied cache has an old decision, which does not hold for what an interrupted call has left in it."""
    cache = StaticCache(config=model.config, max_cache_len=12)
    call(model, Told(BOTH), **{NAME: cache})
    cache.reset()
    hook = model.model.layers[1].mlp.register_forward_hook(stop(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        call(model, **{NAME: cache})
    hook.remove()
    with pytest.raises(ValueError, match="for which these gates were not asked"):
        call(model, input_ids=prompt(3, 1), **{NAME: cache})


def test_the_gates_may_run_the_model(model):
    """It is the base there, whose cache and call are its own; they may draw random numbers."""
    seen = []

    class Running(Told):
        def of_means(self, means_BSD):
            seen.append(model(prompt()).logits)
            torch.rand(5)
            return super().of_means(means_BSD)

    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = call(model, Running(BOTH))
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad(), moelora.disabled(model):
        assert torch.equal(seen[0], model(prompt()).logits)
    assert torch.equal(found.logits, call(model, Told(BOTH).__call__).logits)


def test_random_numbers_of_a_call_are_drawn_once(model):
    """A model that draws some itself draws the same the second time."""
    drawn = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda *_: drawn.append(torch.rand(2)))
    for rows in (CLOSED, BOTH):
        gates = Told(rows)
        call(model, gates)
        states = []
        for way in (gates, Told(rows).__call__):
            torch.manual_seed(5)
            call(model, way)
            states.append(torch.get_rng_state())
        assert torch.equal(*states)
        assert torch.equal(drawn[-1], drawn[-2])
    hook.remove()


def test_another_thread_is_refused(model):
    """While a call is watched too; it goes on as it was."""
    gates = Told(BOTH)
    expected = call(model, gates)
    inside, go_on, found = threading.Event(), threading.Event(), {}

    def wait(*_):
        inside.set()
        go_on.wait(20)

    waiting = model.model.layers[1].mlp.register_forward_pre_hook(wait)
    first = threading.Thread(target=lambda: found.update({"logits": call(model).logits}))
    first.start()
    assert inside.wait(20)
    try:
        with pytest.raises(ValueError, match="another thread's call of this model has not ended"):
            call(model)
    finally:
        go_on.set()
        first.join()
    waiting.remove()
    assert torch.equal(found["logits"], expected.logits)


# --- caches -----------------------------------------------------------------------------------------------------------


def test_caches_that_can_be_put_back():
    """Lists of layers of plain tensors; not states, offloaded ones, pairs of caches, or something else."""
    config = tiny.model("llama").config
    for cache in (DynamicCache(), DynamicCache(config=config), StaticCache(config=config, max_cache_len=8)):
        state, before = remember(cache), copy.deepcopy(cache)
        assert state is not None
        keys = torch.ones(2, 2, 5, 12)
        for layer in range(2):
            cache.update(keys, keys, layer)
        state.put_back()
        assert cache.get_seq_length() == 0
        assert [vars(layer) for layer in cache.layers] == [vars(layer) for layer in before.layers]

    offloaded = DynamicCache()
    offloaded.prefetch_stream = object()  # pyright: ignore[reportAttributeAccessIssue]
    states = [DynamicCache(config=tiny.model(family).config) for family in ("mamba", "qwen3_next")]
    pair = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for cache in (*states, offloaded, pair, ((torch.ones(1), torch.ones(1)),), object()):
        assert remember(cache) is None
