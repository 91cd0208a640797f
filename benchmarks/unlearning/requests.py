"""Three requests to forget, one after the other, served by each method and measured after each. Begin with serve.

A method is a way to train adapters and to open them; those that share their adapters are measured on the same ones.
All adapters have the same rank, places, steps and learning rate, and see the same utterances.

Axes: B utterances, E experts.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import moelora
from benchmarks.unlearning.clinc import REQUESTS, Roles, Sizes, Utterances, by_intent
from benchmarks.unlearning.detection import chosen_detector, upper
from benchmarks.unlearning.host import Host, share
from benchmarks.unlearning.remembered import View, padded
from benchmarks.unlearning.results import Figure
from moelora.continual import O3Stack, RandomOption, Training, UniformOptions, UnlearningStack
from moelora.metrics import Accuracy, persistence_loss, pooled

RANK = 8
MAX_MISS, MAX_FIRE = 0.1, 0.015
"""What is promised of each gate, and of all of them together; with a confidence of 95 % over the calibration draw."""

BEFORE, RETRAINED = "before all requests", "never saw them"
"""Rows to compare with: the model itself, and one whose head was trained without the requests."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train adapters.

    Attributes:
        rows: who is measured on them: names, and who acts, "gates", "all" (ungated) or "truth" (an oracle's gates).
        orthogonality: of an `UnlearningStack`; empty for an `O3Stack`.
        variant: of an `O3Stack`.
        placed: whether A is placed away from benign text.
    """

    rows: Mapping[str, str]
    orthogonality: str = ""
    variant: str = ""
    placed: bool = False


METHODS: dict[str, Method] = {
    "none": Method(
        rows={"ungated adapters": "all", "gates, no orthogonality": "gates"},
        orthogonality="none",
    ),
    "o3_paper": Method(rows={"o3_paper": "gates"}, variant="paper"),
    "o3_code": Method(rows={"o3_code": "gates"}, variant="code"),
    "penalty": Method(rows={"ours, penalty": "gates", "oracle gates": "truth"}, orthogonality="penalty"),
    "nullspace": Method(rows={"ours, null space": "gates"}, orthogonality="nullspace"),
    "placed": Method(
        rows={"ours, null space and away from benign text": "gates"}, orthogonality="nullspace", placed=True
    ),
}
"""By what they train."""

ROWS = [row for method in METHODS.values() for row in method.rows]
OURS = [row for row in ROWS if row.startswith("ours")]
O3 = ["o3_paper", "o3_code"]


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A model that has served some requests.

    Attributes:
        step: how many.
        stack: what served them.
        weights: of utterances and experts, by the gates.
    """

    step: int
    stack: "UnlearningStack | O3Stack"
    weights: Callable[[Utterances], Float[Tensor, "B E"]]


def upper_half(depth: int) -> Callable[[str, Any], bool]:
    """The projections in the last half of the blocks, attention and MLP: where adapters are."""
    blocks = [f".layer.{block}." for block in range(depth // 2, depth)]
    return lambda path, _: any(block in f".{path}." for block in blocks)


def serve(host: Host, method: Method, roles: Roles, *, seed: int, training: Training) -> Iterator[Moment]:
    """The model after each request; it is the bare model again when this ends, however it ends."""
    depth = host.model.config.num_hidden_layers
    view = View(host.remembered, upper(depth))
    common: dict[str, Any] = {"rank": RANK, "targets": upper_half(depth), "seed": seed}
    stack: UnlearningStack | O3Stack
    if method.variant:
        raw = View(host.remembered, host.remembered.states.layers, unit=False)
        with warnings.catch_warnings():
            # that its gate does not close is what is measured here
            warnings.simplefilter("ignore", UserWarning)
            stack = O3Stack(host.model, method.variant, features=raw, **common)
    else:
        detector = chosen_detector(view.of(roles.background))
        stack = UnlearningStack(
            host.model, features=view, detector=detector, orthogonality=method.orthogonality, **common
        )
    try:
        for step, request in enumerate(REQUESTS, start=1):
            asked = host.examples(roles.asked[request])
            if isinstance(stack, O3Stack):
                stack.forget(asked, objective=RandomOption(), training=training, name=request)
            else:
                stack.forget(
                    asked,
                    calibration=host.texts(roles.benign),
                    held_out=host.texts(roles.held[request]),
                    max_miss=MAX_MISS,
                    max_fire=MAX_FIRE,
                    objective=UniformOptions(),
                    training=training,
                    name=request,
                    avoid=host.texts(roles.background) if method.placed else None,
                )
            yield Moment(step=step, stack=stack, weights=lambda utterances: _weights(host, stack, utterances))
    finally:
        if moelora.is_patched(host.model):
            moelora.unpatch_model(host.model)


def measure(
    host: Host, method: Method, roles: Roles, *, seed: int, sizes: Sizes, training: Training
) -> Iterator[tuple[Moment, dict[str, list[Figure]]]]:
    """After each request, the moment and the figures of each row."""
    known: dict[str, list[list[float]]] = {row: [] for row in method.rows}
    for moment in serve(host, method, roles, seed=seed, training=training):
        found: dict[str, list[Figure]] = {}
        for row, who in method.rows.items():
            acting = _acting(host, moment, who)
            figures, left = knowledge(
                roles, sizes, moment.step, lambda utterances, own=acting: host.answers(utterances, own)
            )
            known[row].append([*left, *[float("nan")] * (len(REQUESTS) - len(left))])
            if moment.step == len(REQUESTS):
                figures += list(
                    utility(host, roles, sizes, lambda utterances, own=acting: host.answers(utterances, own))
                )
                figures += list(_persistence(known[row]))
                if who == "gates":
                    figures += list(gate_errors(moment, roles))
            if who != "truth":
                figures += list(_promises(moment))
            found[row] = figures
        yield moment, found


def references(host: Host, roles: Roles, sizes: Sizes) -> Iterator[tuple[str, list[Figure]]]:
    """The model before all requests, and heads that never saw those so far."""
    for row, heads in ((BEFORE, [host.head] * len(REQUESTS)), (RETRAINED, host.without)):
        figures: list[Figure] = []
        for step, head in enumerate(heads, start=1):

            def answer(utterances: Utterances, own: Any = head) -> Tensor:
                return host.answers_of_head(own, utterances)

            figures += knowledge(roles, sizes, step, answer)[0]
            if step == len(REQUESTS):
                figures += list(utility(host, roles, sizes, answer))
        yield row, figures


# --- what is measured -------------------------------------------------------------------------------------------------

Answer = Callable[[Utterances], Tensor]


def knowledge(roles: Roles, sizes: Sizes, step: int, answer: Answer) -> tuple[list[Figure], list[float]]:
    """S.U. and D.U. of each request so far and of all of them; and D.U. by request."""
    figures: list[Figure] = []
    left: list[float] = []
    for metric, groups, count in (
        ("S.U.", roles.asked, sizes.measured),
        ("D.U.", roles.held_out, sizes.held_out),
    ):
        parts = []
        for request in REQUESTS[:step]:
            utterances = by_intent(groups[request], count, seed=0)
            value = share(answer(utterances), utterances)
            figures.append(Figure(metric, value, request, step=step))
            parts.append(Accuracy(value=value, chance=0.0, items=len(utterances)))
            if metric == "D.U.":
                left.append(value)
        figures.append(Figure(metric, pooled(parts).value, step=step))
    return figures, left


def utility(host: Host, roles: Roles, sizes: Sizes, answer: Answer) -> Iterator[Figure]:
    """R.D., the accuracy on the retained domains, and how many far queries get the answer that they got before."""
    retained = by_intent(roles.retained, sizes.retained, seed=0)
    step = len(REQUESTS)
    yield Figure("R.D.", share(answer(retained), retained), versus="near", step=step)
    for versus, utterances in (("Banking77", roles.banking), ("out of scope", roles.outside)):
        far = utterances[:: max(1, len(utterances) // sizes.far)]
        same_B = answer(far) == host.answers_of_head(host.head, far)
        yield Figure("same answer", same_B.double().mean().item(), versus=versus, step=step)


def gate_errors(moment: Moment, roles: Roles) -> Iterator[Figure]:
    """Miss: a request's input whose expert is less than half open. Fire: a benign one with any gate not closed."""
    step = moment.step
    for place, request in enumerate(REQUESTS):
        weights_BE = moment.weights(roles.held_out[request])
        # O3's one adapter is everybody's
        own_B = weights_BE[:, min(place, weights_BE.shape[1] - 1)]
        yield Figure("miss", (own_B < 0.5).double().mean().item(), request, step=step)
    for versus, utterances in (("near", roles.retained), ("Banking77", roles.banking), ("out of scope", roles.outside)):
        fired_B = (moment.weights(utterances) > 0).any(1)
        yield Figure("fire", fired_B.double().mean().item(), versus=versus, step=step)


def _promises(moment: Moment) -> Iterator[Figure]:
    """The newest request's overlap with those before; at the end the certified rates of all."""
    newest = moment.stack.requests[-1]
    if moment.step > 1:
        yield Figure("overlap", newest.overlap, newest.name, step=moment.step)
    if isinstance(moment.stack, UnlearningStack) and moment.step == len(REQUESTS):
        for request in moment.stack.requests:
            certificate = request.certificate
            yield Figure("certified miss", certificate.miss.bound, request.name, step=moment.step)
            yield Figure("certified fire", certificate.union_fire_bound, request.name, step=moment.step)


def _persistence(left: list[list[float]]) -> Iterator[Figure]:
    """How much of each earlier request came back with the later ones."""
    steps = len(REQUESTS)
    for place, request in enumerate(REQUESTS[:-1]):
        yield Figure("persistence loss", left[-1][place] - left[place][place], request, step=steps)
    yield Figure("persistence loss", persistence_loss(torch.tensor(left)), step=steps)


# --- inside -----------------------------------------------------------------------------------------------------------


def _weights(host: Host, stack: "UnlearningStack | O3Stack", utterances: Utterances) -> Tensor:
    return stack.weights(padded(host.remembered.tokens([utterance.text for utterance in utterances])))


def _acting(host: Host, moment: Moment, who: str) -> "Callable[[Utterances], AbstractContextManager[None]] | None":
    names = [request.name for request in moment.stack.requests]
    if who == "gates":
        return None
    if who == "all":
        return lambda utterances: moelora.use_experts(host.model, dict.fromkeys(names, 1.0))
    owner = {label: name for name in names for label in host.corpus.labels_of([name])}
    return lambda utterances: moelora.use_experts(host.model, [owner.get(utterance.label) for utterance in utterances])
