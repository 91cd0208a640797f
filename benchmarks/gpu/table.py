"""One Markdown page of all results: benchmarks/results/gpu/*.csv -> README.md beside them. Begin with page_of.

python -m benchmarks.gpu.table                   # needs neither a GPU nor torch's peers
python -m benchmarks.gpu.table --results FOLDER
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.gpu.goals import SAVED_MEGABYTES, Goal, goal_of
from benchmarks.gpu.providers import BASE, MOELORA, ORDER
from benchmarks.gpu.results import ERROR, FOLDER, SAVED, TIME, Row, read

HEAD = """# On a GPU

Written by `python -m benchmarks.gpu.table` from the CSV files beside it, which hold the quantiles. bf16. What each
case is, and how time is taken, stands at the head of the script of that name in `benchmarks/gpu/` and in `timing.py`.
"""

TIMES = """## Time, relative to the frozen base

Medians, over rounds, of a variant's time by the base's in the same round. "base, again" is the base a second time: the
noise. **Bold**: the goal is reached.
"""

SAVED_TEXT = f"""## Kept for backward, MB

Allocated after forward beyond x and the output; ids and gates count, 0.2 MB for each projection. The goal is at most
{SAVED_MEGABYTES:g} for each projection, beyond ids and gates.
"""

ERROR_TEXT = """## Distance from the mixture in fp32

Of the forward's output, by the Frobenius norm: that every layer computes the same function, up to rounding. Peers round
their logits to bf16, so that a few tokens near a tie meet another expert; moelora promises fp32 ones.
"""

GROWTH_TEXT = """## Growth

Microseconds; "added" is moelora's time less the base's.
"""

SCRIPTS = ("layer", "decode", "model", "growth")
"""In the order of the page."""

Line = tuple[str, str, str]
"""Script, case and mode."""


def page_of(rows: Iterable[Row]) -> str:
    """The page of these rows. Of several rows for the same thing the latest counts."""
    by_date = sorted(rows, key=lambda row: row.date)
    latest = {(row.script, row.case, row.mode, row.provider, row.metric): row for row in by_date}
    rows = sorted(latest.values(), key=lambda row: SCRIPTS.index(row.script))
    times = [row for row in rows if row.metric == TIME and row.script != "growth"]
    sections = [
        HEAD,
        machines(rows),
        TIMES,
        time_table(times),
        failures(rows),
        metric_table(SAVED_TEXT, [row for row in rows if row.metric == SAVED]),
        metric_table(ERROR_TEXT, [row for row in rows if row.metric == ERROR]),
        growth_table([row for row in rows if row.script == "growth"]),
    ]
    return "\n".join(section for section in sections if section)


def machines(rows: Sequence[Row]) -> str:
    """Where, with what and when each script ran."""
    runs = dict.fromkeys((row.script, row.machine) for row in rows)
    lines = [
        (script, machine.device, machine.driver, machine.torch, machine.triton, machine.revision, machine.date)
        for script, machine in runs
    ]
    return markdown(("script", "device", "driver", "torch", "triton", "revision", "date (UTC)"), lines)


def time_table(rows: Sequence[Row]) -> str:
    """A line for each case and mode, a column for each provider."""
    names = present(row.provider for row in rows)
    others = [name for name in names if name not in (BASE, MOELORA)]
    table = []
    for line, group in lines_of(rows).items():
        script, case, mode = line
        base, ours, goal = group.get(BASE), group.get(MOELORA), goal_of(*line)
        table.append(
            (
                script,
                case,
                mode,
                microseconds(base),
                *(ratio(group.get(name)) for name in others),
                microseconds(ours),
                bold(ratio(ours), reached(ours, goal, group)),
                goal.words or (f"below {goal.below}" if goal.below else number(goal.goal)),
                number(goal.stretch),
            )
        )
    head = ("script", "case", "mode", "base, us", *others, "moelora, us", "**moelora**", "goal", "stretch")
    return markdown(head, table)


def metric_table(text: str, rows: Sequence[Row]) -> str:
    """A metric without rounds: a line for each case, a column for each provider; nothing without rows."""
    if not rows:
        return ""
    names = [name for name in present(row.provider for row in rows) if name != BASE]
    table = [
        (case, *("" if name not in group else median(group[name]) for name in names))
        for (_, case, _), group in lines_of(rows).items()
    ]
    return f"{text}\n{markdown(('case', *names), table)}"


def growth_table(rows: Sequence[Row]) -> str:
    """How time grows with tokens and experts; nothing without rows."""
    if not rows:
        return ""
    table = []
    for (_, case, mode), group in lines_of(rows).items():
        base, ours = group.get(BASE), group.get(MOELORA)
        tokens, experts = case.removeprefix("t").split("-e")
        added = ""
        if base is not None and ours is not None and base.median is not None and ours.median is not None:
            added = f"{ours.median - base.median:.1f}"
        table.append((tokens, experts, mode, microseconds(base), microseconds(ours), added, ratio(ours)))
    table.sort(key=lambda line: (line[2], int(line[0]), int(line[1])))
    return f"{GROWTH_TEXT}\n" + markdown(("tokens", "experts", "mode", "base", "moelora", "added", "ratio"), table)


def failures(rows: Sequence[Row]) -> str:
    """Who failed, and with which error; nothing where nobody did."""
    errors: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.error:
            errors.setdefault((row.provider, row.error), []).append(f"{row.script} {row.case} {row.mode}")
    if not errors:
        return ""
    lines = [
        f"- {provider} ({'; '.join(dict.fromkeys(places))}): {error}" for (provider, error), places in errors.items()
    ]
    return "Failed:\n\n" + "\n".join(lines) + "\n"


# --- cells ------------------------------------------------------------------------------------------------------------


def lines_of(rows: Sequence[Row]) -> dict[Line, dict[str, Row]]:
    """Rows by line of the table, then by provider."""
    lines: dict[Line, dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row.script, row.case, row.mode), {})[row.provider] = row
    return lines


def present(names: Iterable[str]) -> list[str]:
    """Each name once, in the order of the table, unknown ones last."""
    order = {name: place for place, name in enumerate(ORDER)}
    return sorted(dict.fromkeys(names), key=lambda name: order.get(name, len(order)))


def cell(row: Row | None, text: Callable[[Row], str]) -> str:
    """Nothing for what was not measured, "failed" for what could not be."""
    if row is None:
        return ""
    return "failed" if row.error else text(row)


def microseconds(row: Row | None) -> str:
    """Its median, to a tenth."""
    return cell(row, lambda row: f"{row.median:.1f}")


def median(row: Row | None) -> str:
    """Its median, to three digits."""
    return cell(row, lambda row: f"{row.median:.3g}")


def ratio(row: Row | None) -> str:
    """Its ratio to the base."""
    return cell(row, lambda row: number(row.ratio))


def number(value: float | None) -> str:
    """Two decimals; nothing for None."""
    return "" if value is None else f"{value:.2f}"


def reached(row: Row | None, goal: Goal, peers: Mapping[str, Row]) -> bool:
    """Whether moelora's ratio, as the table shows it, is within the goal."""
    if row is None or row.ratio is None:
        return False
    if goal.below:
        peer = peers.get(goal.below)
        return peer is not None and peer.ratio is not None and row.ratio < peer.ratio
    return goal.goal is not None and round(row.ratio, 2) <= goal.goal


def bold(text: str, wanted: bool) -> str:
    """The text, in bold if wanted."""
    return f"**{text}**" if wanted else text


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    rule = "|".join("---" for _ in head)
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(line)} |" for line in lines)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read all CSV files of the folder and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=FOLDER)
    options = parser.parse_args(arguments)
    files = sorted(options.results.glob("*.csv"))
    if not files:
        raise SystemExit(f"table: no CSV file in {options.results}; run benchmarks.gpu.layer first")
    page = options.results / "README.md"
    page.write_text(page_of([row for file in files for row in read(file)]))
    print(page)


if __name__ == "__main__":
    main()
