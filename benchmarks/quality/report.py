"""Tables and plots of what was measured, from the files of results. Begin with main.

    python -m benchmarks.quality.report

Writes README.md and the plots beside the results. A figure is the mean of the seeds with Student's 95 % interval.
"""

import csv
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

from benchmarks.quality.run import RESULTS, run_of
from benchmarks.quality.study import ACCURACY, QUESTIONS, SAMPLES, TUNING_SEED
from moelora.metrics import seeds_interval

MEASURES = {
    "decoder": "test loss, nats a token (lower is better)",
    "encoder": "test accuracy, % (higher is better)",
    "mixed": "test accuracy, % (higher is better)",
}


class Figure(NamedTuple):
    """A mean over seeds and half the width of its interval (0 for one seed), and how many digits are shown."""

    mean: float
    half: float
    seeds: int
    digits: int = 3

    def __str__(self) -> str:
        if self.seeds == 0:
            return ""
        spread = f" ± {self.half:.{self.digits}f}" if self.seeds > 1 else " (one seed)"
        return f"{self.mean:.{self.digits}f}{spread}"


class Table:
    """All numbers of a suite, by method, samples, placement and metric."""

    def __init__(self, suite: str) -> None:
        self.suite = suite
        self.values: dict[tuple[str, int, str, str], dict[int, float]] = defaultdict(dict)
        self.about: set[tuple[str, str, str, str]] = set()
        with (RESULTS / f"{suite}.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                run = run_of(row)
                if run.seed != TUNING_SEED:
                    at = (run.method, run.samples, run.placement, row["metric"])
                    # a run that was done again counts once, with its last value
                    self.values[at][run.seed] = float(row["value"])
                    self.about.add((row["device"], row["torch"], row["revision"], row["date"]))

    def figure(self, method: str, metric: str, *, samples: int = 0, placement: str = "attention") -> Figure:
        """A metric of a method, over its seeds."""
        found = list(self.values.get((method, samples or SAMPLES[self.suite], placement, metric), {}).values())
        scale, digits = (100, 1) if self.suite in ACCURACY and metric.startswith("test") else (1, 3)
        values_S = scale * torch.tensor(found, dtype=torch.float64)
        if not found:
            return Figure(float("nan"), 0.0, 0)
        if len(found) == 1 or bool((values_S == values_S[0]).all()):
            return Figure(values_S.mean().item(), 0.0, len(found), digits)
        low, high = seeds_interval(values_S)
        return Figure(values_S.mean().item(), (high - low) / 2, len(found), digits)

    def metrics(self, method: str, start: str, placement: str = "attention") -> list[tuple[int, Figure]]:
        """The numbers "start@position" of a method, by position."""
        key = (method, SAMPLES[self.suite], placement)
        positions = sorted(
            int(at[3].rsplit("@", 1)[1]) for at in self.values if at[:3] == key and at[3].startswith(start)
        )
        return [(position, self.figure(method, f"{start}{position}", placement=placement)) for position in positions]


def lines_of(decoder: Table, encoder: Table, mixed: Table | None) -> Iterable[str]:
    """The page."""
    # it reads tables and writes plots as this module does
    from benchmarks.quality.report_mixed import mixture_table, skills_table

    yield "# Quality\n"
    yield (
        "Written by `python -m benchmarks.quality.report` from the CSV files beside it. What each method is and which "
        "runs answer which question stands in `benchmarks/quality/study.py`; the protocol at the head of `decoder.py`, "
        "`encoder.py` and `mixed.py` there. Means of three seeds with Student's 95 % intervals; every learning rate "
        "tuned over three values on a seed of its own.\n"
    )
    yield "| suite | device | torch | revision | date |\n|---|---|---|---|---|"
    for table in (decoder, encoder, *([mixed] if mixed else [])):
        for about in sorted(table.about):
            yield f"| {table.suite} | {' | '.join(about)} |"
    for name, question in QUESTIONS.items():
        if question.get("suites") == ("mixed",):
            if mixed is not None:
                yield f"\n## ({name}) {question['title']}\n"
                yield from {"f-skills": skills_table, "f": mixture_table}[name](mixed)
            continue
        yield f"\n## ({name}) {question['title']}\n"
        if name == "a":
            yield from samples_table(decoder, question["methods"])
            yield ""
            yield from samples_table(encoder, question["methods"])
            continue
        yield from methods_table(decoder, question["methods"], question.get("placement", "attention"))
        if name == "c":
            yield ""
            yield from accuracy_table(encoder, question["methods"])
    yield "\n## Plots\n"
    for title, name in (
        ("Loss by method", "methods"),
        ("Where tokens go when a text changes its domain", "switch"),
        ("Effective support during training", "support"),
        ("Router samples", "samples"),
        ("Accuracy on unlike skills", "mixed"),
    ):
        if (RESULTS / f"{name}.png").exists():
            yield f"![{title}]({name}.png)\n"


def methods_table(table: Table, methods: list[str], placement: str) -> Iterable[str]:
    """One line a method."""
    yield f"{MEASURES[table.suite]}; placement: {placement}.\n"
    yield "| method | test | text that switches | tokens at their domain's expert | active parameters | all |"
    yield "|---|---|---|---|---|---|"
    for method in methods:
        test, composite, agreement = (
            table.figure(method, metric, placement=placement) for metric in ("test", "composite", "agreement")
        )
        sizes = [table.figure(method, f"{kind} parameters", placement=placement) for kind in ("active", "total")]
        shown = [f"{size.mean / 1e6:.2f} M" if size.seeds else "" for size in sizes]
        yield f"| {method} | {test} | {composite} | {agreement} | {' | '.join(shown)} |"


def accuracy_table(table: Table, methods: list[str]) -> Iterable[str]:
    """One line a method, on the encoder."""
    yield f"{MEASURES[table.suite]}.\n"
    yield "| method | test |\n|---|---|"
    for method in methods:
        if (figure := table.figure(method, "test")).seeds:
            yield f"| {method} | {figure} |"


def samples_table(table: Table, methods: list[str]) -> Iterable[str]:
    """One line a method, one column a number of samples."""
    numbers = QUESTIONS["a"]["samples"][table.suite]
    yield f"{MEASURES[table.suite]}, by the number of {LEARNED_FROM[table.suite]} that the router learned from.\n"
    yield f"| loss on the routing | {' | '.join(map(str, numbers))} |"
    yield "|---" * (len(numbers) + 1) + "|"
    for method in methods:
        figures = [str(table.figure(method, "test", samples=number)) for number in numbers]
        yield f"| {method.removeprefix('router stage, ')} | {' | '.join(figures)} |"


LEARNED_FROM = {"decoder": "texts", "encoder": "utterances"}


def plot_methods(table: Table) -> None:
    """Test loss of all methods, from worst to best."""
    names = {method for question in QUESTIONS.values() for method in question["methods"]}
    plot_ranked(table, names, "test loss, nats a token", "methods", lower_is_better=True)


def plot_ranked(table: Table, methods: Iterable[str], label: str, name: str, *, lower_is_better: bool) -> None:
    """A measure of all methods that have it, from worst to best; no plot if none has."""
    found = [(method, figure) for method in methods if (figure := table.figure(method, "test")).seeds]
    if not found:
        return
    found.sort(key=lambda entry: entry[1].mean, reverse=lower_is_better)
    _, axes = plt.subplots(figsize=(8, 0.32 * len(found) + 1))
    labels, figures = zip(*found, strict=True)
    halves = [figure.half for figure in figures]
    axes.errorbar([figure.mean for figure in figures], labels, xerr=halves, fmt="o", color="#4878a8")
    axes.grid(axis="y", linewidth=0.4)
    finish(axes, label, "", name)


def plot_switch(table: Table) -> None:
    """Share of tokens at their own domain's expert, by position."""
    _, axes = plt.subplots(figsize=(7, 4))
    for method in (
        "supervised gate, top 2",
        "LoRA-Mixer, top 3",
        "renormalized, top 2",
        "PHATGOOSE, top 2",
        "Arrow, top 2",
    ):
        curve = table.metrics(method, "agreement @")
        axes.plot(
            [16 * position + 8 for position, _ in curve], [figure.mean for _, figure in curve], "o-", label=method
        )
    axes.axvline(128, color="grey", linestyle=":")
    axes.text(130, 0.02, "the domain changes", color="grey")
    axes.axhline(1 / 7, color="grey", linewidth=0.8)
    axes.set_ylim(0, 1)
    axes.legend(fontsize=8)
    finish(axes, "position of the token", "share at its domain's expert", "switch")


def plot_support(table: Table) -> None:
    """Effective support of softmax and applied weights, over training."""
    _, axes = plt.subplots(figsize=(7, 4))
    colours = {"mixture": "#4878a8", "ReMix": "#c0504d"}
    for method, colour in colours.items():
        for kind, style in (("softmax", "-"), ("applied", "--")):
            curve = table.metrics(f"{method}, top 2", f"support, {kind} @")
            values = [figure.mean for _, figure in curve]
            axes.plot([step for step, _ in curve], values, style, color=colour, label=f"{method}, top 2: {kind}")
    axes.set_ylim(0, 7)
    axes.legend(fontsize=8)
    finish(axes, "step", "effective support, experts", "support")


def plot_samples(table: Table) -> None:
    """Accuracy by the number of router samples."""
    numbers = QUESTIONS["a"]["samples"][table.suite]
    _, axes = plt.subplots(figsize=(7, 4))
    for method in QUESTIONS["a"]["methods"]:
        figures = [table.figure(method, "test", samples=number) for number in numbers]
        label = method.removeprefix("router stage, ")
        axes.errorbar(numbers, [f.mean for f in figures], [f.half for f in figures], marker="o", capsize=3, label=label)
    axes.set_xscale("log")
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    finish(axes, "utterances that the router learned from", "test accuracy, %", "samples")


def finish(axes: Axes, x: str, y: str, name: str) -> None:
    """Label and write a plot."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    plt.tight_layout()
    plt.savefig(RESULTS / f"{name}.png", dpi=120)
    plt.close()


def main() -> None:
    """Write the page and its plots."""
    from benchmarks.quality.report_mixed import plot_mixed

    decoder = Table("decoder")
    encoder = Table("encoder")
    mixed = Table("mixed") if (RESULTS / "mixed.csv").exists() else None
    if mixed is not None:
        plot_mixed(mixed)
    plot_methods(decoder)
    plot_switch(decoder)
    plot_support(decoder)
    plot_samples(encoder)
    page = RESULTS / "README.md"
    page.write_text("\n".join(lines_of(decoder, encoder, mixed)).rstrip("\n") + "\n", encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
