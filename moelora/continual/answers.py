"""What a patched model says of a batch's answers, without waiting for its device. Begin with answer_nll and choices.

Axes: B rows, L tokens, V vocabulary or classes, C options.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moelora.continual.examples import IGNORED, NO_OPTION, model_inputs
from moelora.example_losses import losses_of, token_shares
from moelora.hooks import argument_names, predicts_next
from moelora.mixture import find_mixture


class AnswerNLL(NamedTuple):
    """-log p of each row's answer.

    Attributes:
        mean_B: mean over the answer's tokens.
        total_B: sum over them.
    """

    mean_B: Float[Tensor, " B"]
    total_B: Float[Tensor, " B"]


class Choice(NamedTuple):
    """What a model makes of each row's options.

    Attributes:
        logits_BC: a score of each option.
        valid_BC: which options a row has.
        truth_B: the place of the labelled option, on the batch's device; -1 where there is no label.
    """

    logits_BC: Float[Tensor, "B C"]
    valid_BC: Bool[Tensor, "B C"]
    truth_B: Int[Tensor, " B"]


def answer_nll(model: nn.Module, batch: Mapping[str, Tensor]) -> AnswerNLL:
    """-log p of the labels of each row: of its class, or of its labelled tokens, by what the model is.

    Raises:
        ValueError: without labels, for a row of which no token has one that can be predicted, for a model whose labels
            have a meaning that is not known.
    """
    labels = _labels(batch)
    root, _ = find_mixture(model)
    if labels.ndim == 1 or not predicts_next(root):
        output = run(model, without_labels(batch))
        mean_B = losses_of(root, output, {**batch, "labels": labels}).loss_B
        counts_B = torch.ones_like(labels) if labels.ndim == 1 else _counts(labels)
    else:
        # the label of a row's first token is predicted by nothing
        counts_B = _counts(labels[:, 1:])
        logits_BLV, start = _answer_logits(model, batch)
        next_BL = torch.cat([labels[:, start + 1 :], labels.new_full((len(labels), 1), IGNORED)], 1)
        mean_B = token_shares(logits_BLV, moved(next_BL, logits_BLV.device)).sum(1)
    return AnswerNLL(mean_B, mean_B * moved(counts_B, mean_B.device))


def choices(model: nn.Module, batch: Mapping[str, Tensor]) -> Choice:
    """The scores of each row's options; `UniformOptions` says where they are read.

    Raises:
        ValueError: for options that the model does not have, or that do not hold the labelled answer; for a language
            model, without options.
    """
    labels, options_BC = batch.get("labels"), batch.get("options")
    if labels is not None and labels.ndim == 2:
        if options_BC is None:
            raise ValueError(
                "items of a language model need options, the tokens that an answer may begin with; for answers in free "
                "text choose another objective, such as NPO"
            )
        _counts(labels[:, 1:])
        first_B = (labels[:, 1:] != IGNORED).int().argmax(1)
        truth_token_B = labels[:, 1:].gather(1, first_B[:, None])[:, 0]
        all_BLV, start = _answer_logits(model, batch)
        row_B = torch.arange(len(labels), device=all_BLV.device)
        logits_BV = all_BLV[row_B, moved(first_B - start, all_BLV.device)]
    else:
        logits_BV = run(model, without_labels(batch)).logits
        if logits_BV.ndim != 2 or logits_BV.shape[1] < 2:
            raise ValueError(
                f"expected scores of several classes for each row, got {tuple(logits_BV.shape)}; of a language model "
                "the labels must be tokens, with -100 on the prompt"
            )
        truth_token_B = batch["input_ids"].new_full((len(logits_BV),), NO_OPTION) if labels is None else labels
    if options_BC is None:
        return Choice(logits_BV, torch.ones_like(logits_BV, dtype=torch.bool), truth_token_B)

    if int(options_BC.max()) >= logits_BV.shape[1]:
        raise ValueError(
            f"options must be below {logits_BV.shape[1]}, the model's number of classes or tokens; got "
            f"{int(options_BC.max())}"
        )
    valid_BC = options_BC != NO_OPTION
    is_truth_BC = valid_BC & (options_BC == truth_token_B[:, None])
    if labels is not None and not bool(is_truth_BC.any(1).all()):
        row = int((~is_truth_BC.any(1)).nonzero()[0, 0])
        raise ValueError(
            f"the answer of row {row} is {int(truth_token_B[row])}, which is none of its options "
            f"{options_BC[row][valid_BC[row]].tolist()}; of a text the first labelled token counts, so options must be "
            "tokenized as the answer is, with the same space before them"
        )
    truth_B = torch.where(is_truth_BC.any(1), is_truth_BC.int().argmax(1), NO_OPTION)
    index_BC = moved(options_BC.clamp(min=0), logits_BV.device)
    return Choice(logits_BV.gather(1, index_BC), moved(valid_BC, logits_BV.device), truth_B)


def run(model: nn.Module, inputs: Mapping[str, Tensor], **more: Any) -> Any:
    """The output of a batch's forward, moved to where the model is."""
    root, _ = find_mixture(model)
    # a training step has no use for keys and values of the past
    if "use_cache" in argument_names(type(root)):
        more["use_cache"] = False
    device = next(root.parameters()).device
    return model(**{name: moved(values, device) for name, values in inputs.items()}, **more)


def own_loss_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor | None:
    """The loss that the model itself computes of the batch's labels, if it does; of a prompt without its logits."""
    root, mixture = find_mixture(model)
    inputs, more, labels = model_inputs(batch), {}, batch.get("labels")
    # routers that decide by prompts read them off whole labels
    if labels is not None and labels.ndim == 2 and _has_plain_loss(root) and not mixture.hooks.latches:
        start = _answer_start(labels)
        more = keeping(model, labels.shape[1] - start)
        inputs["labels"] = labels[:, start:] if more else labels
    output = run(model, inputs, **more)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) and not loss.ndim else None


def moved(values: Tensor, device: torch.device) -> Tensor:
    """On the device, from pinned memory where that spares waiting for it."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def without_labels(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model takes of a batch, so that it computes no loss."""
    return {name: values for name, values in model_inputs(batch).items() if name != "labels"}


def keeping(model: nn.Module, positions: int) -> dict[str, int]:
    """Arguments by which a language model computes the logits of the last positions only, if it can."""
    name = "logits_to_keep"
    return {name: positions} if name in argument_names(type(find_mixture(model)[0])) else {}


# --- inside -----------------------------------------------------------------------------------------------------------


def _answer_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """A language model's logits from the position on that predicts the batch's first labelled token; that position."""
    labels = _labels(batch)
    root, _ = find_mixture(model)
    if not predicts_next(root):
        raise ValueError(
            f"a label for each token is for language models that predict the next one; this is a {type(root).__name__}"
        )
    start = _answer_start(labels)
    positions = labels.shape[1] - start
    logits_BLV = run(model, without_labels(batch), **keeping(model, positions)).logits
    return logits_BLV[:, -positions:], start


def _answer_start(labels_BL: Tensor) -> int:
    """The position that predicts a batch's first labelled token: before it no logits are needed.

    A vocabulary is wide, and a prompt may be long.
    """
    return max(int((labels_BL != IGNORED).any(0).int().argmax()) - 1, 0)


def _has_plain_loss(root: nn.Module) -> bool:
    """Whether a model's own loss compares its logits with the labels of as many positions, and nothing else."""
    return predicts_next(root) and getattr(root, "loss_type", None) == "ForCausalLM"


def _labels(batch: Mapping[str, Tensor]) -> Tensor:
    labels = batch.get("labels")
    if labels is None:
        raise ValueError(f"this objective needs labels, which say what the answer is; got a batch of {sorted(batch)}")
    return labels


def _counts(labels_BL: Tensor) -> Tensor:
    """How many labels each row has.

    Raises:
        ValueError: for a row without any.
    """
    counts_B = (labels_BL != IGNORED).sum(1)
    if bool((counts_B == 0).any()):
        raise ValueError(
            f"{int((counts_B == 0).sum())} of {len(counts_B)} rows have no labelled token that can be predicted; "
            f"expected a label other than {IGNORED} behind the first token. Was the answer cut off?"
        )
    return counts_B
