"""TOFU's results as Markdown. Begin with table."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from benchmarks.unlearning.tofu_data import REQUESTS
from benchmarks.unlearning.tofu_study import DETECTORS, KNOWS, METHODS, NEVER_SAW, TUNING_SEED
from moelora.metrics import seeds_interval

FORGETTING = {
    "asked: probability": "probability",
    "asked: rouge": "ROUGE-L",
    "asked: nearest": "nearest is true",
    "unseen: rouge": "ROUGE-L, unseen",
    "reworded: rouge": "ROUGE-L, reworded",
    "truth ratio": "truth ratio",
    "log10 forget quality": "log10 forget quality",
    "persistence loss": "ROUGE-L back",
}
KEEPING = {
    "utility": "model utility",
    "retained: probability": "retained: probability",
    "retained: rouge": "retained: ROUGE-L",
    "retain set: rouge": "retain set: ROUGE-L",
    "real authors: rouge": "real authors: ROUGE-L",
    "world facts: rouge": "world facts: ROUGE-L",
    "rate": "learning rate",
}
GATES = {
    "miss: asked": "miss, asked",
    "miss: unseen": "miss, unseen",
    "miss: reworded": "miss, reworded",
    "fire: retained": "fire, retained",
    "fire: real authors": "fire, real authors",
    "fire: world facts": "fire, world facts",
    "fire: retain set": "fire, retain set",
    "weight: retained": "mean weight, retained",
}
CERTIFICATES = {
    "miss own: unseen": "miss, unseen",
    "certified miss": "certified miss",
    "miss kept": "kept",
    "fire: retained": "fire, retained",
    "certified fire of all": "certified fire, all gates",
    "fire kept": "kept",
    "auroc: retained": "AUROC, retained",
    "auroc: retain set": "AUROC, retain set",
    "overlap": "overlap",
}
SCORES = {
    "auroc: retained": "retained",
    "auroc: real authors": "real authors",
    "auroc: world facts": "world facts",
    "auroc: retain set": "retain set",
    "fire at 95 % recall": "fire at 95 % recall",
    "miss at 95 % left alone": "miss at 95 % left alone",
}

Key = tuple[str, int, str]


class Figure(NamedTuple):
    """A mean over seeds and half the width of its interval; None for one seed."""

    mean: float
    half: float | None

    def __str__(self) -> str:
        digits = 4 if 0 < abs(self.mean) < 0.01 else 1 if abs(self.mean) >= 10 else 3
        if self.half is None:
            return f"{self.mean:.{digits}g}" if 0 < abs(self.mean) < 1e-3 else f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ± {self.half:.{digits}f}"


def table(rows: Iterable[Mapping[str, str]]) -> str:
    """Markdown from the lines of the file of results: what is forgotten, what is kept, gates, promises, detectors.

    Figures are those after the third request, means over the seeds with Student's 95 % interval.
    """
    figures = figures_of(rows)
    methods = [KNOWS, NEVER_SAW, *METHODS]
    gated = [name for name in methods if (name, REQUESTS, "miss: asked") in figures]
    promising = [name for name in methods if (name, REQUESTS, "certified miss") in figures]
    kinds = sorted({metric.split(":")[0] for name, _, metric in figures if name == DETECTORS})
    parts = [
        "### What is forgotten",
        "Of the three blocks: questions that were handed over (asked), others about the same people (unseen), and all "
        "of them in other words (reworded). Lower is better down to the line of the model that never saw them; forget "
        "quality is the p-value of a test that tells the two apart, so higher is better. The last column is how much "
        "of an earlier request came back.",
        _lines(figures, FORGETTING, {name: (name, REQUESTS) for name in methods}),
        "### What is kept",
        "Retained are questions about people that nobody asks to forget; the retain set is about people that gates "
        "have never met.",
        _lines(figures, KEEPING, {name: (name, REQUESTS) for name in methods}),
        "### Gates",
        "A miss is a question to be forgotten whose weight is below one half; fire is a benign one whose weight is not "
        "exactly 0. Ours promise a miss rate of 10 %; this, and which layers they read, were set with figures like "
        "these in view. O3's are as published.",
        _lines(figures, GATES, {name: (name, REQUESTS) for name in gated}),
        "### Promises",
        "After each request, of its own gate. A promise not kept (0) was given up when the gate was calibrated, as "
        "`protect_forget` says; a share is that of the seeds.",
        _lines(
            figures,
            CERTIFICATES,
            {f"{name}, request {step}": (name, step) for name in promising for step in range(1, REQUESTS + 1)},
        ),
        "### Detectors",
        "AUROC of the third request's unseen questions against benign ones, on the base model's own hidden states.",
        _lines(
            figures,
            {f"{metric}": heading for metric, heading in SCORES.items()},
            dict.fromkeys(kinds, (DETECTORS, REQUESTS)),
            by_kind=True,
        ),
    ]
    return "\n\n".join(part for part in parts if part)


def figures_of(rows: Iterable[Mapping[str, str]]) -> dict[Key, Figure]:
    """Of each method, step and metric, over the seeds that are reported. A run that was done again counts once."""
    values: dict[Key, dict[int, float]] = defaultdict(dict)
    for row in rows:
        seed = int(row["seed"])
        if seed != TUNING_SEED:
            values[row["method"], int(row["step"]), row["metric"]][seed] = float(row["value"])
            values[row["method"], int(row["step"]), "rate"][seed] = float(row["rate"])
    return {key: _figure(list(found.values())) for key, found in values.items()}


# --- inside -----------------------------------------------------------------------------------------------------------


def _figure(values: Sequence[float]) -> Figure:
    values_S = torch.tensor(values, dtype=torch.float64)
    mean = values_S.mean().item()
    if len(values) < 2 or not bool(values_S.isfinite().all()) or bool((values_S == values_S[0]).all()):
        return Figure(mean, None)
    low, high = seeds_interval(values_S)
    return Figure(mean, (high - low) / 2)


def _lines(
    figures: Mapping[Key, Figure],
    columns: Mapping[str, str],
    lines: Mapping[str, tuple[str, int]],
    *,
    by_kind: bool = False,
) -> str:
    """A table; a line that has none of the figures is left out."""
    head = [f"| | {' | '.join(columns.values())} |", "|---" * (len(columns) + 1) + "|"]
    body = []
    for label, (method, step) in lines.items():
        names = [f"{label}: {metric}" if by_kind else metric for metric in columns]
        cells = [str(figures.get((method, step, name), "")) for name in names]
        if any(cells):
            body.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join([*head, *body]) if body else ""
