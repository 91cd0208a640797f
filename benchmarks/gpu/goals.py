"""What was promised, as ratios to the frozen base. Begin with goal_of.

The numbers are those of the issue "Kernels: a routed mixture of eight that costs less than PEFT's single LoRA"; they
were set for one H200.
"""

from typing import NamedTuple

from benchmarks.gpu.providers import PEFT


class Goal(NamedTuple):
    """What reaches the goal: a largest ratio, a ratio below that of a peer, or what `words` say; and the stretch."""

    goal: float | None = None
    stretch: float | None = None
    below: str = ""
    words: str = ""


SAVED_MEGABYTES = 2.0
"""Of one projection, saved for backward beyond x, ids and gates."""

GOALS = {
    ("layer", "r16-e8", "forward"): Goal(1.16, 1.11),
    ("layer", "r16-e8", "forward + backward"): Goal(1.28, 1.22),
    ("layer", "r64-e28", "forward"): Goal(1.28, 1.20),
    ("layer", "r64-e28", "forward + backward"): Goal(1.38, 1.30),
    ("layer", "r16-e64", "forward"): Goal(1.25, 1.18),
    ("layer", "r16-e64", "forward + backward"): Goal(1.40, 1.30),
    ("layer", "frozen-r16-e8", "forward + backward"): Goal(1.22, 1.15),
    ("layer", "narrow-r16-e8", "forward"): Goal(1.45),
    ("layer", "narrow-r16-e8", "forward + backward"): Goal(1.9),
    ("decode", "t1-e8", "graph"): Goal(1.35, 1.25),
    ("decode", "t16-e8", "graph"): Goal(1.35, 1.25),
    ("decode", "t64-e8", "graph"): Goal(1.35, 1.25),
    ("decode", "t1-e256", "graph"): Goal(words="1.2 x its time with 8"),
    ("decode", "t1-e1000", "graph"): Goal(words="1.2 x its time with 8"),
    ("decode", "t64-e256", "graph"): Goal(1.7),
    ("decode", "t64-e1000", "graph"): Goal(1.7),
    ("model", "prefill", "eager"): Goal(1.10, 1.07),
    ("model", "prefill", "graph"): Goal(1.10, 1.07),
    ("model", "train", "eager"): Goal(1.12, 1.09),
    ("model", "decode", "graph"): Goal(stretch=1.15, below=PEFT),
    ("model", "decode", "compiled"): Goal(stretch=1.15, below=PEFT),
}


def goal_of(script: str, case: str, mode: str) -> Goal:
    """The goal of one line of the table; an empty one where nothing was promised.

    A layer's goals hold with and without a CUDA graph.
    """
    if script == "layer":
        mode = mode.removesuffix(", graph")
    return GOALS.get((script, case, mode), Goal())
