"""What `import moelora` costs and brings: it is light, lazy, typed, and says its version."""

import importlib.metadata
import importlib.resources
import subprocess
import sys

import pytest

import moelora

HEAVY = ("transformers", "peft", "triton", "matplotlib", "huggingface_hub")


def run_fresh(code: str) -> str:
    """What a fresh interpreter prints when it runs `code`."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light():
    """`import moelora` in a fresh process loads none of the heavy packages."""
    loaded = run_fresh(f"import sys, moelora; print([name for name in {HEAVY!r} if name in sys.modules])")

    assert loaded == "[]"


def test_import_is_fast():
    """`import moelora` takes less than 50 ms beyond `import torch` (the best of five: others use the machine too)."""
    code = "import torch, time; start = time.perf_counter(); import moelora; print(time.perf_counter() - start)"
    seconds = []
    while len(seconds) < 5 and min(seconds, default=1.0) >= 0.05:
        seconds.append(float(run_fresh(code)))

    assert min(seconds) < 0.05, seconds


@pytest.mark.parametrize("name", moelora.__all__)
def test_public_names_resolve(name: str):
    """Every name in `__all__` is there, and `dir` lists it."""
    assert getattr(moelora, name) is not None
    assert name in dir(moelora)


def test_unknown_names_raise():
    """A name that does not exist is an AttributeError that says so, as in any module."""
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = moelora.no_such_name


def test_version_is_the_installed_one():
    """`moelora.__version__` is what pip installed."""
    assert moelora.__version__ == importlib.metadata.version("moelora")


def test_types_are_shipped():
    """The package carries the marker that tells type checkers to read its annotations."""
    assert importlib.resources.files("moelora").joinpath("py.typed").is_file()
