"""What gates cost, as a part of the page of results. Begin with lines_of."""

from collections.abc import Iterator, Mapping, Sequence

from benchmarks.gpu.providers import BASE, BASE_AGAIN
from benchmarks.unlearning.cost import CLOSED, DISABLED, OPEN, PREFILL

GOAL = 1.05
"""The most that closed gates may take of a prefill, relative to the base."""

OTHERS = (BASE_AGAIN, DISABLED, CLOSED, OPEN)

TEXT = f"""
## What gates cost

Medians of a variant's time by the base's in the same round; "base, again" is the base a second time: the noise. Closed:
no gate opens. Open: one row's does, and the model runs twice. Disabled: the patched model without gates and experts.
**Bold**: closed gates add at most {100 * (GOAL - 1):.0f} % to a prefill. Each request's gate has the default detector,
fitted to 70 % of its prompts, which are random token ids; gates look at the hidden states of the prefill itself.
"""

Line = tuple[str, ...]
"""Where, and what was read: the cells that a line begins with."""


def lines_of(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """The section. Of several rows for the same thing the last counts."""
    found: dict[Line, dict[str, Mapping[str, str]]] = {}
    for row in rows:
        threads = f", {row['threads']} threads" if row["device"] == "CPU" else ""
        line = (
            f"{row['model']}, {row['dtype']}",
            f"{row['device']}{threads}",
            f"{row['part']} {row['shape']}",
            row["requests"],
            row["prompts"],
        )
        found.setdefault(line, {})[row["variant"]] = row
    yield TEXT
    head = ("model", "device", "what", "requests", "prompts of each", "base, ms", *OTHERS)
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for line, own in found.items():
        base = f"{float(own[BASE]['us']) / 1000:.2f}" if BASE in own else ""
        yield f"| {' | '.join((*line, base, *(_ratio(own.get(name)) for name in OTHERS)))} |"


def _ratio(row: Mapping[str, str] | None) -> str:
    """Nothing for what has no such variant: a decoded token behind open gates."""
    if row is None or not row["ratio"]:
        return ""
    ratio = float(row["ratio"])
    reached = row["variant"] == CLOSED and row["part"] == PREFILL and ratio <= GOAL
    return f"**{ratio:.3f}**" if reached else f"{ratio:.3f}"
