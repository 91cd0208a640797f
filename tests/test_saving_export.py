"""A fixed mixture as one plain PEFT LoRA: exactly the adapter it came from, or exactly the sum."""

import json
import math
import warnings

import pytest
import torch
from adapters_on_disk import main_output, peft_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file

import moelora
from moelora.bank import Expert
from moelora.integrations.adapters import load_adapters
from moelora.integrations.peft_folder import alpha_of, concatenate, write_adapter
from moelora.testing import tiny

# PEFT takes the bias of lora_B, which has one dimension, for a shard, and says that such adapters cannot be merged.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* LoRA tensor"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
]

FAMILIES = ("gpt2", "llama", "bert", "t5", "bloom")


def one_adapter(folder, **options):
    """The only adapter of a folder, as the front door reads it."""
    (adapter,) = load_adapters({"one": folder}, **options)
    return adapter


def assert_same_adapter(left, right) -> None:
    """The same sites with the same factors, scales and biases, bit for bit."""
    ours, theirs = one_adapter(left).factors, one_adapter(right).factors
    assert ours.keys() == theirs.keys()
    for path, factors in ours.items():
        assert torch.equal(factors.A_RD, theirs[path].A_RD)
        assert torch.equal(factors.B_RO, theirs[path].B_RO)
        assert factors.scale == theirs[path].scale
        bias_O, other_O = factors.bias_O, theirs[path].bias_O
        if bias_O is None or other_O is None:
            assert bias_O is other_O
        else:
            assert torch.equal(bias_O, other_O)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_bias": True}], ids=["plain", "rslora", "bias"])
def test_one_expert_is_the_adapter_it_came_from(family, options, tmp_path):
    """Tensors and scales are identical, with rank and alpha patterns; PEFT's own keys and layout."""
    peft_model(family, tmp_path / "a", seed=1, rank=3, **options)
    peft_model(family, tmp_path / "b", seed=2, every=2)
    model = moelora.patch_model(tiny.model(family), [tmp_path / "a", tmp_path / "b"])

    moelora.export_adapter(model, tmp_path / "out", weights="a")

    assert_same_adapter(tmp_path / "out", tmp_path / "a")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "a"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sum_loads_in_peft_and_equals_use_experts(family, tmp_path):
    """Three experts with weights, one negative, of unequal ranks and sites; the folder can be an expert again."""
    peft_model(family, tmp_path / "a", seed=1, rank=3)
    peft_model(family, tmp_path / "b", seed=2, every=2, use_rslora=True)
    peft_model(family, tmp_path / "c", seed=3, rank=5, lora_bias=True)
    model = moelora.patch_model(tiny.model(family), [tmp_path / name for name in "abc"])
    inputs = tiny.inputs(model)
    weights = {"a": 0.3, "b": 1.5, "c": -0.7}
    with torch.no_grad(), moelora.use_experts(model, weights):
        expected = main_output(model(**inputs))

    moelora.export_adapter(model, tmp_path / "sum", weights=weights)

    with warnings.catch_warnings(), torch.no_grad():
        # gpt2's head is no Conv1D, which PEFT mentions
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        theirs = main_output(PeftModel.from_pretrained(tiny.model(family), str(tmp_path / "sum")).eval()(**inputs))
        again = moelora.patch_model(tiny.model(family), [tmp_path / "sum"], router="given")
        with moelora.use_experts(again, "sum"):
            ours = main_output(again(**inputs))
    scale = expected.abs().max()
    assert (theirs - expected).abs().max() < 1e-5 * scale
    assert (ours - expected).abs().max() < 1e-5 * scale
    assert (main_output(tiny.model(family)(**inputs)) - expected).abs().max() > 1e-3 * scale


def test_a_weighted_single_expert_keeps_its_factors(tmp_path):
    """The weight goes into the scale, so that nothing is rounded."""
    peft_model("gpt2", tmp_path / "a", seed=1)
    peft_model("gpt2", tmp_path / "b", seed=2)
    model = moelora.patch_model(tiny.model("gpt2"), [tmp_path / "a", tmp_path / "b"])

    moelora.export_adapter(model, tmp_path / "out", weights={"a": -0.5, "b": 0.0})

    ours, theirs = one_adapter(tmp_path / "out").factors, one_adapter(tmp_path / "a").factors
    assert all(torch.equal(ours[path].B_RO, theirs[path].B_RO) for path in theirs)
    assert all(ours[path].scale == -0.5 * theirs[path].scale for path in theirs)


def test_exporting_nothing_is_an_error(tmp_path):
    """Unknown names, no weight at all, and weights that are no numbers; nothing is written."""
    model = moelora.patch_model(tiny.model("gpt2"), num_experts=2, rank=2)
    for weights, match in (
        ("expert7", "no expert 'expert7'.*expert0"),
        ({}, "no expert has a weight"),
        ({"expert0": 0.0}, "no expert has a weight"),
        ({"expert0": math.nan}, "must be finite"),
        ({"expert0": math.inf, "expert1": 1.0}, "must be finite"),
    ):
        with pytest.raises(ValueError, match=match):
            moelora.export_adapter(model, tmp_path / "out", weights=weights)
    assert not (tmp_path / "out").exists()


finite = st.floats(-1e3, 1e3, allow_nan=False).filter(lambda alpha: abs(alpha) > 1e-3)


@given(alpha=st.one_of(st.integers(1, 4096), finite), rank=st.integers(1, 1024), rslora=st.booleans())
@example(alpha=16, rank=3, rslora=True)
@example(alpha=0.1, rank=49, rslora=False)
def test_every_scale_of_an_adapter_is_found_again(alpha, rank, rslora):
    """alpha / r and alpha / sqrt(r), for any alpha and rank, to the last bit."""
    divisor = math.sqrt(rank) if rslora else rank
    scale = float(alpha / divisor)

    assert alpha_of(scale, rank, rslora=rslora) / divisor == scale


@st.composite
def experts(draw) -> list[tuple[Expert, float]]:
    """Experts of one site of width 4 to 3, of any ranks, with weights."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    pairs = []
    for rank in draw(st.lists(st.integers(0, 4), min_size=1, max_size=4)):
        bias = torch.randn(3, generator=generator) if rank and draw(st.booleans()) else None
        A_RD, B_RO = torch.randn(rank, 4, generator=generator), torch.randn(rank, 3, generator=generator)
        pairs.append((Expert(A_RD, B_RO, draw(st.floats(0.1, 8)), bias), draw(st.floats(-2, 2))))
    return pairs


@given(experts())
def test_a_sum_of_experts_is_their_sum(pairs):
    """Factors and biases, whatever the ranks and weights."""
    joined = concatenate(pairs)

    expected_OD = sum(weight * expert.delta_OD() for expert, weight in pairs)
    torch.testing.assert_close(joined.delta_OD(), expected_OD, rtol=1e-5, atol=1e-5)
    biases = [weight * expert.scale * expert.bias_O for expert, weight in pairs if expert.bias_O is not None]
    expected_O = sum(biases) if biases else torch.zeros(3)
    bias_O = torch.zeros(3) if joined.bias_O is None else joined.scale * joined.bias_O
    torch.testing.assert_close(bias_O, expected_O, rtol=1e-5, atol=1e-5)


@settings(max_examples=30)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    alphas=st.lists(st.integers(1, 64), min_size=6, max_size=6),
    rslora=st.booleans(),
)
def test_writing_and_reading_an_adapter_is_the_identity(ranks, alphas, rslora, tmp_path_factory):
    """Any ranks and scales, site by site, in one config."""
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path_factory.mktemp("adapter")
    written = {
        f"layers.{place}.q": Expert(
            torch.randn(rank, 4, generator=generator),
            torch.randn(rank, 3, generator=generator),
            alpha / (math.sqrt(rank) if rslora else rank),
        )
        for place, (rank, alpha) in enumerate(zip(ranks, alphas, strict=False))
    }
    write_adapter(folder, written)

    read = one_adapter(folder).factors
    assert read.keys() == written.keys()
    for path, expert in written.items():
        assert torch.equal(read[path].A_RD, expert.A_RD)
        assert torch.equal(read[path].B_RO, expert.B_RO)
        assert read[path].scale == expert.scale
    assert json.loads((folder / "adapter_config.json").read_text())["target_modules"] == sorted(written)
