"""TOFU on a causal model: three requests to forget, one after the other, by every method. Begin with main.

    python -m benchmarks.unlearning tofu --model decoder-s --data data --cache unlearning_cache --seeds 0 1 2

First come the models: one that knows all of TOFU, and three that never saw the first one, two and three blocks. Then
learning rates are tuned, and then each method serves the requests with each seed. Workers are processes that share the
device. Numbers are written as runs end, and what is in the file is not done again.
"""

import argparse
import multiprocessing
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import transformers

from benchmarks.origin import about_here, revision_here
from benchmarks.unlearning.tofu_study import (
    METHODS,
    Results,
    Run,
    final,
    references,
    tuning,
    wanted,
)
from benchmarks.unlearning.tofu_work import Options, Step, Worker

RESULTS = Path(__file__).parents[1] / "results" / "unlearning"
WORKERS: list[Worker] = []
"""A process has one, made when it begins."""

Outcome = tuple[Run, "list[Step] | str", float]


def begin(options: Options, threads: int) -> None:
    """A worker process begins."""
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")
    transformers.logging.disable_progress_bar()
    # it says in each run what the study shows
    warnings.filterwarnings("ignore", message=r".* is O3 as printed")
    WORKERS[:] = [Worker(options)]


def work(run: Run) -> Outcome:
    """One run; its traceback in place of its numbers, if it fails, and the others go on."""
    start = time.perf_counter()
    found: list[Step] | str
    try:
        found = WORKERS[0].carry_out(run)
    except Exception:  # noqa: BLE001 - reported by the parent
        found = traceback.format_exc()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # for the other workers
    return run, found, time.perf_counter() - start


def outcomes(runs: Sequence[Run], options: Options, workers: int, threads: int, deadline: float) -> Iterator[Outcome]:
    """What comes of the runs, as they end; no more of it once the time is up."""
    if workers == 1:
        for run in runs:
            if time.time() > deadline:
                return
            yield work(run)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(workers, len(runs)), begin, (options, threads)) as pool:
        coming = pool.imap_unordered(work, runs)
        for _ in runs:
            try:
                yield coming.next(timeout=max(0.1, deadline - time.time()))
            except multiprocessing.TimeoutError:
                return


def carry_out(runs: Sequence[Run], results: Results, about: dict[str, str], coming: Iterator[Outcome]) -> bool:
    """Write what comes; False if a run failed or is missing."""
    ended, failed = 0, 0
    for run, found, seconds in coming:
        ended += 1
        label = f"{ended}/{len(runs)} {run.method} seed={run.seed} rate={run.rate:g} steps={run.steps}"
        if isinstance(found, str):
            failed += 1
            print(f"FAILED {label}\n{found}", flush=True)
            continue
        results.add(run, found, {**about, "seconds": f"{seconds:.1f}"})
        last = found[-1][1]
        shown = {name: last[name] for name in ("asked: rouge", "retain set: rouge", "utility") if name in last}
        print(label, *(f"{name} {value:.3f}" for name, value in shown.items()), f"({seconds:.0f} s)", flush=True)
    return ended == len(runs) and not failed


def main(argv: "Sequence[str] | None" = None) -> None:
    """Go through the phases, as far as time allows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.unlearning tofu", description=__doc__)
    parser.add_argument("--model", required=True, help="folder or id of the pretrained decoder")
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets, of which tofu/ is one")
    parser.add_argument("--cache", type=Path, default=Path("unlearning_cache"), help="where fine-tuned models are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=10, help="processes that share the device")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--output", type=Path, default=RESULTS / "tofu.csv")
    parser.add_argument("--revision", default="")
    parser.add_argument("--blocks", type=int, default=9, help="fewer of them, to try the logic")
    parser.add_argument("--questions", type=int, default=400, help="of a block and of every other set")
    parser.add_argument(
        "--epochs", type=int, default=24, help="of fine-tuning, before it is seen whether it was enough"
    )
    parser.add_argument(
        "--promise", type=float, default=0.1, help="the miss rate that gates promise; half of it false fire"
    )
    given = parser.parse_args(argv)

    deadline = time.time() + 60 * given.minutes
    options = Options(
        model=given.model,
        data=given.data / "tofu",
        cache=given.cache,
        device=given.device,
        blocks=given.blocks,
        questions=given.questions,
        epochs=given.epochs,
        promise=given.promise,
    )
    results, about = Results(given.output), about_here(given.device, given.revision or revision_here())

    def do(runs: Sequence[Run]) -> None:
        complete = not runs or carry_out(
            runs, results, about, outcomes(runs, options, given.workers, given.threads, deadline)
        )
        if not complete:
            print("not all was done; call again to go on", flush=True)
            raise SystemExit(1)

    done = results.done()
    # models are files, too, which may be gone
    do([run for run in references() if run.key not in done or not options.is_prepared(run.steps)])
    do(wanted(tuning(given.methods), results))
    do(wanted(final(given.methods, given.seeds, results), results))
    print(f"complete: {results.path}")
