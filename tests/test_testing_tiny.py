"""Tiny models of all families: valid, random, repeatable, and without a trace on the global random state."""

import subprocess
import sys

import pytest
import torch

from moelora.testing import tiny


def _tensor(output) -> torch.Tensor:
    for name in ("logits", "logits_per_text", "last_hidden_state"):
        if output.get(name) is not None:
            return output[name]
    raise AssertionError(f"no tensor to compare in {list(output)}")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_tiny_model_runs_and_repeats(family: str):
    """The same seed gives the same model and inputs, another seed others; the output is finite, rows differ."""
    before = torch.get_rng_state()
    model, again, other = tiny.model(family), tiny.model(family), tiny.model(family, seed=1)
    inputs, same = tiny.inputs(model), tiny.inputs(again)
    assert torch.equal(torch.get_rng_state(), before)

    with torch.no_grad():
        out, out_again, out_other = (_tensor(m(**x)) for m, x in ((model, inputs), (again, same), (other, inputs)))
    assert not model.training
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert torch.isfinite(out).all()
    assert torch.equal(out, out_again)
    assert not torch.allclose(out, out_other)
    assert not torch.allclose(out[0], out[1])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_no_parameter_is_left_at_a_constant(family: str):
    """Biases and norms are random too, so that a forgotten one shows."""
    for name, parameter in tiny.model(family).named_parameters():
        if parameter.numel() > 1:
            assert parameter.std() > 0, name


def test_text_inputs_have_a_mask_with_padding():
    """Every second row is padded, and what is padded is the pad token."""
    model = tiny.model("llama")
    inputs = tiny.inputs(model, batch=4, length=6, seed=3)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (4, 6)
    assert inputs["attention_mask"].sum(1).tolist() == [6, 4, 6, 4]
    assert (inputs["input_ids"][inputs["attention_mask"] == 0] == 0).all()
    assert not torch.equal(inputs["input_ids"], tiny.inputs(model, batch=4, length=6, seed=4)["input_ids"])


def test_config_overrides_reach_the_config():
    """`num_hidden_layers=3` makes three layers, `attn_implementation` chooses the attention."""
    model = tiny.model("llama", num_hidden_layers=3, attn_implementation="eager")
    assert len(model.model.layers) == 3
    assert model.config._attn_implementation == "eager"


def test_an_unknown_family_is_an_error_that_lists_the_known():
    """The error names what came and what there is."""
    with pytest.raises(ValueError, match=r"unknown family 'lama'; expected one of llama, mistral"):
        tiny.model("lama")


def test_importing_the_package_does_not_import_testing():
    """`import moelora` stays light."""
    code = "import sys, moelora; assert not [m for m in sys.modules if m.startswith('moelora.testing')]"
    subprocess.run([sys.executable, "-c", code], check=True)
