"""The file of results of the encoder's benchmark, and what a line says. Begin with Results and Figure."""

import csv
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, final

import torch

from benchmarks.origin import read_rows, revision_here, today

FOLDER = Path(__file__).parents[1] / "results" / "unlearning"

FIELDS = (
    "part",
    "row",
    "seed",
    "request",
    "versus",
    "step",
    "metric",
    "value",
    "low",
    "high",
    "seconds",
    "device",
    "torch",
    "revision",
    "date",
)


class Figure(NamedTuple):
    """One number that was measured.

    Attributes:
        metric: what it is.
        value: rates and accuracies from 0 to 1.
        request: which one it is about, if one.
        versus: which other inputs, if any.
        step: after how many requests; 0 if that has no meaning.
        low, high: of its own 95 % interval over utterances, NaN without one.
    """

    metric: str
    value: float
    request: str = ""
    versus: str = ""
    step: int = 0
    low: float = math.nan
    high: float = math.nan


class Unit(NamedTuple):
    """A piece of work that is done as a whole or not at all: one row of one part with one seed."""

    part: str
    row: str
    seed: int


@final
class Results:
    """A CSV file that grows unit by unit."""

    path: Path

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self.path, self.device = path, device

    def lines(self) -> list[dict[str, str]]:
        """All that is in the file."""
        return read_rows(self.path)

    def done(self) -> set[Unit]:
        """What need not be done again."""
        return {Unit(line["part"], line["row"], int(line["seed"])) for line in self.lines()}

    def add(self, unit: Unit, figures: Iterable[Figure], seconds: float) -> None:
        """Append a unit's figures; `seconds` is processor time."""
        about = (
            f"{seconds:.1f}",
            self.device,
            torch.__version__,
            revision_here(),
            today(),
        )
        rows = [
            (*unit, f.request, f.versus, f.step, f.metric, *(_number(v) for v in (f.value, f.low, f.high)), *about)
            for f in figures
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.is_file()
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([FIELDS, *rows] if new else rows)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"
