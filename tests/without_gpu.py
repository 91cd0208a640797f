"""Scripts in processes of their own that compile kernels and see no GPU.

Whether kernels are interpreted is decided once for a process, and the tests around these interpret them.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path


def write_kernels(folder: Path, kernels: str) -> Path:
    """The folder, with a file of kernels: Triton reads their source from there."""
    (folder / "kernels_here.py").write_text(kernels)
    return folder


def run(folder: Path, script: str, **variables: str) -> None:
    """Run a script that has all of the folder's kernels, and Triton's cache there, in a fresh process without a GPU."""
    root = Path(__file__).parents[1]
    paths = [str(root), str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "TRITON_CACHE_DIR": str(folder / "cache"),
    }
    finished = subprocess.run(
        [sys.executable, "-c", "import kernels_here\nfrom kernels_here import *\n" + textwrap.dedent(script)],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
