"""Texts of seven domains as windows of tokens, for a decoder. Begin with load."""

import bz2
import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

DOMAINS = ("novels-doyle", "novels-haggard", "dialogues", "peps", "code", "gsm8k", "tofu")
LENGTH = 256
"""Tokens of a window."""

TEST_WINDOWS = 64
VALIDATION_WINDOWS = 32


class Domain(NamedTuple):
    """One domain's windows: to train on, to choose learning rates by, and to report."""

    name: str
    train_NL: Int[Tensor, "N L"]
    validation_NL: Int[Tensor, "M L"]
    test_NL: Int[Tensor, "S L"]


def load(data: Path, tokenizer: Any) -> list[Domain]:
    """All domains. Windows are consecutive, each behind a beginning-of-text token, as the model was trained on.

    Test texts are other documents than training texts (for TOFU: other questions about the same people).
    """
    return [_domain(name, *_documents(data, name), tokenizer) for name in DOMAINS]


def composites(domains: Sequence[Domain], count: int, *, seed: int) -> tuple[Int[Tensor, "N L"], Int[Tensor, "N L"]]:
    """Windows whose second half is another domain's, from test texts, and the domain of every token."""
    generator = torch.Generator().manual_seed(seed)
    windows, labels = [], []
    for _ in range(count):
        first, second = torch.randperm(len(domains), generator=generator)[:2].tolist()
        rows = [int(torch.randint(len(domains[d].test_NL), (), generator=generator)) for d in (first, second)]
        half = LENGTH // 2
        # without the second window's own beginning-of-text, which would give the switch away
        left_L, right_L = domains[first].test_NL[rows[0], :half], domains[second].test_NL[rows[1], 1 : half + 1]
        windows.append(torch.cat([left_L, right_L]))
        labels.append(torch.tensor([first] * half + [second] * half))
    return torch.stack(windows), torch.stack(labels)


def _domain(name: str, train: Iterable[str], test: Iterable[str], tokenizer: Any) -> Domain:
    train_NL, test_NL = _windows(train, tokenizer), _windows(test, tokenizer)
    # evenly spread over the test texts
    picked = torch.linspace(0, len(test_NL) - 1, min(TEST_WINDOWS, len(test_NL))).long()
    return Domain(name, train_NL[:-VALIDATION_WINDOWS], train_NL[-VALIDATION_WINDOWS:], test_NL[picked])


def _windows(documents: Iterable[str], tokenizer: Any) -> Tensor:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    stream: list[int] = []
    for ids in tokenizer(list(documents), add_special_tokens=False)["input_ids"]:
        stream += [*ids, eos]
    step = LENGTH - 1
    whole = len(stream) // step
    body_NL = torch.tensor(stream[: whole * step]).reshape(whole, step)
    return torch.cat([torch.full((whole, 1), bos), body_NL], dim=1)


def _documents(data: Path, name: str) -> tuple[list[str], list[str]]:
    """Training and test documents of a domain."""
    if name == "gsm8k":
        train, test = (_lines(data / "gsm8k" / f"{split}.jsonl.gz") for split in ("train", "test"))
        return [_question(entry) for entry in train], [_question(entry) for entry in test]
    if name == "tofu":
        entries = _lines(data / "tofu" / "forget10_perturbed.jsonl.gz")
        texts = [_question(entry) for entry in entries]
        return [text for n, text in enumerate(texts) if n % 5], texts[::5]
    return tuple(  # pyright: ignore[reportReturnType]
        [entry["text"] for entry in _lines(data / "domains" / f"{name}.adapters-{split}.jsonl.bz2")]
        for split in ("train", "test")
    )


def _question(entry: dict[str, Any]) -> str:
    return f"Question: {entry['question']}\nAnswer: {entry['answer']}"


def _lines(path: Path) -> list[dict[str, Any]]:
    opened = bz2.open if path.suffix == ".bz2" else gzip.open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]
