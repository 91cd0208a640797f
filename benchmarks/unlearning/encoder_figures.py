"""The encoder's results by what they are about, over the seeds. Begin with Table."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, final

import torch

from benchmarks.unlearning.clinc import REQUESTS
from moelora.metrics import clopper_pearson, seeds_interval

VERSUS = ("near", "Banking77", "out of scope")


class Mean(NamedTuple):
    """A mean over seeds, half the width of its interval (0 for one seed or none), and how many seeds there are."""

    value: float
    half: float
    seeds: int

    def percent(self, digits: int = 1) -> str:
        """In %."""
        return self.shown(100, digits)

    def shown(self, scale: float = 1.0, digits: int = 3) -> str:
        """With its interval, if there is one."""
        if not self.seeds:
            return ""
        spread = f" ± {scale * self.half:.{digits}f}" if self.half else ""
        return f"{scale * self.value:.{digits}f}{spread}"


@final
class Table:
    """All figures of the file. Of the requests these are the latest of each: after the last one, or when it came."""

    lines: list[Mapping[str, str]]

    def __init__(self, lines: Iterable[Mapping[str, str]]) -> None:
        self.lines = list(lines)
        self._values: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
        # by step, so that later ones take the place of earlier ones
        for line in sorted(self.lines, key=lambda line: int(line["step"])):
            if line["value"]:
                at = tuple(line[name] for name in ("part", "row", "metric", "request", "versus"))
                self._values[at][line["seed"]] = float(line["value"])

    def values(self, part: str, row: str, metric: str, *, request: str = "", versus: str = "") -> list[float]:
        """One for each seed."""
        return list(self._values.get((part, row, metric, request, versus), {}).values())

    def mean(self, part: str, row: str, metric: str, *, request: str = "", versus: str = "") -> Mean:
        """Over the seeds."""
        return mean_of(self.values(part, row, metric, request=request, versus=versus))

    def of_requests(self, part: str, row: str, metric: str, versus: str = "") -> list[Mean]:
        """One for each request."""
        return [self.mean(part, row, metric, request=request, versus=versus) for request in REQUESTS]

    def rows(self, part: str) -> list[str]:
        """In the order of the file."""
        return list(dict.fromkeys(line["row"] for line in self.lines if line["part"] == part))

    def interval(self, part: str, row: str, metric: str, versus: str) -> str:
        """A figure's own interval over utterances, of the first seed."""
        at = (part, row, metric, versus)
        for line in self.lines:
            if at == (line["part"], line["row"], line["metric"], line["versus"]) and line["low"]:
                return f"{float(line['low']):.3f} to {float(line['high']):.3f}"
        return ""

    def counted(self, row: str, metric: str, versus: str) -> str:
        """A rate of the part "evasion" over the texts of all seeds, in %, with its interval; `step` counts texts."""
        events = trials = 0
        for line in self.lines:
            if (line["part"], line["row"], line["metric"], line["versus"]) == ("evasion", row, metric, versus):
                trials += int(line["step"])
                events += round(float(line["value"]) * int(line["step"]))
        if not trials:
            return ""
        low, high = clopper_pearson(events, trials)
        return f"{100 * events / trials:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def mean_of(values: Sequence[float]) -> Mean:
    """Of the seeds' values."""
    if len(values) < 2:
        return Mean(sum(values), 0.0, len(values))
    low, high = seeds_interval(torch.tensor(values, dtype=torch.float64))
    return Mean(sum(values) / len(values), (high - low) / 2, len(values))
