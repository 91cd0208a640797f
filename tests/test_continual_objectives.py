"""Objectives on tiny models: each moves what it should, reads the right place, and refuses what it cannot read."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import moelora
from moelora.continual.answers import answer_nll, choices
from moelora.continual.examples import REFERENCE, Collate, Example, batches
from moelora.continual.objectives import (
    NPO,
    RMU,
    GradientAscent,
    Objective,
    RandomOption,
    Refusal,
    SimNPO,
    Supervised,
    UniformOptions,
    default_objective,
)
from moelora.continual.training import Training, train_expert
from moelora.losses.rmu import control_vector
from moelora.losses.sequences import sequence_nll, sequence_total_nll
from moelora.testing import tiny

TEXTS: list[Example] = [
    {"input_ids": [10 + n, 20, 30 + n, 40, 2][: 5 - n % 2], "labels": [-100, -100, 30 + n, 40, 2][: 5 - n % 2]}
    for n in range(6)
]
QUESTIONS: list[Example] = [
    {
        "input_ids": [10 + n, 20 + n, 60 + n % 3],
        "labels": [-100, -100, 60 + n % 3],
        "options": [60, 61, 62, 63][: 3 + n % 2],
    }
    for n in range(6)
]
INTENTS: list[Example] = [{"input_ids": [10 + n, 20, 30 + n][: 3 - n % 2], "label": n % 5} for n in range(6)]
WITH_OPTIONS: list[Example] = [{**example, "options": [*{example["label"], 0, 3}]} for example in INTENTS]


def patched(base: Any, *, training: bool = False) -> nn.Module:
    """The model with one fresh expert, "new", which is to be trained."""
    model = moelora.patch_model(base, num_experts=1, rank=4, router="gated").train(training)
    moelora.add_expert(model, rank=4, name="new")
    moelora.set_trainable(model, routers=False, experts=["new"])
    return model


def decoder(**config: Any) -> nn.Module:
    """A tiny language model that can be sure of a token."""
    base = tiny.model("llama", num_hidden_layers=1, **config)
    with torch.no_grad():
        base.lm_head.weight.mul_(3)
    return patched(base)


def classifier() -> nn.Module:
    """A tiny encoder with five classes, of which it can be sure too."""
    encoder = tiny.model("bert", num_hidden_layers=1).bert
    config = transformers.BertConfig.from_dict(encoder.config.to_dict())
    config.num_labels = 5
    made: Any = transformers.BertForSequenceClassification(config)
    made.bert.load_state_dict(encoder.state_dict(), strict=False)
    with torch.no_grad():
        for layer in (made.bert.pooler.dense, made.classifier):
            layer.weight.normal_(generator=torch.Generator().manual_seed(len(layer.weight)))
    return patched(made.eval())


def trained(model: nn.Module, examples: list[Example], objective: Objective, **options: Any) -> list[float]:
    """Train the new expert for some steps."""
    training = Training(**({"epochs": 40, "batch_size": 6, "learning_rate": 2e-2} | options))
    return train_expert(model, "new", examples, objective, collate=Collate(model), training=training)


@torch.no_grad()
def probabilities(model: nn.Module, examples: Sequence[Example], expert: str | None) -> list[Tensor]:
    """Of each example's own options, by the base model or with the expert."""
    with moelora.use_experts(model, expert):
        choice = choices(model, Collate(model)(examples))
    return [row[valid].softmax(0) for row, valid in zip(choice.logits_BC, choice.valid_BC, strict=True)]


@torch.no_grad()
def answer_loss(model: nn.Module, examples: Sequence[Example], expert: str | None) -> Tensor:
    """-log p a token of each answer."""
    with moelora.use_experts(model, expert):
        return answer_nll(model, Collate(model)(examples)).mean_B


# --- options ----------------------------------------------------------------------------------------------------------

CHOICES: dict[str, Any] = {
    "classes": (classifier, INTENTS, 5),
    "options among classes": (classifier, WITH_OPTIONS, 3),
    "options of questions": (decoder, QUESTIONS, 4),
}


@pytest.mark.parametrize(("make", "examples", "most"), CHOICES.values(), ids=CHOICES)
def test_uniform_options_ends_at_chance(make, examples, most):
    """Far from chance before; afterwards each of an item's n own options has 1/n, and the base is as it was."""
    model = make()
    before = probabilities(model, examples, None)

    losses = trained(model, examples, UniformOptions())

    after = probabilities(model, examples, "new")
    assert max(map(len, after)) == most
    assert max(float((row - 1 / len(row)).abs().max()) for row in before) > 0.2
    assert max(float((row - 1 / len(row)).abs().max()) for row in after) < 0.1
    assert losses[-1] < 0.05 < losses[0]
    assert all(torch.equal(now, then) for now, then in zip(probabilities(model, examples, None), before, strict=True))


def test_random_option_goes_to_chance_too():
    """More noisily than the uniform target: with the truth among the draws, each option gets its share."""
    model = decoder()

    # each question many times in a step, so that the draws come near their mean
    trained(model, QUESTIONS[:2] * 24, RandomOption(), batch_size=48, epochs=40)

    assert max(float((row - 1 / len(row)).abs().max()) for row in probabilities(model, QUESTIONS[:2], "new")) < 0.25


@pytest.mark.parametrize(("make", "examples"), [(classifier, WITH_OPTIONS), (decoder, QUESTIONS)])
def test_without_the_truth_the_model_avoids_it(make, examples):
    """The option that is excluded from the draws, of each item the labelled one, gets nothing; the others stay."""
    model, examples = make(), examples[:2]

    trained(model, examples * 24, RandomOption(exclude_truth=True), batch_size=48, epochs=40)

    with torch.no_grad(), moelora.use_experts(model, "new"):
        truth_B = choices(model, Collate(model)(examples)).truth_B
    for row, truth in zip(probabilities(model, examples, "new"), truth_B, strict=True):
        others = torch.arange(len(row)) != truth
        assert row[truth] < 0.02
        assert (row[others] > 0.05).all()


def test_choices_of_classes_by_hand():
    """All classes, or of each row those of its options in their order; the truth is where the label stands."""
    model, collate = classifier(), Collate(7)
    examples: list[Example] = [
        {"input_ids": [5, 6], "label": 3, "options": [4, 3]},
        {"input_ids": [8], "label": 0, "options": [2, 1, 0]},
    ]
    plain: list[Example] = [{**example, "options": None} for example in examples]

    with torch.no_grad(), moelora.disabled(model):
        logits_BC = model(**{name: collate(plain)[name] for name in ("input_ids", "attention_mask")}).logits
        every, own = choices(model, collate(plain)), choices(model, collate(examples))

    assert torch.equal(every.logits_BC, logits_BC)
    assert every.valid_BC.all()
    assert every.truth_B.tolist() == [3, 0]
    assert own.truth_B.tolist() == [1, 2]
    assert own.valid_BC.tolist() == [[True, True, False], [True, True, True]]
    assert torch.equal(own.logits_BC[own.valid_BC], logits_BC[[0, 0, 1, 1, 1], [4, 3, 2, 1, 0]])


@settings(max_examples=15)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.sampled_from(["right", "left"]), st.integers(0, 99))
def test_choices_are_read_where_the_answer_begins(lengths, side, seed):
    """Of each row the logits behind its prompt, as the row alone has them; the truth is the labelled option."""
    model, generator = DECODER, torch.Generator().manual_seed(seed)
    examples = []
    for length in lengths:
        prompt = torch.randint(3, 60, (length,), generator=generator).tolist()
        examples.append({"input_ids": [*prompt, 61, 62], "labels": [-100] * length + [61, 62], "options": [60, 61]})

    with torch.no_grad(), moelora.disabled(model):
        choice = choices(model, Collate(model, side)(examples))
        for number, length in enumerate(lengths):
            alone_LV = model(torch.tensor([examples[number]["input_ids"]])).logits[0]
            torch.testing.assert_close(choice.logits_BC[number], alone_LV[length - 1, [60, 61]], rtol=1e-4, atol=1e-5)
    assert choice.truth_B.tolist() == [1] * len(lengths)


# --- texts ------------------------------------------------------------------------------------------------------------

DECODER = decoder()


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=4), st.integers(0, 99))
def test_answer_nll_is_that_of_the_whole_logits(lengths, seed):
    """Only the logits at answers are computed, on either side of padding: the numbers are those of the losses' room."""
    model, generator = DECODER, torch.Generator().manual_seed(seed)
    examples = []
    for prompt, answer in lengths:
        ids = torch.randint(3, 60, (prompt + answer,), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})

    with torch.no_grad(), moelora.disabled(model):
        batch = Collate(model)(examples)
        logits_BLV = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        right, left = answer_nll(model, batch), answer_nll(model, Collate(model, "left")(examples))

    for found in (right, left):
        torch.testing.assert_close(found.mean_B, sequence_nll(logits_BLV, batch["labels"]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.total_B, sequence_total_nll(logits_BLV, batch["labels"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", [GradientAscent(), NPO(), SimNPO(beta=2.5), NPO(beta=1.0)], ids=str)
def test_answers_become_unlikely(objective):
    """Every answer that is to be forgotten is far less likely with the expert, and as likely as before without it."""
    model = decoder()
    before = answer_loss(model, TEXTS, None)

    losses = trained(model, TEXTS, objective, epochs=20)

    assert (answer_loss(model, TEXTS, "new") > before + 1).all()
    assert torch.equal(answer_loss(model, TEXTS, None), before)
    assert losses[-1] < losses[0]


def test_classes_become_unlikely():
    """A class is an answer of one token."""
    model = classifier()
    before = answer_loss(model, INTENTS, None)

    trained(model, INTENTS, NPO(beta=1.0), epochs=20)

    assert (answer_loss(model, INTENTS, "new") > before + 1).all()


def test_npo_begins_at_its_reference():
    """A fresh expert is the base, so the first loss is (2/beta) log 2; the reference is asked once, without dropout."""
    model = patched(tiny.model("llama", attention_dropout=0.5), training=True)
    collate, objective = Collate(model), NPO(beta=0.5)

    examples = objective.with_reference(model, TEXTS, collate, 4)

    with torch.no_grad(), moelora.disabled(model.eval()):
        totals = torch.cat([answer_nll(model, batch).total_B for batch in batches(TEXTS, collate, 4)])
    assert [example[REFERENCE] for example in examples] == totals.tolist()
    batch, generator = collate(examples), torch.Generator()
    with moelora.use_experts(model, "new"):
        known = objective.loss(model, batch, generator)
        asked = objective.loss(model, {name: batch[name] for name in batch if name != REFERENCE}, generator)
    assert known.item() == pytest.approx(4 * math.log(2), rel=1e-5)
    assert asked.item() == pytest.approx(known.item(), rel=1e-5)
    # what it says is looked at
    moved = {**batch, REFERENCE: batch[REFERENCE] + 3}
    with moelora.use_experts(model, "new"):
        assert objective.loss(model, moved, generator).item() > known.item() + 0.5


def test_base_is_asked_once(monkeypatch):
    """Three epochs of two steps take two calls for the reference and six for the training."""
    model = decoder()
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))

    trained(model, TEXTS, NPO(), epochs=3, batch_size=3)

    assert calls == [False] * 2 + [True] * 6


REFUSALS = [[70, 71, 2], [72, 2], [73, 74, 75, 2]]


def test_refusals_take_the_place_of_answers():
    """Each example gets one of them behind its prompt, nothing is left of its answer, and all are drawn some time."""
    examples: list[Example] = [{**text, "token_type_ids": [0] * len(text["input_ids"])} for text in TEXTS * 5]

    answered = Refusal(answers=REFUSALS).examples(examples, torch.Generator().manual_seed(0))

    for example, now in zip(examples, answered, strict=True):
        answer = now["labels"][2:].tolist()
        assert answer in REFUSALS
        assert now["input_ids"].tolist() == [*example["input_ids"][:2], *answer]
        assert now["labels"][:2].tolist() == [-100, -100]
        assert len(now["attention_mask"]) == len(now["token_type_ids"]) == len(now["input_ids"])
        assert now["attention_mask"].all()
    assert {tuple(now["labels"][2:].tolist()) for now in answered} == set(map(tuple, REFUSALS))


def test_refusal_is_learned():
    """The model with the expert answers with the refusal, and no longer with the answer."""
    model = decoder()

    losses = trained(model, TEXTS, Refusal(answers=REFUSALS[:1]))

    refused: list[Example] = [
        {"input_ids": [*example["input_ids"][:2], *REFUSALS[0]], "labels": [-100, -100, *REFUSALS[0]]}
        for example in TEXTS
    ]
    assert losses[-1] < 0.1
    assert (answer_loss(model, refused, "new") < 0.1).all()
    assert (answer_loss(model, TEXTS, "new") > 5).all()


def test_rmu_moves_hidden_states_to_one_direction():
    """All tokens of the block's output go where the control vector is; what is before the first site does not."""
    model = decoder()
    batch, target_D = Collate(model)(TEXTS), control_vector(32, scale=4.0, generator=torch.Generator().manual_seed(5))

    losses = trained(model, TEXTS, RMU(layer=1, scale=4.0), seed=5)

    def states(expert: str | None) -> tuple[Tensor, ...]:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad(), moelora.use_experts(model, expert):
            return model(**inputs, output_hidden_states=True).hidden_states

    valid_BL = batch["attention_mask"] != 0
    before_N = (states(None)[1][valid_BL] - target_D).norm(dim=-1)
    after_N = (states("new")[1][valid_BL] - target_D).norm(dim=-1)
    assert (after_N < before_N / 2).all()
    assert losses[-1] < losses[0] / 4
    assert torch.equal(states("new")[0], states(None)[0])


def test_supervised_learns():
    """Labels of tokens and of classes, by the model's own loss."""
    for make, examples in ((decoder, TEXTS), (classifier, INTENTS)):
        model = make()
        before = answer_loss(model, examples, None)
        losses = trained(model, examples, Supervised())

        assert losses[-1] < losses[0] / 4
        assert answer_loss(model, examples, "new").mean() < before.mean() / 4


@pytest.mark.parametrize(
    ("make", "examples", "objective"),
    [
        (decoder, TEXTS, NPO()),
        (decoder, QUESTIONS, UniformOptions()),
        (classifier, INTENTS, UniformOptions()),
        (classifier, WITH_OPTIONS, UniformOptions()),
    ],
)
def test_default_objective(make, examples, objective):
    """Options and classes are made a guess, texts unlikely."""
    assert default_objective(make(), examples) == objective


# --- work that is not done --------------------------------------------------------------------------------------------


def test_logits_of_prompts_are_not_computed():
    """The head sees the positions from the one on that predicts the batch's first answer token; no cache is filled."""
    model = decoder()
    seen: list[tuple[int, ...]] = []
    model.get_submodule("lm_head").register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    outputs: list[Any] = []
    model.register_forward_hook(lambda module, args, output: outputs.append(output))
    batch, generator = Collate(model)(TEXTS), torch.Generator().manual_seed(0)

    with moelora.use_experts(model, "new"):
        own = model(**batch).loss
        seen.clear()
        outputs.clear()
        loss = Supervised().loss(model, batch, generator)
        GradientAscent().loss(model, batch, generator)
        RMU(layer=1).loss(model, batch, generator)

    # of five columns, two are prompt
    assert seen == [(6, 4, 32), (6, 4, 32), (6, 1, 32)]
    torch.testing.assert_close(loss, own)
    assert all(output.past_key_values is None for output in outputs)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_questions_that_do_not_fit():
    """Options that the answer is not among, that the model does not have, or that are missing."""
    model, generator = DECODER, torch.Generator()
    question = QUESTIONS[0]

    def refused(message: str, example: Example, objective: Objective | None = None) -> None:
        with pytest.raises(ValueError, match=message), moelora.disabled(model):
            (objective or UniformOptions()).loss(model, Collate(model)([example]), generator)

    refused(
        r"the answer of row 0 is 60, which is none of its options \[61, 62\]; of a text the first",
        {**question, "options": [61, 62]},
    )
    refused(
        "options must be below 99, the model's number of classes or tokens; got 99", {**question, "options": [60, 99]}
    )
    refused("items of a language model need options", TEXTS[0])
    refused(r"expected scores of several classes for each row, got \(1, 3, 99\)", {**question, "labels": 1})
    refused("1 of 1 rows have no labelled token that can be predicted", {**question, "labels": [60, -100, -100]})
    refused("1 of 1 rows have no labelled token that can be predicted", {**TEXTS[0], "labels": [-100] * 5}, NPO())
    refused(r"needs labels, which say what the answer is; got a batch of \['attention", {"input_ids": [5]}, NPO())
    refused("returned no loss for a batch of", {"input_ids": [5]}, Supervised())
    refused("layer must lie between 1 and 1, the last of this model; got 2", TEXTS[0], RMU(layer=2))


def test_classes_that_do_not_fit():
    """Labels of tokens for a classifier, a truth that is not known."""
    model, generator = classifier(), torch.Generator()
    with pytest.raises(ValueError, match="is for language models that predict the next one; this is a BertForSeq"):
        UniformOptions().loss(model, Collate(model)(QUESTIONS), generator)
    with pytest.raises(ValueError, match="exclude_truth needs labels"), moelora.disabled(model):
        RandomOption(exclude_truth=True).loss(model, Collate(model)([{"input_ids": [5]}]), generator)
    # without labels there is still something to guess
    with moelora.disabled(model):
        assert UniformOptions().loss(model, Collate(model)([{"input_ids": [5]}]), generator) > 0


def test_options_that_mean_nothing():
    """Of the objectives themselves, and examples without what a default rests on."""
    for make in (lambda: NPO(beta=0.0), lambda: SimNPO(beta=-1.0)):
        with pytest.raises(ValueError, match="beta must be positive"):
            make()
    for answers in ([], [[5], []]):
        with pytest.raises(ValueError, match="expected a refusal at least"):
            Refusal(answers=answers)
    for values in ({"layer": 0}, {"layer": 1, "scale": 0.0}):
        with pytest.raises(ValueError, match="layer must be at least 1 and scale positive"):
            RMU(**values)
    for example in ({"input_ids": [5, 6], "label": 1}, {"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [5]}):
        with pytest.raises(ValueError, match="a refusal takes the place of an answer behind a prompt"):
            Refusal(answers=[[7]]).examples([example], torch.Generator())
    with pytest.raises(ValueError, match="no example to choose an objective by"):
        default_objective(DECODER, [])
    with pytest.raises(ValueError, match=r"examples to be forgotten need labels, got \['input_ids'\]"):
        default_objective(DECODER, [{"input_ids": [5]}])
    with pytest.raises(ValueError, match="the model predicts tokens, but the label is the class 1"):
        default_objective(DECODER, INTENTS[1:])
