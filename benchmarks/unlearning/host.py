"""The model that everything is measured on: the encoder, its head, and what it says. Begin with Host.open.

Axes: B utterances, D width, C classes.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Int
from torch import Tensor, nn

from benchmarks.unlearning.classifier import IntentClassifier, load_encoder, train_head
from benchmarks.unlearning.clinc import REQUESTS, Corpus, Utterances
from benchmarks.unlearning.remembered import Remembered, View, padded
from moelora.continual import HiddenStates

BATCH = 64

Acting = Callable[[Utterances], AbstractContextManager[None]]
"""Who acts on a batch, in place of the gates."""


@final
@dataclass(frozen=True, kw_only=True)
class Host:
    """A classifier that knows all intents, and what is remembered of its encoder's features.

    Attributes:
        model: not patched between two pieces of work.
        remembered: features of prompts.
        corpus: all utterances.
        without: the heads that never saw the first one, two, ... requests.
    """

    model: IntentClassifier
    remembered: Remembered
    corpus: Corpus
    without: tuple[nn.Linear, ...]

    @classmethod
    def open(cls, folder: "str | Path", corpus: Corpus, cache: "Path | None") -> "Host":
        """The pretrained encoder with a head trained on CLINC150's training split, and heads that saw less of it.

        Args:
            folder: of the encoder.
            corpus: the utterances.
            cache: where features are kept for the next time; None for nowhere.
        """
        model, tokenizer = load_encoder(folder, corpus.classes)
        states = HiddenStates(model, range(1, model.config.num_hidden_layers + 1))
        remembered = Remembered(states, tokenizer)
        kept = None if cache is None else cache / "features.safetensors"
        if kept is not None:
            remembered.load(kept)
        # all that is asked about below, whatever the seed
        new = [text for split in corpus.splits.values() for text, _ in split]
        if remembered.learn(remembered.tokens(new)) and kept is not None:
            remembered.save(kept)

        train = corpus.splits["train"]
        means_ND = View(remembered, [states.layers[-1]], unit=False).of(train)[:, 0]
        label_N = torch.tensor([utterance.label for utterance in train])
        heads = []
        for count in range(len(REQUESTS) + 1):
            gone = torch.tensor(sorted(corpus.labels_of(REQUESTS[:count])), dtype=torch.long)
            kept_N = ~torch.isin(label_N, gone)
            heads.append(train_head(means_ND[kept_N], label_N[kept_N], corpus.classes))
        model.head.load_state_dict(heads[0].state_dict())
        return cls(model=model, remembered=remembered, corpus=corpus, without=tuple(heads[1:]))

    @property
    def head(self) -> nn.Linear:
        """That knows all."""
        return self.model.head

    def examples(self, utterances: Utterances) -> list[dict[str, Any]]:
        """As stacks take what they are to forget."""
        texts = self.texts(utterances)
        return [{**text, "labels": label} for text, (_, label) in zip(texts, utterances, strict=True)]

    def texts(self, utterances: Utterances) -> list[dict[str, Any]]:
        """As stacks take benign texts: out-of-scope queries have no label that the head knows."""
        return [{"input_ids": ids} for ids in self.remembered.tokens([utterance.text for utterance in utterances])]

    @torch.no_grad()
    def answers(self, utterances: Utterances, acting: "Acting | None" = None) -> Int[Tensor, " B"]:
        """The intent that the model, as it stands now, gives each utterance; batches are of similar length."""
        rows = self.remembered.tokens([utterance.text for utterance in utterances])
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
        answer_B = torch.empty(len(rows), dtype=torch.long)
        for start in range(0, len(order), BATCH):
            chunk = order[start : start + BATCH]
            who = nullcontext() if acting is None else acting([utterances[place] for place in chunk])
            with who:
                logits_BC = self.model(**padded([rows[place] for place in chunk])).logits
            answer_B[torch.tensor(chunk)] = logits_BC.argmax(-1)
        return answer_B

    def answers_of_head(self, head: nn.Linear, utterances: Utterances) -> Int[Tensor, " B"]:
        """The same of the bare encoder under another head."""
        final = View(self.remembered, [self.remembered.states.layers[-1]])
        return head(final.of(utterances)[:, 0]).argmax(-1)


def right(answer_B: Int[Tensor, " B"], utterances: Utterances) -> int:
    """How many answers are the utterance's own intent."""
    return int((answer_B == torch.tensor([utterance.label for utterance in utterances])).sum())


def share(answer_B: Int[Tensor, " B"], utterances: Sequence[Any]) -> float:
    """Accuracy, from 0 to 1."""
    return right(answer_B, list(utterances)) / len(utterances)
