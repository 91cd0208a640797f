"""Unlearning on an encoder: detectors, requests to forget, and ways around their gates. Begin with main.

    python -m benchmarks.unlearning encoder --model FOLDER --clinc FOLDER --banking FOLDER --seeds 0 1 2

The encoder is all-MiniLM-L6-v2; the folders are those of CLINC150's and Banking77's files. A seed draws what a request
hands over, what gates know and are calibrated on, and the adapters' first values. Parts are written as they are done,
and what is in the file is not done again.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers

from benchmarks.unlearning import clinc, detection, evasion, requests
from benchmarks.unlearning.host import Host, share
from benchmarks.unlearning.report import write
from benchmarks.unlearning.requests import Method
from benchmarks.unlearning.results import FOLDER, Figure, Results, Unit
from moelora.continual import Training

PARTS = ("scope", "detection", "requests", "evasion")

TRAINING = Training(epochs=1, batch_size=16, learning_rate=2e-3)
"""Of every adapter of every method; the loss of ours is at its floor before the end."""

EVADED = "penalty"
"""The method whose model is asked in other words; the gates of our methods are the same."""

Say = Callable[[str], None]


class Work:
    """All pieces of work on one host, with their results; each `do` skips what is done."""

    def __init__(self, host: Host, results: Results, sizes: clinc.Sizes, training: Training, say: Say) -> None:
        self.host, self.results, self.sizes, self.training, self.say = host, results, sizes, training, say
        self._done = results.done()
        self._since = time.process_time()

    def missing(self, part: str, rows: Iterable[str], seed: int) -> bool:
        """Whether a row is not in the file yet."""
        return any(Unit(part, row, seed) not in self._done for row in rows)

    def add(self, part: str, row: str, seed: int, figures: Iterable[Figure]) -> None:
        """Write a row, unless it is there."""
        unit = Unit(part, row, seed)
        listed = list(figures)
        if unit not in self._done:
            self.results.add(unit, listed, time.process_time() - self._since)
            self._done.add(unit)
            shown = ", ".join(f"{f.metric} {f.request or f.versus} {f.value:.3f}" for f in listed[:4])
            self.say(f"{part}, {row}, seed {seed}: {shown} ... ({time.process_time() - self._since:.0f} s)")
        self._since = time.process_time()

    def scope(self) -> None:
        """Known intents from unknown ones; nothing is drawn, so once is enough."""
        if not self.missing("scope", detection.BASELINES, 0):
            return
        test = [utterance for utterance in self.host.corpus.splits["test"] if utterance.label != clinc.OUTSIDE]
        accuracy = share(self.host.answers_of_head(self.host.head, test), test)
        rows = list(detection.scope(self.host.remembered, self.host.corpus, self.host.head))
        self.add("scope", "the classifier", 0, [Figure("accuracy", accuracy, versus="test")])
        # the baselines last: with them the part is done
        for row, figures in reversed(rows):
            self.add("scope", row, 0, figures)

    def detection(self, seed: int) -> None:
        """Every detector on every request."""
        if self.missing("detection", [detection.OWN], seed):
            roles = self.roles(seed)
            for row, figures in detection.requests(self.host.remembered, roles, self.host.head, self.host.corpus):
                self.add("detection", row, seed, figures)

    def requests(self, seed: int, *, evade: bool) -> None:
        """Every method on the three requests, and the attacks on one of them."""
        roles = self.roles(seed)
        if self.missing("requests", [requests.RETRAINED], seed):
            for row, figures in requests.references(self.host, roles, self.sizes):
                self.add("requests", row, seed, figures)
        for name, method in requests.METHODS.items():
            attacked = evade and name == EVADED and self.missing("evasion", ["answers"], seed)
            if attacked or self.missing("requests", method.rows, seed):
                self._serve(method, roles, seed, attacked=attacked)

    def _serve(self, method: Method, roles: clinc.Roles, seed: int, *, attacked: bool) -> None:
        training = Training(
            epochs=self.training.epochs,
            batch_size=self.training.batch_size,
            learning_rate=self.training.learning_rate,
            seed=seed,
        )
        figures: dict[str, list[Figure]] = {row: [] for row in method.rows}
        measured = requests.measure(self.host, method, roles, seed=seed, sizes=self.sizes, training=training)
        for moment, found in measured:
            for row in found:
                figures[row] += found[row]
            if moment.step == len(clinc.REQUESTS):
                for row in figures:
                    self.add("requests", row, seed, figures[row])
                if attacked:
                    after = list(evasion.answered(self.host, evasion.attack(self.host, roles, seed=seed), "answered"))
                    self.add("evasion", "answers", seed, after)

    def evasion(self, seed: int) -> None:
        """The attacks on the gates alone, and on the model before all requests."""
        if not self.missing("evasion", [*evasion.WINDOWS, "answers before"], seed):
            return
        roles = self.roles(seed)
        attacked = evasion.attack(self.host, roles, seed=seed)
        self.add("evasion", "answers before", seed, evasion.answered(self.host, attacked, "answered before"))
        for row, (window, stride) in evasion.WINDOWS.items():
            gates = evasion.gates_of(self.host, roles, window=window, stride=stride)
            figures = list(evasion.evade(gates, attacked))
            figures += list(evasion.benign_fire(gates, roles))
            figures += list(evasion.drift(gates, roles, attacked, seed=seed))
            self.add("evasion", row, seed, figures)

    def roles(self, seed: int) -> clinc.Roles:
        """Who gets which utterances with this seed."""
        return clinc.draw(self.host.corpus, seed=seed, sizes=self.sizes)


def main(argv: "Sequence[str] | None" = None) -> None:
    """Measure what is not measured yet, and write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.unlearning encoder",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--clinc", type=Path, required=True, help="folder with data_full.json(.gz) and domains.json")
    parser.add_argument("--banking", type=Path, required=True, help="folder with train.csv(.gz) and test.csv(.gz)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--cache", type=Path, default=None, help="where the encoder's features are kept")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of encoder.csv and README.md")
    options = parser.parse_args(argv)

    torch.set_num_threads(options.threads)
    with _quiet():
        corpus = clinc.read(options.clinc, options.banking)
        host = Host.open(options.model, corpus, options.cache)
        results = Results(options.output / "encoder.csv")
        work = Work(host, results, clinc.Sizes(), TRAINING, lambda line: print(line, flush=True))
        if "scope" in options.parts:
            work.scope()
        for seed in options.seeds:
            if "detection" in options.parts:
                work.detection(seed)
            if "requests" in options.parts:
                work.requests(seed, evade="evasion" in options.parts)
            if "evasion" in options.parts:
                work.evasion(seed)
    print(write(options.output))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report of the pooler that nobody asked for."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        yield


if __name__ == "__main__":
    main()
