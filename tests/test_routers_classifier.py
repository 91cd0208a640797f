"""A classifier names the experts: at the beginning of a call, once for a generation, for rows or tokens."""

import copy
import gc

import numpy as np
import pytest
import torch
from generating import PLAIN, cache_name, encoder_inputs, prompt
from hypothesis import given, settings
from hypothesis import strategies as st

import moelora
from moelora import Classifier, MoELoRAConfig
from moelora.call_settings import GivenIds, Settings
from moelora.scenarios import CrossScenario, missed
from moelora.tape import Tape
from moelora.testing import tiny
from moelora.testing.router_contract import router_contract


def patched(family="llama"):
    """A tiny mixture of three random experts behind a classifier that is still to come."""
    model = moelora.patch_model(
        tiny.model(family), num_experts=3, rank=2, config=MoELoRAConfig(router=Classifier())
    ).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".bank." in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    if model.config.is_encoder_decoder:
        for name in ("forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"):
            setattr(model.generation_config, name, None)
    return model


@pytest.fixture(scope="module")
def model():
    """A mixture whose classifier each test sets."""
    return patched()


class By:
    """A classifier that always says the same and remembers what it was asked."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def __call__(self, inputs):
        # the tensors alone: a cache must not live on here
        self.asked.append({name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)})
        return self.answer(inputs) if callable(self.answer) else self.answer


def logits(model, **inputs):
    """The answer to a prompt."""
    with torch.no_grad():
        return model(**({"input_ids": prompt()} | inputs)).logits


def classified(model, answer, **inputs):
    """The same with a classifier."""
    moelora.set_classifier(model, By(answer))
    return logits(model, **inputs)


def fixed(model, experts):
    """The same with fixed experts."""
    with moelora.use_experts(model, experts):
        return logits(model)


def test_the_router_keeps_the_contract():
    """Ids on the tape, as for given ones."""
    ids = [0, 2, -1, 1, 2, 0]

    def tape(tokens, order):
        moved = [-1 if ids[token] < 0 else order.index(ids[token]) for token in tokens]
        return Tape(settings=Settings(given=GivenIds(ids=torch.tensor([moved]))))

    router_contract(lambda width, available: Classifier().build(width, available, None), tape=tape)


@pytest.mark.parametrize(
    "answer",
    [["expert2", "expert0"], [2, 0], torch.tensor([2, 0]), np.array([2, 0]), np.array(["expert2", "expert0"])],
    ids=["names", "ids", "tensor", "array", "array of names"],
)
def test_an_expert_for_each_row(model, answer):
    """However it is said; and the classifier sees the call's arguments by name."""
    assert torch.equal(classified(model, answer), fixed(model, ["expert2", "expert0"]))
    asked = model._moelora.tape.classifier.classify.asked
    assert len(asked) == 1
    assert torch.equal(asked[0]["input_ids"], prompt())

    with torch.no_grad():
        model(prompt())
    assert torch.equal(asked[1]["input_ids"], prompt()), "positional arguments have their names"


def test_one_for_all_and_the_base_model(model):
    """A single name counts for all rows; -1 is the base model, bit for bit."""
    assert torch.equal(classified(model, "expert1"), fixed(model, "expert1"))
    with moelora.disabled(model):
        base = logits(model)
    assert torch.equal(classified(model, [-1, 1])[0], base[0])


def test_segments(model):
    """An id for each token: the first half of a row is its own expert's, whatever comes later."""
    ids = torch.zeros(2, 6, dtype=torch.long)
    ids[:, 3:] = 1
    torch.testing.assert_close(classified(model, ids)[:, :3], fixed(model, "expert0")[:, :3])
    with moelora.given_experts(model, ids):
        assert torch.equal(classified(model, ids), logits(model))


@pytest.mark.parametrize("family", ["llama", "mamba", "jamba", "t5", "whisper"])
@pytest.mark.parametrize("beams", [1, 3])
def test_decided_once_for_a_generation(family, beams):
    """Asked once, of the prompt or of what the encoder reads; every token has the expert of its row."""
    model = patched(family)
    encoder_decoder = model.config.is_encoder_decoder
    inputs = encoder_inputs(model) if encoder_decoder else {"input_ids": prompt()}
    options = PLAIN | {"max_new_tokens": 4, "num_beams": beams}
    with moelora.use_experts(model, ["expert1", "expert2"], repeats=beams):
        expected = model.generate(**inputs, **options)

    # the classifier sees rows that beams have repeated, or an encoder's, which they have not
    classify = By(lambda seen: [1] * (rows_of(seen) // 2) + [2] * (rows_of(seen) // 2))
    moelora.set_classifier(model, classify)
    found = model.generate(**inputs, **options)

    assert len(classify.asked) == 1
    assert torch.equal(found, expected)
    gc.collect()
    assert not model._moelora.tape.classifier.kept, "nothing outlives the caches"


def rows_of(inputs):
    """The batch that a classifier is asked about."""
    name = next(name for name in ("input_features", "input_ids") if inputs.get(name) is not None)
    return inputs[name].shape[0]


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_ids_by_hand_in_a_generation(family):
    """An id for each row needs no count of the tokens in the cache, which Mamba's does not keep."""
    model = patched(family)
    options = PLAIN | {"max_new_tokens": 3}
    with moelora.use_experts(model, ["expert1", "expert2"]):
        expected = model.generate(input_ids=prompt(), **options)
    with moelora.given_experts(model, ["expert1", "expert2"]):
        assert torch.equal(model.generate(input_ids=prompt(), **options), expected)


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_generated_tokens_have_the_expert_of_the_last_segment(family):
    """By hand, step by step, with the cache that the first call made; two conversations do not mix."""
    model = patched(family)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1], [2, 2, 2, 2, 2, 0]])
    steps = torch.tensor([[7], [8]])
    moelora.set_classifier(model, By(ids))
    with torch.no_grad():
        first = model(prompt(), use_cache=True)
        second = model(prompt().flip(0), use_cache=True)
        found = [model(steps, **{cache_name(model): each[cache_name(model)]}).logits for each in (first, second)]

    whole = torch.cat([ids, ids[:, -1:]], dim=1)
    for tokens, step in zip((prompt(), prompt().flip(0)), found, strict=True):
        with moelora.given_experts(model, whole):
            expected = logits(model, input_ids=torch.cat([tokens, steps], dim=1))
        torch.testing.assert_close(step[:, 0], expected[:, -1], rtol=1e-4, atol=1e-5)
    assert len(model._moelora.tape.classifier.classify.asked) == 2


def test_a_cache_that_is_emptied_begins_anew():
    """A static cache that is used again belongs to a new prompt."""
    from transformers import StaticCache

    model = patched()
    classify = By(lambda inputs: int(inputs["input_ids"][0, 0] == 5))
    moelora.set_classifier(model, classify)
    cache = StaticCache(model.config, max_cache_len=16)
    with torch.no_grad():
        model(torch.tensor([[3, 4]]), **{cache_name(model): cache})
        cache.reset()
        found = model(torch.tensor([[5, 4]]), **{cache_name(model): cache}).logits
    assert len(classify.asked) == 2
    with moelora.use_experts(model, "expert1"):
        torch.testing.assert_close(found, logits(model, input_ids=torch.tensor([[5, 4]])), rtol=1e-4, atol=1e-5)


def test_ids_by_hand_come_first(model):
    """Whoever says more about a call is heard."""
    classify = By("expert0")
    moelora.set_classifier(model, classify)
    with moelora.given_experts(model, "expert2"):
        assert torch.equal(logits(model), fixed(model, "expert2"))
    assert torch.equal(logits(model, expert_ids=torch.tensor([2, 2])), fixed(model, "expert2"))
    with moelora.disabled(model):
        logits(model)
    assert not classify.asked


def test_training_with_checkpointing(model):
    """The second pass of a layer has the expert of the first, and nobody is asked again."""
    trained = copy.deepcopy(model).train()
    classify = By(["expert1", "expert2"])
    moelora.set_classifier(trained, classify)
    enable = getattr(trained, "activation_checkpointing_enable", None) or trained.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    trained(prompt(), labels=prompt()).loss.backward()

    assert len(classify.asked) == 1
    bank = trained._moelora.layers["model.layers.0.self_attn.q_proj"].bank
    norms_E = bank.B_trainable_RO.grad.view(3, 2, -1).flatten(1).norm(dim=-1)
    assert (norms_E > 0).tolist() == [False, True, True]


def test_an_estimator_of_scikit_learn(model):
    """Anything with `predict`, that says names or ids."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    features = torch.tensor([[0.0], [0.1], [0.9], [1.0]])
    estimator = linear_model.LogisticRegression(C=100.0).fit(features.numpy(), ["expert0"] * 2 + ["expert2"] * 2)
    classify = moelora.by_estimator(estimator, lambda inputs: (inputs["input_ids"][:, :1] == 5).float())
    tokens = torch.tensor([[5, 4], [3, 4]])
    moelora.set_classifier(model, classify)
    found = logits(model, input_ids=tokens)
    with moelora.use_experts(model, ["expert2", "expert0"]):
        assert torch.equal(found, logits(model, input_ids=tokens))


def test_a_module_of_torch(model):
    """The highest score wins, for rows and for tokens."""
    module = torch.nn.Embedding(99, 3)
    tokens = prompt()
    moelora.set_classifier(model, moelora.by_module(module, lambda inputs: inputs["input_ids"]))
    found = logits(model)
    with moelora.given_experts(model, module(tokens).argmax(-1)):
        assert torch.equal(found, logits(model))


def test_the_function_is_not_saved(model, tmp_path):
    """A loaded mixture and a copy say what they lack."""
    classified(model, "expert1")
    expected = logits(model)
    moelora.save(model, tmp_path)
    for twin in (moelora.load(tiny.model("llama"), tmp_path), copy.deepcopy(model)):
        with pytest.raises(ValueError, match=r"routed by a classifier, and it has none.*set_classifier"):
            logits(twin)
        moelora.set_classifier(twin, By("expert1"))
        assert torch.equal(logits(twin), expected)
    moelora.set_classifier(model, None)
    with pytest.raises(ValueError, match="it has none"):
        logits(model)


def test_what_does_not_fit(model):
    """Answers, functions, caches and models that are wrong say so."""
    with pytest.raises(ValueError, match=r"ids of shape \(3,\) for 2 rows of 6 tokens"):
        classified(model, [0, 1, 2])
    with pytest.raises(ValueError, match=r"ids of shape \(2, 5\) for 2 rows of 6 tokens"):
        classified(model, torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="no expert 'math'"):
        classified(model, ["math", "expert0"])
    with pytest.raises(ValueError, match="between -1"):
        classified(model, [3, 0])
    with pytest.raises(ValueError, match=r"moelora.by_estimator"):
        moelora.set_classifier(model, 3)
    with pytest.raises(ValueError, match="a method `predict`"):
        moelora.by_estimator(torch.nn.Linear(1, 1), lambda inputs: inputs)

    moelora.set_classifier(model, None)
    with torch.no_grad(), moelora.use_experts(model, "expert1"):
        made = model(prompt(), use_cache=True)
    moelora.set_classifier(model, By("expert1"))
    with pytest.raises(ValueError, match="Cache of a call that the classifier has not seen"):
        logits(model, input_ids=torch.tensor([[7], [8]]), **{cache_name(model): made[cache_name(model)]})

    other = moelora.patch_model(tiny.model("llama"), num_experts=2, rank=2)
    with pytest.raises(ValueError, match="would not ask a classifier: it is Learned"):
        moelora.set_classifier(other, By("expert1"))


# --- the table of experts and scenarios -------------------------------------------------------------------------------


def test_every_expert_on_every_scenario(model, tmp_path):
    """Each cell is that expert alone; the routed row is the classifier's."""
    scenarios = {"one": torch.tensor([[3, 4]]), "two|b": torch.tensor([[5, 6]])}
    moelora.set_classifier(model, By(lambda inputs: int(inputs["input_ids"][0, 0] == 5)))

    def evaluate(model, tokens):
        return logits(model, input_ids=tokens).logsumexp(-1).mean()

    table = moelora.cross_scenario(model, scenarios, evaluate)

    for row, name in enumerate(moelora.expert_names(model)):
        with moelora.use_experts(model, name):
            expected = [float(evaluate(model, tokens)) for tokens in scenarios.values()]
        assert table.values_ES[row].tolist() == expected
    with moelora.disabled(model):
        assert table.base_S.tolist() == [float(evaluate(model, tokens)) for tokens in scenarios.values()]
    assert table.routed_S.tolist() == [table.values_ES[0, 0].item(), table.values_ES[1, 1].item()]

    lines = str(table).splitlines()
    assert lines[0] == r"| expert | one | two\|b |"
    assert len(lines) == 2 + 3 + 2
    table.to_csv(tmp_path / "table.csv")
    rows = (tmp_path / "table.csv").read_text().splitlines()
    assert rows[0] == "expert,one,two|b"
    assert [float(value) for value in rows[1].split(",")[1:]] == table.values_ES[0].tolist()
    assert rows[-1].startswith("(routed),")

    with pytest.raises(ValueError, match="there is no scenario"):
        moelora.cross_scenario(model, {}, evaluate)


@settings(max_examples=20)
@given(st.lists(st.lists(st.integers(-9, 9), min_size=2, max_size=2), min_size=1, max_size=4), st.booleans())
def test_what_the_router_missed(values, larger):
    """The distance to the best expert, in the direction that counts; a router that takes the best misses nothing."""
    values_ES = torch.tensor(values, dtype=torch.float64)
    best_S = values_ES.amax(0) if larger else values_ES.amin(0)
    worse_S = best_S - 1 if larger else best_S + 1
    names = tuple(map(str, range(len(values))))
    for routed_S, expected in ((best_S, 0), (worse_S, 1)):
        table = CrossScenario(
            experts=names, scenarios=("a", "b"), values_ES=values_ES, base_S=best_S, routed_S=routed_S
        )
        assert missed(table, larger_is_better=larger).tolist() == [expected] * 2
