"""Datasets as a stack reads them: features of prompts, and what is held out. Begin with read and split."""

import math
from typing import Any

import torch

from moelora.continual.examples import Collate, Example, batches, listed, prompts_of
from moelora.continual.experts import BATCH_SIZE
from moelora.continual.features import Windows
from moelora.continual.stack_gates import Features


def read(features: Features, collate: Collate, dataset: Any) -> Windows:
    """Features of a dataset's prompts, in order."""
    return Windows.join([features(prompts_of(batch)) for batch in batches(dataset, collate, BATCH_SIZE)])


def split(examples: list[Example], held_out: Any, seed: int) -> tuple[list[Example], list[Example]]:
    """What a detector is fitted to, and what its errors are counted on.

    Args:
        examples: at hand.
        held_out: a share of them, drawn at random, or a dataset of its own.
        seed: of the draw.

    Raises:
        ValueError: for a share that is none, or that leaves nothing to fit to.
    """
    if not isinstance(held_out, float):
        return examples, listed(held_out)
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is a share between 0 and 1, or a dataset; got {held_out}")
    count = math.ceil(held_out * len(examples))
    if count == len(examples):
        raise ValueError(f"held_out={held_out} of {len(examples)} examples leaves none to fit the gate to; give more")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [examples[number] for number in order[count:]], [examples[number] for number in order[:count]]
