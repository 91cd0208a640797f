"""In every family: one expert is PEFT's own model, a fixed mixture PEFT's `cat`, a closed mixture the base."""

import pytest
import torch
from adapters_on_disk import main_output, peft_model

import moelora
from moelora.testing import tiny


def _relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_experts_equal_peft(family, tmp_path):
    """One expert with weight 1 and two with (0.3, 0.7), with mixed ranks, rsLoRA and sites missing from one."""
    plain = peft_model(family, tmp_path / "plain", seed=1, rank=3, every=2)
    stabilised = peft_model(family, tmp_path / "stabilised", seed=2, rank=4, use_rslora=True)
    inputs = tiny.inputs(tiny.model(family))
    with torch.no_grad():
        expected = {"plain": main_output(plain(**inputs)), "stabilised": main_output(stabilised(**inputs))}
        # the plain one first: PEFT's `cat` scales by the first adapter's rsLoRA flag
        plain.load_adapter(str(tmp_path / "stabilised"), "stabilised")
        plain.add_weighted_adapter(["default", "stabilised"], [0.3, 0.7], "both", combination_type="cat")
        plain.set_adapter("both")
        expected_both = main_output(plain(**inputs))

    # frozen, as patching leaves it: torch folds some products another way for trainable weights, which rounds otherwise
    model = tiny.model(family).requires_grad_(False)
    with torch.no_grad():
        base = main_output(model(**inputs))
    patched = moelora.patch_model(model, {name: tmp_path / name for name in expected})

    assert patched is model
    with torch.no_grad():
        for name, value in expected.items():
            with moelora.use_experts(model, {name: 1.0}):
                assert _relative(main_output(model(**inputs)), value) < 1e-5
            assert _relative(base, value) > 1e-3, "the adapter does something"
        with moelora.use_experts(model, {"plain": 0.3, "stabilised": 0.7}):
            assert _relative(main_output(model(**inputs)), expected_both) < 1e-5
        assert _relative(main_output(model(**inputs)), base) > 1e-3, "the routed mixture does something"
        with moelora.disabled(model):
            assert torch.equal(main_output(model(**inputs)), base)
        moelora.unpatch_model(model)
        assert torch.equal(main_output(model(**inputs)), base)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_expert_is_its_merged_weights(family):
    """Also where PEFT refuses: fresh factors, made random, against the base with them merged into its weights."""
    model, merged = tiny.model(family), tiny.model(family)
    inputs = tiny.inputs(model)
    moelora.patch_model(model, num_experts=2, rank=3)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".bank." in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    for path, layer in model._moelora.layers.items():
        linear = merged.get_submodule(path)
        delta_OD = layer.bank.expert(1).delta_OD().to(linear.weight.dtype)
        conv1d = type(layer.base).__name__ == "Conv1D"
        # a parameter of its own: zamba2 ties those of its shared blocks
        linear.weight = torch.nn.Parameter(linear.weight + (delta_OD.T if conv1d else delta_OD))

    with torch.no_grad(), moelora.use_experts(model, "expert1"):
        ours, theirs = main_output(model(**inputs)), main_output(merged(**inputs))

    assert _relative(ours, theirs) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "mamba", "bamba", "albert", "falcon"])
def test_a_closed_mixture_is_the_base_even_with_nan_experts(family, dtype):
    """`disabled`, a row of None and unpatching, with experts full of NaN."""
    model = tiny.model(family).to(dtype)
    inputs = tiny.inputs(model)
    names = {id(module): name for name, module in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with torch.no_grad():
        base = main_output(model(**inputs))
        moelora.patch_model(model, num_experts=3, rank=4)
        for name, parameter in model.named_parameters():
            if ".bank." in name:
                parameter.data.fill_(torch.nan)

        assert main_output(model(**inputs)).isnan().any()
        with moelora.disabled(model):
            assert torch.equal(main_output(model(**inputs)), base)
        with moelora.use_experts(model, [None, None]):
            assert torch.equal(main_output(model(**inputs)), base)
        with moelora.use_experts(model, {"expert0": 0.0}):
            assert torch.equal(main_output(model(**inputs)), base)
        moelora.unpatch_model(model)

        assert torch.equal(main_output(model(**inputs)), base)
    assert {id(module): name for name, module in model.named_modules()} == names
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert not moelora.is_patched(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "qwen3_next"])
def test_rows_of_a_batch_go_their_own_ways(family, tmp_path):
    """One entry per row: each row is what its expert alone makes of the batch, None the base."""
    peft_model(family, tmp_path / "a", seed=1)
    peft_model(family, tmp_path / "b", seed=2)
    model = moelora.patch_model(tiny.model(family), [tmp_path / "a", tmp_path / "b"])
    inputs = tiny.inputs(model, batch=4)
    rows = ["a", None, {"a": 0.5, "b": -1.0}, "b"]

    with torch.no_grad():
        with moelora.use_experts(model, rows):
            mixed = main_output(model(**inputs))
        for number, row in enumerate(rows):
            with moelora.use_experts(model, row):
                alone = main_output(model(**inputs))
            torch.testing.assert_close(mixed[number], alone[number], rtol=1e-5, atol=1e-5)
            if row is None:
                assert torch.equal(mixed[number], alone[number])
