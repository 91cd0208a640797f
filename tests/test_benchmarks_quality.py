"""The study of quality: what it would run, what it finds again, and which rate it takes."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.quality.run import Results, run_of
from benchmarks.quality.study import METHODS, QUESTIONS, SAMPLES, SEEDS, TUNING_SEED, Run, final_runs, tuning_runs
from moelora import AuxLosses
from moelora.config import ROUTERS

ABOUT = {"seconds": "1", "device": "CPU", "torch": "2", "revision": "x", "date": "2026-01-01"}


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """An empty file of results."""
    return Results(tmp_path / "decoder.csv")


def test_every_method_can_be_built():
    """Names of routers, their options and the losses' names are known."""
    for question in QUESTIONS.values():
        for name in question["methods"]:
            method = METHODS[name]
            if method.router and method.kind != "peft":
                ROUTERS[method.router](**method.router_options)
                AuxLosses(**method.losses)
            assert not method.rate_of or METHODS[method.rate_of].rates


@pytest.mark.parametrize("suite", ["decoder", "encoder", "mixed"])
def test_all_methods_are_tuned_alike(suite):
    """Each is tried at three rates, on a seed that is not reported, and reported three times."""
    questions = list(QUESTIONS)
    tuning, final = list(tuning_runs(suite, questions)), list(final_runs(suite, questions, {}))

    assert {run.seed for run in tuning} == {TUNING_SEED}
    assert TUNING_SEED not in SEEDS
    for setting in {run.setting for run in tuning}:
        assert len({run.rate for run in tuning if run.setting == setting}) == 3
    for run in final:
        assert {replace(run, seed=seed).key for seed in SEEDS} <= {other.key for other in final}
        assert (
            METHODS[run.method].fixed
            or METHODS[run.method].rates
            or METHODS[run.method].rate_of
            or (METHODS[run.method].router in ("arrow", "phatgoose", "classifier"))
        )


def test_what_is_done_is_found_again(results):
    """A run's key survives the file, so that a study goes on where it was."""
    run = Run(suite="decoder", method="mixture, top 2", seed=1, rate=3e-3, samples=SAMPLES["decoder"])
    results.add(run, {"test": 2.5, "test code": 1.0}, ABOUT)

    again = Results(results.path)
    assert again.done() == {run.key}
    assert run_of(again.rows[0]) == run
    assert replace(run, seed=2).key not in again.done()


@pytest.mark.parametrize(("suite", "best"), [("decoder", 9e-3), ("encoder", 1e-3), ("mixed", 1e-3)])
def test_the_best_rate_is_taken(results, suite, best):
    """The lowest loss or the highest accuracy on the tuning seed, and none before all rates were tried."""
    method = "mixture, top 2"
    setting = Run(suite=suite, method=method, seed=TUNING_SEED, samples=SAMPLES[suite])
    for rate, value in zip(METHODS[method].rates, (0.9, 0.8, 0.7), strict=True):
        assert setting.setting not in results.best_rates()
        results.add(replace(setting, rate=rate), {"validation": value}, ABOUT)
    results.add(replace(setting, seed=0, rate=3e-3), {"validation": 0.0 if suite == "decoder" else 1.0}, ABOUT)

    assert results.best_rates()[setting.setting] == best
