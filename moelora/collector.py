"""Pause Python's garbage collector while very many objects are made. Begin with collector_paused."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """No collection of cycles within this context.

    Thirty adapters are tens of thousands of small tensors, all of which stay alive. Every few thousand of them the
    collector would go through all objects of the process, those of torch and transformers too, and find nothing: up to
    half of the time that loading takes.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
