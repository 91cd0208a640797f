"""Utterances of CLINC150 and Banking77, and who gets which: requests, benign text, tests. Begin with read and draw.

    corpus = read(clinc_folder, banking_folder)
    roles = draw(corpus, seed=0)

The requests are three domains of CLINC150, asked for one after the other; the other seven are retained. *Near* is what
is benign and most like a request: the retained domains. *Far* are Banking77 and CLINC150's out-of-scope queries. What a
detector may know of benign text (`background`), what gates are calibrated on (`calibration`) and what is reported
(`retained`, `banking`, `outside`) have no utterance in common, and only the last comes from test splits.
"""

import csv
import gzip
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

REQUESTS = ("work", "travel", "home")
"""In the order in which they come."""

OUTSIDE = -1
"""The label of what belongs to none of the 150 intents."""


class Utterance(NamedTuple):
    """A query and the number of its intent, which is its place in the list of all intents."""

    text: str
    label: int


Utterances = list[Utterance]


class Corpus(NamedTuple):
    """All utterances.

    Attributes:
        intents: names of all intents, by domain.
        splits: "train", "val" and "test" of CLINC150; "oos_train", "oos_val", "oos_test"; "banking_train" and
            "banking_test".
    """

    intents: dict[str, list[str]]
    splits: dict[str, Utterances]

    @property
    def domains(self) -> list[str]:
        """Names of the domains."""
        return list(self.intents)

    @property
    def classes(self) -> int:
        """How many intents there are."""
        return sum(map(len, self.intents.values()))

    def labels_of(self, domains: Sequence[str]) -> set[int]:
        """The intents of these domains."""
        names = [(domain, intent) for domain, intents in self.intents.items() for intent in intents]
        return {label for label, (domain, _) in enumerate(names) if domain in domains}

    def of(self, split: str, domains: Sequence[str]) -> Utterances:
        """The utterances of these domains."""
        wanted = self.labels_of(domains)
        return [utterance for utterance in self.splits[split] if utterance.label in wanted]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many utterances each role gets; of domains, of each intent.

    Attributes:
        asked: of a request, to unlearn; its gate is fitted to them.
        measured: of these, on which S.U. is measured.
        held: of a request's validation split: its miss rate is certified on them. The training split is not like the
            test split (its queries are closer to each other), so others of it would certify too much.
        held_out: of a request's test split, on which D.U. is measured; gates are tested on all of it.
        background, calibration: of the retained domains.
        retained: of the retained domains' test split, on which accuracy is measured; gates are tested on all of it.
        banking_background, banking_calibration, far: of Banking77; `far` also of the out-of-scope queries on which the
            model's answers are compared.
        banking: of Banking77's test split.
    """

    asked: int = 60
    measured: int = 6
    held: int = 20
    held_out: int = 14
    background: int = 40
    calibration: int = 20
    retained: int = 7
    banking_background: int = 300
    banking_calibration: int = 200
    banking: int = 1000
    far: int = 150


class Roles(NamedTuple):
    """Who gets which utterances.

    Attributes:
        asked: of each request: what it hands over.
        held: of each request: what it holds out, to certify a miss rate on.
        held_out: of each request: its test split.
        background: benign text that a detector may know.
        calibration: benign text that gates are calibrated on, by where it is from: "retained", "outside", "banking".
        retained: the test split of the retained domains.
        banking, outside: test queries of Banking77, and all out-of-scope ones.
    """

    asked: dict[str, Utterances]
    held: dict[str, Utterances]
    held_out: dict[str, Utterances]
    background: Utterances
    calibration: dict[str, Utterances]
    retained: Utterances
    banking: Utterances
    outside: Utterances

    @property
    def benign(self) -> Utterances:
        """All that gates are calibrated on."""
        return [utterance for part in self.calibration.values() for utterance in part]


def read(clinc: Path, banking: Path) -> Corpus:
    """All utterances, from the folders with `data_full.json(.gz)`, `domains.json`, `train.csv(.gz)`, `test.csv(.gz)`.

    Raises:
        ValueError: if a file is missing.
    """
    intents: dict[str, list[str]] = json.loads(_text(clinc, "domains.json"))
    label = {intent: number for number, intent in enumerate(name for names in intents.values() for name in names)}
    splits = {
        split: [Utterance(text, label.get(intent, OUTSIDE)) for text, intent in pairs]
        for split, pairs in json.loads(_text(clinc, "data_full.json")).items()
    }
    for split in ("train", "test"):
        lines = csv.DictReader(io.StringIO(_text(banking, f"{split}.csv"), newline=""))
        splits[f"banking_{split}"] = [Utterance(line["text"], OUTSIDE) for line in lines]
    return Corpus(intents, splits)


def draw(corpus: Corpus, *, seed: int, sizes: Sizes) -> Roles:
    """The roles of a seed. Tests are the same for all seeds, and of Banking77 evenly spread over its intents."""
    retained = [domain for domain in corpus.domains if domain not in REQUESTS]
    outside, banking = corpus.splits, sample(corpus.splits["banking_train"], len(corpus.splits["banking_train"]), seed)
    end = sizes.banking_background + sizes.banking_calibration
    test = corpus.splits["banking_test"]
    return Roles(
        asked={domain: by_intent(corpus.of("train", [domain]), sizes.asked, seed) for domain in REQUESTS},
        held={domain: by_intent(corpus.of("val", [domain]), sizes.held, seed) for domain in REQUESTS},
        held_out={domain: corpus.of("test", [domain]) for domain in REQUESTS},
        background=by_intent(corpus.of("train", retained), sizes.background, seed)
        + outside["oos_train"]
        + banking[: sizes.banking_background],
        calibration={
            "retained": by_intent(corpus.of("val", retained), sizes.calibration, seed),
            "outside": outside["oos_val"],
            "banking": banking[sizes.banking_background : end],
        },
        retained=corpus.of("test", retained),
        # the file lists one intent after the other
        banking=test[:: max(1, len(test) // sizes.banking)][: sizes.banking],
        outside=outside["oos_test"],
    )


def sample(utterances: Sequence[Utterance], count: int, seed: int) -> Utterances:
    """Up to `count` of them, in an order drawn with the seed."""
    order = torch.randperm(len(utterances), generator=torch.Generator().manual_seed(seed))[:count]
    return [utterances[place] for place in order.tolist()]


def by_intent(utterances: Sequence[Utterance], count: int, seed: int) -> Utterances:
    """Up to `count` of each intent, in an order drawn with the seed."""
    taken: dict[int, int] = {}
    kept = []
    for utterance in sample(utterances, len(utterances), seed):
        taken[utterance.label] = taken.get(utterance.label, 0) + 1
        if taken[utterance.label] <= count:
            kept.append(utterance)
    return kept


# --- inside -----------------------------------------------------------------------------------------------------------


def _text(folder: Path, name: str) -> str:
    plain, packed = folder / name, folder / f"{name}.gz"
    if plain.is_file():
        return plain.read_text(encoding="utf-8")
    if packed.is_file():
        return gzip.decompress(packed.read_bytes()).decode("utf-8")
    raise ValueError(f"expected {name} or {name}.gz in {folder}; see the README of the results for where it is from")
