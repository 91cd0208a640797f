"""Train the gate of one expert, as PHATGOOSE does after the expert's own training. Begin with train_phatgoose."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moelora.call_settings import Settings
from moelora.hooks import loss_in
from moelora.mixture import Mixture, find_mixture
from moelora.routers.base import AbstractRouter
from moelora.routers.linear import linear_in_fp32
from moelora.routers.phatgoose import PhatgooseRouter
from moelora.routing import NO_EXPERT, Routing
from moelora.site_inputs import evaluating
from moelora.tape import Tape


def train_phatgoose(
    model: nn.Module, name: str, batches: Iterable[Mapping[str, Any]], *, steps: int = 100, lr: float = 1e-3
) -> dict[str, Tensor]:
    """Train one expert's gate v at every site: sigmoid(v . x) times the expert's output, on the model's own loss.

    Nothing but the gates is trained, from zeros, by Adam; no other expert acts, and there is no dropout. Everything
    else of the model is as before. On a mixture with `Phatgoose` the gates are the expert's from then on.

    Source: Muqeeth et al. 2024 (arXiv 2402.05859), section 3: 100 steps at a learning rate of 1e-3.

    Args:
        model: a patched model, with any router.
        name: of the expert.
        batches: keyword arguments of the model's forward, with labels, from the data that the expert was trained on.
            They are taken in turn, again from the beginning where `steps` are more.
        steps: of the optimiser, one a batch.
        lr: its learning rate.

    Returns:
        The gate (D,) of each site, by its path; zeros where the expert has no rows. Gates of all experts, stacked, are
        what `moelora.warm_start` takes.

    Raises:
        ValueError: for an unknown name, no batches, or a model that returns no loss or one that is not finite.
    """
    _, mixture = find_mixture(model)
    expert = mixture.index(name)
    if steps < 1 or not lr > 0:
        raise ValueError(f"steps must be at least 1 and lr positive, got steps={steps}, lr={lr}")

    with evaluating(model), _frozen(model), _gates(mixture, expert) as gates, torch.enable_grad():
        vectors = [gate.gate_1D for gate in gates if gate.present]
        optimiser = torch.optim.Adam(vectors, lr=lr)
        done = 0
        for batch in islice(cycle(batches), steps):
            loss = loss_in(model(**batch), batch)
            if loss is None:
                raise ValueError("the model returned no loss to train on; put labels into each batch")
            if not bool(torch.isfinite(loss)):
                raise ValueError(f"the loss is {float(loss.detach())} in step {done}; lower lr, or look at the batch")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            done += 1
    if not done:
        raise ValueError("batches is empty; expected keyword arguments of the model's forward, with labels")

    found = {}
    for (router, layers), gate in zip(mixture.by_router(), gates, strict=True):
        gate_D = gate.gate_1D.detach()[0].clone()
        found |= {layer.site: gate_D for layer in layers}
        if isinstance(router, PhatgooseRouter):
            router.prototype_ED[expert].copy_(gate_D)
    return found


@final
class GateRouter(AbstractRouter):
    """One expert acts on every token, with the weight sigmoid(v . x). It lives as long as its gate is trained."""

    gate_1D: nn.Parameter
    expert: int
    present: bool

    def __init__(self, expert: int, in_features: int, available: Sequence[bool], device: torch.device) -> None:
        super().__init__()
        self._set_available(available, device)
        self.expert, self.present = expert, bool(available[expert])
        self.gate_1D = nn.Parameter(torch.zeros(1, in_features, device=device))

    def forward(self, x_TD: Float[Tensor, "T D"], tape: Tape) -> Routing:
        weights_T1 = linear_in_fp32(x_TD, self.gate_1D).sigmoid()
        experts_T1 = torch.full_like(weights_T1, self.expert if self.present else NO_EXPERT, dtype=torch.long)
        return Routing(experts_T1, weights_T1 if self.present else torch.zeros_like(weights_T1))

    def keep_experts(self, order: Sequence[int]) -> None:
        raise NotImplementedError("experts neither come nor go while a gate is trained")

    def add_experts(self, available: Sequence[bool]) -> None:
        raise NotImplementedError("experts neither come nor go while a gate is trained")


@contextmanager
def _gates(mixture: Mixture, expert: int) -> Iterator[list[GateRouter]]:
    """A gate in each router's place, while this context lasts."""
    # what the last training call chose is still to be counted, by the routers that are put aside
    mixture.hooks.balance()
    before, settings = {site: layer.router for site, layer in mixture.layers.items()}, mixture.tape.settings
    gates = []
    for router, layers in mixture.by_router():
        device = layers[0].bank.A_frozen_RD.device
        gates.append(GateRouter(expert, layers[0].in_features, router.available_E.tolist(), device))
        for layer in layers:
            layer.router = gates[-1]
    # nobody's `use_experts` or `disabled`, in which this may be called
    mixture.tape.settings = Settings()
    try:
        yield gates
    finally:
        mixture.tape.settings = settings
        for site, router in before.items():
            mixture.layers[site].router = router


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of the model is trained while this context lasts."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in before:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)
