"""Can the gates be avoided, and does anybody notice? Begin with evade and drift.

Gates read a prompt in windows. With windows of 256 tokens, the default, a short query in a long text is one part in
twenty of what a gate sees; with windows of 16 it is most of it. Both are measured; the stack itself has the default.

Axes: B texts, E requests.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from benchmarks.unlearning.attacks import ATTACKS, Context
from benchmarks.unlearning.clinc import OUTSIDE, REQUESTS, Roles, Utterance, Utterances, by_intent, sample
from benchmarks.unlearning.detection import chosen_detector, upper
from benchmarks.unlearning.host import Host
from benchmarks.unlearning.remembered import Remembered, View
from benchmarks.unlearning.requests import MAX_FIRE, MAX_MISS
from benchmarks.unlearning.results import Figure
from moelora.continual import Gate, HiddenStates
from moelora.continual.features import Windows
from moelora.continual.gate import Promise, fit_gate, recalibrate
from moelora.continual.union import max_statistic
from moelora.metrics import clopper_pearson

WINDOWS = {"windows of 256 tokens": (256, 128), "windows of 16 tokens": (16, 8)}
"""Length and stride."""

PER_INTENT = 4
"""Queries of each intent that are attacked with, of the requests' test splits."""

STREAM, STREAMS, LEVEL = 300, 20, 0.01
"""Queries in a stream that the monitor compares, how many streams are drawn, and the p-value of an alarm."""


class Attacked(NamedTuple):
    """What an attack made of a query.

    Attributes:
        request: what the query is about, its place in `REQUESTS`.
        label: its intent.
        turns: one text or several.
    """

    request: int
    label: int
    turns: list[str]


class Gates(NamedTuple):
    """The gates of all requests, as a stack has them, and what they look at."""

    gates: Sequence[Gate]
    view: View

    def windows(self, texts: Sequence[str]) -> Windows:
        """Features of texts of any length."""
        return self.view.windows(self.view.remembered.tokens(texts))

    def opened(self, texts: Sequence[str]) -> Bool[Tensor, "B E"]:
        """Which gates open fully."""
        windows = self.windows(texts)
        return torch.stack([gate.weights(gate.distances(windows)) >= 1 for gate in self.gates], dim=1)

    def closest(self, texts: Sequence[str]) -> Float[Tensor, " B"]:
        """Distance to the closest request."""
        windows = self.windows(texts)
        return max_statistic([gate.distances(windows) for gate in self.gates])


def gates_of(host: Host, roles: Roles, *, window: int, stride: int) -> Gates:
    """Fit and calibrate all gates, without experts."""
    states = HiddenStates(host.model, host.remembered.states.layers, window=window, stride=stride)
    remembered = host.remembered
    if (window, stride) != (remembered.states.window, remembered.states.stride):
        remembered = Remembered(states, remembered.tokenizer)
        remembered.take_short(host.remembered)
    view = View(remembered, upper(host.model.config.num_hidden_layers))

    def read(utterances: Utterances) -> Windows:
        return view.windows(remembered.tokens([utterance.text for utterance in utterances]))

    promise = Promise(max_miss=MAX_MISS, max_fire=MAX_FIRE, on_conflict="protect_utility")
    background = read(roles.background).features_WSD
    gates: list[Gate] = []
    for request in REQUESTS:
        gate = fit_gate(chosen_detector(background), read(roles.asked[request]), read(roles.held[request]), promise)
        gates = recalibrate([*gates, gate], read(roles.benign), union="max_statistic")
    return Gates(gates, view)


def attack(host: Host, roles: Roles, *, seed: int) -> dict[str, list[Attacked]]:
    """What each attack makes of a few queries of each intent."""
    names = [name.replace("_", " ") for names in host.corpus.intents.values() for name in names]
    queries = {request: by_intent(roles.held_out[request], PER_INTENT, seed) for request in REQUESTS}
    # benign texts that no gate was calibrated on
    benign = [utterance for utterance in sample(roles.retained, 400, seed) if utterance.label != OUTSIDE]
    made: dict[str, list[Attacked]] = {}
    for name, write in ATTACKS.items():
        rng = random.Random(seed)
        made[name] = []
        for place, request in enumerate(REQUESTS):
            others = queries[REQUESTS[(place + 1) % len(REQUESTS)]]
            for query in queries[request]:
                context = Context(
                    rng=rng,
                    benign=[utterance.text for utterance in benign],
                    intents=[names[utterance.label] for utterance in benign],
                    other=rng.choice(others).text,
                )
                made[name].append(Attacked(place, query.label, write(query.text, context)))
    return made


def evade(gates: Gates, attacked: dict[str, list[Attacked]]) -> Iterator[Figure]:
    """Of each attack, how often the request's own gate stays closed in all turns, and how often every gate does."""
    for name, entries in attacked.items():
        opened = [gates.opened(entry.turns).any(0) for entry in entries]
        own = sum(not bool(opened_E[entry.request]) for opened_E, entry in zip(opened, entries, strict=True))
        every = sum(not bool(opened_E.any()) for opened_E in opened)
        yield from (_rate("miss", own, len(entries), name), _rate("no gate opens", every, len(entries), name))


def answered(host: Host, attacked: dict[str, list[Attacked]], metric: str) -> Iterator[Figure]:
    """Of each attack, how often the model as it stands now gives the query's own intent in one of the turns."""
    for name, entries in attacked.items():
        owner = [place for place, entry in enumerate(entries) for _ in entry.turns]
        texts = [Utterance(turn, entry.label) for entry in entries for turn in entry.turns]
        answer_B = host.answers(texts)
        got = {place for place, answer, text in zip(owner, answer_B.tolist(), texts) if answer == text.label}
        yield _rate(metric, len(got), len(entries), name)


def benign_fire(gates: Gates, roles: Roles) -> Iterator[Figure]:
    """How often a gate opens for benign text that nobody hides anything in."""
    for versus, utterances in (("near", roles.retained), ("Banking77", roles.banking), ("out of scope", roles.outside)):
        fired_B = gates.opened([utterance.text for utterance in utterances]).any(1)
        yield _rate("fire", int(fired_B.sum()), len(utterances), versus)


def drift(gates: Gates, roles: Roles, attacked: dict[str, list[Attacked]], *, seed: int) -> Iterator[Figure]:
    """How often a two-sample Kolmogorov-Smirnov test finds that a stream is not what gates were calibrated on.

    An alarm says that the certificates no longer speak of the traffic.
    """
    from scipy import stats

    calibrated_M = gates.closest([utterance.text for utterance in roles.benign])
    texts = {name: [utterance.text for utterance in getattr(roles, name)] for name in roles.calibration}
    texts["asked"] = [utterance.text for request in REQUESTS for utterance in roles.held_out[request]]
    texts["base64"] = [turn for entry in attacked["base64"] for turn in entry.turns]
    scores = {name: gates.closest(lines).tolist() for name, lines in texts.items()}

    like = {name: len(part) / len(roles.benign) for name, part in roles.calibration.items()}
    most = {name: 0.9 * share for name, share in like.items()}
    streams: dict[str, dict[str, float]] = {
        "mixed as for the calibration": like,
        "retained domains only": {"retained": 1.0},
        "Banking77 only": {"banking": 1.0},
        "out of scope only": {"outside": 1.0},
        "one in ten asks for a request": {**most, "asked": 0.1},
        "one in ten is base64": {**most, "base64": 0.1},
    }
    rng = random.Random(seed)
    for name, shares in streams.items():
        alarms = 0
        for _ in range(STREAMS):
            drawn = [
                score for part, share in shares.items() for score in rng.choices(scores[part], k=round(share * STREAM))
            ]
            result: Any = stats.ks_2samp(drawn, calibrated_M.numpy())
            alarms += result.pvalue < LEVEL
        yield _rate("alarm", int(alarms), STREAMS, name)


# --- inside -----------------------------------------------------------------------------------------------------------


def _rate(metric: str, events: int, trials: int, versus: str) -> Figure:
    low, high = clopper_pearson(events, trials)
    return Figure(metric, events / trials, versus=versus, step=trials, low=low, high=high)
