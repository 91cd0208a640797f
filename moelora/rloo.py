"""Train routers by reinforcement, as ReMix does. Begin with rloo_loss.

Each example runs M times, each time with experts drawn anew. Experts learn from the mean of the M supervised losses.
A router learns to make more probable what did better than the other samples of the same example.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from moelora.aux_losses import distinct, weigh
from moelora.example_losses import ExampleLoss, ExampleLosses, losses_of
from moelora.hooks import INPUTS
from moelora.losses import leave_one_out, rloo_surrogate
from moelora.mixture import Mixture, find_mixture, own_loss
from moelora.plackett_luce import ordered_log_prob, unordered_log_prob
from moelora.routers.rloo import RLOO
from moelora.tape import Record

Credit = Literal["sequence", "reward_to_go"]
LogProb = Literal["ordered", "unordered"]


class RLOOLoss(NamedTuple):
    """What one batch taught.

    Attributes:
        total: task + router_weight * surrogate + aux: what to call `backward` on. Its value means nothing.
        task: mean supervised loss of all samples of all examples.
        surrogate: `losses.rloo_surrogate`, which has the routers' gradient.
        aux: the mixture's own losses on the routings (`AuxLosses`), weighted.
        loss_BM: supervised loss of each sample of each example.
        advantage_BM: `losses.leave_one_out` of it.
    """

    total: Float[Tensor, ""]
    task: Float[Tensor, ""]
    surrogate: Float[Tensor, ""]
    aux: Float[Tensor, ""]
    loss_BM: Float[Tensor, "B M"]
    advantage_BM: Float[Tensor, "B M"]

    def detach(self) -> "RLOOLoss":
        """The same numbers, cut from the autograd graph."""
        return RLOOLoss(*(tensor.detach() for tensor in self))


def rloo_loss(
    model: nn.Module,
    batch: Mapping[str, Any],
    samples: int = 4,
    *,
    router_weight: float = 1.0,
    credit: Credit = "sequence",
    log_prob: LogProb = "ordered",
    loss_fn: ExampleLoss | None = None,
) -> RLOOLoss:
    """The loss of a batch whose gradient trains experts and RLOO routers. The batch runs M times in one forward call.

        total = mean_b [ (1/M) sum_m L_bm ] + router_weight * mean_b [ sum_m adv_bm * log Q_bm ] + aux
        adv_bm = (L_bm - mean_m L_bm) / (M - 1)

    L_bm is the mean loss of example b's labels. log Q_bm is summed over all routers and all tokens that are no padding,
    the prompt's too, since what acts there changes the losses behind it. Experts get the gradient of the mean
    supervised loss and nothing else, routers ReMix's estimator, which is unbiased: Qiu et al. 2026,
    https://arxiv.org/abs/2603.10160, section 4. With many tokens and sites log Q is a long sum: give routers a learning
    rate and a clipping of their own.

    Args:
        model: a patched model whose router is `RLOO`, in training mode.
        batch: what the model is called with, and its labels. `rloo_backward` takes less memory.
        samples: M, at least 2.
        router_weight: of the routers' part.
        credit: "sequence" weighs each choice by its example's advantage. "reward_to_go", for causal language models,
            weighs a choice at position t by the advantage of the losses from t on, which alone it can change: as
            unbiased, with less variance. Ours; the paper has one reward.
        log_prob: "ordered" is the draw's own; "unordered", for up to 3 experts per token, that of the set (see
            `losses.unordered_log_prob`).
        loss_fn: from the model's output and the repeated batch the loss of each row; needed where the loss is none
            that `losses_of` knows. The model then gets the batch as it is, with labels.

    Raises:
        ValueError: for fewer than 2 samples, another router, a model in evaluation, a mixture that is fixed or
            disabled, a tensor in the batch that has not one row for each example, or a loss that is not known.
    """
    root, mixture = _check(model, samples, credit, log_prob)
    repeated, examples = repeat_batch(batch, samples)
    sampled = _run(model, root, mixture, repeated, loss_fn)
    loss_BM = _by_example(sampled.loss_B, samples)

    # what was chosen, and how much better it did than the others
    advantage_BMX = leave_one_out(_by_example(_credited(sampled, credit), samples))
    positions = None if credit == "sequence" else advantage_BMX.shape[2]
    log_prob_BMX = _by_example(_log_prob(mixture, examples * samples, log_prob, positions), samples)

    task, aux = loss_BM.mean(), _aux(mixture, loss_BM)
    surrogate = rloo_surrogate(advantage_BMX, log_prob_BMX)
    return RLOOLoss(task + router_weight * surrogate + aux, task, surrogate, aux, loss_BM, leave_one_out(loss_BM))


def rloo_backward(
    model: nn.Module,
    batch: Mapping[str, Any],
    samples: int = 4,
    *,
    router_weight: float = 1.0,
    credit: Credit = "sequence",
    log_prob: LogProb = "ordered",
    loss_fn: ExampleLoss | None = None,
    scale: float = 1.0,
) -> RLOOLoss:
    """The same estimator with the memory of one sample: gradients are accumulated here, and the loss comes detached.

    Every sample runs twice. The first runs give the losses, and so the advantages; each second run starts from the
    random state of its first, draws the same experts bit for bit, and is followed by its backward pass. The first runs
    build a graph too, and drop it: without one torch takes other kernels, which round otherwise, and a near tie could
    then fall otherwise. The samples are others than those of `rloo_loss`, which draws for all copies at once.

    The first runs bypass a wrapper such as DDP; of the M backward passes all but the last belong into its `no_sync`,
    which is not done here.

    Args:
        model, batch, samples, router_weight, credit, log_prob, loss_fn: as in `rloo_loss`, but the batch may hold
            anything that the model takes, since it is not repeated.
        scale: what the total is multiplied by before `backward`, such as 1 / accumulated batches.

    Raises:
        ValueError: as `rloo_loss`.
    """
    root, mixture = _check(model, samples, credit, log_prob)
    generator = mixture.tape.generator

    # what does each sample lose?
    states, lost = [], []
    for _ in range(samples):
        states.append(RandomState(root, generator))
        sampled = _run(root, root, mixture, batch, loss_fn)
        lost.append(ExampleLosses(*(None if part is None else part.detach() for part in sampled)))  # pyright: ignore[reportArgumentType]
        del sampled
    all_BM = torch.stack([each.loss_B for each in lost], 1)
    advantage_BMX = leave_one_out(torch.stack([_credited(each, credit) for each in lost], 1))
    positions = None if credit == "sequence" else advantage_BMX.shape[2]

    # the same again, one by one, each with its backward pass
    parts = []
    for number, state in enumerate(states):
        state.restore()
        sampled = _run(model, root, mixture, batch, loss_fn)
        log_prob_BX = _log_prob(mixture, sampled.loss_B.shape[0], log_prob, positions)
        task, aux = sampled.loss_B.mean() / samples, _aux(mixture, sampled.loss_B) / samples
        surrogate = rloo_surrogate(advantage_BMX[:, number : number + 1], log_prob_BX[:, None])
        total = task + router_weight * surrogate + aux
        (total * scale).backward()
        parts.append(torch.stack([total, task, surrogate, aux]).detach())
        del sampled, log_prob_BX, task, aux, surrogate, total
    total, task, surrogate, aux = torch.stack(parts).sum(0).unbind()
    return RLOOLoss(total, task, surrogate, aux, all_BM, leave_one_out(all_BM))


class RandomState:
    """The state of torch's generators, on the CPU and where a model's parameters are, and of one more generator."""

    def __init__(self, model: nn.Module, generator: torch.Generator | None = None) -> None:
        self.devices: set[torch.device] = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
        self.generator = generator
        self.cpu: Tensor = torch.get_rng_state()
        self.others: dict[torch.device, Tensor] = {
            device: torch.get_device_module(device).get_rng_state(device) for device in self.devices
        }
        self.own: Tensor | None = None if generator is None else generator.get_state()

    def restore(self) -> None:
        """Go back to it."""
        torch.set_rng_state(self.cpu)
        for device, state in self.others.items():
            torch.get_device_module(device).set_rng_state(state, device)
        if self.generator is not None and self.own is not None:
            self.generator.set_state(self.own)


def repeat_batch(batch: Mapping[str, Any], samples: int) -> tuple[dict[str, Any], int]:
    """A batch M times over, copy after copy, and how many examples it has.

    Raises:
        ValueError: for a tensor that has not one row for each example.
    """
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.ndim}
    first = next((name for name in ("labels", *INPUTS, *tensors) if name in tensors), None)
    if first is None:
        raise ValueError(f"the batch holds no tensors with rows, only {sorted(batch)}")
    examples = tensors[first].shape[0]
    for name, value in tensors.items():
        if value.shape[0] != examples:
            raise ValueError(
                f"{name!r} has the shape {tuple(value.shape)}, but {first!r} has {examples} rows, so it cannot be "
                "repeated for each sample; moelora.rloo_backward repeats nothing"
            )
    copies = {name: torch.cat([value] * samples) for name, value in tensors.items()}
    return {**batch, **copies}, examples


# --- inside -----------------------------------------------------------------------------------------------------------


def _check(model: nn.Module, samples: int, credit: str, log_prob: str) -> tuple[nn.Module, Mixture]:
    root, mixture = find_mixture(model)
    router = mixture.config.router
    if not isinstance(router, RLOO):
        raise ValueError(f"only routers that draw their experts are trained so: RLOO(top_k=2); this model has {router}")
    if not root.training or not torch.is_grad_enabled():
        raise ValueError("experts are drawn in training only; call model.train(), with gradients enabled")
    if samples < 2:
        raise ValueError(f"a leave-one-out baseline needs at least 2 samples, got samples={samples}")
    for name, value, known in (("credit", credit, Credit), ("log_prob", log_prob, LogProb)):
        if value not in get_args(known):
            raise ValueError(f"unknown {name} {value!r}; expected one of {get_args(known)}")
    return root, mixture


def _run(
    model: nn.Module, root: nn.Module, mixture: Mixture, batch: Mapping[str, Any], loss_fn: ExampleLoss | None
) -> ExampleLosses:
    """One call: the losses of its rows. Its routings stay on the tape."""
    inputs = {name: value for name, value in batch.items() if name != "num_items_in_batch"}
    decoder = any(name.startswith("decoder_input") for name in inputs)
    needs_labels = getattr(getattr(root, "config", None), "is_encoder_decoder", False) and not decoder
    labels = inputs.get("labels")
    if loss_fn is None and not needs_labels:
        # the model's own loss is one number for all, and large
        inputs.pop("labels", None)
    with own_loss(model, labels_BL=labels if isinstance(labels, Tensor) else None):
        output = model(**inputs)
    if not any(distinct(mixture.tape.records)):
        raise ValueError("no expert was drawn in this call: the mixture is disabled, or fixed by use_experts")
    return losses_of(root, output, batch, loss_fn)


def _aux(mixture: Mixture, like: Tensor) -> Tensor:
    """The mixture's own losses on the routings of the last call."""
    losses = mixture.config.losses
    value = weigh(mixture.tape.routings_with_gradient(), losses) if losses.active() else None
    return like.new_zeros(()) if value is None else value.to(like.device)


def _log_prob(mixture: Mixture, rows: int, log_prob: str, positions: int | None) -> Float[Tensor, "N X"]:
    """log Q of each row of the last call, summed over routers, at each of its positions or (None) in all, X = 1.

    A router that serves several sites is counted once. What is chosen before the first position, for a whole prompt or
    in a tower of another length, counts at the first.
    """
    function = ordered_log_prob if log_prob == "ordered" else unordered_log_prob
    once = isinstance(mixture.config.router, RLOO) and mixture.config.router.granularity == "prompt"
    total_NX: Tensor | None = None
    for record in distinct(mixture.tape.routings_with_gradient()):
        tokens = record.routing.experts_TK.shape[0]
        if tokens % rows:
            raise ValueError(
                f"a site has routed {tokens} tokens in a call of {rows} rows, so which example they belong to is not "
                "known; leave such sites out of targets"
            )
        found_NX = _log_prob_of(record, rows, function, ordered=log_prob == "ordered", once=once)
        if positions is None:
            found_NX = found_NX.sum(1, keepdim=True)
        elif found_NX.shape[1] != positions:
            found_NX = F.pad(found_NX.sum(1, keepdim=True), (0, positions - 1))
        total_NX = found_NX if total_NX is None else total_NX + found_NX.to(total_NX.device)
    assert total_NX is not None
    return total_NX


def _log_prob_of(
    record: Record, rows: int, function: Callable[[Tensor, Tensor], Tensor], *, ordered: bool, once: bool
) -> Tensor:
    routing = record.routing
    assert routing.logits_TE is not None
    if once:
        # all tokens of a row have its one choice
        logits_NE, experts_NK = (x.unflatten(0, (rows, -1))[:, 0] for x in (routing.logits_TE, routing.experts_TK))
        return function(logits_NE, experts_NK)[:, None]
    log_prob_T = routing.log_prob_T
    if not ordered or log_prob_T is None or not log_prob_T.requires_grad:
        # under reentrant checkpointing only the scores lead to the router
        log_prob_T = function(routing.logits_TE, routing.experts_TK)
    if record.valid_T is not None:
        log_prob_T = torch.where(record.valid_T, log_prob_T, 0)
    return log_prob_T.unflatten(0, (rows, -1))


def _by_example(values_NX: Tensor, samples: int) -> Tensor:
    """Rows of a repeated batch, copy after copy, as (B, M, ...)."""
    return values_NX.unflatten(0, (samples, -1)).transpose(0, 1)


def _credited(sampled: ExampleLosses, credit: str) -> Float[Tensor, "N X"]:
    """What choices answer for: X = 1, a whole example; X = L, at each position what is to come."""
    if credit == "sequence":
        return sampled.loss_B[:, None]
    if sampled.to_go_BL is None:
        raise ValueError("credit='reward_to_go' is for causal language models with labels, without loss_fn")
    return sampled.to_go_BL
