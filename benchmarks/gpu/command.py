"""The options that all scripts take, and how a script begins and ends. Begin with Session."""

import argparse
import gc
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.gpu.providers import BASE, BASE_AGAIN
from benchmarks.gpu.results import FOLDER, TIME, Results, Row, machine_of
from benchmarks.gpu.timing import Failure, Variant, interleaved, nothing


def parser_of(script: str, description: str | None, cases: Collection[str], *, rounds: int) -> argparse.ArgumentParser:
    """A parser with the common options."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.gpu.{script}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", nargs="+", choices=list(cases), default=list(cases), metavar="CASE")
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="only these (and the base); default: all")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--backend", default="auto", help="of moelora's kernels")
    parser.add_argument("--output", type=Path, default=FOLDER / f"{script}.csv")
    parser.add_argument("--revision", help="of the code, where it cannot be asked from git")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, at sizes that say nothing: tries the logic")
    return parser


class Session:
    """One run of a script: its device, its choice of providers, its rows.

    Raises:
        SystemExit: if there is no CUDA device.
    """

    def __init__(self, script: str, options: argparse.Namespace) -> None:
        if not options.tiny and not torch.cuda.is_available():
            raise SystemExit(f"{script}: this benchmark needs a CUDA device; --tiny tries its logic on a CPU")
        self.device = torch.device("cpu" if options.tiny else "cuda")
        self.providers: list[str] | None = options.providers
        self.output: Path = options.output
        self.rounds: int = options.rounds
        self.results = Results(script, machine_of(self.device, options.revision))

    def wants(self, provider: str) -> bool:
        """Whether a provider is measured in this run."""
        return self.providers is None or provider in self.providers or provider in (BASE, BASE_AGAIN)

    def measure(
        self,
        case: str,
        mode: str,
        runs: Mapping[str, Callable[[], object] | Failure],
        before: Mapping[str, Callable[[], object]] | None = None,
        *,
        per: int = 1,
    ) -> None:
        """Time in turns what can be run, and list what cannot.

        Args:
            case, mode: of the rows.
            runs: by provider.
            before: what has to be done ahead of a provider's turns, untimed.
            per: how many of the things whose time is wanted one run does.
        """
        prepare = before or {}
        variants = [
            Variant(provider, run, prepare.get(provider, nothing))
            for provider, run in runs.items()
            if not isinstance(run, Failure)
        ]
        for provider, timing in interleaved(variants, rounds=self.rounds, device=self.device):
            each = timing if isinstance(timing, Failure) else timing.divided(per)
            self.results.add(case, mode, provider, TIME, each)
        for provider, run in runs.items():
            if isinstance(run, Failure):
                self.results.add(case, mode, provider, TIME, run)

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        """One case: saved when it ends, so that a script that dies half way leaves what it has."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.results.write(self.output)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)

    def close(self) -> None:
        """Print a short table."""
        machine = self.results.machine
        print(f"{machine.device}, driver {machine.driver}, torch {machine.torch}, triton {machine.triton}")
        print(f"revision {machine.revision}, {machine.date}: {self.output}\n")
        print(short_table(self.results.rows))


def short_table(rows: Sequence[Row]) -> str:
    """Rows as aligned text."""
    lines = [f"{'case':<16}{'mode':<28}{'provider':<26}{'metric':<15}{'median':>11}{'p20':>10}{'p80':>10}{'ratio':>8}"]
    for row in rows:
        head = f"{row.case:<16}{row.mode:<28}{row.provider:<26}{row.metric:<15}"
        if row.error:
            lines.append(f"{head} {row.error[:120]}")
        else:
            spread = "".join("" if value is None else f"{value:>10.4g}" for value in (row.p20, row.p80))
            lines.append(f"{head}{row.median:>11.4g}{spread}" + ("" if row.ratio is None else f"{row.ratio:>8.3f}"))
    return "\n".join(lines)
