"""The supervised loss of each example of a batch, where models give one number for all. Begin with losses_of."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from moelora.hooks import predicts_next

ExampleLoss = Callable[[Any, Mapping[str, Any]], Tensor]
"""A loss of one's own: from a model's output and its batch, one number for each row, (B,)."""

IGNORED = -100
ONE_LABEL_A_TOKEN = ("ForMaskedLM", "ForTokenClassification")


class ExampleLosses(NamedTuple):
    """Losses of B examples.

    Attributes:
        loss_B: of each example.
        to_go_BL: for causal language models, what is still to come of it at each position: at the first, all.
    """

    loss_B: Float[Tensor, " B"]
    to_go_BL: Float[Tensor, "B L"] | None = None


def losses_of(
    model: nn.Module, output: Any, batch: Mapping[str, Any], loss_fn: ExampleLoss | None = None
) -> ExampleLosses:
    """The loss of each row: by `loss_fn`, or the mean cross-entropy of its labels.

    Labels that stand for tokens count as the model's own loss has them: a decoder's are predicted by the token before,
    those of encoders and encoder-decoders at their own place. A row of class scores has one label.

    Args:
        model: a transformers model, which says what its labels mean; any model with `loss_fn`.
        output: what it returned.
        batch: what it was called with, and `labels`.
        loss_fn: a loss of the caller's own.

    Raises:
        ValueError: if the loss is not known, or `loss_fn` does not give one number for each row.
    """
    if loss_fn is not None:
        loss_B = loss_fn(output, batch)
        if loss_B.ndim != 1:
            raise ValueError(f"loss_fn must give one loss for each row, shape (B,), got {tuple(loss_B.shape)}")
        return ExampleLosses(loss_B.float())
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    labels = batch.get("labels")
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
        raise ValueError(
            "the loss of an example is computed from the model's logits and the batch's labels; this "
            f"{type(model).__name__} was called with {sorted(batch)}; pass loss_fn(output, batch), which gives one "
            "loss for each row"
        )
    labels = labels.to(logits.device)
    if logits.ndim == 3 and labels.ndim == 2 and logits.shape[:2] == labels.shape:
        if predicts_next(model):
            return causal_losses(logits, labels)
        encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        if encoder_decoder or getattr(model, "loss_type", None) in ONE_LABEL_A_TOKEN:
            return ExampleLosses(token_shares(logits, labels).sum(1))
    elif logits.ndim == 2 and labels.ndim == 1 and logits.shape[1] > 1 and not labels.is_floating_point():
        return ExampleLosses(F.cross_entropy(logits.float(), labels, reduction="none"))
    raise ValueError(
        f"what the labels of a {type(model).__name__} mean is not known, with logits of shape {tuple(logits.shape)} "
        f"and labels of shape {tuple(labels.shape)}; pass loss_fn(output, batch), which gives one loss for each row"
    )


def causal_losses(logits_BLV: Float[Tensor, "B L V"], labels_BL: Int[Tensor, "B L"]) -> ExampleLosses:
    """Mean cross-entropy of each row's labels, each predicted one token earlier, and what is to come of it."""
    ignored_B1 = labels_BL.new_full((labels_BL.shape[0], 1), IGNORED)
    share_BL = token_shares(logits_BLV, torch.cat([labels_BL[:, 1:], ignored_B1], 1))
    to_go_BL = share_BL.detach().flip(1).cumsum(1).flip(1)
    return ExampleLosses(share_BL.sum(1), to_go_BL)


def token_shares(logits_BLV: Float[Tensor, "B L V"], labels_BL: Int[Tensor, "B L"]) -> Float[Tensor, "B L"]:
    """Each token's part of its row's mean cross-entropy; 0 where there is no label."""
    loss_BL = F.cross_entropy(
        logits_BLV.float().flatten(0, 1), labels_BL.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(labels_BL)
    return loss_BL / (labels_BL != IGNORED).sum(1, keepdim=True).clamp(min=1)
