"""The probe forward sees what is called with what, and leaves the model and the process as they were."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moelora.integrations.families import linears
from moelora.integrations.preserve import preserved
from moelora.integrations.probe import ProbeError, probe
from moelora.integrations.targets import resolve_sites
from moelora.testing import tiny


def _traces(model: nn.Module) -> dict:
    """Everything about a model that a probe might disturb."""
    return {
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
        },
        "modules": {name: id(module) for name, module in model.named_modules(remove_duplicate=False)},
        "attributes": {
            (name, key): value
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, (bool, int, float, str, type(None)))
        },
        "config": copy.deepcopy(vars(model.config)) if hasattr(model, "config") else None,
        "gradients": {name: p.grad is None for name, p in model.named_parameters()},
    }


def _random_state() -> tuple:
    """Of torch and numpy. Python's own is drawn from by beartype, which samples the containers that it checks."""
    _, keys, place, *_ = np.random.get_state(legacy=True)
    return torch.get_rng_state().tolist(), list(keys), place


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_model_is_as_before(family: str):
    """Values, flags, configs, hooks, global random states: all equal, also where parts were in different modes."""
    model = tiny.model(family).train(len(family) % 2 == 0)
    for module in list(model.modules())[::3]:
        module.training = not module.training
    values = {name: value.clone() for name, value in model.state_dict().items()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    traces, state = _traces(model), _random_state()

    resolve_sites(model)
    assert _random_state() == state
    assert _traces(model) == traces
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name]), name
    for name, value in model.named_buffers():
        assert torch.equal(value, buffers[name]), name


class Restless(nn.Module):
    """A module that changes itself in every forward, and draws from every random state."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)
        self.calls = 0
        self.register_buffer("longest", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = x.shape
        self.longest = torch.maximum(self.longest, torch.tensor(float(len(x))))
        x = self.norm(x) + random.random() + float(np.random.rand())
        return self.second(self.drop(self.first(x)))


def test_running_statistics_counters_and_new_attributes_are_put_back():
    """Batch-norm buffers, replaced buffers, Python attributes."""
    model = Restless()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    longest, state = model.longest, _random_state()
    report = probe(model, list(linears(model)), torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))
    assert report.called("first")
    assert model.calls == 0
    assert not hasattr(model, "seen")
    assert model.longest is longest
    assert _random_state() == state
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_python_random_is_put_back():
    """Also after an exception, and with it everything else."""
    model = Restless()
    state = random.getstate()
    with preserved(model):
        random.random()
    assert random.getstate() == state
    with pytest.raises(ZeroDivisionError), preserved(model):
        model.calls = 1 // 0
    assert random.getstate() == state


def test_a_failing_forward_is_a_clear_error_with_its_cause():
    """The message says what was fed in and what to pass; the model is as before even so."""
    model = Restless().train()
    traces = _traces(model)
    with pytest.raises(
        ProbeError, match=r"Restless failed in eval mode with 0: \[5, 3\].*pass probe_inputs="
    ) as caught:
        probe(model, ["first"], torch.ones(5, 3))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert _traces(model) == traces
    with pytest.raises(ProbeError, match="a tuple of arguments or a tensor, got int"):
        probe(model, ["first"], 3)


def test_user_inputs_replace_the_made_ones():
    """A mapping, as keyword arguments; here a longer text than the probe's own."""
    model = tiny.model("bert")
    given = probe(model, ["bert.encoder.layer.0.attention.self.query"], tiny.inputs(model, length=9))
    assert given.called("bert.encoder.layer.0.attention.self.query")


def test_calls_are_counted_and_ordered():
    """DeBERTa calls query and key twice, value once; ALBERT every projection once per depth."""
    model = tiny.model("deberta-v2")
    attention = "deberta.encoder.layer.0.attention.self."
    report = probe(model, list(linears(model)))
    counts = {name: len(report.of(attention + name)) for name in ("query_proj", "key_proj", "value_proj")}
    assert counts == {"query_proj": 2, "key_proj": 2, "value_proj": 1}
    assert report.first(attention + "value_proj").order < report.first("cls.predictions.decoder").order
    # the second call reads another tensor than the first
    first, second = report.of(attention + "key_proj")
    assert first.inputs != second.inputs

    albert = tiny.model("albert")
    path = next(path for path in linears(albert) if path.endswith("attention.query"))
    assert len(probe(albert, [path]).of(path)) == len(probe(albert, [path]).of(path, "train")) == 2


def test_layer_drop_and_checkpointing_do_not_hide_a_layer():
    """Random skipping is off during the probe, and so is recomputation; both are on again afterwards."""
    model = tiny.model("whisper", decoder_layerdrop=0.99, encoder_layerdrop=0.99)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(resolve_sites(model).sites) == 24
    assert model.config.decoder_layerdrop == model.model.decoder.layerdrop == 0.99
    assert all(layer.gradient_checkpointing for layer in model.model.encoder.layers)
    wav = tiny.model("wav2vec2", layerdrop=0.99)
    assert len(resolve_sites(wav).sites) == 8


def test_half_precision_and_frozen_models():
    """The inputs take the model's dtype; no gradient is asked for."""
    for family in ("llama", "vit", "whisper"):
        model = tiny.model(family).to(torch.bfloat16).requires_grad_(False)
        assert resolve_sites(model).sites


def test_a_head_that_pools_needs_no_pad_token():
    """Without a pad token the probe uses one row, which such heads can take."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    model = GPT2ForSequenceClassification(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    assert {site.role for site in resolve_sites(model).sites} == {"attn_in", "attn_out"}


def test_cross_attention_inside_decoders_that_read_an_encoder():
    """GPT-2 and BERT with cross-attention: key and value read the encoder, given by probe_inputs."""
    encoded = torch.ones(2, 5, 32)
    model = tiny.model("gpt2", add_cross_attention=True)
    inputs = {"input_ids": torch.full((2, 4), 9), "encoder_hidden_states": encoded}
    sites = {site.path: site for site in resolve_sites(model, probe_inputs=inputs).sites}
    cross = {path.split(".", 3)[3]: site for path, site in sites.items() if "crossattention" in path}
    assert {name: (site.role, site.reads_encoder) for name, site in cross.items()} == {
        "crossattention.c_attn": ("cross_in", True),
        "crossattention.q_attn": ("cross_in", False),
        "crossattention.c_proj": ("cross_out", False),
    }


class FusedInTraining(nn.Module):
    """Calls its projection in eval mode and reads the raw weight in training."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x)
        return nn.functional.linear(x, self.read.weight) if self.training else self.read(x)


def test_what_is_called_in_one_mode_only_is_refused():
    """The reason names the mode."""
    with pytest.raises(ValueError, match=r"'read': not called as a module in train mode"):
        resolve_sites(FusedInTraining(), targets=["read"], probe_inputs=torch.ones(2, 4))
    assert resolve_sites(FusedInTraining(), targets=["called"], probe_inputs=torch.ones(2, 4)).sites


def test_a_linear_that_is_called_with_other_widths_is_refused():
    """Attributes that do not say what the module does would make a bank of the wrong shape."""

    class Grouped(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.unflatten(-1, (2, 4))).flatten(-2)

    with pytest.raises(ValueError, match=r"called with width 8 -> 6, but its attributes say \(4, 3\)"):
        resolve_sites(nn.Sequential(Grouped(4, 3)), targets=["0"], probe_inputs=torch.ones(2, 8))
