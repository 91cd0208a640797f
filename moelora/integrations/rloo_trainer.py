"""transformers' Trainer for routers that are trained by reinforcement. Begin with RLOOTrainer."""

from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from moelora.example_losses import ExampleLoss
from moelora.rloo import Credit, LogProb, rloo_loss


class RLOOTrainer(Trainer):
    """Trainer with `moelora.rloo_loss` in training; evaluation and everything else are Trainer's own.

    Each example counts alike, whatever the number of its labels, and so does each of the accumulated batches: with
    batches of one size, accumulating is the same as one large batch. The last batches of an epoch may be smaller; their
    examples then count for more within that step.

    The loss that is logged is the supervised one, with the mixture's own losses on the routings.

    Args:
        samples, router_weight, credit, log_prob, loss_fn: as in `rloo_loss`.
        args, options: Trainer's.

    Raises:
        ValueError: with label smoothing or `compute_loss_func`, which would have no effect; pass `loss_fn` instead.
    """

    samples: int
    router_weight: float
    credit: Credit
    log_prob: LogProb
    loss_fn: ExampleLoss | None
    # a mean over the examples of a call: Trainer divides it by the number of accumulated calls
    loss_is_scaled_for_ga: bool | None = False

    def __init__(
        self,
        *args: Any,
        samples: int = 4,
        router_weight: float = 1.0,
        credit: Credit = "sequence",
        log_prob: LogProb = "ordered",
        loss_fn: ExampleLoss | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        if self.label_smoother is not None or self.compute_loss_func is not None:
            raise ValueError(
                "the loss of each example is computed by rloo_loss, so label_smoothing_factor and compute_loss_func "
                "would have no effect; pass loss_fn(output, batch), which gives one loss for each row"
            )
        self.samples, self.router_weight, self.credit, self.log_prob = samples, router_weight, credit, log_prob
        self.loss_fn = loss_fn
        # releases that do not know loss_is_scaled_for_ga go by this, and no label tokens need be counted
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """In training `rloo_loss`, whose value is replaced by that of the losses in it; Trainer's own in evaluation."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        found = rloo_loss(
            model,
            inputs,
            self.samples,
            router_weight=self.router_weight,
            credit=self.credit,
            log_prob=self.log_prob,
            loss_fn=self.loss_fn,
        )
        loss = found.total - (found.total - found.task - found.aux).detach()
        return (loss, found) if return_outputs else loss
