"""Models that know TOFU, and models that never saw some of it, kept on disk. Begin with prepare.

    folder = prepare(cache, source, tofu, forgotten=0, recipe=Recipe(), device="cuda")     # 0: knows all of it
    model = load_model(folder, "cuda")

All parameters are trained, as in the benchmark's own fine-tuning, on every question with its answer. Real authors and
world facts are taught along: the pretrained decoder knows no facts, and what nobody knows cannot be lost.
"""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.unlearning.tofu_data import IGNORED, Example, Tofu, examples_of
from moelora.losses import sequence_nll

KNOWN = 0.9
"""Mean probability per token of the learned answers from which on a model knows them."""

POOL = 16
"""Batches among which examples of similar length are put together."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model learns all of TOFU.

    Attributes:
        epochs: of one round; a further round follows until the answers are known.
        rounds: how many rounds at most.
        batch_size: questions in a step.
        rate: the highest learning rate; a short warm-up, then a straight line to 0 in each round.
    """

    epochs: int = 24
    rounds: int = 3
    batch_size: int = 64
    rate: float = 1e-3


def prepare(cache: Path, source: str, tofu: Tofu, *, forgotten: int, recipe: Recipe, device: str) -> Path:
    """The folder of a model that never saw the first `forgotten` blocks; it is trained if it is not there.

    Raises:
        ValueError: if the answers are not known at the end of the last round.
    """
    folder = cache / f"without-{forgotten}"
    if folder.exists():
        return folder
    tokenizer = load_tokenizer(source)
    model = load_model(source, device)
    examples = examples_of(tokenizer, tofu.seen(forgotten))
    probability = 0.0
    for number in range(recipe.rounds):
        fine_tune(model, examples, recipe, seed=number)
        probability = (-answer_nll(model, examples).double()).exp().mean().item()
        if probability >= KNOWN:
            break
    else:
        raise ValueError(
            f"after {recipe.rounds} rounds of {recipe.epochs} epochs the answers have a probability per token of "
            f"{probability:.3f}; expected {KNOWN}. Train for more epochs"
        )

    # whole or not there
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return folder


def load_model(folder: "str | Path", device: str) -> Any:
    """A decoder in fp32, in evaluation mode."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(device).eval()


def load_tokenizer(folder: "str | Path") -> Any:
    """A decoder's tokenizer."""
    return AutoTokenizer.from_pretrained(folder)


def fine_tune(model: Any, examples: Sequence[Example], recipe: Recipe, *, seed: int) -> None:
    """One round of the recipe."""
    train_whole(
        model,
        examples,
        lambda logits_BLV, labels_BL, number_B: sequence_nll(logits_BLV, labels_BL).mean(),
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        rate=recipe.rate,
        seed=seed,
    )


def train_whole(
    model: Any,
    examples: Sequence[Example],
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    epochs: int,
    batch_size: int,
    rate: float,
    seed: int,
) -> None:
    """Train all parameters: AdamW, a short warm-up and a straight line to 0, bf16 products on a GPU, clipping at 1.

    Args:
        loss: of the logits of a batch, its labels, and the numbers of its examples.
    """
    generator, texts = torch.Generator().manual_seed(seed), Texts.of(model, examples)
    device = texts.ids_NL.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=device.type == "cuda")
    steps = epochs * math.ceil(len(examples) / batch_size)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    model.train()
    for _ in range(epochs):
        for numbers in batches_of(texts.lengths, batch_size, generator):
            batch = texts.batch(numbers)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits_BLV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            optimizer.zero_grad()
            loss(logits_BLV, batch["labels"], torch.tensor(numbers, device=device)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def answer_nll(
    model: Any,
    examples: Sequence[Example],
    *,
    rows: int = 128,
    nll: Callable[[Tensor, Tensor], Tensor] = sequence_nll,
) -> Float[Tensor, " N"]:
    """-log p of each answer, by default the mean over its tokens: fp32, on the CPU, in the order of the examples.

    The labels go to the model with the batch, so that gates can tell the prompt from the answer.
    """
    texts = Texts.of(model, examples)
    by_length = sorted(range(len(examples)), key=texts.lengths.__getitem__)
    parts = []
    for start in range(0, len(by_length), rows):
        batch = texts.batch(by_length[start : start + rows])
        parts.append(nll(model(**batch).logits, batch["labels"]))
    nll_N = torch.cat(parts).cpu()
    return torch.empty_like(nll_N).index_copy_(0, torch.tensor(by_length), nll_N)


class Texts(NamedTuple):
    """All examples on the model's device, padded once; a batch is some rows, as long as the longest of them."""

    ids_NL: Int[Tensor, "N L"]
    labels_NL: Int[Tensor, "N L"]
    lengths: list[int]

    @classmethod
    def of(cls, model: Any, examples: Sequence[Example]) -> "Texts":
        """The examples for a model."""
        device, fills = next(model.parameters()).device, {"input_ids": model.config.pad_token_id, "labels": IGNORED}
        ids_NL, labels_NL = (
            nn.utils.rnn.pad_sequence([torch.tensor(example[name]) for example in examples], True, fill).to(device)
            for name, fill in fills.items()
        )
        return cls(ids_NL, labels_NL, [len(example["input_ids"]) for example in examples])

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """These examples as `input_ids`, `attention_mask` and `labels`."""
        lengths = [self.lengths[number] for number in numbers]
        device, span = self.ids_NL.device, slice(0, max(lengths))
        number_B, length_B = torch.tensor([numbers, lengths], device=device)
        return {
            "input_ids": self.ids_NL[number_B, span],
            "attention_mask": (torch.arange(max(lengths), device=device) < length_B[:, None]).long(),
            "labels": self.labels_NL[number_B, span],
        }


def batches_of(lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> list[list[int]]:
    """All examples once, in batches of similar length that come in random order."""
    numbers = torch.randperm(len(lengths), generator=generator).tolist()
    batches: list[list[int]] = []
    for start in range(0, len(numbers), POOL * batch_size):
        pool = sorted(numbers[start : start + POOL * batch_size], key=lengths.__getitem__)
        batches += [pool[at : at + batch_size] for at in range(0, len(pool), batch_size)]
    return [batches[number] for number in torch.randperm(len(batches), generator=generator).tolist()]


def moved(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch on a device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
