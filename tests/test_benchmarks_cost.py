"""What gates cost: the benchmark runs on a tiny model, measures the path that it says, and the page shows it."""

from pathlib import Path

import pytest
import torch

from benchmarks.origin import read_rows
from benchmarks.unlearning import cost, cost_report
from benchmarks.unlearning.cost import CLOSED, DECODE, FIELDS, OPEN, PREFILL, Host, Shape, Topics
from moelora.testing import tiny

PROMPTS = 60


@pytest.fixture(scope="module")
def host():
    """A tiny decoder that has forgotten two requests."""
    host = Host(tiny.model("llama"), Topics(99, 2), [6, 9], PROMPTS)
    host.forget(1)
    host.forget(2)
    return host


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny decoder on disk."""
    folder = tmp_path_factory.mktemp("model") / "small"
    tiny.model("llama").save_pretrained(folder)
    return folder


def measured(folder: Path, output: Path, *more: str) -> list[dict[str, str]]:
    """What the command writes."""
    options = ["--model", str(folder), "--device", "cpu", "--prompts", str(PROMPTS), "--rounds", "2"]
    threads = torch.get_num_threads()
    cost.main([*options, "--threads", str(threads), "--shapes", "2x6", "--output", str(output), *more])
    return read_rows(output)


@torch.no_grad()
def test_the_base_and_the_patched_model_share_their_weights(host):
    """And nothing else: behind closed gates they say the same, and behind an open one they do not."""
    closed_BL, opened_BL = (host.prompts_of(Shape(3, 9), opened=opened) for opened in (False, True))
    model, base = host.stack.model, host.base
    closed_BLV, opened_BLV = (model(input_ids=ids_BL).logits for ids_BL in (closed_BL, opened_BL))

    weights = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in base.parameters()} <= weights
    assert torch.equal(closed_BLV, base(input_ids=closed_BL).logits)
    assert torch.equal(opened_BLV[1:], base(input_ids=opened_BL).logits[1:])
    assert not torch.equal(opened_BLV[0], base(input_ids=opened_BL).logits[0])


def test_gates_are_as_they_are_said_to_be(host):
    """None open, or the first row's alone; the model runs once, and twice."""
    shape = Shape(3, 9)
    closed_BL, opened_BL = (host.prompts_of(shape, opened=opened) for opened in (False, True))
    model = host.stack.model

    assert not bool(host.stack.weights({"input_ids": closed_BL}).any())
    assert host.stack.weights({"input_ids": opened_BL}).any(1).tolist() == [True, False, False]
    assert cost.passes(model, cost.prefill_of(model, closed_BL)) == 1
    assert cost.passes(model, cost.prefill_of(model, opened_BL)) == 2


def test_another_path_is_not_measured(host):
    """Prompts longer than a window are read beside the prefill, which is another cost."""
    host.stack.features.window, host.stack.features.stride = 8, 4
    host.stack._hand_over_gates()
    try:
        with pytest.raises(ValueError, match="longer than a window"):
            cost.variants_of(host, Shape(1, 9))
    finally:
        host.stack.features.window, host.stack.features.stride = 256, 128
        host.stack._hand_over_gates()


def test_a_decoded_token_stands_behind_its_prompt(host):
    """However often it was decoded before."""
    ids_BL = host.prompts_of(Shape(2, 9), opened=False)
    decoder = cost.Decoder(host.stack.model, ids_BL)

    for _ in range(2):
        decoder.step()
    assert decoder.cache.get_seq_length() == 11
    decoder.rewind()
    assert decoder.cache.get_seq_length() == 9


def test_the_command_appends_what_it_measures(folder, tmp_path, capsys):
    """Each part, size and variant once; a second run goes behind the first."""
    output = tmp_path / "new" / "cost.csv"
    rows = measured(folder, output, "--requests", "2", "1", "--revision", "abc")
    again = measured(folder, output, "--requests", "1")

    assert tuple(rows[0]) == FIELDS
    assert again[: len(rows)] == rows
    assert [row["requests"] for row in rows] == ["1"] * 9 + ["2"] * 9
    assert [row["variant"] for row in rows[:9]].count(CLOSED) == 2
    assert {(row["part"], row["shape"]) for row in rows} == {(PREFILL, "2x6"), (DECODE, "2x6")}
    assert {(row["model"], row["dtype"], row["revision"]) for row in rows} == {("small", "float32", "abc")}
    assert all(float(row["us"]) > 0 and float(row["ratio"]) > 0 for row in rows)
    assert OPEN in capsys.readouterr().out


def test_the_page_marks_what_reaches_the_goal():
    """Of two rows for the same thing the last counts; decoding has no goal, and no open gates."""
    about = dict.fromkeys(FIELDS, "") | {"model": "m", "dtype": "float32", "device": "CPU", "threads": "1"}
    about |= {"shape": "1x32", "requests": "4", "prompts": "300"}

    def row(part: str, variant: str, us: float, ratio: float) -> dict[str, str]:
        return about | {"part": part, "variant": variant, "us": f"{us}", "ratio": f"{ratio}"}

    rows = [row(PREFILL, "base", 2000, 1), row(PREFILL, CLOSED, 2, 1.2), row(PREFILL, CLOSED, 2, 1.0499)]
    rows += [row(PREFILL, OPEN, 4, 2.04), row(DECODE, CLOSED, 1, 1.01)]

    prefill, decode = list(cost_report.lines_of(rows))[-2:]
    assert prefill == "| m, float32 | CPU, 1 threads | prefill 1x32 | 4 | 300 | 2.00 |  |  | **1.050** | 2.040 |"
    assert decode == "| m, float32 | CPU, 1 threads | decode 1x32 | 4 | 300 |  |  |  | 1.010 |  |"
