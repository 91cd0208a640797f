"""Carry out what a suite's questions need, and keep what is done. Begin with main.

    python -m benchmarks.quality.run decoder --model FOLDER --data FOLDER --workers 12 --minutes 9

A run that stands in the file of results is not done again, so a study may be cut off and go on: adapters first, then
the runs that tune learning rates, then those that are reported. Workers are processes that share the device.
"""

import argparse
import csv
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.origin import about_here, read_rows, revision_here
from benchmarks.quality.study import (
    ACCURACY,
    METHODS,
    QUESTIONS,
    SAMPLES,
    SEEDS,
    SKILLS,
    TUNING_SEED,
    Options,
    Run,
    final_runs,
    tuning_runs,
)

RESULTS = Path(__file__).parents[1] / "results" / "quality"
FIELDS = [
    "suite",
    "method",
    "seed",
    "rate",
    "samples",
    "placement",
    "metric",
    "value",
    "seconds",
    "device",
    "torch",
    "revision",
    "date",
]
Setting = tuple[str, str, str]

FEWEST = 3
"""Skills that unlike ones are mixed from, at least: as many experts as LoRA-Mixer's method uses."""


class Results:
    """A file with one line for each number that a run measured."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = read_rows(path)

    def done(self) -> set[str]:
        """Keys of the runs that are in the file."""
        return {run_of(row).key for row in self.rows}

    def add(self, run: Run, metrics: dict[str, float], about: dict[str, str]) -> None:
        """Append a run's numbers and write them out."""
        rows = [
            {**{k: str(v) for k, v in asdict(run).items()}, "metric": name, "value": f"{value:.6g}", **about}
            for name, value in metrics.items()
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if fresh:
                writer.writeheader()
            writer.writerows(rows)
        self.rows += rows

    def best_rates(self) -> dict[Setting, float]:
        """For each setting that was tuned at all its rates, the one whose value was best."""
        found: dict[Setting, dict[float, float]] = {}
        for row in self.rows:
            if row["metric"] == "validation" and int(row["seed"]) == TUNING_SEED:
                run = run_of(row)
                # accuracies are stored as they are; a loss is better when it is lower
                sign = -1.0 if run.suite in ACCURACY else 1.0
                # what is done again, since its adapters were gone, changes no rate that other runs were made at
                found.setdefault(run.setting, {}).setdefault(run.rate, sign * float(row["value"]))
        return {
            setting: min(values, key=values.__getitem__)
            for setting, values in found.items()
            if set(values) >= set(METHODS[setting[1]].rates)
        }

    def gains(self, skill: str, metric: str = "validation") -> list[float]:
        """What a skill's adapter adds to the accuracy of a head on the frozen encoder, by seed."""
        found: dict[tuple[str, int], float] = {}
        for row in self.rows:
            if row["metric"] == metric and row["method"] in (f"probe: {skill}", f"adapter: {skill}"):
                # adapters that are trained again have no second say, since mixtures of the first may be measured
                found.setdefault((row["method"], int(row["seed"])), float(row["value"]))
        pairs = [(found.get((f"adapter: {skill}", seed)), found.get((f"probe: {skill}", seed))) for seed in SEEDS]
        return [adapter - probe for adapter, probe in pairs if adapter is not None and probe is not None]

    def kept_skills(self) -> dict[str, float]:
        """The skills that adapters help on, as far as they are measured, and their adapters' learning rates.

        An adapter helps if the mean of its gains on held-out training items is above twice its standard error: each
        seed holds out others. The test split has no say.
        """
        best, kept = self.best_rates(), {}
        for skill in SKILLS:
            gains = self.gains(skill)
            if len(gains) == len(SEEDS) and mean(gains) > 2 * stdev(gains) / len(gains) ** 0.5:
                kept[skill] = best["mixed", f"adapter: {skill}", "attention"]
        return kept


def run_of(row: dict[str, str]) -> Run:
    """The run that a line belongs to."""
    return Run(
        suite=row["suite"],
        method=row["method"],
        seed=int(row["seed"]),
        rate=float(row["rate"]),
        samples=int(row["samples"]),
        placement=row["placement"],
    )


def phases(suite: str, questions: list[str], results: Results) -> Iterable[list[Run]]:
    """Lists of runs, each of which needs what those before it found."""
    if suite == "decoder":
        placements = sorted({QUESTIONS[question].get("placement", "attention") for question in questions})

        def adapters(seed: int, rate: float, placement: str) -> Run:
            samples = SAMPLES[suite]
            return Run(suite=suite, method="adapters", seed=seed, rate=rate, samples=samples, placement=placement)

        rates = METHODS["adapters"].rates
        yield [adapters(TUNING_SEED, rate, placement) for placement in placements for rate in rates]
        best = {placement: results.best_rates()[suite, "adapters", placement] for placement in placements}
        yield [adapters(seed, best[placement], placement) for placement in placements for seed in (*SEEDS, TUNING_SEED)]
    # whether a skill is mixed is known once its own adapter is done
    parts = [[question] for question in ("f-skills", "f") if question in questions] if suite == "mixed" else [questions]
    for part in parts:
        yield list(tuning_runs(suite, part))
        yield list(final_runs(suite, part, results.best_rates()))


def work(suite: str, options: Any, runs: Any, answers: Any, rates: dict[str, float]) -> None:
    """A worker process: take runs until there are none."""
    import torch

    torch.set_num_threads(1 if options.device == "cuda" else options.threads)
    torch.set_float32_matmul_precision("high")
    where = Options(
        model=options.model, data=options.data, cache=options.cache, device=options.device, scale=options.scale
    )
    own: Any
    if suite == "decoder":
        from benchmarks.quality.decoder import Decoder

        own = Decoder(where)
    elif suite == "mixed":
        from benchmarks.quality.mixed import Mixed

        own = Mixed(where)
    else:
        from benchmarks.quality.encoder import Encoder

        own = Encoder(where)
    parent = os.getppid()
    # a worker whose parent was killed is nobody's
    while (run := runs.get()) is not None and os.getppid() == parent:
        start = time.perf_counter()
        try:
            answers.put((run, own.carry_out(run, rates), time.perf_counter() - start))
            if options.device == "cuda":
                torch.cuda.empty_cache()  # for the other workers
        except Exception:  # noqa: BLE001 - one run's failure is reported, and the others go on
            answers.put((run, traceback.format_exc(), time.perf_counter() - start))


def adapters_are_there(run: Run, options: Any) -> bool:
    """Whether the folders that this run wrote, if it wrote any, still lie in the cache."""
    method = METHODS[run.method]
    best = options.best.get(run.setting)
    if method.kind not in ("adapters", "skill") or (run.seed == TUNING_SEED and run.rate != best):
        return True
    return (options.cache / "adapters" / run.pool / method.options.get("skill", "")).is_dir()


def carry_out(todo: Sequence[Run], options: Any, results: Results, deadline: float, about: dict[str, str]) -> bool:
    """All of these runs in worker processes; False if time was up or a run failed."""
    context = multiprocessing.get_context("spawn")
    runs, answers = context.Queue(), context.Queue()
    rates = results.kept_skills()
    if options.suite != "mixed":
        rates = {at[2]: rate for at, rate in results.best_rates().items() if at[:2] == (options.suite, "adapters")}
    elif len(rates) < FEWEST and any(METHODS[run.method].kind not in ("skill", "probe") for run in todo):
        print(f"adapters help on {list(rates)} alone; a mixture needs {FEWEST} skills", flush=True)
        return False
    workers = [
        context.Process(target=work, args=(options.suite, options, runs, answers, rates), daemon=True)
        for _ in range(min(options.workers, len(todo)))
    ]
    for run in todo:
        runs.put(run)
    for _ in workers:
        runs.put(None)
    for worker in workers:
        worker.start()

    complete = True
    for number in range(len(todo)):
        try:
            run, found, seconds = answers.get(timeout=max(1.0, deadline - time.time()))
        except Exception:  # noqa: BLE001 - queue.Empty of another context
            print(f"time is up after {number} of {len(todo)} runs; the next call goes on", flush=True)
            complete = False
            break
        if isinstance(found, str):
            print(f"FAILED {run.key}\n{found}", flush=True)
            complete = False
            continue
        results.add(run, found, {**about, "seconds": f"{seconds:.1f}"})
        shown = found.get("test", found.get("validation", float("nan")))
        print(
            f"{number + 1}/{len(todo)} {run.method} seed={run.seed} rate={run.rate:g} n={run.samples} "
            f"{run.placement}: {shown:.4f} ({seconds:.0f} s)",
            flush=True,
        )
    for worker in workers:
        worker.terminate() if not complete else worker.join(5)
    return complete


def main() -> None:
    """Go through the phases, as far as time allows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.run", description=__doc__)
    parser.add_argument("suite", choices=("decoder", "encoder", "mixed"))
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--model", default="", help="folder of the model; encoders come in a package, too")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with the data sets")
    parser.add_argument("--cache", type=Path, default=Path("quality_cache"), help="where adapters are kept")
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--scale", type=float, default=1.0, help="below 1, fewer steps: tries the logic")
    parser.add_argument("--revision", default="")
    options = parser.parse_args()

    results = Results(options.output or RESULTS / f"{options.suite}.csv")
    deadline = time.time() + 60 * options.minutes
    about = about_here(options.device, options.revision or revision_here())
    options.best = {}
    for runs in phases(options.suite, options.questions, results):
        options.best = results.best_rates()
        done = results.done()
        wanted = {run.key: run for run in runs}.values()
        # adapters are files, too, which may be gone
        todo = [run for run in wanted if run.key not in done or not adapters_are_there(run, options)]
        # seed by seed, so that what is cut off is whole seeds; the longest first, so that no worker ends alone
        todo.sort(key=lambda run: (run.seed, METHODS[run.method].kind not in ("joint", "single")))
        if todo and not carry_out(todo, options, results, deadline, about):
            raise SystemExit(1)
    print(f"complete: {results.path}")


if __name__ == "__main__":
    main()
