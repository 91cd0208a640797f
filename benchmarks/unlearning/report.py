"""The page of results, from the CSV files beside it. Begin with write.

python -m benchmarks.unlearning report
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.origin import read_rows
from benchmarks.unlearning import cost_report, encoder_report, tofu_report
from benchmarks.unlearning.results import FOLDER
from moelora.metrics import seeds_interval

LEARNED = ("before", "final", "average", "backward transfer", "forgetting")
TUNING_SEED = 100


def write(folder: Path) -> Path:
    """Write README.md of what is in a folder, and return its path."""
    page = folder / "README.md"
    page.write_text("\n".join(lines_of(folder)).rstrip("\n") + "\n", encoding="utf-8")
    return page


def lines_of(folder: Path) -> Iterator[str]:
    """The page, line by line."""
    yield "# Unlearning and continual learning\n"
    yield (
        "Written by `python -m benchmarks.unlearning report` from the CSV files beside it. Means over seeds with "
        "Student's 95 % intervals where there are several. What each row is stands at the head of the scripts in "
        "`benchmarks/unlearning`."
    )
    if encoder := read_rows(folder / "encoder.csv"):
        yield from encoder_report.lines_of(encoder)
    if learned := [row for row in read_rows(folder / "learning.csv") if int(row["seed"]) != TUNING_SEED]:
        yield "\n## Ten domains learned in sequence, accuracy among 150 intents in %\n"
        yield from learning_lines(learned)
    if tofu := read_rows(folder / "tofu.csv"):
        yield "\n## TOFU on a causal model\n"
        yield tofu_report.table(tofu)
    if cost := read_rows(folder / "cost.csv"):
        yield from cost_report.lines_of(cost)


def learning_lines(rows: Sequence[dict[str, str]]) -> Iterator[str]:
    """One line a method."""
    yield f"| method | {' | '.join(LEARNED)} | learning rate |"
    yield "|---" * (len(LEARNED) + 2) + "|"
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        values = [[100 * float(row["value"]) for row in own if row["metric"] == metric] for metric in LEARNED]
        yield f"| {method} | {' | '.join(shown(value, digits=1) for value in values)} | {own[0]['rate']} |"


def shown(values: Sequence[float], *, digits: int = 4) -> str:
    """A mean and half the width of its interval."""
    if len(values) < 2:
        return "".join(f"{value:.{digits}f}" for value in values)
    interval = seeds_interval(torch.tensor(values, dtype=torch.float64))
    return f"{sum(values) / len(values):.{digits}f} ± {(interval.high - interval.low) / 2:.{digits}f}"


def main(argv: "Sequence[str] | None" = None) -> None:
    """Write the page of the results that are kept here."""
    print(write(FOLDER))
