"""What a model says about sets of questions, and TOFU's measures of it. Begin with measure, then figures_of.

    measured = measure(model, tokenizer, {"asked": questions, ...})     # likelihoods of all answers, and generated ones
    figures = knowledge(questions, measured["asked"])                   # probability, ROUGE-L recall, ...

All sets go through the model together, in big batches of similar length. Nothing here knows how the model was made to
forget: gates and experts act in its forward and in its `generate`. The formulas are those of `moelora.metrics.tofu`.

Axes: N questions, C false answers.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.unlearning.tofu_data import Question, encode, encode_answers, prompt
from benchmarks.unlearning.tofu_model import answer_nll, moved
from moelora.continual.examples import Collate
from moelora.metrics import (
    conditional_probability,
    forget_quality,
    forget_truth_ratio,
    kept_truth_ratio,
    model_utility,
    option_probability,
    released_truth_ratio,
    rouge_l_recall,
)

ROWS = {"cuda": 512, "cpu": 128}
"""Questions that are answered at once."""

SPARE = 8
"""Tokens that a generated answer may be longer than the true one."""

WORD = re.compile(r"[^\W_]+")

Figures = dict[str, float]


class Measured(NamedTuple):
    """What a model says about a set of questions.

    Attributes:
        nll_N: of each answer, the mean over its tokens.
        paraphrase_nll_N: of each answer in other words.
        false_nll_NC: of each wrong answer.
        answers: what it generates, greedily.
    """

    nll_N: Float[Tensor, " N"]
    paraphrase_nll_N: Float[Tensor, " N"]
    false_nll_NC: Float[Tensor, "N C"]
    answers: list[str]

    @property
    def ratio_N(self) -> Float[Tensor, " N"]:
        """Truth ratio of each question, as the released code has it."""
        return released_truth_ratio(self.false_nll_NC, self.paraphrase_nll_N)


def measure(model: Any, tokenizer: Any, sets: Mapping[str, Sequence[Question]]) -> dict[str, Measured]:
    """Likelihoods and generated answers of each set, all sets at once. A set's questions have as many false ones."""
    questions = [question for chosen in sets.values() for question in chosen]
    answers = generate(model, tokenizer, questions)
    pairs = [(q.question, text) for q in questions for text in (q.answer, q.paraphrase, *q.false)]
    nlls = iter(answer_nll(model, encode(tokenizer, pairs), rows=_rows(model) // 4).tolist())

    found, at = {}, 0
    for name, chosen in sets.items():
        nll_NX = torch.tensor([[next(nlls) for _ in range(2 + len(q.false))] for q in chosen])
        found[name] = Measured(nll_NX[:, 0], nll_NX[:, 1], nll_NX[:, 2:], answers[at : at + len(chosen)])
        at += len(chosen)
    return found


@torch.no_grad()
def generate(model: Any, tokenizer: Any, questions: Sequence[Question]) -> list[str]:
    """Greedy answers by the model's own `generate`, in batches of answers of similar length, padded on the left."""
    device = next(model.parameters()).device
    collate = Collate(model, padding_side="left")
    lengths = [len(answer) for answer in encode_answers(tokenizer, [question.answer for question in questions])]
    prompts = tokenizer([prompt(question.question) for question in questions])["input_ids"]
    by_length = sorted(range(len(questions)), key=lengths.__getitem__)
    answers = [""] * len(questions)
    for start in range(0, len(by_length), _rows(model)):
        chosen = by_length[start : start + _rows(model)]
        batch = moved(collate([{"input_ids": prompts[number]} for number in chosen]), device)
        output_BL = model.generate(
            **batch,
            max_new_tokens=lengths[chosen[-1]] + SPARE,
            do_sample=False,
            pad_token_id=collate.pad_id,
        )
        texts = tokenizer.batch_decode(output_BL[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for number, text in zip(chosen, texts, strict=True):
            answers[number] = text
    return answers


def knowledge(questions: Sequence[Question], measured: Measured) -> Figures:
    """How well the true answers are known: probability, ROUGE-L recall, and how often the nearest answer is the truth.

    "nearest" stands in for O3's accuracy, which compares sentence embeddings: here the generated answer shares more
    words with the true answer (in the words of the false ones) than with any false one. Equal ones share the point, so
    that an answer that says nothing counts as guessing: 1 / 6 for made-up authors.
    """
    rouge = [rouge_l_recall(text, q.answer) for q, text in zip(questions, measured.answers, strict=True)]
    nearest = [nearest_is_true(text, q) for q, text in zip(questions, measured.answers, strict=True)]
    return {
        "probability": conditional_probability(measured.nll_N).mean().item(),
        "rouge": sum(rouge) / len(rouge),
        "nearest": sum(nearest) / len(nearest),
    }


def utility(sets: Mapping[str, Sequence[Question]], measured: Mapping[str, Measured]) -> Figures:
    """Model utility and its nine scores, of the sets "retain set", "real authors" and "world facts"."""
    figures: Figures = {}
    for name in ("retain set", "real authors", "world facts"):
        said = measured[name]
        known = knowledge(sets[name], said)
        if name != "retain set":
            options_NC = torch.cat([said.nll_N[:, None], said.false_nll_NC], dim=1)
            known["probability"] = option_probability(options_NC).mean().item()
        known["truth ratio"] = kept_truth_ratio(said.ratio_N)
        figures |= {f"{name}: {measure}": value for measure, value in known.items()}
    scores = [
        [figures[f"{name}: {measure}"] for measure in ("probability", "rouge", "truth ratio")]
        for name in ("retain set", "real authors", "world facts")
    ]
    return figures | {"utility": model_utility(torch.tensor(scores, dtype=torch.float64).clamp(0, 1))}


def forgetting(ratio_N: Float[Tensor, " N"], reference_N: Float[Tensor, " N"]) -> Figures:
    """The forget set's truth ratio, and forget quality against a model that never saw it.

    The p-value of a quality near 0 says nothing; its logarithm is what papers plot.
    """
    quality = forget_quality(ratio_N, reference_N)
    log = torch.tensor(quality, dtype=torch.float64).clamp(min=1e-300).log10().item()
    return {"truth ratio": forget_truth_ratio(ratio_N), "forget quality": quality, "log10 forget quality": log}


def joined(parts: Sequence[Measured]) -> Measured:
    """Several sets as one."""
    return Measured(
        torch.cat([part.nll_N for part in parts]),
        torch.cat([part.paraphrase_nll_N for part in parts]),
        torch.cat([part.false_nll_NC for part in parts]),
        [answer for part in parts for answer in part.answers],
    )


def nearest_is_true(text: str, question: Question) -> float:
    """1 if the text shares most words (F1) with the true answer; a share of it among equals, 0 otherwise."""
    scores = [shared_words(text, answer) for answer in (question.paraphrase, *question.false)]
    best = max(scores)
    return (scores[0] == best) / scores.count(best)


def shared_words(text: str, other: str) -> float:
    """F1 of the words of two texts, each word as often as it stands there."""
    words, others = Counter(WORD.findall(text.lower())), Counter(WORD.findall(other.lower()))
    shared = sum((words & others).values())
    return 2 * shared / max(1, sum(words.values()) + sum(others.values()))


# --- inside -----------------------------------------------------------------------------------------------------------


def _rows(model: Any) -> int:
    return ROWS[next(model.parameters()).device.type]
