"""The benchmarks for GPUs, as far as a CPU can tell: peers compute one function, and results become one page."""

import importlib
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import command, peers, providers, results, table, timing
from benchmarks.gpu.scatter import scatter_builder

SCRIPTS = ("layer", "decode", "model", "growth")
PEERS = (providers.DENSE, providers.LOOP, providers.GROUPED, providers.MOELORA)
MACHINE = results.Machine("NVIDIA H200", "580.1", "2.11.0", "3.6.0", "abc1234", "2026-11-25 12:00")


@pytest.fixture
def weights() -> peers.Weights:
    """A small mixture in fp32."""
    return peers.draw_weights(
        32, 16, num_experts=5, rank=4, top_k=2, dtype=torch.float32, device=torch.device("cpu"), train_experts=True
    )


@pytest.mark.parametrize("provider", PEERS)
def test_peers_compute_one_mixture(weights: peers.Weights, provider: str):
    """In fp32 every layer gives the reference's output and gradient of x, for the same factors and router."""
    layer = peers.builders()[provider](weights)
    x_TD = torch.randn(12, 32, requires_grad=True)
    grad_TO = torch.randn(12, 16)

    expected_TO = peers.expected_output(weights, x_TD)
    (expected_TD,) = torch.autograd.grad(expected_TO, x_TD, grad_TO)
    output_TO = layer(x_TD)
    (gradient_TD,) = torch.autograd.grad(output_TO, x_TD, grad_TO)

    torch.testing.assert_close(output_TO, expected_TO)
    torch.testing.assert_close(gradient_TD, expected_TD)


@pytest.mark.parametrize("provider", PEERS)
@pytest.mark.parametrize("train_experts", [True, False])
def test_peers_train_what_is_asked_for(weights: peers.Weights, provider: str, train_experts: bool):
    """The router always has a gradient, the factors if they are trained, the base never."""
    layer = peers.builders()[provider](weights._replace(train_experts=train_experts))
    layer(torch.randn(12, 32)).square().mean().backward()

    trained = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert len(trained) == (3 if train_experts else 1)
    assert any("router" in name for name in trained)
    assert not any("base" in name for name in trained)


def test_a_single_lora_is_the_first_expert(weights: peers.Weights):
    """PEFT's layer computes the base plus the first expert at the mixture's scale."""
    x_TD = torch.randn(12, 32)
    delta_TO = x_TD @ weights.A_ERD[0].T @ weights.B_ERO[0]

    output_TO = peers.builders()[providers.PEFT](weights)(x_TD)

    torch.testing.assert_close(output_TO, x_TD @ weights.base_OD.T + peers.SCALE * delta_TO)


def test_a_missing_peer_says_what_is_missing(weights: peers.Weights):
    """Without a checkout of ScatterMoE its place in the results holds an error that names the option."""
    failure = timing.attempt(lambda: scatter_builder(None)(weights))

    assert isinstance(failure, timing.Failure)
    assert "--scattermoe" in failure.error


def test_a_variant_that_fails_leaves_the_others_alone():
    """Timing lists the error in its place, and times the same variant twice if it is there twice."""

    def broken() -> None:
        raise RuntimeError("no such kernel\nand a long story")

    variants = [timing.Variant(name, run) for name, run in (("base", int), ("peer", broken), ("base", int))]
    answers = timing.interleaved(variants, rounds=3, device=torch.device("cpu"))

    assert [name for name, _ in answers] == ["base", "peer", "base"]
    assert answers[1][1] == timing.Failure("RuntimeError: no such kernel")
    assert isinstance(answers[0][1], timing.Timing)
    assert answers[0][1].ratio == 1.0


def test_ratios_are_taken_round_by_round():
    """A clock that slows down by half in the middle leaves the ratio as it is."""
    timing_of = timing.timing_of([12.0, 12.0, 24.0, 24.0, 24.0], [10.0, 10.0, 20.0, 20.0, 20.0])

    assert timing_of.ratio == pytest.approx(1.2)
    assert (timing_of.p20, timing_of.median, timing_of.p80) == (12.0, 24.0, 24.0)


def made_up_results(path: Path) -> None:
    """A file as `layer.py` writes it."""
    run = results.Results("layer", MACHINE)
    run.add("r16-e8", "forward", providers.BASE, results.TIME, timing.Timing(360.0, 355.0, 370.0, 1.0))
    run.add("r16-e8", "forward", providers.MOELORA, results.TIME, timing.Timing(414.0, 410.0, 420.0, 1.15))
    run.add("r16-e8", "forward", providers.DENSE, results.TIME, timing.Timing(511.2, 510.0, 515.0, 1.42))
    run.add("r16-e8", "forward", providers.SCATTER, results.TIME, timing.Failure("ImportError: no module"))
    run.add("r16-e8", "forward + backward", providers.MOELORA, results.SAVED, 1.25)
    run.write(path)


def test_results_come_back_from_the_file(tmp_path: Path):
    """What is read is what was written, numbers as numbers, errors as errors."""
    made_up_results(tmp_path / "layer.csv")

    rows = results.read(tmp_path / "layer.csv")

    assert [row.ratio for row in rows] == [1.0, 1.15, 1.42, None, None]
    assert rows[0].p80 == 370.0
    assert rows[3].error == "ImportError: no module"
    assert all(row.machine == MACHINE for row in rows)


def test_the_page_has_goals_ratios_and_errors(tmp_path: Path):
    """One line a case: the base's time, each ratio, the goal, in bold where it is reached; failures by name."""
    made_up_results(tmp_path / "layer.csv")

    table.main(["--results", str(tmp_path)])
    page = (tmp_path / "README.md").read_text()

    assert "| layer | r16-e8 | forward | 360.0 | failed | 1.42 | 414.0 | **1.15** | 1.16 | 1.11 |" in page
    assert "- ScatterMoE (layer r16-e8 forward): ImportError: no module" in page
    assert "| layer | NVIDIA H200 | 580.1 | 2.11.0 | 3.6.0 | abc1234 | 2026-11-25 12:00 |" in page
    assert "| r16-e8 | 1.25 |" in page


def test_the_latest_of_two_runs_counts():
    """A case that was measured again stands on the page once."""
    old = results.Row(
        "decode", "t1-e8", "graph", providers.MOELORA, results.TIME, 20.0, 20.0, 20.0, 1.5, date="2026-11-01"
    )
    new = old._replace(median=16.0, ratio=1.3, date="2026-11-02")

    page = table.page_of([new, old])

    assert "| decode | t1-e8 | graph |  | 16.0 | **1.30** | 1.35 | 1.25 |" in page
    assert "1.50" not in page


@pytest.mark.parametrize(("ours", "shown"), [(1.2, "**1.20**"), (1.4, "1.40")])
def test_a_goal_may_be_a_peer(ours: float, shown: str):
    """A decoded token has to cost less than with PEFT's single LoRA, whatever that costs."""
    row = results.Row("model", "decode", "graph", providers.PEFT, results.TIME, 90.0, 90.0, 90.0, 1.3)

    page = table.page_of([row, row._replace(provider=providers.MOELORA, median=80.0, ratio=ours)])

    assert f"| model | decode | graph |  | 1.30 | 80.0 | {shown} | below PEFT, one LoRA | 1.15 |" in page


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_ask_for_a_gpu(script: str, monkeypatch: pytest.MonkeyPatch):
    """Without CUDA a script loads, says so, and measures nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    module = importlib.import_module(f"benchmarks.gpu.{script}")

    with pytest.raises(SystemExit, match="needs a CUDA device"):
        module.main([])


@pytest.mark.parametrize(
    ("script", "options", "modes"),
    [
        ("layer", ["--cases", "narrow-r16-e8", "qkv-r16-e8"], 8),
        ("decode", ["--cases", "t16-e8"], 1),
        ("growth", ["--cases", "experts-t1"], 5),
        ("model", [], 6),
    ],
)
def test_scripts_run_through(script: str, options: list[str], modes: int, tmp_path: Path, capsys):
    """At a size for a CPU every provider gives a time in every mode, or its error; none does here."""
    output = tmp_path / f"{script}.csv"

    with warnings.catch_warnings():
        # transformers 5.24 has another name for an argument that 5.17 still calls past_key_values
        warnings.filterwarnings("ignore", message="`past_key_values` is deprecated")
        arguments = ["--tiny", "--rounds", "1", "--output", str(output), *options]
        importlib.import_module(f"benchmarks.gpu.{script}").main(arguments)

    rows = results.read(output)
    assert len({(row.case, row.mode) for row in rows if row.metric == results.TIME}) == modes
    assert [row.error for row in rows if row.error] == []
    assert {providers.BASE, providers.MOELORA} <= {row.provider for row in rows}
    assert command.short_table(rows) in capsys.readouterr().out
