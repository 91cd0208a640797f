"""Rows of measurements and the files they live in. Begin with Row and Results.

One row for each (script, case, mode, provider, metric): a peer that failed has one too, with its error.
"""

import csv
import datetime
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gpu.timing import Failure, Timing

FOLDER = Path(__file__).parents[1] / "results" / "gpu"

TIME = "us"
SAVED = "saved MB"
ERROR = "relative error"


class Machine(NamedTuple):
    """Where and with what rows were measured."""

    device: str
    driver: str
    torch: str
    triton: str
    revision: str
    date: str


class Row(NamedTuple):
    """One measurement.

    Attributes:
        script, case, mode: what was done.
        provider: by whom.
        metric: microseconds of a call ("us"), what forward keeps for backward ("saved MB"), or the forward's distance
            from an fp32 reference ("relative error").
        median, p20, p80: over rounds; a metric without rounds has a median alone.
        ratio: to the base, round by round; only for times.
        error: why there is no number.
    """

    script: str
    case: str
    mode: str
    provider: str
    metric: str
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    ratio: float | None = None
    device: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    revision: str = ""
    date: str = ""
    error: str = ""

    @property
    def machine(self) -> Machine:
        """Where it was measured."""
        return Machine(self.device, self.driver, self.torch, self.triton, self.revision, self.date)


NUMBERS = ("median", "p20", "p80", "ratio")


class Results:
    """The rows of one run of one script, on their way into a file."""

    def __init__(self, script: str, machine: Machine) -> None:
        self.script, self.machine = script, machine
        self.rows: list[Row] = []

    def add(self, case: str, mode: str, provider: str, metric: str, value: "Timing | Failure | float") -> None:
        """Keep one measurement, or why there is none."""
        row = Row(self.script, case, mode, provider, metric, **self.machine._asdict())
        if isinstance(value, Failure):
            row = row._replace(error=value.error)
        elif isinstance(value, Timing):
            ratio = None if value.ratio is None else round(value.ratio, 4)
            row = row._replace(
                median=round(value.median, 2), p20=round(value.p20, 2), p80=round(value.p80, 2), ratio=ratio
            )
        else:
            row = row._replace(median=float(f"{value:.4g}"))
        self.rows.append(row)

    def write(self, path: Path) -> None:
        """Put all rows so far into a CSV file, in place of what it held."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(Row._fields)
            writer.writerows(["" if value is None else value for value in row] for row in self.rows)


def read(path: Path) -> list[Row]:
    """The rows of a CSV file."""
    with path.open(newline="") as file:
        return [
            Row(**{name: number_in(text) if name in NUMBERS else text for name, text in line.items()})  # pyright: ignore[reportArgumentType] - names decide the types
            for line in csv.DictReader(file)
        ]


def number_in(text: str) -> float | None:
    """A number, or None for an empty cell."""
    return float(text) if text else None


def machine_of(device: torch.device, revision: str | None) -> Machine:
    """The machine this runs on, now."""
    return Machine(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        driver=answer_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0],
        torch=torch.__version__,
        triton=installed_version("triton"),
        revision=revision or answer_of("git", "rev-parse", "--short", "HEAD"),
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
    )


def answer_of(*command: str) -> str:
    """What a command prints; nothing where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def installed_version(package: str) -> str:
    """Version of a package; nothing where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
