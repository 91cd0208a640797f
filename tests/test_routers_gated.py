"""Gates open and close experts: once for a generation, by the byte where closed, for one thread at a time."""

import copy
import threading

import pytest
import torch
from gated_mixtures import (
    BOTH,
    CLOSED,
    FIRST,
    Say,
    base_state,
    bits,
    call,
    digest,
    fixed,
    patched,
    stop,
    tensors,
    whole_state,
)
from generating import PLAIN, cache_name, encoder_inputs, left_padded, prompt

import moelora
from moelora import Gated, MoELoRAConfig
from moelora.call_settings import Settings
from moelora.continual.features import HiddenStates
from moelora.tape import Tape
from moelora.testing import tiny
from moelora.testing.router_contract import router_contract


@pytest.fixture(scope="module")
def model():
    """A mixture whose gates each test sets."""
    return patched()


# --- the router -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["sum", "max_single"])
def test_the_router_keeps_the_contract(combine):
    """Weights on the tape; no two alike but 0, since among equals the order decides."""
    weights = torch.rand(6, 8, generator=torch.Generator().manual_seed(0))
    weights = weights.masked_fill(weights < 0.4, 0)

    def tape(tokens, order):
        return Tape(settings=Settings(gates_BE=weights[tokens][:, order]))

    router_contract(
        lambda width, available: Gated(combine=combine).build(width, available, None), tape=tape, examples=10
    )


def test_weights_are_what_the_gates_say(model):
    """The sum of the open experts, or the one that is open widest; of equals the first."""
    rows = [BOTH, [0.25, 0.75], [1.0, 1.0]]
    assert torch.equal(call(model, Say(*rows)).logits, fixed(model, rows).logits)
    strongest = [[1.0, 0.0], [0.0, 0.75], [1.0, 0.0]]
    single = patched(combine="max_single")
    torch.testing.assert_close(call(single, Say(*rows)).logits, fixed(model, strongest).logits)

    routing = Gated(combine="max_single").build(4, [False, True], None)(
        torch.zeros(2, 4), Tape(settings=Settings(gates_BE=torch.tensor([[1.0, 0.5], [0.0, 0.5]])), leading=(2,))
    )
    assert routing.experts_TK.tolist() == [[-1], [1]], "who is strongest does not depend on the site"
    assert routing.logits_TE is None


# --- by the byte ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_closed_rows_are_the_base_models(family, dtype, attention):
    """Batch of one, padded batch, open neighbours, experts of NaN and inf: equal to a model that was never patched."""
    base = tiny.model(family, attn_implementation=attention).to(dtype)
    batches = [{"input_ids": prompt(1)}, left_padded([prompt(1, 6)[0], prompt(1, 3)[0], prompt(1, 5)[0]])]
    expected = [tensors(call(base, **batch)) for batch in batches]
    for fill in (None, torch.nan, torch.inf):
        model = patched(family, copy.deepcopy(base), fill=fill)
        for batch, wanted in zip(batches, expected, strict=True):
            for found, right in zip(tensors(call(model, Say(CLOSED), **batch)), wanted, strict=True):
                assert torch.equal(bits(found), bits(right))
        mixed = call(model, Say(CLOSED, FIRST, CLOSED), **batches[1])
        for found, right in zip(tensors(mixed), expected[1], strict=True):
            assert torch.equal(bits(found[::2]), bits(right[::2]))
        assert not torch.equal(mixed.logits[1], expected[1][0][1]), "the neighbour is open"


def test_the_base_is_never_written(tmp_path):
    """Toggles, calls, failures and a save leave every byte, the configuration and the tied head as they were."""
    base = tiny.model("llama", tie_word_embeddings=True)
    config = base.config.to_dict()
    model = patched(base=base)
    before, whole = digest(base_state(model)), digest(whole_state(model))
    answers = [call(model, Say(row)).logits for row in (CLOSED, BOTH)]
    for step in range(1000):
        moelora.set_gates(model, Say(BOTH if step % 2 else CLOSED))
        if step % 100 < 2:
            assert torch.equal(call(model).logits, answers[step % 2])

    failing = model.model.layers[1].mlp.register_forward_hook(stop(RuntimeError("inside")))
    with pytest.raises(RuntimeError, match="inside"):
        call(model, Say(BOTH))
    failing.remove()
    assert torch.equal(call(model, Say(CLOSED)).logits, answers[0])
    with pytest.raises(ValueError, match="the same for every token can be merged"):
        moelora.merge(model)
    moelora.save(model, tmp_path)

    assert digest(whole_state(model)) == whole
    assert digest(base_state(model)) == before
    assert model.config.to_dict() == config
    assert model.lm_head.weight is model.model.embed_tokens.weight
    loaded = moelora.load(tiny.model("llama", tie_word_embeddings=True), tmp_path)
    with pytest.raises(ValueError, match=r"routed by gates, and there are none.*set_gates"):
        call(loaded)
    assert torch.equal(call(loaded, Say(BOTH)).logits, answers[1])
    assert digest(base_state(loaded)) == before


@pytest.mark.parametrize("sampled", [False, True])
def test_generation_is_token_identical(sampled):
    """Though the gates run the model and draw numbers: the generator's state is that of the base model's run."""
    options = PLAIN | {"max_new_tokens": 8, "do_sample": sampled}
    base = tiny.model("llama")
    torch.manual_seed(7)
    expected, state = base.generate(prompt(3), **options), torch.get_rng_state()

    model = patched()
    moelora.set_gates(model, lambda inputs: torch.rand(3, 2) * model(inputs["input_ids"]).logits[:, 0, :2] * 0)
    torch.manual_seed(7)
    assert torch.equal(model.generate(prompt(3), **options), expected)
    assert torch.equal(torch.get_rng_state(), state)

    moelora.set_gates(model, Say(CLOSED, BOTH, CLOSED))
    torch.manual_seed(7)
    found = model.generate(prompt(3), **options)
    assert torch.equal(found[::2], expected[::2])
    assert torch.equal(torch.get_rng_state(), state)


# --- once for a conversation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mamba", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_asked_once_for_a_generation(family, beams):
    """Every token, and every beam of a row, has the gates of its prompt."""
    model = patched(family)
    inputs = encoder_inputs(model) if model.config.is_encoder_decoder else {"input_ids": prompt()}
    options = PLAIN | {"max_new_tokens": 4, "num_beams": beams}
    with moelora.use_experts(model, [None, {"expert0": 1.0, "expert1": 0.5}], repeats=beams):
        expected = model.generate(**inputs, **options)
    gates = Say(CLOSED, BOTH)
    moelora.set_gates(model, gates)
    assert torch.equal(model.generate(**inputs, **options), expected)
    assert len(gates.seen) == 1


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_a_new_turn_may_only_stay_as_open(family):
    """A gate that would close stays open; one that would open, or open wider, asks for a new call."""
    model, name = patched(family), cache_name(patched(family))
    turn = torch.tensor([[7, 8], [9, 10]])

    def go_on(before, tokens, after):
        moelora.set_gates(model, lambda inputs: torch.tensor(before if inputs["input_ids"].shape[1] == 6 else after))
        with torch.no_grad():
            first = model(prompt(), use_cache=True)
            return model(tokens, **{name: first[name]}).logits

    found = go_on([CLOSED, BOTH], turn, [CLOSED, CLOSED])
    with torch.no_grad(), moelora.use_experts(model, [None, {"expert0": 1.0, "expert1": 0.5}]):
        first = model(prompt(), use_cache=True)
        assert torch.equal(found, model(turn, **{name: first[name]}).logits)

    for before, after, who in [
        ([CLOSED, BOTH], [CLOSED, [1.0, 0.6]], r"gates of \['expert1'\] for rows \[1\]"),
        ([CLOSED, BOTH], [FIRST, BOTH], r"gates of \['expert0'\] for rows \[0\]"),
    ]:
        with pytest.raises(ValueError, match=who + ".*start a new call with the whole conversation"):
            go_on(before, turn, after)
    go_on([CLOSED, BOTH], turn[:, :1], [FIRST, FIRST])  # a single token is a step of generation: nobody is asked


def test_the_decision_goes_with_the_cache(model):
    """A copy of a cache and an emptied one; not one that these gates, or these experts, did not fill."""
    gates = Say(BOTH, CLOSED, FIRST)
    name, step = cache_name(model), {"input_ids": torch.tensor([[7], [8], [9]])}
    cache = call(model, gates)[name]
    copied = copy.deepcopy(cache)
    right = fixed(model, gates.rows, **step, **{name: copy.deepcopy(cache)}).logits
    for each in (cache, copied):
        assert torch.equal(call(model, **step, **{name: copy.deepcopy(each)}).logits, right)
    assert len(gates.seen) == 1
    copied.batch_repeat_interleave(2)
    longer = {"input_ids": step["input_ids"].repeat_interleave(2, 0), name: copied}
    torch.testing.assert_close(call(model, **longer).logits, right.repeat_interleave(2, 0))
    emptied = copy.deepcopy(cache)
    emptied.crop(0)
    call(model, **{name: emptied})
    assert len(gates.seen) == 2

    with pytest.raises(ValueError, match=r"for which these gates were not asked.*start a new call"):
        call(model, Say(CLOSED), **step, **{name: cache})
    with moelora.disabled(model):
        unknown = call(model)[name]
    with pytest.raises(ValueError, match="for which these gates were not asked"):
        call(model, **step, **{name: unknown})
    other = patched()
    cache = call(other, Say(CLOSED))[name]
    moelora.remove_expert(other, "expert0")
    with pytest.raises(ValueError, match=r"the experts \['expert0', 'expert1'\], and now there are \['expert1'\]"):
        call(other, **step, **{name: cache})


# --- inside the gates -------------------------------------------------------------------------------------------------


def test_the_gates_may_run_the_model(model):
    """It is the base there, with the outer call's arguments as they come, whose cache and call it does not touch."""
    states, seen = HiddenStates(model, window=4, stride=2), []

    def gates(inputs):
        seen.append(model(**inputs).logits)
        near = states({name: inputs.get(name) for name in ("input_ids", "attention_mask")})
        return near.lowest(near.features_WSD.sum((1, 2)))[:, None].abs() * 0 + torch.tensor(BOTH)

    moelora.set_gates(model, gates)
    batch = left_padded([prompt(1, 6)[0], prompt(1, 4)[0]])
    name = cache_name(model)
    with moelora.record(model) as recording:
        found = call(model, **batch)
    with moelora.disabled(model):
        assert torch.equal(seen[0], call(model, **batch).logits)
    assert torch.equal(found.logits, fixed(model, [BOTH, BOTH], **batch).logits)
    assert found[name].get_seq_length() == 6
    assert {routing.experts_TK.shape[0] for site in recording for routing in recording.calls(site)} == {12}

    # a second turn: the mask covers the past, and the gates see their own tokens' part
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 2, dtype=torch.long)], 1)
    call(model, input_ids=prompt(2, 2), attention_mask=mask, **{name: found[name]})
    assert found[name].get_seq_length() == 8
    assert len(seen) == 2

    # in training too, where the loss is the outer call's
    trained = copy.deepcopy(model).train()
    trained.gradient_checkpointing_enable({"use_reentrant": False})
    moelora.set_gates(trained, lambda inputs: trained(inputs["input_ids"]).logits[:, 0, :2] * 0 + torch.tensor(FIRST))
    trained(prompt(), labels=prompt()).loss.backward()
    bank = trained._moelora.layers["model.layers.0.self_attn.q_proj"].bank
    assert (bank.B_trainable_RO.grad.view(2, 2, -1).flatten(1).norm(dim=-1) > 0).tolist() == [True, False]


@pytest.mark.parametrize("length", [1, 5])
def test_a_static_cache_and_its_mask(model, length):
    """`generate` then hands the model a mask of four axes; the gates see a plain one."""
    seen = []

    def gates(inputs):
        seen.append(inputs.get("attention_mask"))
        return torch.tensor([CLOSED, BOTH])

    moelora.set_gates(model, gates)
    batch = left_padded([prompt(1, length)[0], prompt(1, max(1, length - 2))[0]])
    expected = model.generate(**batch, **PLAIN, max_new_tokens=3)
    found = model.generate(**batch, **PLAIN, max_new_tokens=3, cache_implementation="static", disable_compile=True)
    assert torch.equal(found, expected)
    assert len(seen) == 2
    for mask in seen:
        # transformers leaves out what masks nothing
        assert torch.equal(mask, batch["attention_mask"]) if length > 1 else mask is None or bool((mask == 1).all())


def test_fixed_and_disabled_come_first(model):
    """Then the gates are not asked."""
    gates = Say(BOTH)
    moelora.set_gates(model, gates)
    fixed(model, [FIRST] * 3)
    with moelora.disabled(model):
        call(model)
    assert not gates.seen


# --- threads and interruptions ----------------------------------------------------------------------------------------


def test_two_threads_with_opposite_gates():
    """The second call is refused while the first is under way, which ends as it began; one after the other both run."""
    model = patched()
    ids = {first: torch.full((2, 4), first) for first in (3, 4)}
    moelora.set_gates(model, lambda inputs: torch.tensor([BOTH if int(inputs["input_ids"][0, 0]) == 3 else CLOSED] * 2))
    expected = {first: call(model, input_ids=ids[first]).logits for first in ids}
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        go_on.wait(20)

    waiting = model.model.layers[1].mlp.register_forward_pre_hook(wait)
    found = {}
    first = threading.Thread(target=lambda: found.update({3: call(model, input_ids=ids[3]).logits}))
    first.start()
    assert inside.wait(20)
    try:
        for _ in range(2):
            with pytest.raises(ValueError, match="another thread's call of this model has not ended"):
                call(model, input_ids=ids[4])
        with pytest.raises(ValueError, match="another thread's call"):
            moelora.set_gates(model, Say(CLOSED))
    finally:
        go_on.set()
        first.join()
    waiting.remove()
    assert torch.equal(found[3], expected[3])

    # with a lock, as the error says
    lock, wrong = threading.Lock(), []

    def serve(number):
        for _ in range(5):
            with lock:
                answer = call(model, input_ids=ids[number]).logits
            if not torch.equal(answer, expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=serve, args=(number,)) for number in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not torch.equal(expected[3], call(tiny.model("llama"), input_ids=ids[3]).logits)
    assert torch.equal(expected[4], call(tiny.model("llama"), input_ids=ids[4]).logits)


@pytest.mark.parametrize("where", ["call", "gates"])
def test_an_interrupted_call_leaves_no_gates_open(model, where):
    """KeyboardInterrupt runs no hooks; the next call asks anew all the same."""
    closed = call(model, Say(CLOSED)).logits
    hook = model.model.layers[1].mlp.register_forward_hook(stop(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        call(model, Say(BOTH) if where == "call" else lambda inputs: model(inputs["input_ids"]))
    hook.remove()
    model._moelora.tape.gates.gates = Say(CLOSED)
    assert torch.equal(call(model).logits, closed)
    with pytest.raises(ZeroDivisionError):
        call(model, lambda inputs: 1 / 0)
    assert torch.equal(call(model, Say(CLOSED)).logits, closed)


# --- what does not fit ------------------------------------------------------------------------------------------------


def test_errors(model):
    """Each says what was expected and what came."""
    with pytest.raises(ValueError, match=r"weights of shape \(3, 2\), rows x experts, got torch.float32 \(3,\)"):
        call(model, lambda inputs: torch.zeros(3))
    with pytest.raises(ValueError, match=r"shape \(3, 2\), rows x experts, got torch.float32 \(1, 2\)"):
        call(model, lambda inputs: torch.zeros(1, 2))
    with pytest.raises(ValueError, match="got a list"):
        call(model, lambda inputs: [CLOSED] * 3)
    for wrong in (torch.nan, torch.inf, -0.5):
        with pytest.raises(ValueError, match=rf"gate of expert 1 has the weight {wrong} for row 2.*nan_policy"):
            call(model, Say(CLOSED, CLOSED, [0.0, wrong]))
    with pytest.raises(ValueError, match="expected a function of the call's arguments"):
        moelora.set_gates(model, 3)
    with pytest.raises(ValueError, match="would not look at gates: it is Learned"):
        moelora.set_gates(moelora.patch_model(tiny.model("llama"), num_experts=2, rank=2), Say(CLOSED))
    with pytest.raises(ValueError, match="unknown combine 'mean'; expected one of"):
        Gated(combine="mean")
    with pytest.raises(ValueError, match="share_router has no meaning"):
        MoELoRAConfig(router=Gated(), share_router=True)
    moelora.set_gates(model, Say(BOTH))
    with pytest.raises(ValueError, match="not a part of it"):
        model.model.layers[0].self_attn.q_proj(torch.zeros(1, 2, model.config.hidden_size))
    for gone in (None, "copy"):
        twin = copy.deepcopy(model) if gone else model
        moelora.set_gates(model, gone and Say(BOTH))
        with pytest.raises(ValueError, match="there are none for this call"):
            call(twin)
