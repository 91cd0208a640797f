"""Which runs there are and what has been measured, as data. Begin with Run and METHODS.

A method's learning rate is one of three, chosen on a seed of its own after the first request; then it serves all three
requests with each seed. What is in the file of results is not done again.
"""

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.origin import read_rows
from benchmarks.unlearning.tofu_data import REQUESTS
from benchmarks.unlearning.tofu_methods import O3, Method, Stack, Whole

TUNING_SEED = 100
"""Not one of those that are reported."""

WHOLE_RATES = (3e-5, 1e-4, 3e-4)
ADAPTER_RATES = (3e-4, 1e-3, 3e-3)
"""Tried for all parameters, and for adapters."""

KNOWS, NEVER_SAW, DETECTORS = "knows all of TOFU", "never saw them", "detectors"
"""What is measured beside the methods: the model before all requests, models trained without the blocks, scores."""

CHOICE = "left and lost"
"""What a learning rate is chosen by: lower is better."""

FIELDS: tuple[str, ...] = (
    "method",
    "seed",
    "rate",
    "step",
    "metric",
    "value",
    "seconds",
    "device",
    "torch",
    "revision",
    "date",
)


class Way(NamedTuple):
    """A method: how it is made, and the rates it may have.

    Attributes:
        make: from a model, its tokenizer and `rate`, `seed`, `promise`.
        rates: learning rates to try.
    """

    make: Callable[..., Method]
    rates: tuple[float, ...]


METHODS: dict[str, Way] = {
    "gradient ascent, all weights": Way(
        lambda model, tokenizer, *, promise, **options: Whole(model, tokenizer, loss="ascent", **options), WHOLE_RATES
    ),
    "NPO, all weights": Way(
        lambda model, tokenizer, *, promise, **options: Whole(model, tokenizer, loss="npo", **options), WHOLE_RATES
    ),
    "ungated adapters, refusal": Way(
        lambda *args, **options: Stack(*args, objective="refusal", gated=False, **options), ADAPTER_RATES
    ),
    "O3 as printed, refusal": Way(
        lambda model, tokenizer, *, promise, **options: O3(model, tokenizer, variant="paper", **options), ADAPTER_RATES
    ),
    "O3 as released, refusal": Way(
        lambda model, tokenizer, *, promise, **options: O3(model, tokenizer, variant="code", **options), ADAPTER_RATES
    ),
    "ours, refusal": Way(
        lambda *args, **options: Stack(*args, objective="refusal", gated=True, **options), ADAPTER_RATES
    ),
    "ours, NPO": Way(lambda *args, **options: Stack(*args, objective="npo", gated=True, **options), ADAPTER_RATES),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One method with one seed.

    Attributes:
        method: of `METHODS`, or `KNOWS`, `NEVER_SAW`, `DETECTORS`.
        seed: of all that is drawn.
        rate: the learning rate; 0 where none matters.
        steps: how many requests it serves; for `NEVER_SAW` how many blocks the model has not seen.
    """

    method: str
    seed: int = 0
    rate: float = 0.0
    steps: int = REQUESTS

    @property
    def key(self) -> tuple[str, int, float, int]:
        """What a finished run is known by."""
        return (self.method, self.seed, self.rate, self.steps)


class Results:
    """A file with a line for each number; steps are counted from 1, and 0 is none in particular."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = read_rows(path)

    def done(self) -> set[tuple[str, int, float, int]]:
        """Keys of the runs that are in the file."""
        last: dict[tuple[str, int, float], int] = {}
        for row in self.rows:
            at = (row["method"], int(row["seed"]), float(row["rate"]))
            last[at] = max(last.get(at, 0), int(row["step"]))
        keys = {(*at, step) for at, step in last.items()}
        # models without one, two and three blocks are runs of their own under one name
        return keys | {(NEVER_SAW, 0, 0.0, int(row["step"])) for row in self.rows if row["method"] == NEVER_SAW}

    def add(self, run: Run, found: "Iterable[tuple[int, dict[str, float]]]", about: dict[str, str]) -> None:
        """Append a run's numbers, by step, and write them out."""
        rows = [
            {
                "method": run.method,
                "seed": str(run.seed),
                "rate": f"{run.rate:g}",
                "step": str(step),
                "metric": name,
                "value": f"{value:.6g}",
                **about,
            }
            for step, figures in found
            for name, value in figures.items()
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            if fresh:
                writer.writeheader()
            writer.writerows(rows)
        self.rows += rows

    def best_rate(self, method: str) -> float:
        """The rate whose `CHOICE` is lowest on the tuning seed; of equal ones the lowest rate.

        Raises:
            ValueError: if one of its rates has not been tried.
        """
        tried = {
            float(row["rate"]): float(row["value"])
            for row in self.rows
            if row["method"] == method and int(row["seed"]) == TUNING_SEED and row["metric"] == CHOICE
        }
        missing = set(METHODS[method].rates) - set(tried)
        if missing:
            raise ValueError(f"{method} has not been tried at the rates {sorted(missing)}; expected all of its rates")
        # a rate at which training broke down has no number
        return min(sorted(tried), key=lambda rate: tried[rate] if tried[rate] == tried[rate] else float("inf"))


def references() -> list[Run]:
    """Models that never saw the first blocks; with 0 blocks, the one that knows all, and is to forget."""
    return [Run(method=NEVER_SAW, steps=blocks) for blocks in range(REQUESTS + 1)]


def tuning(methods: Sequence[str]) -> list[Run]:
    """Each method at each of its rates, for one request."""
    return [
        Run(method=method, seed=TUNING_SEED, rate=rate, steps=1) for method in methods for rate in METHODS[method].rates
    ]


def final(methods: Sequence[str], seeds: Sequence[int], results: Results) -> list[Run]:
    """Each method at its best rate with every seed, seed by seed, so that what is cut off is whole seeds."""
    best = {method: results.best_rate(method) for method in methods}
    runs = [Run(method=method, seed=seed, rate=best[method]) for seed in seeds for method in methods]
    return [Run(method=KNOWS), *runs, *(Run(method=DETECTORS, seed=seed) for seed in seeds)]


def wanted(runs: Sequence[Run], results: Results) -> list[Run]:
    """Those that are not in the file yet."""
    done = results.done()
    return [run for run in runs if run.key not in done]
