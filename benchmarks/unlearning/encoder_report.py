"""The encoder's results as Markdown. Begin with lines_of.

A figure is the mean over the seeds with Student's 95 % interval; rates and accuracies in %. Attacks are counted over
all seeds together, with the interval of Clopper and Pearson.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from benchmarks.unlearning.attacks import ATTACKS
from benchmarks.unlearning.clinc import REQUESTS
from benchmarks.unlearning.detection import BASELINES, CHOSEN, best_union
from benchmarks.unlearning.encoder_figures import VERSUS, Mean, Table
from benchmarks.unlearning.encoder_targets import targets
from benchmarks.unlearning.requests import BEFORE, MAX_MISS, RETRAINED, ROWS

WIDE, NARROW = "windows of 256 tokens", "windows of 16 tokens"


def lines_of(lines: Iterable[Mapping[str, str]]) -> Iterator[str]:
    """The encoder's part of the page."""
    table = Table(lines)
    parts = {line["part"] for line in table.lines}
    about = sorted({(line["device"], line["torch"], line["revision"], line["date"]) for line in table.lines})
    yield "\n## An encoder: CLINC150, Banking77\n"
    yield (
        "all-MiniLM-L6-v2 under a head of 150 intents. Requests: the domains work, travel, home, one after the other. "
        "Near: the seven retained domains. Far: Banking77, and CLINC150's out-of-scope queries. Measured on "
        f"{'; '.join(', '.join(entry) for entry in about)}."
    )
    if {"detection", "requests", "scope"} <= parts:
        yield "\n### Targets\n"
        yield "By the mean over seeds, not its interval.\n"
        yield from _head("target", "measured", "met")
        for target, measured, met in targets(table):
            yield _line(target, measured, "yes" if met else "**no**")
    for part, title, write in (
        ("scope", "Known intents from out-of-scope queries", scope_lines),
        ("detection", "Detectors: a request's test queries from near and far ones", detection_lines),
        ("requests", "Three requests in sequence", request_lines),
        ("evasion", "Ways around the gates", evasion_lines),
    ):
        if part in parts:
            yield f"\n### {title}\n"
            yield from write(table)


def scope_lines(table: Table) -> Iterator[str]:
    """Each score, and which of ours was chosen by validation data."""
    best = best_union(table.lines)
    accuracy = table.mean("scope", "the classifier", "accuracy", versus="test").percent()
    yield (
        "AUROC of 4,500 test queries against 1,000 out-of-scope ones, on features of one frozen encoder (with its head "
        f"it has an accuracy of {accuracy} %). One run: nothing is drawn. Ours are unions of ten detectors, one a "
        f"domain, which know neither intents nor out-of-scope queries; **{best}** has the best AUROC on validation "
        "data.\n"
    )
    yield from _head("score", "validation", "test", "95 % interval", "fire at recall 95 %")
    ours = [row for row in table.rows("scope") if row not in (*BASELINES, "the classifier")]
    for row in (*BASELINES, *ours):
        shown = [table.mean("scope", row, "AUROC", versus=versus).shown() for versus in ("validation", "test")]
        fire = table.mean("scope", row, "fire at recall 95", versus="test").percent()
        yield _line(f"**{row}**" if row == best else row, *shown, table.interval("scope", row, "AUROC", "test"), fire)


def detection_lines(table: Table) -> Iterator[str]:
    """AUROC against each kind of input, then the error rates against near ones."""
    yield (
        f"AUROC, for {', '.join(REQUESTS)}. The detector of our stacks is in bold: of those with a distance that is "
        "relative to nothing (Mahalanobis or Nearest without that from benign text), which closes the gate far from "
        "all that is known, it has the best AUROC on validation splits, the three kinds of benign text counted "
        "alike.\n"
    )
    yield from _head("detector", "validation", *VERSUS)
    for row in table.rows("detection"):
        cells = [_each(table.of_requests("detection", row, "AUROC", versus)) for versus in ("validation", *VERSUS)]
        yield _line(f"**{row}**" if row == CHOSEN else row, *cells)
    yield "\nAgainst near inputs, in %.\n"
    yield from _head("detector", "fire at recall 95 %", "miss where 95 % are left alone")
    for row in table.rows("detection"):
        metrics = ("fire at recall 95", "miss at benign 95")
        cells = [_percents(table.of_requests("detection", row, metric, "near")) for metric in metrics]
        yield _line(f"**{row}**" if row == CHOSEN else row, *cells)


def request_lines(table: Table) -> Iterator[str]:
    """What is left of the requests, what is lost of the rest, and what the gates do."""
    yield (
        "Accuracy in % after the third request; chance is 0.7. S.U.: on what was unlearned; D.U.: on the requests' "
        "test split; R.D.: on the retained domains. The same answer: share of far queries that are answered as before. "
        "Persistence loss: by how many points D.U. of the first two requests rose again with later ones.\n"
    )
    yield from _head("row", "S.U.", "D.U.", "R.D.", "same answer, Banking77", "out of scope", "persistence loss")
    rows = (BEFORE, RETRAINED, *ROWS)
    for row in rows:
        cells = [
            table.mean("requests", row, "S.U."),
            table.mean("requests", row, "D.U."),
            table.mean("requests", row, "R.D.", versus="near"),
            *(table.mean("requests", row, "same answer", versus=versus) for versus in VERSUS[1:]),
            table.mean("requests", row, "persistence loss"),
        ]
        yield _line(row, *(cell.percent() for cell in cells))
    yield f"\nBy request ({', '.join(REQUESTS)}).\n"
    yield from _head("row", "D.U., %", "persistence loss, points", "largest overlap with those before")
    for row in rows:
        overlaps = [value for r in REQUESTS for value in table.values("requests", row, "overlap", request=r)]
        yield _line(
            row,
            _percents(table.of_requests("requests", row, "D.U.")),
            _percents(table.of_requests("requests", row, "persistence loss")[:-1]),
            f"{max(overlaps):.1e}" if overlaps else "",
        )
    yield (
        f"\nGates, in %. Promised is a miss rate of {100 * MAX_MISS:g} for each request and a fire rate of all "
        "gates on text like the calibration's, each with 95 % confidence. A miss is a test query whose own expert "
        "is less than half open, a fire a benign query for which a gate is not closed. The promised fire rate, and how "
        "many layers gates read, were set with figures like these in view.\n"
    )
    fires = [f"fire, {versus}" for versus in VERSUS]
    yield from _head("row", f"miss ({', '.join(REQUESTS)})", "certified miss", *fires, "certified fire")
    for row in ROWS:
        if table.values("requests", row, "fire", versus="near"):
            yield _line(
                row,
                _percents(table.of_requests("requests", row, "miss")),
                _percents(table.of_requests("requests", row, "certified miss")),
                *(table.mean("requests", row, "fire", versus=versus).percent() for versus in VERSUS),
                table.mean("requests", row, "certified fire", request=REQUESTS[-1]).percent(),
            )


def evasion_lines(table: Table) -> Iterator[str]:
    """Misses and answers by attack, then the monitor of drift."""
    yield (
        "In %, over the texts of all seeds. Miss: the gate of the query's own request stays closed, in all turns. "
        "Answered: the model gives the query's own intent, before all requests and behind the gates; where it hardly "
        "did before, evading the gate gains nothing. No paraphrase or translation by a model is among the attacks.\n"
    )
    yield from _head("attack", f"miss, {WIDE}", "no gate opens", f"miss, {NARROW}", "answered before", "answered")
    for attack in ATTACKS:
        columns = (
            (WIDE, "miss"),
            (WIDE, "no gate opens"),
            (NARROW, "miss"),
            ("answers before", "answered before"),
            ("answers", "answered"),
        )
        yield _line(attack, *(table.counted(row, metric, attack) for row, metric in columns))
    yield "\nFire of these gates on benign text, in %.\n"
    yield from _head("windows", *VERSUS)
    for row in (WIDE, NARROW):
        yield _line(row, *(table.counted(row, "fire", versus) for versus in VERSUS))
    yield (
        "\nDrift: how often a Kolmogorov-Smirnov test at a level of 1 % tells a stream of 300 queries from the benign "
        "calibration texts, in %. An alarm means that the certificate does not speak of this traffic.\n"
    )
    yield from _head("stream", "alarms")
    for stream in dict.fromkeys(line["versus"] for line in table.lines if line["metric"] == "alarm"):
        yield _line(stream, table.counted(WIDE, "alarm", stream))


# --- inside -----------------------------------------------------------------------------------------------------------


def _each(means: Sequence[Mean]) -> str:
    return " / ".join(mean.shown() for mean in means)


def _percents(means: Sequence[Mean]) -> str:
    return " / ".join(mean.percent() for mean in means if mean.seeds)


def _head(*names: str) -> Iterator[str]:
    yield _line(*names)
    yield "|---" * len(names) + "|"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
