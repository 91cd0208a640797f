"""The report's part on unlike skills: each skill by itself, and what mixtures keep of them. Begin with skills_table."""

from collections.abc import Iterable

import torch

from benchmarks.quality.report import MEASURES, RESULTS, Table, plot_ranked
from benchmarks.quality.run import Results
from benchmarks.quality.study import QUESTIONS, SKILLS
from moelora.metrics import seeds_interval


def skills_table(table: Table) -> Iterable[str]:
    """One line a skill: a head on the frozen encoder against adapter and head."""
    results = Results(RESULTS / "mixed.csv")
    kept = results.kept_skills()
    yield (
        f"{MEASURES['mixed']}; a gain is the adapter's on the same seed. The encoder's weights were rounded to fp16 "
        "for the way to the machine (`half.py`), and computed with in fp32.\n"
    )
    yield "| skill | head on the frozen encoder | adapter and head | gain | gain on held-out training items | mixed |"
    yield "|---|---|---|---|---|---|"
    for skill in SKILLS:
        figures = [str(table.figure(f"{kind}: {skill}", "test")) for kind in ("probe", "adapter")]
        gains = [points(results.gains(skill, metric)) for metric in ("test", "validation")]
        yield f"| {' | '.join([skill, *figures, *gains, 'yes' if skill in kept else 'no'])} |"


def points(gains: list[float]) -> str:
    """A mean of gains in points of a per cent, with Student's interval."""
    if len(gains) < 2:
        return ""
    values_S = 100 * torch.tensor(gains, dtype=torch.float64)
    low, high = seeds_interval(values_S)
    return f"{values_S.mean().item():+.1f} ± {(high - low) / 2:.1f}"


def mixture_table(table: Table) -> Iterable[str]:
    """One line a method, one column a skill, behind the mean of the skills."""
    kept = list(Results(RESULTS / "mixed.csv").kept_skills())
    yield f"{MEASURES['mixed']}; the mean of the skills, and each. Parameters are those of adapters and routers.\n"
    yield f"| method | mean | {' | '.join(kept)} | active parameters | all |"
    yield "|---" * (len(kept) + 4) + "|"
    for method in QUESTIONS["f"]["methods"]:
        figures = [str(table.figure(method, metric)) for metric in ("test", *(f"test {skill}" for skill in kept))]
        sizes = [table.figure(method, f"{kind} parameters") for kind in ("active", "total")]
        shown = [f"{size.mean / 1e6:.2f} M" if size.seeds else "" for size in sizes]
        yield f"| {' | '.join([method, *figures, *shown])} |"


def plot_mixed(table: Table) -> None:
    """Mean accuracy of all methods, from worst to best."""
    methods = QUESTIONS["f"]["methods"]
    plot_ranked(table, methods, "test accuracy, %, mean of the skills", "mixed", lower_is_better=False)
