"""The results of the unlearning benchmarks: what is kept, averaged and said on the page."""

import csv
from pathlib import Path

import pytest

from benchmarks.unlearning import encoder_report, learning, report, requests
from benchmarks.unlearning.encoder_figures import Table
from benchmarks.unlearning.encoder_targets import not_better
from benchmarks.unlearning.results import Figure, Results, Unit


def test_what_is_done_is_found_again(tmp_path):
    """A unit survives the file; a number that is not there is an empty cell."""
    results = Results(tmp_path / "encoder.csv")
    unit = Unit("requests", "ours, penalty", 1)
    results.add(unit, [Figure("D.U.", 0.25, "work", step=3), Figure("AUROC", 0.5, low=0.4, high=0.6)], 1.0)

    assert Results(results.path).done() == {unit}
    first, second = results.lines()
    assert (first["value"], first["low"], first["step"]) == ("0.25", "", "3")
    assert (second["low"], second["high"]) == ("0.4", "0.6")


def _written(tmp_path: Path, rows: dict[str, dict[str, float]], part: str = "requests") -> Table:
    results = Results(tmp_path / "encoder.csv")
    for seed in (0, 1):
        for row, metrics in rows.items():
            results.add(Unit(part, row, seed), [Figure(name, value, step=3) for name, value in metrics.items()], 1.0)
    with results.path.open(newline="") as file:
        return Table(csv.DictReader(file))


def test_later_steps_take_the_place_of_earlier_ones(tmp_path):
    """Whatever the order in the file; seeds are averaged."""
    results = Results(tmp_path / "encoder.csv")
    for seed, value in ((0, 0.2), (1, 0.4)):
        results.add(Unit("requests", "a", seed), [Figure("D.U.", value, step=3), Figure("D.U.", 0.9, step=1)], 1.0)
    mean = Table(results.lines()).mean("requests", "a", "D.U.")

    assert (mean.value, mean.seeds) == (pytest.approx(0.3), 2)
    assert mean.half == pytest.approx(12.706 * 0.1, rel=1e-3)
    assert mean.percent() == "30.0 ± 127.1"


def test_attacks_are_counted_over_seeds(tmp_path):
    """Events of all seeds, with Clopper and Pearson's interval."""
    results = Results(tmp_path / "encoder.csv")
    for seed, events in ((0, 1), (1, 2)):
        results.add(Unit("evasion", "w", seed), [Figure("miss", events / 10, versus="base64", step=10)], 1.0)

    assert Table(results.lines()).counted("w", "miss", "base64") == "15.0 (3.2 to 37.9)"


def test_a_preset_is_beaten_only_by_better_figures(tmp_path):
    """Below chance is chance, and nobody is better than what cannot be better."""
    table = _written(
        tmp_path,
        {"o3_code": {"D.U.": 0.3, "S.U.": 0.0}, "ours, penalty": {"D.U.": 0.4, "S.U.": 1 / 150}},
    )
    worse = list(not_better(table, "o3_code"))

    assert "not in D.U.: 40.0 (ours, penalty) against 30.0" in worse
    assert not any("S.U." in line for line in worse)


def test_the_page_says_what_was_measured(tmp_path):
    """One table a part; a row that is not there yet leaves its cells empty."""
    table = _written(tmp_path, {requests.BEFORE: {"S.U.": 1.0}, "ours, penalty": {"S.U.": 0.125}})
    page = "\n".join(encoder_report.lines_of(table.lines))

    assert "### Three requests in sequence" in page
    assert "| ours, penalty | 12.5 |" in page
    assert "### Ways around the gates" not in page


def test_learning_in_sequence_is_read_off_its_accuracies():
    """Two tasks: the first falls by 0.2 when the second is learned. Of "joint" there is no sequence to speak of."""
    found = learning.metrics_of([[0.1, 0.3], [0.9, 0.3], [0.7, 0.8]])
    assert found["before"] == pytest.approx(0.2)
    assert found["final"] == pytest.approx(0.75)
    assert found["backward transfer"] == pytest.approx(-0.2)
    assert found["forgetting"] == pytest.approx(0.2)
    assert learning.metrics_of([[0.1, 0.3], [0.6, 0.8]]) == pytest.approx({"before": 0.2, "final": 0.7})


def test_a_learning_rate_is_chosen_once_all_were_tried():
    """By the final accuracy of the tuning seed alone."""
    rows = [
        {"method": "a", "seed": str(seed), "rate": str(rate), "metric": "final", "value": str(value)}
        for seed, values in ((learning.TUNING_SEED, (0.5, 0.7, 0.6)), (0, (0.9, 0.1, 0.1)))
        for rate, value in zip(learning.RATES, values, strict=True)
    ]
    assert learning.best_rates(rows) == {"a": learning.RATES[1]}
    assert learning.best_rates(rows[:2]) == {}


def test_the_page_leaves_out_what_was_not_run(tmp_path):
    """Tuning runs are not reported, nor benchmarks without a file."""
    lines = [("a", learning.TUNING_SEED, 0.001, "final", 0.5), *(("a", seed, 0.001, "final", 0.8) for seed in (0, 1))]
    with (tmp_path / "learning.csv").open("w", newline="") as file:
        csv.writer(file).writerows([learning.FIELDS, *((*line, "", "", "", "") for line in lines)])
    page = report.write(tmp_path).read_text()
    assert "| a |  | 80.0 ± 0.0 |  |  |  | 0.001 |" in page
    assert "50.0" not in page
    assert "TOFU" not in page
    assert "CLINC150, Banking77" not in page
