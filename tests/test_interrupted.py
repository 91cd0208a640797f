"""Calls that were interrupted: KeyboardInterrupt and its like run no hook, and the next call is a new one anyway."""

import gc
import threading
import weakref

import pytest
import torch
from gated_mixtures import BOTH, CLOSED, Say, Told, call, hooks, patched, stop
from generating import cache_name, prompt
from transformers import DynamicCache

import moelora
from moelora import RLOO, Classifier, Given, Learned, MoELoRAConfig
from moelora.routers.base import RouterConfig
from moelora.testing import tiny

LEARNED = Learned(init_std=0.5)
ERRORS = [KeyboardInterrupt, SystemExit, GeneratorExit, RuntimeError]
STACKS = {"whole": lambda model: model, "part": lambda model: model.model}
PLACES = {
    "block": lambda model, hook: model.model.layers[0].mlp.register_forward_hook(hook),
    "before a part": lambda model, hook: model.model.register_forward_pre_hook(hook),
    "behind a part": lambda model, hook: model.model.register_forward_hook(hook),
    "embeddings": lambda model, hook: model.model.embed_tokens.register_forward_pre_hook(hook),
}


@pytest.fixture(scope="module")
def model():
    """A mixture whose gates each test sets."""
    return patched()


@torch.no_grad()
def states(model, stack, **inputs):
    """The last hidden states of a prompt, (B, L, D), by the whole model or by a part of it alone."""
    inputs = {"input_ids": prompt(3)} | inputs
    if stack == "part":
        return model.model(**inputs).last_hidden_state
    return model(**inputs, output_hidden_states=True).hidden_states[-1]


def interrupt(model, error, run, place="block"):
    """Run something that an error stops, and keep the traceback, as an interactive Python does."""
    hook = PLACES[place](model, stop(error()))
    try:
        with pytest.raises(error) as stopped:
            run()
    finally:
        hook.remove()
    return stopped


@pytest.mark.parametrize("then", STACKS)
@pytest.mark.parametrize("first", STACKS)
@pytest.mark.parametrize("kind", [Say, Told])
@pytest.mark.parametrize("error", ERRORS)
def test_the_next_call_asks_its_gates(model, error, kind, first, then):
    """Of the model or of a part, by function or by what the call itself sees; what is not asked is not silently off."""
    gates = kind(BOTH)
    moelora.set_gates(model, gates)
    right, clean = states(model, then), hooks(model)
    with moelora.disabled(model):
        assert not torch.equal(states(model, then), right)
    for place in PLACES:
        stopped = interrupt(model, error, lambda: states(model, first), place)
        gates.seen.clear()
        assert torch.equal(states(model, then), right), place
        if kind is Say:
            assert len(gates.seen) == 1
        assert hooks(model) == clean
        assert stopped.tb is not None


@pytest.mark.parametrize("kind", [Say, Told])
@pytest.mark.parametrize("rows", [CLOSED, BOTH])
def test_a_block_alone_is_refused_as_ever(model, kind, rows):
    """Whatever the interrupted call was about to do."""
    moelora.set_gates(model, kind(rows))
    states_BLD = torch.zeros(1, 4, model.config.hidden_size)
    stopped = interrupt(model, KeyboardInterrupt, lambda: states(model, "whole"))
    with pytest.raises(ValueError, match=r"call model\(\.\.\.\), not a part of it"):
        model.model.layers[0].self_attn.q_proj(states_BLD)
    del stopped


@pytest.mark.parametrize("then", STACKS)
def test_gates_that_were_interrupted(model, then):
    """While they were asked, or ran the model themselves."""
    moelora.set_gates(model, Say(BOTH))
    right = states(model, then)

    class Running(Told):
        def of_means(self, means_BSD):
            return self({})

        def __call__(self, inputs):
            interrupted = model.model.layers[1].mlp.register_forward_hook(stop(KeyboardInterrupt()))
            try:
                model(prompt(1))
            finally:
                interrupted.remove()
            return super().__call__(inputs)

    for gates in (stop(KeyboardInterrupt()), Running(BOTH), Running(BOTH).__call__):
        moelora.set_gates(model, gates)
        with pytest.raises(KeyboardInterrupt) as stopped:
            states(model, "whole")
        model._moelora.tape.gates.gates, model._moelora.tape.gates.told = Say(BOTH), None
        assert torch.equal(states(model, then), right)
        del stopped


def test_gates_that_swallow_an_interruption(model):
    """Of a call of their own, which is not taken for the call that they are for."""
    moelora.set_gates(model, Say(BOTH))
    right = states(model, "whole")

    class Swallowing(Told):
        def of_means(self, means_BSD):
            interrupt(model, KeyboardInterrupt, lambda: model(prompt(1)))
            return super().of_means(means_BSD)

        def __call__(self, inputs):
            interrupt(model, KeyboardInterrupt, lambda: model.model(prompt(1)))
            return super().__call__(inputs)

    for gates in (Swallowing(BOTH), Swallowing(BOTH).__call__):
        moelora.set_gates(model, gates)
        assert torch.equal(states(model, "whole"), right)


def test_a_thread_that_was_stopped_holds_nobody_up(model):
    """Its call has ended, though no hook said so."""
    moelora.set_gates(model, Say(BOTH))
    right = states(model, "whole")
    stopped = threading.Thread(target=lambda: interrupt(model, SystemExit, lambda: states(model, "whole")))
    stopped.start()
    stopped.join()
    assert torch.equal(states(model, "part"), right)


def test_calls_of_two_threads_do_not_close_each_other():
    """Where no gates refuse the second: it goes on when the first has ended, though it began inside of it."""
    model = patched_plain()
    right = states(model, "whole")
    arrived, found, events = threading.Barrier(3, timeout=20), {}, {}
    names = {}

    def wait(*_):
        name = names[threading.get_ident()]
        arrived.wait()
        assert events[name].wait(20)

    def run(name):
        names[threading.get_ident()] = name
        found[name] = states(model, "whole")

    hook = model.model.layers[0].register_forward_pre_hook(wait)
    threads = {name: threading.Thread(target=run, args=(name,)) for name in ("first", "second")}
    for name, thread in threads.items():
        events[name] = threading.Event()
        thread.start()
    arrived.wait()
    for name, thread in threads.items():
        assert model._moelora.tape.depth == 4 - 2 * len(found)
        events[name].set()
        thread.join()
    hook.remove()
    assert model._moelora.tape.depth == 0
    assert torch.equal(found["first"], right)
    assert torch.equal(found["second"], right)


# --- other mixtures ---------------------------------------------------------------------------------------------------


def patched_plain(router: RouterConfig = LEARNED):
    """A tiny mixture of three experts that add something."""
    model = moelora.patch_model(tiny.model("llama"), num_experts=3, rank=2, config=MoELoRAConfig(router=router))
    for name, parameter in model.named_parameters():
        if ".bank." in name:
            parameter.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    return model.eval()


@pytest.mark.parametrize("then", STACKS)
@pytest.mark.parametrize("first", STACKS)
@pytest.mark.parametrize("error", ERRORS)
def test_settings_end_with_their_call(error, first, then):
    """What was fixed for the interrupted call is not for the next, and what is fixed for the next one holds."""
    model = patched_plain()
    right = states(model, then)
    with moelora.use_experts(model, "expert1"):
        fixed = states(model, then)
    for place in PLACES:
        with moelora.use_experts(model, "expert0"):
            stopped = interrupt(model, error, lambda: states(model, first), place)
        assert torch.equal(states(model, then), right), place
        with moelora.use_experts(model, "expert0"):
            stopped = interrupt(model, error, lambda: states(model, first), place)
        with moelora.use_experts(model, "expert1"):
            assert torch.equal(states(model, then), fixed), place
        del stopped


@pytest.mark.parametrize("then", STACKS)
def test_a_classifier_is_asked_anew(then):
    """For each call, whatever came before."""
    model = patched_plain(Classifier())
    moelora.set_classifier(model, lambda inputs: 1)
    right = states(model, then)
    moelora.set_classifier(model, lambda inputs: 0)
    stopped = interrupt(model, KeyboardInterrupt, lambda: states(model, "whole"))
    moelora.set_classifier(model, lambda inputs: 1)
    assert torch.equal(states(model, then), right)
    del stopped


def test_ids_that_came_with_a_call_end_with_it():
    """The next call needs its own."""
    model = patched_plain(Given())
    stopped = interrupt(model, KeyboardInterrupt, lambda: model(prompt(3), expert_ids=torch.tensor([0, 1, 1])))
    for stack in STACKS:
        with pytest.raises(ValueError, match="none were given"):
            states(model, stack)
    stopped = interrupt(model, KeyboardInterrupt, lambda: model(prompt(3), expert_ids=torch.tensor([0, 1, 1])))
    with moelora.given_experts(model, 1):
        right = states(model, "whole")
    assert torch.equal(model(prompt(3), expert_ids=1, output_hidden_states=True).hidden_states[-1], right)
    del stopped


@torch.no_grad()
def test_prompts_end_with_their_call():
    """A part alone has none, and a conversation that was cut off in its first call does not go on."""
    model = patched_plain(RLOO(granularity="prompt"))
    right = states(model, "whole")
    name, cache = cache_name(model), DynamicCache(config=model.config)
    stopped = interrupt(model, KeyboardInterrupt, lambda: model(prompt(3), use_cache=True, **{name: cache}))
    with pytest.raises(ValueError, match=r"call model\(\.\.\.\), not a part of it"):
        states(model, "part")
    with pytest.raises(ValueError, match="did not take part in its first call"):
        model(prompt(3, 1), **{name: cache})
    assert torch.equal(states(model, "whole"), right)
    del stopped


def test_a_training_step_that_was_interrupted():
    """Neither its routings nor its balance count."""
    model, other = (patched_plain(Learned(top_k=1, combine="unit", balance_bias_speed=0.1)).train() for _ in range(2))
    stopped = interrupt(model, KeyboardInterrupt, lambda: model(prompt(3)))
    for each in (model, other):
        each(prompt(3))
        each(prompt(3))
    for (name, ours), theirs in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    del stopped


# --- what is held -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Say, Told])
def test_a_call_that_has_ended_is_held_by_nobody(model, kind):
    """Its tensors go when the caller lets go of them, without a search for cycles."""
    moelora.set_gates(model, kind(BOTH))
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            ids = prompt(3)
            seen = weakref.ref(ids)
            output = call(model, input_ids=ids)
            del output, ids
            gates = model._moelora.tape.gates.gates
            gates.seen.clear()
            assert seen() is None
    finally:
        gc.enable()
