"""What the encoder's results were to reach, and whether they do. Begin with targets."""

import math
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.unlearning.clinc import REQUESTS
from benchmarks.unlearning.detection import BASELINES, CHOSEN, best_union
from benchmarks.unlearning.encoder_figures import VERSUS, Mean, Table
from benchmarks.unlearning.requests import BEFORE, O3, OURS

CHANCE = 1 / 150
ROUNDING = 1e-6
"""Of the figures in the file."""

Target = tuple[str, str, bool]
"""What was to be reached, what was measured, and whether it is reached."""


def targets(table: Table) -> Iterator[Target]:
    """All of them, by the mean over seeds."""
    for versus, least in zip(VERSUS, (0.97, 0.99, 0.99)):
        found = table.of_requests("detection", CHOSEN, "AUROC", versus)
        shown = " / ".join(mean.shown() for mean in found)
        yield f"AUROC, {versus}, at least {least}", shown, all(mean.value >= least for mean in found)
    best = table.mean("scope", best_union(table.lines), "AUROC", versus="test").value
    others = {row: table.mean("scope", row, "AUROC", versus="test").value for row in BASELINES}
    shown = f"{best:.3f} against {', '.join(f'{value:.3f} ({row})' for row, value in others.items())}"
    yield "out-of-scope AUROC above the baselines", shown, best > max(others.values())
    for row in OURS:
        yield from _of_ours(table, row)
    for preset in O3:
        worse = list(not_better(table, preset))
        yield f"ours better than {preset} in every figure", "; ".join(worse) or "all", not worse


def _of_ours(table: Table, row: str) -> Iterator[Target]:
    if not table.values("requests", row, "D.U."):
        return
    bounds = table.of_requests("requests", row, "certified miss")
    yield f"{row}: certified miss at most 10 %", _percents(bounds), all(mean.value <= 0.1 for mean in bounds)
    missed = table.of_requests("requests", row, "miss")
    kept = all(own.value <= bound.value for own, bound in zip(missed, bounds, strict=True))
    yield f"{row}: measured miss within what is certified", _percents(missed), kept
    fires = [table.mean("requests", row, "fire", versus=versus) for versus in VERSUS]
    yield f"{row}: fire at most 5 % ({', '.join(VERSUS)})", _percents(fires), all(m.value <= 0.05 for m in fires)
    before = table.mean("requests", BEFORE, "R.D.", versus="near").value
    lost = 100 * (before - table.mean("requests", row, "R.D.", versus="near").value)
    yield f"{row}: at most 1 point of retained accuracy lost", f"{lost:.2f}", lost <= 1
    back = table.mean("requests", row, "persistence loss")
    yield f"{row}: persistence loss at most 2 points", back.percent(2), back.value <= 0.02
    most = 1e-3 if row == "ours, penalty" else 1e-6
    overlap = max(v for request in REQUESTS for v in table.values("requests", row, "overlap", request=request))
    yield f"{row}: overlap at most {most:g}", f"{overlap:.1e}", overlap <= most


def not_better(table: Table, preset: str) -> Iterator[str]:
    """Figures in which one of our rows has no better mean than a preset of O3's, unless both are as good as can be."""
    measures: list[tuple[str, dict[str, str], float]] = [
        *((metric, {}, CHANCE) for metric in ("S.U.", "D.U.")),
        ("persistence loss", {}, -math.inf),
        ("R.D.", {"versus": "near"}, 1.0),
        *(("same answer", {"versus": versus}, 1.0) for versus in VERSUS[1:]),
        *(("fire", {"versus": versus}, 0.0) for versus in VERSUS),
        *(("miss", {"request": request}, 0.0) for request in REQUESTS),
        *(("overlap", {"request": request}, 0.0) for request in REQUESTS[1:]),
    ]
    for metric, about, best in measures:

        def cost(row: str, metric: str = metric, about: Mapping[str, str] = about, best: float = best) -> float:
            value = table.mean("requests", row, metric, **about).value
            # below chance is no better than chance
            return 1 - value if best == 1.0 else max(value, best)

        least, theirs = 0.0 if best == 1.0 else best, cost(preset)
        behind = []
        for row in OURS:
            ours = cost(row)
            if table.values("requests", row, "D.U.") and ours >= theirs and ours > least + ROUNDING:
                value = table.mean("requests", row, metric, **about).value
                behind.append(f"{100 * value:.1f} ({row})")
        if behind:
            value = table.mean("requests", preset, metric, **about).value
            yield f"not in {' '.join([metric, *about.values()])}: {', '.join(behind)} against {100 * value:.1f}"


def _percents(means: Sequence[Mean]) -> str:
    return " / ".join(mean.percent() for mean in means) + " %"
