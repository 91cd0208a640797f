"""Unlike skills for a sentence encoder: intents, questions about a passage, multiple choice. Begin with load.

An item is a few texts and the number of its right answer. A skill's answers are classes, told from an item's one text;
or they are texts themselves, of which the one nearest to the question is taken.
"""

import csv
import gzip
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

CLINC = ("banking", "kitchen_and_dining", "home", "meta")
"""Domains of CLINC150 in which a head on the frozen encoder errs most, 15 intents each, and one near to Banking77."""

LENGTH = 160
"""Tokens of a text; what is longer loses its end."""

TEST = 1500
"""Items of a test split that are asked, at most: evenly spread."""


class Item(NamedTuple):
    """The ids of an item's texts, and the number of its right answer."""

    texts: list[list[int]]
    label: int


class Skill(NamedTuple):
    """One skill's items; `classes` is 0 where an item brings its own answers, behind its question."""

    name: str
    classes: int
    train: list[Item]
    test: list[Item]

    def split(self, seed: int) -> tuple[list[Item], list[Item]]:
        """Training items, and every sixth of them (at most 500) to choose by: another draw with each seed."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.train), generator=generator).tolist()
        held = min(500, len(order) // 6)
        return [self.train[n] for n in order[held:]], [self.train[n] for n in order[:held]]


class Batch(NamedTuple):
    """Rows of texts, and which rows make up the items of each skill.

    Attributes:
        input_ids_BL, attention_mask_BL: as the encoder takes them.
        skill_B: the number of each row's skill.
        items: for the number of each skill in the batch, the rows of N items of P texts, and their right answers.
    """

    input_ids_BL: Int[Tensor, "B L"]
    attention_mask_BL: Int[Tensor, "B L"]
    skill_B: Int[Tensor, " B"]
    items: dict[int, tuple[Int[Tensor, "N P"], Int[Tensor, " N"]]]

    def to(self, device: str) -> "Batch":
        """The same on a device."""
        items = {skill: (rows_NP.to(device), label_N.to(device)) for skill, (rows_NP, label_N) in self.items.items()}
        return Batch(self.input_ids_BL.to(device), self.attention_mask_BL.to(device), self.skill_B.to(device), items)


def collate(numbered: Sequence[tuple[int, Item]]) -> Batch:
    """A batch of items, each with the number of its skill."""
    rows = [(skill, ids) for skill, item in numbered for ids in item.texts]
    longest = max(len(ids) for _, ids in rows)
    input_ids_BL = torch.zeros(len(rows), longest, dtype=torch.long)
    mask_BL = torch.zeros_like(input_ids_BL)
    for row, (_, ids) in enumerate(rows):
        input_ids_BL[row, : len(ids)] = torch.tensor(ids)
        mask_BL[row, : len(ids)] = 1

    places: dict[int, list[list[int]]] = {}
    labels: dict[int, list[int]] = {}
    row = 0
    for skill, item in numbered:
        places.setdefault(skill, []).append(list(range(row, row + len(item.texts))))
        labels.setdefault(skill, []).append(item.label)
        row += len(item.texts)
    items = {skill: (torch.tensor(places[skill]), torch.tensor(labels[skill])) for skill in places}
    return Batch(input_ids_BL, mask_BL, torch.tensor([skill for skill, _ in rows]), items)


def in_order(skill: int, items: Sequence[Item], size: int) -> Iterator[Batch]:
    """All items of one skill once, neighbours of like length."""
    ranked = sorted(items, key=lambda item: max(map(len, item.texts)))
    for start in range(0, len(ranked), size):
        yield collate([(skill, item) for item in ranked[start : start + size]])


def shuffled(
    pools: Sequence[Sequence[Item]], shares: Sequence[float], size: int, *, generator: torch.Generator
) -> Iterator[Batch]:
    """Batches without end: items of skills drawn with these shares, and all of a skill's before any comes again."""
    orders: dict[int, list[int]] = {}
    shares_E = torch.tensor(shares, dtype=torch.float32)
    while True:
        numbered = []
        for skill in torch.multinomial(shares_E, size, replacement=True, generator=generator).tolist():
            if not orders.get(skill):
                orders[skill] = torch.randperm(len(pools[skill]), generator=generator).tolist()
            numbered.append((skill, pools[skill][orders[skill].pop()]))
        yield collate(numbered)


# --- sources ----------------------------------------------------------------------------------------------------------

Raw = tuple[list[Any], int]
"""Texts (or pairs of texts that are read as one) and the number of the right answer."""


def load(data: Path, tokenizer: Any) -> list[Skill]:
    """All skills, from folders of the data sets; the order is that of SOURCES."""
    found = []
    for name, (read, classes) in SOURCES.items():
        train, test = read(data)
        picked = torch.linspace(0, len(test) - 1, min(TEST, len(test))).long().tolist()
        found.append(Skill(name, classes, _encoded(train, tokenizer), _encoded([test[n] for n in picked], tokenizer)))
    return found


def _encoded(raw: Sequence[Raw], tokenizer: Any) -> list[Item]:
    # a pair is one text to this encoder, which was trained without token types
    flat = [text if isinstance(text, tuple) else (text, None) for texts, _ in raw for text in texts]
    separator = f" {tokenizer.sep_token} "
    joined = [first if second is None else f"{first}{separator}{second}" for first, second in flat]
    ids = iter(tokenizer(joined, truncation=True, max_length=LENGTH)["input_ids"])
    return [Item([next(ids) for _ in texts], label) for texts, label in raw]


def _clinc(domain: str) -> Callable[[Path], tuple[list[Raw], list[Raw]]]:
    def read(data: Path) -> tuple[list[Raw], list[Raw]]:
        intents = json.loads((data / "clinc150" / "domains.json").read_text(encoding="utf-8"))[domain]
        splits = _json(data / "clinc150" / "data_full.json.gz")

        def own(*names: str) -> list[Raw]:
            return [
                ([text], intents.index(label)) for name in names for text, label in splits[name] if label in intents
            ]

        return own("train", "val"), own("test")

    return read


def _banking77(data: Path) -> tuple[list[Raw], list[Raw]]:
    names = json.loads((data / "banking77" / "categories.json").read_text(encoding="utf-8"))
    found = []
    for split in ("train", "test"):
        with gzip.open(data / "banking77" / f"{split}.csv.gz", "rt", encoding="utf-8", newline="") as file:
            found.append([([row["text"]], names.index(row["category"])) for row in csv.DictReader(file)])
    return found[0], found[1]


def _boolq(data: Path) -> tuple[list[Raw], list[Raw]]:
    """Question and passage: yes or no."""

    def own(split: str) -> list[Raw]:
        entries = _json(data / "boolq_passage" / f"{split}.json.gz")
        parted = [(entry["sentence"].removeprefix("question: ").split("\npassage: ", 1), entry) for entry in entries]
        return [([tuple(parts)], int(entry["label"] == "True")) for parts, entry in parted]

    return own("train"), own("test")


def _pubmedqa(reads: str) -> Callable[[Path], tuple[list[Raw], list[Raw]]]:
    """Question, and the end of the abstract without its conclusion or the conclusion alone: yes, no or maybe."""

    def read(data: Path) -> tuple[list[Raw], list[Raw]]:
        entries = _json(data / "pubmedqa" / "ori_pqal.json.gz")
        official = json.loads((data / "pubmedqa" / "test_ground_truth.json").read_text(encoding="utf-8"))
        splits: tuple[list[Raw], list[Raw]] = [], []
        for name, entry in entries.items():
            # the results stand in the last section; what comes before would be cut off by its length
            passage = entry["CONTEXTS"][-1] if reads == "abstract" else entry["LONG_ANSWER"]
            label = ("no", "yes", "maybe").index(entry["final_decision"])
            splits[name in official].append(([(entry["QUESTION"], passage)], label))
        return splits

    return read


def _choice(*folders: str) -> Callable[[Path], tuple[list[Raw], list[Raw]]]:
    """Questions of four answers; the few with three or five are left out."""

    def read(data: Path) -> tuple[list[Raw], list[Raw]]:
        def own(split: str) -> list[Raw]:
            found: list[Raw] = []
            for folder in folders:
                for entry in _json(data / "arc_openbookqa" / folder / f"{split}.json.gz"):
                    question, rest = entry["instruction"].split("\n\nAnswer1: ", 1)
                    answers = re.split(r" Answer\d: ", rest.rsplit("\n\nAnswer format", 1)[0])
                    if len(answers) == 4:
                        texts = [question.split("question: ", 1)[1], *answers]
                        found.append((texts, int(entry["answer"].removeprefix("answer")) - 1))
            return found

        return own("train"), own("test")

    return read


def _json(path: Path) -> Any:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)


SOURCES: dict[str, tuple[Callable[[Path], tuple[list[Raw], list[Raw]]], int]] = {
    **{f"clinc-{domain}": (_clinc(domain), 15) for domain in CLINC},
    "banking77": (_banking77, 77),
    "boolq": (_boolq, 2),
    "pubmedqa": (_pubmedqa("abstract"), 3),
    "pubmedqa-conclusion": (_pubmedqa("conclusion"), 3),
    "arc": (_choice("ARC-Easy", "ARC-Challenge"), 0),
    "openbookqa": (_choice("openbookqa"), 0),
}
"""How each skill's training and test items are read, and how many classes it has."""
