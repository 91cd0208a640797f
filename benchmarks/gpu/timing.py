"""How time is taken: variants in turns, many rounds, by CUDA events. Begin with interleaved.

- *In turns.* A round gives every variant one turn, every other round in reverse order, so that a slow moment or a
  changing clock hits all of them. A ratio is the median, over rounds, of a variant's time by the base's in that round.
- *A turn* is as many calls as fit into about three milliseconds, and at least one; its time is divided by their number.
  It begins with the device busy overwriting a gigabyte: the L2 cache holds nothing of the variant's, and the latency of
  the first launch is hidden, as it is in the middle of a model. A variant whose calls take the host longer than the
  device still shows that; CUDA graphs (`graph_of`) show the device's time alone.
- *The same variant twice* (two entries, two names) says how large the noise is.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from benchmarks.gpu.providers import BASE

TURN_MICROSECONDS = 3000
MOST_CALLS = 50
WARM_UP_CALLS = 3

Answer = TypeVar("Answer")


def nothing() -> None:
    """What a variant needs before its turn, mostly."""


class Variant(NamedTuple):
    """One contender: what is timed, and what has to be done before each of its turns, untimed."""

    name: str
    run: Callable[[], object]
    before: Callable[[], object] = nothing


class Timing(NamedTuple):
    """Microseconds of one call, over rounds, and the ratio to the base."""

    median: float
    p20: float
    p80: float
    ratio: float | None = None

    def divided(self, count: int) -> "Timing":
        """The time of one of several things that a call does."""
        return Timing(self.median / count, self.p20 / count, self.p80 / count, self.ratio)


class Failure(NamedTuple):
    """Why there is no timing."""

    error: str


def attempt(work: Callable[[], Answer]) -> Answer | Failure:
    """What the work answers, or its error in one line: a peer that fails is a result, and the others go on."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is what the table has to say of it
        first_line = next(iter(str(error).strip().splitlines()), "")
        return Failure(f"{type(error).__name__}: {first_line}"[:300])


def interleaved(
    variants: Sequence[Variant], *, rounds: int, device: torch.device, base: str = BASE
) -> list[tuple[str, Timing | Failure]]:
    """Time variants in turns, as the head of this file says.

    Returns:
        For each variant, in order, its name and its timing, or why it failed. The ratio is missing where the base is.
    """
    calls: dict[int, int] = {}
    failures: dict[int, Failure] = {}
    for index, variant in enumerate(variants):
        answer = attempt(lambda variant=variant: calls_per_turn(variant, device))
        if isinstance(answer, Failure):
            failures[index] = answer
        else:
            calls[index] = answer

    times: dict[int, list[float]] = {index: [] for index in calls}
    for number in range(rounds):
        for index in list(calls) if number % 2 == 0 else list(calls)[::-1]:
            times[index].append(turn(variants[index], calls[index], device))

    base_index = next((index for index in calls if variants[index].name == base), None)
    base_times = None if base_index is None else times[base_index]
    return [
        (variant.name, failures[index] if index in failures else timing_of(times[index], base_times))
        for index, variant in enumerate(variants)
    ]


def timing_of(times: Sequence[float], base_times: Sequence[float] | None = None) -> Timing:
    """Quantiles of the rounds, and the ratio to the base, round by round."""
    ratio = None
    if base_times is not None:
        ratio = statistics.median(mine / its for mine, its in zip(times, base_times, strict=True))
    return Timing(statistics.median(times), quantile(times, 0.2), quantile(times, 0.8), ratio)


def quantile(values: Sequence[float], share: float) -> float:
    """The value that this share of all lies below."""
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))]


def calls_per_turn(variant: Variant, device: torch.device) -> int:
    """Warm a variant up, and see how many of its calls make a turn."""
    turn(variant, WARM_UP_CALLS, device)
    once = turn(variant, 1, device)
    return max(1, min(MOST_CALLS, round(TURN_MICROSECONDS / once)))


def turn(variant: Variant, calls: int, device: torch.device) -> float:
    """Microseconds of one call, the mean over these."""
    variant.before()
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(calls):
            variant.run()
        return 1e6 * (time.perf_counter() - begin) / calls

    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    gigabyte(device).zero_()
    start.record()
    for _ in range(calls):
        variant.run()
    stop.record()
    stop.synchronize()
    return 1e3 * start.elapsed_time(stop) / calls


@lru_cache(maxsize=1)
def gigabyte(device: torch.device) -> Tensor:
    """What the device overwrites before a turn: about a third of a millisecond, and far more than its L2 holds."""
    return torch.empty(2**28, dtype=torch.float32, device=device)


def graph_of(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The run, captured in a CUDA graph; on a CPU the run itself."""
    if device.type != "cuda":
        return run
    current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            run()
    current.wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    finally:
        # a capture that fails leaves its own stream behind as the current one
        torch.cuda.set_stream(current)
    return Replay(graph, run)


class Replay:
    """A captured run. It holds what was captured, whose weights the graph goes on reading."""

    def __init__(self, graph: torch.cuda.CUDAGraph, run: Callable[[], object]) -> None:
        self.graph, self.run = graph, run

    def __call__(self) -> None:
        self.graph.replay()


def attempt_graph(run: Callable[[], object] | Failure, device: torch.device) -> Callable[[], object] | Failure:
    """The run in a graph, or why there is none."""
    return run if isinstance(run, Failure) else attempt(lambda: graph_of(run, device))
