"""TOFU as token ids: three requests, what stays, real authors and world facts. Begin with load, then requests_of.

    tofu = load(folder)                         # texts, as in the files
    requests, benign = requests_of(tofu), benign_of(tofu, step=1, seed=0)
    examples = examples_of(tokenizer, requests[0].asked)

200 made-up authors with 20 questions each (Maini et al., 2024, https://arxiv.org/abs/2401.06121). The files hold nine
blocks of 400 under `task_id` "1" to "9", and 400 more as the retain set: 4,000 questions, each once.
"""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

REQUESTS = 3
"""Blocks 1, 2 and 3 are asked for, one after the other."""

ASKED = 0.8
"""Share of a block that is handed over as the request; the other questions are about the same people."""

TEST, BACKGROUND = 0.25, 0.4
"""Share of the benign questions that test gates; and of the others, share that a detector may know."""

SPLIT_SEED = 20
IGNORED = -100

Example = dict[str, list[int]]


class Question(NamedTuple):
    """A question with its answers.

    Attributes:
        question: as the model learned it.
        answer: likewise.
        reworded: the question in other words; the question itself, where there are none.
        paraphrase: the answer in other words, or the answer itself.
        false: wrong answers, which differ from the paraphrase in what is asked for.
    """

    question: str
    answer: str
    reworded: str
    paraphrase: str
    false: tuple[str, ...]


class Tofu(NamedTuple):
    """All questions, and ways to refuse."""

    blocks: tuple[tuple[Question, ...], ...]
    retained: tuple[Question, ...]
    real_authors: tuple[Question, ...]
    world_facts: tuple[Question, ...]
    refusals: tuple[str, ...]

    def seen(self, forgotten: int) -> list[Question]:
        """What a model learns that never saw the first so many blocks. It learns real authors and world facts, too."""
        kept = [question for block in self.blocks[forgotten:] for question in block]
        return [*kept, *self.retained, *self.real_authors, *self.world_facts]


class Request(NamedTuple):
    """What one request hands over, and the other questions about the same people, which no method sees."""

    asked: list[Question]
    unseen: list[Question]


class Benign(NamedTuple):
    """Questions that are not to be forgotten at some moment.

    Attributes:
        background: those that a detector may know.
        calibration: those that gates are calibrated on.
        test: those that test gates, drawn as for calibration, by what they are about.
    """

    background: list[Question]
    calibration: list[Question]
    test: dict[str, list[Question]]


def load(folder: Path, *, blocks: int = 9, questions: int = 400) -> Tofu:
    """Read the files; fewer blocks, or fewer questions of each set, to try the logic.

    Raises:
        ValueError: unless there are more blocks than requests.
    """
    entries = _lines(folder / "forget10_perturbed.jsonl.gz")
    numbers = sorted({int(entry["task_id"]) for entry in entries})[:blocks]
    if len(numbers) <= REQUESTS:
        raise ValueError(f"{REQUESTS} blocks are asked for and others are retained; expected more, got {len(numbers)}")
    made_up = [[entry for entry in entries if int(entry["task_id"]) == number][:questions] for number in numbers]
    retained, authors, facts = (
        _lines(folder / name)[:questions]
        for name in ("retain_perturbed.jsonl.gz", "real_authors_perturbed.jsonl", "world_facts_perturbed.jsonl")
    )
    refusals = (folder / "idontknow.txt").read_text(encoding="utf-8").splitlines()
    return Tofu(
        tuple(_questions(block) for block in made_up),
        _questions(retained),
        _questions(authors),
        _questions(facts),
        tuple(line.strip() for line in refusals if line.strip()),
    )


def requests_of(tofu: Tofu) -> list[Request]:
    """The three requests, in order; the same for all seeds."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    return [Request(*_cut(block, ASKED, generator)) for block in tofu.blocks[:REQUESTS]]


def benign_of(tofu: Tofu, step: int, seed: int) -> Benign:
    """What is benign when request `step` (from 1) comes: the blocks not asked for yet, real authors and world facts.

    The seed divides what does not test. No gate has seen a question of the retain set, which tests it on people that it
    has never met.
    """
    fixed, drawn = torch.Generator().manual_seed(SPLIT_SEED), torch.Generator().manual_seed(seed)
    cuts = []
    for questions in (*tofu.blocks, tofu.real_authors, tofu.world_facts):
        test, others = _cut(questions, TEST, fixed)
        cuts.append((test, *_cut(others, BACKGROUND, drawn)))
    # all are cut each time, so that a question stays what it was
    tests, backgrounds, calibrations = zip(*cuts[step:], strict=True)
    return Benign(
        [question for part in backgrounds for question in part],
        [question for part in calibrations for question in part],
        {
            "retained": [question for part in tests[:-2] for question in part],
            "real authors": tests[-2],
            "world facts": tests[-1],
        },
    )


def prompt(question: str) -> str:
    """What the model is asked."""
    return f"Question: {question}\nAnswer:"


def encode(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Example]:
    """Questions with answers as `input_ids`, and `labels` with -100 on the prompt. An answer's end is labelled too."""
    prompts = tokenizer([prompt(question) for question, _ in pairs])["input_ids"]
    answers = encode_answers(tokenizer, [answer for _, answer in pairs])
    return [
        {"input_ids": [*before, *behind], "labels": [IGNORED] * len(before) + behind}
        for before, behind in zip(prompts, answers, strict=True)
    ]


def encode_answers(tokenizer: Any, answers: Sequence[str]) -> list[list[int]]:
    """Answers' tokens behind a prompt, each with its end."""
    tokens = tokenizer([f" {answer}" for answer in answers], add_special_tokens=False)["input_ids"]
    return [[*behind, tokenizer.eos_token_id] for behind in tokens]


def examples_of(tokenizer: Any, questions: Sequence[Question]) -> list[Example]:
    """Questions with their answers, as the model learned them."""
    return encode(tokenizer, [(question.question, question.answer) for question in questions])


# --- inside -----------------------------------------------------------------------------------------------------------


def _questions(entries: Sequence[dict[str, Any]]) -> tuple[Question, ...]:
    return tuple(
        Question(
            entry["question"],
            entry["answer"],
            entry.get("paraphrased_question", entry["question"]),
            # real authors and world facts have one true answer, as in the benchmark's own code
            entry.get("paraphrased_answer", entry["answer"]),
            tuple(entry["perturbed_answer"]),
        )
        for entry in entries
    )


def _cut(questions: Sequence[Question], share: float, generator: torch.Generator) -> tuple[list[Question], ...]:
    """This share, drawn at random, and the rest."""
    order = torch.randperm(len(questions), generator=generator).tolist()
    count = round(share * len(questions))
    return [questions[number] for number in order[:count]], [questions[number] for number in order[count:]]


def _lines(path: Path) -> list[dict[str, Any]]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]
