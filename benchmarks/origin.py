"""Where figures come from, and the files that they are kept in. Begin with about_here and read_rows."""

import csv
import subprocess
import time
from pathlib import Path

import torch


def revision_here() -> str:
    """The commit that this code is of; "unknown" outside of a repository."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def today() -> str:
    """The date, UTC."""
    return time.strftime("%Y-%m-%d", time.gmtime())


def about_here(device: str, revision: str) -> dict[str, str]:
    """What a line says of where it was measured."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "revision": revision,
        "date": today(),
    }


def read_rows(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file, none if it is not there."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
