"""Training of one expert beside others that stay as they are. Begin with train_expert.

    moelora.set_trainable(model, routers=False, experts=["new"])
    losses = train_expert(model, "new", dataset, NPO(), collate=Collate(model), training=Training(epochs=5))

`train_router` trains who chooses among experts that are in place.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moelora.continual.examples import Collate, batches, listed
from moelora.continual.objectives import Objective
from moelora.continual.orthogonality import Hold
from moelora.mixture import Mixture, find_mixture, use_experts
from moelora.prefill import cards


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """How an expert is trained: by AdamW.

    Attributes:
        epochs: how often each example is seen.
        batch_size: how many examples a step has.
        learning_rate: the highest; see `rate`.
        weight_decay: of AdamW.
        warmup: share of the steps in which the learning rate rises.
        max_grad_norm: longer gradients are scaled down to this length; infinite for none.
        seed: of the order of the examples, of what an objective draws, and of dropout.
    """

    epochs: int = 10
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs and batch_size must be at least 1, got {self.epochs} and {self.batch_size}")
        if not (0 < self.learning_rate < math.inf and 0 <= self.weight_decay < math.inf and self.max_grad_norm > 0):
            raise ValueError(
                "learning_rate and max_grad_norm must be positive and weight_decay not negative, got "
                f"{self.learning_rate}, {self.max_grad_norm} and {self.weight_decay}"
            )
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is a share of the steps, from 0 to 1; got {self.warmup}")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0, of so many.

        A straight line up to the full rate in the last step of the warm-up, then one down that would reach 0 behind the
        last step. transformers' linear schedule, one step ahead of it in the warm-up: its first step has the rate 0 and
        is lost.
        """
        rising = math.ceil(self.warmup * steps)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        return self.learning_rate * (steps - step) / (steps - rising)


def train_expert(
    model: nn.Module,
    name: str,
    dataset: Any,
    objective: Objective,
    *,
    collate: Collate,
    training: Training,
    hold: Hold | None = None,
    beside: Sequence[str] = (),
) -> list[float]:
    """Train one expert, which acts at weight 1, alone or beside others; nothing else of the model changes.

    Each module stays in the mode it is in: with `model.eval()`, as models come from `from_pretrained`, there is no
    dropout; `model.train()` brings dropout, seeded, and gradient checkpointing. The global random state is left as it
    was.

    Args:
        model: a patched model whose only trainable expert is `name`:
            `moelora.set_trainable(model, routers=False, experts=[name])`.
        name: of the expert.
        dataset: see `moelora.continual.examples`.
        objective: what to learn, or to unlearn.
        collate: makes the batches.
        training: how.
        hold: keeps the expert apart from others; it is removed afterwards, also after an error.
        beside: frozen experts that act with it, at weight 1 too.

    Returns:
        The objective's mean loss in each epoch, without what the hold adds.

    Raises:
        ValueError: if the expert is not what is trained, or not alone; for a dataset that does not fit; for a loss or a
            gradient that is not finite, which is looked for after each epoch. The expert is of no use then.
    """
    root, mixture = find_mixture(model)
    try:
        factors = _factors(mixture, name)
        with _alone(root, factors), use_experts(model, dict.fromkeys([name, *beside], 1.0)):
            return _fit(model, factors, listed(dataset), objective, collate, training, hold, f"{name!r}")
    finally:
        if hold is not None:
            hold.remove()


def train_router(
    model: nn.Module, dataset: Any, objective: Objective, *, collate: Collate, training: Training
) -> list[float]:
    """Train the routers of a mixture, while all experts stay as they are; otherwise as `train_expert`.

    Returns:
        The objective's mean loss in each epoch.

    Raises:
        ValueError: if there is nothing to train in the routers; for a dataset that does not fit; for a loss or a
            gradient that is not finite.
    """
    root, mixture = find_mixture(model)
    parameters = [parameter for router in mixture.routers().values() for parameter in router.parameters()]
    flags = [parameter.requires_grad for parameter in parameters]
    if not parameters:
        raise ValueError(f"this model's routers have nothing to train: {mixture.config.router}")
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with _alone(root, parameters):
            return _fit(model, parameters, listed(dataset), objective, collate, training, None, "the routers")
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)


# --- inside -----------------------------------------------------------------------------------------------------------


def _fit(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    examples: list[Any],
    objective: Objective,
    collate: Collate,
    training: Training,
    hold: Hold | None,
    what: str,
) -> list[float]:
    # one kernel for all parameters where there is one
    optimizer = torch.optim.AdamW(
        parameters,
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
        fused=True if all(parameter.is_cuda for parameter in parameters) else None,
    )
    if hold is not None:
        hold.attach(optimizer)
    generator = torch.Generator().manual_seed(training.seed)
    steps = training.epochs * math.ceil(len(examples) / training.batch_size)

    means, step = [], 0
    with _own_randomness(training.seed):
        examples = objective.examples(examples, generator)
        examples = objective.with_reference(model, examples, collate, training.batch_size)
        for _ in range(training.epochs):
            seen, sizes = [], []
            for batch in batches(examples, collate, training.batch_size, generator):
                for group in optimizer.param_groups:
                    group["lr"] = training.rate(step + len(sizes), steps)
                loss = objective.loss(model, batch, generator)
                total = loss if hold is None else loss + hold.penalty()
                if not total.requires_grad:
                    raise ValueError(f"the loss of {objective} does not depend on {what}; nothing to train")
                optimizer.zero_grad()
                total.backward()
                norm = nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
                optimizer.step()
                seen.append((loss.detach(), total.detach(), norm.detach()))
                sizes.append(len(batch["input_ids"]))

            # to read a number waits for the device: once an epoch
            losses_N, totals_N, norms_N = (torch.stack(list(column)).double().cpu() for column in zip(*seen))
            _check_finite(totals_N, norms_N, step, training, what)
            means.append(float(losses_N @ torch.tensor(sizes).double()) / sum(sizes))
            step += len(sizes)
        optimizer.zero_grad()
    return means


def _factors(mixture: Mixture, name: str) -> list[nn.Parameter]:
    """The expert's own, as far as they are trained.

    Raises:
        ValueError: if there are none, or they are not alone.
    """
    index = mixture.index(name)
    banks = [layer.bank for layer in mixture.layers.values()]
    trained = {mixture.names[other] for bank in banks for other, kind in enumerate(bank.trainable) if kind}
    if trained != {name}:
        raise ValueError(
            f"expected {name!r} to be the only expert that is trained, but that is {sorted(trained)}; call "
            f"moelora.set_trainable(model, routers=False, experts=[{name!r}]) first"
        )
    parameters = [parameter for bank in banks if bank.ranks[index] for parameter in bank.parameters()]
    factors = [parameter for parameter in parameters if parameter.requires_grad]
    if not factors:
        raise ValueError(f"all factors of expert {name!r} are frozen, so there is nothing to train")
    return factors


@contextmanager
def _alone(root: nn.Module, factors: Sequence[nn.Parameter]) -> Iterator[None]:
    """Nothing but these gets a gradient; flags and gradients of the rest are as before."""
    own = {id(factor) for factor in factors}
    others = [parameter for parameter in root.parameters() if parameter.requires_grad and id(parameter) not in own]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Dropout draws from the global random state; it gets a seeded one, and then the old one back."""
    devices = cards()
    with torch.random.fork_rng(devices=devices):
        # not torch.manual_seed, which would seed accelerators that nobody has used yet
        for generator in [torch.default_generator, *(torch.cuda.default_generators[card] for card in devices)]:
            generator.manual_seed(seed)
        yield


def _check_finite(totals_N: Tensor, norms_N: Tensor, step: int, training: Training, what: str) -> None:
    wrong_N = ~(totals_N.isfinite() & norms_N.isfinite())
    if wrong_N.any():
        first = int(wrong_N.nonzero()[0, 0])
        raise ValueError(
            f"in step {step + first + 1} of the training of {what} the loss is {float(totals_N[first])} and its "
            f"gradient has the length {float(norms_N[first])}; expected finite numbers. Lower the learning_rate (now "
            f"{training.learning_rate}), and see whether the base model's own output is finite"
        )
