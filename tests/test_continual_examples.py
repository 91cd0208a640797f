"""Examples as batches: padding, labels, options, prompts without answers, and what does not fit."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moelora.continual.examples import (
    REFERENCE,
    Collate,
    batches,
    listed,
    model_inputs,
    prompts_of,
    row_of,
)

PAD = 7


@st.composite
def texts(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Examples of a language model, with a prompt and an answer each; no token is the padding's, none is 0."""
    made = []
    for _ in range(draw(st.integers(1, 5))):
        prompt = draw(st.lists(st.integers(10, 49), min_size=1, max_size=6))
        answer = draw(st.lists(st.integers(50, 90), min_size=1, max_size=4))
        made.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer, "text": "not read"})
    return made


def config_of(**values: Any) -> nn.Module:
    """A module with a config."""
    module: Any = nn.Module()
    module.config = SimpleNamespace(**values)
    return module


# --- batches ----------------------------------------------------------------------------------------------------------


@given(texts(), st.sampled_from(["right", "left"]))
def test_padding_adds_nothing(examples, side):
    """Where the mask is 1 stand the tokens and labels of each example in order; elsewhere padding without labels."""
    batch = Collate(PAD, side)(examples)

    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]
    for number, example in enumerate(examples):
        mask_L = batch["attention_mask"][number] != 0
        assert batch["input_ids"][number][mask_L].tolist() == example["input_ids"]
        assert batch["labels"][number][mask_L].tolist() == example["labels"]
        assert (batch["input_ids"][number][~mask_L] == PAD).all()
        assert (batch["labels"][number][~mask_L] == -100).all()
        # all of it at one end
        assert mask_L[0 if side == "right" else -1]
        assert (mask_L.int().diff() != 0).sum() <= 1


def test_columns_by_hand():
    """One class a row, options filled up with -1 behind them whatever the side of padding, token types with 0."""
    examples = [
        {"input_ids": [5, 6, 8], "token_type_ids": [0, 1, 1], "label": 2, "options": [2], REFERENCE: 1.5},
        {"input_ids": torch.tensor([9]), "token_type_ids": [1], "label": torch.tensor(0), "options": [4, 0, 1]}
        | {REFERENCE: 0.25},
    ]

    batch = Collate(PAD, "left")(examples)

    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[5, 6, 8], [PAD, PAD, 9]],
        "attention_mask": [[1, 1, 1], [0, 0, 1]],
        "token_type_ids": [[0, 1, 1], [0, 0, 1]],
        "labels": [2, 0],
        "options": [[2, -1, -1], [4, 0, 1]],
        REFERENCE: [1.5, 0.25],
    }
    assert sorted(model_inputs(batch)) == ["attention_mask", "input_ids", "labels", "token_type_ids"]


@given(texts(), st.integers(0, 3), st.integers(0, 3))
def test_padding_of_the_tokenizer_is_cut_off(examples, before, behind):
    """Examples that come padded make the batch that they make without: no step reads what is not there."""
    padded = [
        {
            "input_ids": [0] * before + example["input_ids"] + [0] * behind,
            "attention_mask": [0] * before + [1] * len(example["input_ids"]) + [0] * behind,
            "labels": [-100] * before + example["labels"] + [-100] * behind,
        }
        for example in examples
    ]

    plain, batch = Collate(PAD)(examples), Collate(PAD)(padded)

    assert all(torch.equal(batch[name], plain[name]) for name in plain)


def test_pad_id_of_a_model():
    """Its padding token; else its end token, the first if there are several; else 0."""
    assert Collate(config_of(pad_token_id=3, eos_token_id=4)).pad_id == 3
    assert Collate(config_of(pad_token_id=None, eos_token_id=[4, 5])).pad_id == 4
    assert Collate(config_of()).pad_id == 0
    assert Collate(nn.Module()).pad_id == 0


class Numbers:
    """A dataset with a length and items, and nothing else."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        if number >= 7:
            raise RuntimeError("read behind the end")
        return {"input_ids": [number + 1]}


def test_batches_hold_each_example_once():
    """In order without a generator; with one shuffled, the same for the same seed, another for the next epoch."""
    collate = Collate(0)

    def order(generator: torch.Generator | None) -> list[int]:
        return [int(token) for batch in batches(Numbers(), collate, 3, generator) for token in batch["input_ids"]]

    generator = torch.Generator().manual_seed(1)
    first, second = order(generator), order(generator)

    assert [len(batch["input_ids"]) for batch in batches(Numbers(), collate, 3)] == [3, 3, 1]
    assert order(None) == sorted(first) == sorted(second) == list(range(1, 8))
    assert order(torch.Generator().manual_seed(1)) == first
    assert len({tuple(first), tuple(second), tuple(order(None))}) == 3


# --- prompts ----------------------------------------------------------------------------------------------------------


@given(texts(), st.sampled_from(["right", "left"]))
def test_prompts_are_what_stands_before_the_answer(examples, side):
    """Only prompt tokens count, and nothing of an answer is left anywhere."""
    prompts = prompts_of(Collate(PAD, side)(examples))

    for number, example in enumerate(examples):
        length = example["labels"].count(-100)
        mask_L = prompts["attention_mask"][number] != 0
        assert prompts["input_ids"][number][mask_L].tolist() == example["input_ids"][:length]
    assert not torch.isin(prompts["input_ids"], torch.arange(50, 91)).any()
    if side == "right":
        assert prompts["input_ids"].shape[1] == max(example["labels"].count(-100) for example in examples)


def test_prompts_by_hand():
    """An answer in the middle ends the prompt; a text that is all answer, or has none, is all prompt."""
    examples = [
        {"input_ids": [11, 12, 60, 13], "labels": [-100, -100, 60, -100], "token_type_ids": [0, 1, 1, 1]},
        {"input_ids": [14, 15, 16], "labels": [14, 15, 16], "token_type_ids": [1, 1, 1]},
        {"input_ids": [17, 18], "labels": [-100, -100], "token_type_ids": [1, 1]},
    ]

    prompts = prompts_of(Collate(PAD)(examples))

    assert {name: values.tolist() for name, values in prompts.items()} == {
        "input_ids": [[11, 12, 0], [14, 15, 16], [17, 18, 0]],
        "attention_mask": [[1, 1, 0], [1, 1, 1], [1, 1, 0]],
        "token_type_ids": [[0, 1, 0], [1, 1, 1], [1, 1, 0]],
    }


def test_prompts_of_classes_are_the_texts():
    """A class is no part of the text; columns that a detector does not read are left out."""
    batch = Collate(PAD)(
        [{"input_ids": [5, 6], "label": 1, "options": [0, 1]}, {"input_ids": [8], "label": 0} | {"options": [1]}]
    )

    prompts = prompts_of(batch)

    assert sorted(prompts) == ["attention_mask", "input_ids"]
    assert all(torch.equal(prompts[name], batch[name]) for name in prompts)


# --- errors -----------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[list[dict[str, Any]], str]] = {
    "no text": ([{"text": "hello"}], r"needs input_ids, got \['text'\]; tokenize"),
    "no tokens": ([{"input_ids": []}], "has no tokens"),
    "all padding": ([{"input_ids": [1, 2], "attention_mask": [0, 0]}], "has no tokens"),
    "two axes": ([{"input_ids": [[1, 2]]}], r"of one axis at most, got torch.int64 \(1, 2\)"),
    "one token": ([{"input_ids": 1}], "must be a list of token ids, got the number 1"),
    "ragged": ([{"input_ids": [[1], [1, 2]]}], "input_ids must be integers, got"),
    "words": ([{"input_ids": ["a"]}], "input_ids must be integers, got"),
    "regression": ([{"input_ids": [1], "label": 0.5}], "labels of one example must be integers"),
    "another length": (
        [{"input_ids": [1, 2], "labels": [1]}],
        r"labels must have as many entries as input_ids, \(2,\)",
    ),
    "another mask": ([{"input_ids": [1, 2], "attention_mask": [1]}], "attention_mask must have as many"),
    "some labels": ([{"input_ids": [1], "label": 0}, {"input_ids": [1]}], "1 of 2 examples have labels; expected all"),
    "mixed labels": (
        [{"input_ids": [1], "label": 0}, {"input_ids": [1], "labels": [1]}],
        "some examples have one number",
    ),
    "some options": ([{"input_ids": [1], "options": [0]}, {"input_ids": [1]}], "1 of 2 examples have options"),
    "no options": ([{"input_ids": [1], "options": []}], "options must be different"),
    "negative options": ([{"input_ids": [1], "options": [0, -1]}], "options must be different"),
    "equal options": (
        [{"input_ids": [1], "options": [3, 3]}],
        r"got \[3, 3\]; options whose texts begin with the same",
    ),
    "nothing": ([], "no example to make a batch of"),
}


@pytest.mark.parametrize(("examples", "message"), WRONG.values(), ids=WRONG)
def test_examples_that_do_not_fit(examples, message):
    """An error says what came and what was expected."""
    with pytest.raises(ValueError, match=message):
        Collate(0)(examples)


def test_other_errors():
    """Of datasets, batch sizes and sides."""
    with pytest.raises(ValueError, match="the dataset is empty"):
        next(batches([], Collate(0), 2))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        next(batches([{"input_ids": [1]}], Collate(0), 0))
    with pytest.raises(ValueError, match=r"items 0, 1, .* got a dict"):
        listed({"input_ids": [1]})
    with pytest.raises(ValueError, match="got a generator"):
        listed(example for example in [{"input_ids": [1]}])
    with pytest.raises(ValueError, match="an example is a mapping with input_ids, got a str"):
        listed(["hello"])
    with pytest.raises(ValueError, match="unknown padding_side 'both'"):
        Collate(0, "both")


def test_labels_before_label():
    """Where both columns are there, `labels` counts: it is what a model takes."""
    assert int(row_of({"input_ids": [1], "label": 3, "labels": 0})["labels"]) == 0
