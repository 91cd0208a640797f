"""Generation: a patched model decodes, batches, pads, beams and samples as its base does, and is routed the same."""

import copy

import pytest
import torch
from generating import DECODERS, ENCODER_DECODERS, PLAIN, cache_name, encoder_inputs, left_padded, patched, prompt

import moelora
from moelora.testing import tiny


def step_by_step(model, ids, **inputs):
    """Logits of every position, computed with a cache: three tokens at once, then one by one."""
    prefill = 3
    name = "decoder_input_ids" if inputs else "input_ids"
    output = model(**inputs, **{name: ids[:, :prefill]}, use_cache=True)
    steps = [output.logits]
    key = cache_name(model)
    if inputs:
        inputs = {"encoder_outputs": (output.encoder_last_hidden_state,), **inputs}
        inputs = {key: value for key, value in inputs.items() if key in ("encoder_outputs", "attention_mask")}
    for place in range(prefill, ids.shape[1]):
        output = model(**inputs, **{name: ids[:, place : place + 1], key: output[key]}, use_cache=True)
        steps.append(output.logits)
    return torch.cat(steps, 1)


@torch.no_grad()
@pytest.mark.parametrize("share_router", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("family", DECODERS)
def test_decoding_step_by_step_equals_a_full_forward(family, share_router):
    """The same logits, and the same experts at every site for every token."""
    model = patched(family, share_router=share_router)
    ids = prompt(length=7)
    with moelora.record(model) as whole:
        expected = model(input_ids=ids, use_cache=False).logits

    with moelora.record(model) as steps:
        got = step_by_step(model, ids)

    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert whole.keys() == steps.keys() == model._moelora.layers.keys()
    for site, routing in whole.items():
        by_step = [call.experts_TK.unflatten(0, (2, -1)) for call in steps.calls(site)]
        assert torch.equal(torch.cat(by_step, 1).flatten(0, 1), routing.experts_TK), site


@torch.no_grad()
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_decoding_step_by_step_with_an_encoder(family):
    """The decoder's own sites are routed token by token as in a full forward, and the encoder's once."""
    model = patched(family)
    ids, inputs = prompt(length=6), encoder_inputs(model)
    with moelora.record(model) as whole:
        expected = model(**inputs, decoder_input_ids=ids, use_cache=False).logits

    with moelora.record(model) as steps:
        got = step_by_step(model, ids, **inputs)

    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    for site, routing in whole.items():
        by_step = [call.experts_TK.unflatten(0, (2, -1)) for call in steps.calls(site)]
        assert torch.equal(torch.cat(by_step, 1).flatten(0, 1), routing.experts_TK), site


@torch.no_grad()
@pytest.mark.parametrize("family", [*DECODERS, "bamba"])
def test_greedy_generation_is_the_argmax_loop(family):
    """`generate` with its cache writes what a loop over full forwards writes."""
    model = patched(family)
    ids = prompt()
    expected = ids
    for _ in range(4):
        last = model(input_ids=expected, use_cache=False).logits[:, -1:]
        expected = torch.cat([expected, last.argmax(-1)], 1)

    assert torch.equal(model.generate(ids, max_new_tokens=4, **PLAIN), expected)


@torch.no_grad()
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_greedy_generation_with_an_encoder_is_the_argmax_loop(family):
    """The encoder runs once, before the model's own forward; the decoder's steps are those of full forwards."""
    model = patched(family)
    inputs = encoder_inputs(model)
    expected = torch.full((2, 1), model.config.decoder_start_token_id)
    for _ in range(4):
        last = model(**inputs, decoder_input_ids=expected, use_cache=False).logits[:, -1:]
        expected = torch.cat([expected, last.argmax(-1)], 1)

    assert torch.equal(model.generate(**inputs, max_new_tokens=4, **PLAIN), expected)


@torch.no_grad()
def test_whisper_generates_the_same_with_and_without_a_cache():
    """Whisper's own `generate`, whose rules for tokens a loop would have to repeat."""
    model = patched("whisper")
    inputs = encoder_inputs(model)
    model.generation_config.max_length = None
    with_cache, without = (model.generate(**inputs, max_new_tokens=4, use_cache=cache) for cache in (True, False))

    assert torch.equal(with_cache, without)
    with moelora.disabled(model):
        assert not torch.equal(model.generate(**inputs, max_new_tokens=4), with_cache)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma3", "mixtral", "mamba", "jamba"])
def test_left_padding_changes_nothing(family, options):
    """A short prompt beside a long one is continued as it is alone: plain, with a static cache, with beams."""
    model = patched(family)
    prompts = [prompt(1, 4)[0], prompt(1, 7)[0]]
    together = model.generate(**left_padded(prompts), max_new_tokens=4, **PLAIN, **options)

    for row, alone in zip(together, prompts, strict=True):
        expected = model.generate(alone[None], max_new_tokens=4, **PLAIN, **options)
        assert torch.equal(row[-4:], expected[0, -4:])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3", "jamba"])
def test_a_static_cache_writes_the_same_tokens(family):
    """Fixed shapes, as for compiled decoding."""
    model = patched(family)
    dynamic = model.generate(prompt(), max_new_tokens=5, **PLAIN)

    assert torch.equal(model.generate(prompt(), max_new_tokens=5, cache_implementation="static", **PLAIN), dynamic)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mamba", "t5"])
def test_beams_and_samples_are_reproducible_and_belong_to_their_row(family):
    """Beam search equals itself without a cache; several sequences come in rows; a seed fixes a sample."""
    model = patched(family)
    inputs = encoder_inputs(model) if family == "t5" else {"input_ids": prompt()}
    beams = model.generate(**inputs, max_new_tokens=4, num_beams=3, num_return_sequences=2, **PLAIN)
    assert beams.shape[0] == 4
    if family != "mamba":  # it has no mode without a cache
        slow = model.generate(**inputs, max_new_tokens=4, num_beams=3, num_return_sequences=2, use_cache=False, **PLAIN)
        assert torch.equal(beams, slow)

    samples = []
    for _ in range(2):
        torch.manual_seed(7)
        sampled = PLAIN | {"do_sample": True}
        samples.append(model.generate(**inputs, max_new_tokens=4, num_return_sequences=3, **sampled))
    assert torch.equal(*samples)
    assert samples[0].shape[0] == 6


@torch.no_grad()
@pytest.mark.parametrize("options", [{"do_sample": True, "num_return_sequences": 2}, {"num_beams": 2}], ids=str)
def test_a_reloaded_model_writes_the_same(options, tmp_path):
    """Sampling with a seed, and beams, before and after saving."""
    model = patched("llama")
    moelora.save(model, tmp_path)
    again = moelora.load(tiny.model("llama"), tmp_path)

    texts = []
    for each in (model, again):
        torch.manual_seed(3)
        texts.append(each.generate(prompt(), max_new_tokens=6, **(PLAIN | options)))
    assert torch.equal(*texts)


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True, "top_k": 1}], ids=str
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
def test_rows_keep_their_experts_under_beams(family, options):
    """`repeats=` spreads one entry for each prompt over its beams or samples; each row is as if it were alone."""
    model = patched(family)
    options = PLAIN | {"max_new_tokens": 4} | options
    rows = [{"expert0": 1.5, "expert2": -0.5}, None]
    with moelora.use_experts(model, rows, repeats=3):
        together = model.generate(prompt(), **options)

    each = together.shape[0] // 2
    for number, row in enumerate(rows):
        with moelora.use_experts(model, row):
            alone = model.generate(prompt()[number : number + 1], **options)
        assert torch.equal(together[each * number : each * (number + 1)], alone)


@torch.no_grad()
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_rows_keep_their_experts_under_beams_with_an_encoder(family):
    """The encoder runs before the model repeats its rows, the decoder after: one entry for each prompt serves both."""
    model = patched(family)
    inputs = encoder_inputs(model)
    options = PLAIN | {"max_new_tokens": 4, "num_beams": 3}
    rows = [{"expert0": 1.5, "expert2": -0.5}, None]
    with moelora.use_experts(model, rows, repeats=3):
        together = model.generate(**inputs, **options)

    for number, row in enumerate(rows):
        with moelora.use_experts(model, row):
            alone = model.generate(**{key: value[number : number + 1] for key, value in inputs.items()}, **options)
        assert torch.equal(together[number : number + 1], alone)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("family", [*DECODERS, "t5", "bart"])
def test_a_disabled_model_generates_as_its_base(family, options):
    """Equal scores bit for bit, around and after patching."""
    if options.get("cache_implementation") and family in ("t5", "bart", "mamba", "mamba2", "qwen3_next"):
        options = {}  # no static cache in these
    options = PLAIN | {"max_new_tokens": 4, "output_scores": True, "return_dict_in_generate": True} | options
    base, model = tiny.model(family), patched(family)
    # torch multiplies a strided input another way, which rounds otherwise, where the weight is trainable
    base.requires_grad_(False)
    base.generation_config = copy.deepcopy(model.generation_config)
    inputs = (
        encoder_inputs(model) if model.config.is_encoder_decoder else left_padded([prompt(1, 4)[0], prompt(1, 6)[0]])
    )
    expected = base.generate(**inputs, **options)

    with moelora.disabled(model):
        got = model.generate(**inputs, **options)

    assert torch.equal(got.sequences, expected.sequences)
    assert all(torch.equal(one, other) for one, other in zip(got.scores, expected.scores, strict=True))
    routed = model.generate(**inputs, **options)
    assert not torch.equal(routed.scores[0], expected.scores[0])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", ["llama", "t5", "jamba"])
def test_generation_leaves_everything_as_it_was(family, training):
    """Training flags, trainable flags, hooks, settings, weights and the mixture itself."""
    model = patched(family).train(training)
    inputs = encoder_inputs(model) if family == "t5" else {"input_ids": prompt()}

    def state():
        modules = {name: (id(module), module.training) for name, module in model.named_modules()}
        hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
        flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        tape = model._moelora.tape
        return modules, hooks, flags, tape.settings, tape.depth, list(tape.recordings), sorted(vars(model))

    before, weights = state(), copy.deepcopy(model.state_dict())
    model.generate(**inputs, max_new_tokens=3, num_beams=2, **PLAIN)

    assert state() == before
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert not model._moelora.tape.records


@torch.no_grad()
def test_given_ids_per_token_follow_the_cache():
    """Ids for the prompt's tokens and one for the rest: generation equals full forwards with all ids."""
    model = patched("llama", router="given")
    ids = prompt()
    known = torch.tensor([[0, 1, 2, 3, 0, 1], [-1, -1, 2, 2, 1, 0]])
    expected = ids
    for _ in range(4):
        with moelora.given_experts(model, known, rest="expert3"):
            last = model(input_ids=expected, use_cache=False).logits[:, -1:]
        expected = torch.cat([expected, last.argmax(-1)], 1)

    with moelora.given_experts(model, known, rest="expert3"):
        assert torch.equal(model.generate(ids, max_new_tokens=4, **PLAIN), expected)
        static = model.generate(ids, max_new_tokens=4, cache_implementation="static", **PLAIN)
    assert torch.equal(static, expected)
