"""Features of prompts, computed once: the encoder is frozen, and the same prompts are asked about again and again.

Begin with Remembered. What a gate sees is what `HiddenStates` gives it; only the second time it costs nothing.

Axes: B prompts, W windows, S layers, D width.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from benchmarks.unlearning.clinc import Utterance
from moelora.continual import HiddenStates
from moelora.continual.features import Windows

BATCH = 128
LONGEST = 512
"""Tokens that the encoder has positions for; what is longer is cut off, for it and for its gates."""

Ids = tuple[int, ...]


def padded(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """A batch of token ids; what stands under padding does not matter."""
    ids_BL = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask_BL = torch.nn.utils.rnn.pad_sequence(
        [torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True
    )
    return {"input_ids": ids_BL, "attention_mask": mask_BL}


@final
class Remembered:
    """Means over the tokens of each window, of all layers, by token ids.

    Attributes:
        states: of all layers.
        tokenizer: the encoder's.
    """

    states: HiddenStates
    tokenizer: Any

    def __init__(self, states: HiddenStates, tokenizer: Any) -> None:
        self.states, self.tokenizer = states, tokenizer
        self._means: dict[Ids, Float[Tensor, "W S D"]] = {}
        self._ids: dict[str, list[int]] = {}

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, with the marks that the encoder was trained with."""
        unknown = [text for text in dict.fromkeys(texts) if text not in self._ids]
        if unknown:
            found = self.tokenizer(unknown, truncation=True, max_length=LONGEST)["input_ids"]
            self._ids |= dict(zip(unknown, found, strict=True))
        return [self._ids[text] for text in texts]

    def learn(self, rows: Sequence[Sequence[int]]) -> bool:
        """Compute what is not known yet, prompts of similar length together.

        Returns:
            Whether there was any.
        """
        unknown = sorted({tuple(row) for row in rows} - set(self._means), key=len)
        for start in range(0, len(unknown), BATCH):
            chunk = unknown[start : start + BATCH]
            windows = self.states.means(padded(chunk))
            counts = torch.bincount(windows.row_W, minlength=len(chunk)).tolist()
            self._means |= dict(zip(chunk, windows.features_WSD.cpu().split(counts), strict=True))
        return bool(unknown)

    def windows(self, rows: Sequence[Sequence[int]]) -> Windows:
        """The means of all layers."""
        self.learn(rows)
        parts = [self._means[tuple(row)] for row in rows]
        row_W = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(part) for part in parts]))
        return Windows(torch.cat(parts), row_W, len(rows))

    def of(self, utterances: Sequence[Utterance]) -> Float[Tensor, "B S D"]:
        """The means of short utterances, each of one window.

        Raises:
            ValueError: for one that is longer than a window.
        """
        windows = self.windows(self.tokens([utterance.text for utterance in utterances]))
        if len(windows.row_W) != len(utterances):
            raise ValueError("an utterance is longer than a window; expected short ones")
        return windows.features_WSD

    def take_short(self, other: "Remembered") -> None:
        """Take over the prompts that are one window here and there."""
        self._means |= {row: means for row, means in other._means.items() if len(row) <= self.states.window}

    def save(self, path: Path) -> None:
        """Keep all that is known in a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = list(self._means)
        held = {
            "ids": torch.tensor([number for row in rows for number in row]),
            "lengths": torch.tensor([len(row) for row in rows]),
            "windows": torch.tensor([len(self._means[row]) for row in rows]),
            "means": torch.cat([self._means[row] for row in rows]),
        }
        save_file(held, path)

    def load(self, path: Path) -> None:
        """Take over what another one has kept, if there is such a file."""
        if not path.is_file():
            return
        held = load_file(path)
        rows = [tuple(row.tolist()) for row in held["ids"].split(held["lengths"].tolist())]
        self._means |= dict(zip(rows, held["means"].split(held["windows"].tolist()), strict=True))


@final
class View:
    """Some layers of what is remembered, as features of a stack or for a detector.

    Args:
        remembered: of all layers.
        layers: which, counted from 1.
        unit: whether features are brought to unit length, as ours are; O3's are not.
    """

    def __init__(self, remembered: Remembered, layers: Sequence[int], *, unit: bool = True) -> None:
        self.remembered, self.layers, self.unit = remembered, tuple(layers), unit
        self._columns = [remembered.states.layers.index(layer) for layer in layers]

    def __call__(self, batch: Mapping[str, Tensor]) -> Windows:
        """Features of a batch of prompts."""
        whole = batch["attention_mask"] != 0
        rows = [ids_L[kept_L].tolist() for ids_L, kept_L in zip(batch["input_ids"].cpu(), whole.cpu(), strict=True)]
        return self.windows(rows)

    def windows(self, rows: Sequence[Sequence[int]]) -> Windows:
        """Features of prompts of any length, by their token ids."""
        windows = self.remembered.windows(rows)
        return windows._replace(features_WSD=self._seen(windows.features_WSD))

    def of(self, utterances: Sequence[Utterance]) -> Float[Tensor, "B S D"]:
        """Features of short utterances."""
        return self._seen(self.remembered.of(utterances))

    def _seen(self, means_WSD: Tensor) -> Tensor:
        chosen_WSD = means_WSD[:, self._columns]
        return F.normalize(chosen_WSD, dim=-1) if self.unit else chosen_WSD
