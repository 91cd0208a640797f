"""What stacks learn and forget: tokenized texts with labels, and batches of them. Begin with Collate.

    collate = Collate(model)
    for batch in batches(dataset, collate, 16):
        logits = model(**model_inputs(batch)).logits
        scores_B = features(prompts_of(batch)).score(detector)

Axes: B rows, L tokens, C options.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

Example = Mapping[str, Any]
"""One text. `input_ids`, a list of token ids or a 1-D tensor; if there are `attention_mask` and `token_type_ids`.

`labels` (or `label`): one class, or for a language model a token for each of `input_ids`, -100 on the prompt.
`options`: the item's own answers, classes of a classifier or tokens that a language model's answer may begin with.
`REFERENCE`: what the base model says, which an objective may have looked up. Other columns are not read.
"""

IGNORED = -100
"""The label of tokens that do not count."""

NO_OPTION = -1
"""Stands in `options` behind those of a row that has fewer than others."""

REFERENCE = "reference_total_nll"
"""Column of -log p(answer) by the base model, summed over the answer's tokens."""

SIDES = ("right", "left")
NOT_FOR_MODELS = ("options", REFERENCE)


@final
class Collate:
    """Pads examples to a batch.

    Padding that an example brings along at its ends, where its mask is 0, is cut off first.

    Args:
        model_or_pad_id: the id that padding gets; of a model its config's `pad_token_id`, else the end token, else 0.
        padding_side: "right" fits every model. "left" is for models that have no absolute positions.

    Raises:
        ValueError: for another padding side.
    """

    pad_id: int
    padding_side: str

    def __init__(self, model_or_pad_id: nn.Module | int, padding_side: str = "right") -> None:
        if padding_side not in SIDES:
            raise ValueError(f"unknown padding_side {padding_side!r}; expected one of {SIDES}")
        self.pad_id = model_or_pad_id if isinstance(model_or_pad_id, int) else _pad_id(model_or_pad_id)
        self.padding_side = padding_side

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """The examples as one batch, on the CPU.

        Returns:
            `input_ids` and `attention_mask` (B, L), and of what the examples have: `token_type_ids` (B, L), `labels`
            (B,) or (B, L), `options` (B, C), filled up with -1, and `REFERENCE` (B,).

        Raises:
            ValueError: for no examples, one without tokens, columns that do not fit each other or that only some have.
        """
        if not examples:
            raise ValueError("there is no example to make a batch of")
        rows = [row_of(example) for example in examples]
        columns = {name: [row[name] for row in rows if name in row] for row in rows for name in row}
        for name, values in columns.items():
            if len(values) < len(rows):
                raise ValueError(
                    f"{len(values)} of {len(rows)} examples have {name}; expected all or none, so complete the others "
                    "or leave the column out"
                )
            if len({value.ndim for value in values}) > 1:
                raise ValueError(
                    f"some examples have one number as {name}, others one for each token; keep classification and "
                    "language modelling in datasets of their own"
                )
        fills = {"input_ids": self.pad_id, "labels": IGNORED, "options": NO_OPTION}
        return {
            name: torch.stack(values)
            if not values[0].ndim
            else _padded(values, fills.get(name, 0), "right" if name == "options" else self.padding_side)
            for name, values in columns.items()
        }


def row_of(example: Example) -> dict[str, Tensor]:
    """The columns of one example that are read, as checked tensors of one axis or none, without padding at its ends.

    Raises:
        ValueError: for an example without tokens, or columns that do not fit each other.
    """
    if example.get("input_ids") is None:
        raise ValueError(f"an example needs input_ids, got {sorted(example)}; tokenize the texts first")
    ids_L = _integers(example["input_ids"], "input_ids")
    if not ids_L.ndim:
        raise ValueError(f"input_ids must be a list of token ids, got the number {int(ids_L)}")
    row = {"input_ids": ids_L, "attention_mask": torch.ones_like(ids_L)}
    for name in ("attention_mask", "token_type_ids"):
        if example.get(name) is not None:
            row[name] = _integers(example[name], name)
    label = example.get("labels") if example.get("labels") is not None else example.get("label")
    if label is not None:
        row["labels"] = _integers(label, "labels")
    for name, values in row.items():
        if values.shape != ids_L.shape and not (name == "labels" and not values.ndim):
            raise ValueError(
                f"{name} must have as many entries as input_ids, {tuple(ids_L.shape)}, got {tuple(values.shape)}"
            )
    kept_N = row["attention_mask"].nonzero()[:, 0]
    if not len(kept_N):
        raise ValueError("an example has no tokens; leave it out")
    span = slice(int(kept_N[0]), int(kept_N[-1]) + 1)
    row = {name: values[span] if values.ndim else values for name, values in row.items()}

    if example.get("options") is not None:
        row["options"] = _options(example["options"])
    if example.get(REFERENCE) is not None:
        row[REFERENCE] = torch.as_tensor(example[REFERENCE], dtype=torch.float32)
    return row


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch a model's forward takes: `model(**model_inputs(batch))`."""
    return {name: values for name, values in batch.items() if name not in NOT_FOR_MODELS}


def prompts_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The prompts of a batch, as a gate will see them: `input_ids`, `attention_mask`, and `token_type_ids` if there.

    Of rows with a label for each token these are the tokens before the first labelled one; all, if there is none
    before it. Nothing of an answer is left in them.
    """
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch]
    prompts = {name: batch[name] for name in names}
    labels = batch.get("labels")
    if labels is None or labels.ndim != 2:
        return prompts
    whole_BL = prompts["attention_mask"] != 0
    before_BL = whole_BL & ((labels != IGNORED).cumsum(1) == 0)
    prompt_BL = torch.where(before_BL.any(1, keepdim=True), before_BL, whole_BL)

    # no longer than the longest prompt
    column_N = prompt_BL.any(0).nonzero()[:, 0]
    span = slice(int(column_N[0]), int(column_N[-1]) + 1)
    prompt_BL = prompt_BL[:, span]
    return {name: torch.where(prompt_BL, values[:, span], 0) for name, values in prompts.items()}


def batches(
    dataset: Any, collate: Collate, batch_size: int, generator: torch.Generator | None = None
) -> Iterator[dict[str, Tensor]]:
    """All examples once, in batches of `batch_size`, the last one perhaps smaller; shuffled if a generator is given.

    Raises:
        ValueError: for an empty dataset or a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    examples = listed(dataset)
    order = range(len(examples)) if generator is None else _shuffled(len(examples), generator)
    for start in range(0, len(examples), batch_size):
        yield collate([examples[number] for number in order[start : start + batch_size]])


def listed(dataset: Any) -> list[Example]:
    """All examples of a dataset, which is anything with a length and items 0, 1, ...

    Raises:
        ValueError: for something else, or an empty one.
    """
    if isinstance(dataset, Mapping) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(
            f"a dataset has a length and items 0, 1, ... (a list, datasets.Dataset, a torch Dataset); got a "
            f"{type(dataset).__name__}"
        )
    examples = [dataset[number] for number in range(len(dataset))]
    if not examples:
        raise ValueError("the dataset is empty; expected an example at least")
    wrong = next((example for example in examples if not isinstance(example, Mapping)), None)
    if wrong is not None:
        raise ValueError(f"an example is a mapping with input_ids, got a {type(wrong).__name__}; tokenize the texts")
    return examples


# --- inside -----------------------------------------------------------------------------------------------------------


def _pad_id(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(config, name, None)
        # some models have several end tokens
        value = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(value, int) and value >= 0:
            return value
    return 0


def _shuffled(count: int, generator: torch.Generator) -> list[int]:
    return torch.randperm(count, generator=generator, device=generator.device).tolist()


def _integers(values: Any, name: str) -> Tensor:
    """A number or a list of numbers as int64, on the CPU."""
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be integers, got {values!r}") from error
    if (tensor.is_floating_point() and tensor.numel()) or tensor.is_complex() or tensor.ndim > 1:
        raise ValueError(
            f"{name} of one example must be integers of one axis at most, got {tensor.dtype} {tuple(tensor.shape)}"
        )
    return tensor.detach().cpu().long()


def _options(values: Any) -> Tensor:
    option_C = _integers(values, "options")
    found = option_C.tolist() if option_C.ndim == 1 else []
    if not found or min(found) < 0 or len(set(found)) < len(found):
        raise ValueError(
            f"options must be different class or token ids, one at least, got {option_C.tolist()}; options whose texts "
            "begin with the same token cannot be told apart by it"
        )
    return option_C


def _padded(rows: Sequence[Tensor], fill: int, side: str) -> Tensor:
    longest = max(map(len, rows))
    batch = rows[0].new_full((len(rows), longest), fill)
    for number, row in enumerate(rows):
        start = longest - len(row) if side == "left" else 0
        batch[number, start : start + len(row)] = row
    return batch
