"""The study on unlike skills: which are kept, how items become batches, and how heads answer them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.quality import skills
from benchmarks.quality.answers import NORM, SHARPNESS, Answers, Choice, encode, fit_head, fresh_head
from benchmarks.quality.run import Results, phases
from benchmarks.quality.skills import Item, Skill, collate, in_order, shuffled
from benchmarks.quality.study import METHODS, QUESTIONS, SEEDS, SKILLS, TUNING_SEED, Run

ABOUT = {"seconds": "1", "device": "CPU", "torch": "2", "revision": "x", "date": "2026-01-01"}

WIDTH = 8


class Embeddings(nn.Module):
    """An encoder that looks ids up; it counts them, too, where they are padding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, WIDTH)
        torch.nn.init.normal_(self.table.weight, generator=torch.Generator().manual_seed(0))

    def forward(self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        """What a transformers encoder returns."""
        return SimpleNamespace(last_hidden_state=self.table(input_ids))


def item(label: int, *texts: list[int]) -> Item:
    """Texts by their ids."""
    return Item(list(texts), label)


def test_the_skills_of_the_study_can_be_read():
    """Names agree, and the one source that is in the repository has 15 intents, none missing."""
    assert tuple(skills.SOURCES) == SKILLS
    read, classes = skills.SOURCES["clinc-home"]
    train, test = read(Path(__file__).parents[1] / "examples" / "data")
    assert (len(train), len(test), classes) == (1800, 450, 15)
    assert {label for _, label in train} == {label for _, label in test} == set(range(15))


def test_held_out_items_are_not_trained_on():
    """A split takes every item once, and another seed holds out others."""
    skill = Skill("one", 2, [item(0, [n]) for n in range(60)], [])

    def held(seed: int) -> set[int]:
        training, rest = skill.split(seed)
        assert sorted(i.texts[0][0] for i in training + rest) == list(range(60))
        return {i.texts[0][0] for i in rest}

    assert len(held(0)) == 10
    assert held(0) == held(0) != held(1)


def test_a_batch_knows_its_rows():
    """Rows of each skill's items, in order, behind padding that is masked."""
    batch = collate([(1, item(2, [5, 6, 7])), (0, item(1, [1], [2, 3])), (1, item(0, [4]))])

    assert batch.input_ids_BL.tolist() == [[5, 6, 7], [1, 0, 0], [2, 3, 0], [4, 0, 0]]
    assert batch.attention_mask_BL.sum(1).tolist() == [3, 1, 2, 1]
    assert batch.skill_B.tolist() == [1, 0, 0, 1]
    assert {skill: (rows.tolist(), labels.tolist()) for skill, (rows, labels) in batch.items.items()} == {
        1: ([[0], [3]], [2, 0]),
        0: ([[1, 2]], [1]),
    }


def test_all_of_a_skill_before_any_comes_again():
    """Shares choose the skill; within it nothing comes twice in one round."""
    pools = [[item(0, [n]) for n in range(12)], [item(0, [19])]]
    first, second, again = (
        next(batches).input_ids_BL.flatten().tolist()
        for batches in [shuffled(pools, [1.0, 0.0], 6, generator=torch.Generator().manual_seed(0))]
        for _ in range(3)
    )
    assert sorted(first + second) == list(range(12))
    assert 19 not in again


@pytest.fixture
def answers() -> Answers:
    """Two skills: three classes, and multiple choice."""
    generator = torch.Generator().manual_seed(0)
    heads = [fresh_head(Skill("", classes, [], []), WIDTH, generator) for classes in (3, 0)]
    return Answers(Embeddings(), heads)


def test_a_fresh_choice_is_the_nearest_answer(answers):
    """Scores are SHARPNESS times the cosine of question and answer."""
    batch = collate([(1, item(1, [3], [4], [3], [5]))])
    table = answers.module.table.weight
    cosine = torch.nn.functional.cosine_similarity(table[3], table[[4, 3, 5]], dim=-1)

    torch.testing.assert_close(answers.scores(batch)[1][0], SHARPNESS * cosine)
    assert answers.right(batch) == 1


def test_the_loss_is_the_mean_over_items(answers):
    """Whatever their skill, and however long the texts beside them are."""
    numbered = [(0, item(2, [1, 2])), (1, item(0, [3], [4], [6, 7, 8])), (0, item(0, [5]))]
    alone = [answers(collate([one]))["loss"] for one in numbered]

    torch.testing.assert_close(answers(collate(numbered))["loss"], torch.stack(alone).mean())


@pytest.mark.parametrize("classes", [3, 0])
def test_a_head_is_fitted_to_what_it_can_tell(classes):
    """Classes that the ids decide; a question whose answer is not its nearest text."""
    if classes:
        items = [item(n % 3, [n % 3 + 1]) for n in range(12)]
        head = fresh_head(Skill("", 3, [], []), WIDTH, torch.Generator().manual_seed(0))
    else:
        items = [item(1, [n], [n], [n + 1]) for n in range(1, 4)]
        head = Choice(WIDTH)
    features_NPD, label_N = encode(Embeddings(), items, "cpu")
    torch.testing.assert_close(features_NPD.norm(dim=-1), torch.full(features_NPD.shape[:2], NORM))

    fit_head(head, features_NPD, label_N, strength=1e4)
    assert head(features_NPD).argmax(-1).tolist() == label_N.tolist()


def test_in_order_asks_everything_once():
    """Neighbours are of like length."""
    items = [item(n, [1] * (5 - n)) for n in range(5)]
    labels = [label for batch in in_order(7, items, 2) for label in batch.items[7][1].tolist()]
    assert labels == [4, 3, 2, 1, 0]


def measured(results: Results, skill: str, probe: float, adapter: tuple[float, float, float]) -> None:
    """Enter a skill's tuning and its three seeds."""

    def add(kind: str, seed: int, rate: float, value: float) -> None:
        run = Run(suite="mixed", method=f"{kind}: {skill}", seed=seed, rate=rate, samples=4000)
        results.add(run, {"validation": value}, ABOUT)

    for kind in ("probe", "adapter"):
        for rate in METHODS[f"{kind}: {skill}"].rates:
            add(kind, TUNING_SEED, rate, rate)
    for seed, value in zip(SEEDS, adapter, strict=True):
        add("probe", seed, 300.0, probe)
        add("adapter", seed, 9e-3, value)


def test_a_skill_is_kept_where_its_adapter_helps(tmp_path):
    """By more than twice the standard error of its gains on held-out items, and once all seeds are there."""
    results = Results(tmp_path / "mixed.csv")
    measured(results, "boolq", 0.6, (0.65, 0.66, 0.67))
    measured(results, "arc", 0.4, (0.41, 0.40, 0.40))
    measured(results, "openbookqa", 0.4, (0.39, 0.38, 0.37))
    # a third of a point on average, and a standard error of as much
    assert results.gains("arc") == pytest.approx([0.01, 0.0, 0.0])
    assert results.kept_skills() == {"boolq": 9e-3}


def test_skills_are_measured_before_they_are_mixed(tmp_path):
    """The tuning of single skills, their seeds, then the same for mixtures."""
    first, second, third, fourth = phases("mixed", list(QUESTIONS), Results(tmp_path / "mixed.csv"))
    kinds = [{METHODS[run.method].kind for run in runs} for runs in (first, second, third, fourth)]
    assert kinds[0] == kinds[1] == {"probe", "skill"}
    assert kinds[2] <= kinds[3] == {"pool", "single", "joint"}
    assert {run.suite for run in first} == {"mixed"}
