"""Texts for tests of stacks: topics that a tiny random model tells apart."""

from typing import Any

import torch
from torch import Tensor

from moelora.continual.examples import Collate, prompts_of

PROMPT, LENGTH = 6, 10
FORGET, OTHER, BENIGN = 3, 40, 60
"""The first tokens of three topics; each has four tokens."""


def texts(first: int, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Questions of six tokens with answers of four, all of one topic."""
    generator = torch.Generator().manual_seed(seed)
    ids_NL = torch.randint(first, first + 4, (count, LENGTH), generator=generator)
    return [{"input_ids": ids_L, "labels": [-100] * PROMPT + ids_L[PROMPT:].tolist()} for ids_L in ids_NL]


def prompts(*topics: int, seed: int = 9) -> dict[str, Tensor]:
    """A batch of prompts, one for each topic, that no stack has seen."""
    return prompts_of(Collate(0)([texts(topic, 1, seed)[0] for topic in topics]))
