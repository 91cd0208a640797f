"""Fused state-space kernels read raw weights; forced off, the projections are called, and nothing else changes.

The kernels themselves need a GPU and a package, so here functions stand in for them that compute the same in torch,
from the raw weights, as the kernels do.
"""

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moelora.integrations.families import linears
from moelora.integrations.probe import probe
from moelora.integrations.state_space import bypassed, force_unfused, raw_reads
from moelora.integrations.targets import resolve_sites
from moelora.testing import tiny

ONE: tuple[str, ...] = ("mamba", "falcon_mamba")
TWO: tuple[str, ...] = ("mamba2", "bamba", "zamba2", "falcon_h1", "nemotron_h", "granitemoehybrid")
FUSED_NAME: dict[str, str] = dict.fromkeys(ONE, "mamba_inner_fn")
FUSED_NAME |= dict.fromkeys(TWO, "mamba2_split_conv1d_scan_combined")


def _modeling(family: str) -> Any:
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def _fused(family: str, calls: list[str]) -> Callable[..., Tensor]:
    """What the fused kernel of a family computes from raw weights; exact for mamba and mamba2."""
    modeling = _modeling(family)

    def mamba_inner_fn(xz, conv_w, conv_b, x_w, dt_w, out_w, out_b, A, B, C, D, delta_bias, delta_softplus, **rest):
        calls.append("fused")
        x, z = xz.chunk(2, dim=1)
        x = modeling.causal_conv1d_fn(x, conv_w.squeeze(1), conv_b, activation="silu")
        rank, state = dt_w.shape[1], A.shape[1]
        dt, B, C = F.linear(x.transpose(1, 2), x_w).split([rank, state, state], dim=-1)
        dt = dt_w @ dt.transpose(1, 2)
        y = modeling.mamba_selective_scan(
            x, dt, A, B.transpose(1, 2), C.transpose(1, 2), D, z, delta_bias=delta_bias, delta_softplus=True
        )
        return F.linear(y.transpose(1, 2), out_w, out_b)

    def mamba2_split_conv1d_scan_combined(zxbcdt, conv_w, conv_b, dt_bias, A, D, outproj_weight, outproj_bias, **rest):
        calls.append("fused")
        inner, heads, groups = outproj_weight.shape[1], len(A), rest["ngroups"]
        state = (conv_w.shape[0] - inner) // (2 * groups)
        z, xBC, dt = zxbcdt.split([inner, conv_w.shape[0], heads], dim=-1)
        xBC = modeling.causal_conv1d_fn(xBC.transpose(1, 2), conv_w, conv_b, activation="silu").transpose(1, 2)
        x, B, C = (
            part.unflatten(-1, (-1, size))
            for part, size in zip(
                xBC.split([inner, groups * state, groups * state], dim=-1), (rest["headdim"], state, state)
            )
        )
        y = modeling.mamba2_chunk_scan(
            x,
            dt,
            A,
            B,
            C,
            chunk_size=rest["chunk_size"],
            D=D,
            z=None,
            dt_bias=dt_bias,
            dt_softplus=True,
            dt_limit=rest["dt_limit"],
            return_final_states=False,
        )
        y = y.flatten(-2) * F.silu(z)
        y = F.rms_norm(y.unflatten(-1, (groups, -1)), (inner // groups,), eps=rest["rmsnorm_eps"] or 1e-5).flatten(-2)
        weight = rest["rmsnorm_weight"]
        return F.linear(y if weight is None else y * weight, outproj_weight, outproj_bias)

    return locals()[FUSED_NAME[family]]


class Calls:
    """Counts the calls of modules whose path ends with a name."""

    def __init__(self, model: nn.Module, ending: str) -> None:
        self.seen: list[str] = []
        for path, module in model.named_modules():
            if path.endswith(ending):
                module.register_forward_hook(lambda *_, path=path: self.seen.append(path))


def _sites(model: nn.Module, *endings: str) -> list[str]:
    return [path for path in linears(model) if path.endswith(endings) and ("mixer" in path or "mamba" in path)]


@pytest.mark.parametrize("family", [*ONE, *TWO])
def test_a_fused_kernel_passes_the_projection_by_and_is_forced_off(family: str, monkeypatch: pytest.MonkeyPatch):
    """Without us out_proj is not called in training; with us it is, until the undo."""
    model = tiny.model(family).train()
    inputs = tiny.inputs(model) | {"use_cache": False}
    fused: list[str] = []
    monkeypatch.setattr(_modeling(family), FUSED_NAME[family], _fused(family, fused))
    paths = _sites(model, "out_proj")
    called = Calls(model, "out_proj")
    hooks = [len(module._forward_hooks) for module in model.modules()]
    model(**inputs)
    assert len(fused) == len(paths)
    assert not called.seen
    assert not probe(model, paths).of(paths[0], "train")
    fused.clear()
    called.seen.clear()

    undo = force_unfused(model, paths)
    model(**inputs).logits.sum().backward()
    assert called.seen == paths
    assert not fused
    assert probe(model, paths).called(paths[0])
    assert all(module.training for module in model.modules())

    undo()
    undo()
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    model(**inputs)
    assert len(fused) == len(paths)


# With several groups transformers 5.17 itself computes two things: its fused kernel normalises every group alone, its
# other path (training without the kernel, and evaluation) all of them together. With one group there is no difference.
@pytest.mark.parametrize(("family", "options"), [("mamba", {}), ("mamba2", {"n_groups": 1})])
def test_the_unfused_path_computes_the_same(family: str, options: dict[str, int], monkeypatch: pytest.MonkeyPatch):
    """Outputs and gradients agree with the stand-in for the fused kernel; convolution and scan kernels stay in use."""
    model = tiny.model(family, **options).train()
    inputs = tiny.inputs(model)
    inputs.pop("attention_mask")
    fused: list[str] = []
    monkeypatch.setattr(_modeling(family), FUSED_NAME[family], _fused(family, fused))
    expected = model(**inputs).logits
    expected.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    assert fused

    kept: list[str] = []
    for name in ("causal_conv1d_fn", "mamba_selective_scan" if family == "mamba" else "mamba2_chunk_scan"):
        kernel = getattr(_modeling(family), name)
        monkeypatch.setattr(
            _modeling(family), name, lambda *a, kernel=kernel, name=name, **k: (kept.append(name), kernel(*a, **k))[1]
        )
    force_unfused(model, _sites(model, "out_proj"))
    ours = model(**inputs).logits
    ours.square().mean().backward()
    torch.testing.assert_close(ours, expected)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], msg=name)
    assert len(set(kept)) == 2
    assert len(kept) == 4


@pytest.mark.parametrize("family", [*ONE, *TWO])
def test_the_unfused_path_is_that_of_evaluation(family: str, monkeypatch: pytest.MonkeyPatch):
    """Forced off, a model in training computes what it computes in evaluation, with several groups too."""
    model = tiny.model(family)
    inputs = tiny.inputs(model) | {"use_cache": False}
    expected = model(**inputs).logits
    fused: list[str] = []
    monkeypatch.setattr(_modeling(family), FUSED_NAME[family], _fused(family, fused))
    force_unfused(model, _sites(model, "out_proj"))
    torch.testing.assert_close(model.train()(**inputs).logits, expected)
    assert not fused


def test_two_models_do_not_know_of_each_other(monkeypatch: pytest.MonkeyPatch):
    """Only mixers of the given model, and of the given sites, leave the fused path."""
    fused: list[str] = []
    monkeypatch.setattr(_modeling("mamba2"), FUSED_NAME["mamba2"], _fused("mamba2", fused))
    ours, other = tiny.model("mamba2").train(), tiny.model("mamba2").train()
    force_unfused(ours, _sites(ours, "out_proj")[:1])
    ours(**tiny.inputs(ours))
    assert len(fused) == 1
    other(**tiny.inputs(other))
    assert len(fused) == 3


def test_in_proj_alone_keeps_the_fused_kernel(monkeypatch: pytest.MonkeyPatch):
    """in_proj is always called as a module, so nothing has to be given up for it."""
    fused: list[str] = []
    monkeypatch.setattr(_modeling("mamba"), FUSED_NAME["mamba"], _fused("mamba", fused))
    model = tiny.model("mamba").train()
    undo = force_unfused(model, _sites(model, "in_proj"))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model(**tiny.inputs(model))
    assert len(fused) == 2
    undo()


@pytest.mark.parametrize("family", [*ONE, *TWO])
def test_resolution_counts_on_the_forced_path(family: str, monkeypatch: pytest.MonkeyPatch):
    """With the fused kernel present the sites are the same as without, and the model is left fused."""
    model = tiny.model(family)
    without = resolve_sites(model)
    fused: list[str] = []
    monkeypatch.setattr(_modeling(family), FUSED_NAME[family], _fused(family, fused))
    assert resolve_sites(model) == without
    assert not fused
    model.train()(**tiny.inputs(model), use_cache=False)
    assert fused


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_recomputes_on_the_forced_path(reentrant: bool, monkeypatch: pytest.MonkeyPatch):
    """Forward and recomputation both call out_proj; the flags are right although recomputation ends early."""
    fused: list[str] = []
    monkeypatch.setattr(_modeling("mamba2"), FUSED_NAME["mamba2"], _fused("mamba2", fused))
    model = tiny.model("mamba2").train()
    plain = tiny.model("mamba2").train()
    inputs = tiny.inputs(model)
    for one in (model, plain):
        force_unfused(one, _sites(one, "out_proj"))
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    called = Calls(model, "mixer.in_proj")
    model(**inputs, use_cache=False).logits.sum().backward()
    plain(**inputs, use_cache=False).logits.sum().backward()
    assert len(called.seen) == 4
    assert not fused
    assert all(module.training for module in model.modules())
    for (name, p), q in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_a_copy_of_a_forced_model_is_forced_too(monkeypatch: pytest.MonkeyPatch):
    """deepcopy carries the hooks, with state of their own."""
    fused: list[str] = []
    monkeypatch.setattr(_modeling("mamba"), FUSED_NAME["mamba"], _fused("mamba", fused))
    model = tiny.model("mamba").train()
    undo = force_unfused(model, _sites(model, "out_proj"))
    twin = copy.deepcopy(model)
    undo()
    twin(**tiny.inputs(twin))
    assert not fused


def test_a_failing_forward_leaves_the_mode():
    """An exception inside the mixer does not leave it in eval mode."""
    model = tiny.model("mamba").train()
    force_unfused(model, _sites(model, "out_proj"))
    mixer = model.backbone.layers[0].mixer
    handle = mixer.out_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**tiny.inputs(model))
    assert mixer.training
    handle.remove()


@pytest.mark.parametrize("family", [*ONE, "jamba"])
def test_dt_proj_cannot_be_freed(family: str):
    """It is read by weight in the plain path too: the error names the site and why, and nothing is changed."""
    model = tiny.model(family)
    paths = _sites(model, "out_proj", "dt_proj")
    with pytest.raises(ValueError, match=r"cannot patch '.*dt_proj': .*Mixer reads dt_proj\.weight directly"):
        force_unfused(model, paths)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Flagged(nn.Module):
    """Like the mixers of the mamba_ssm package: a fast path behind a flag of its own, and an in_proj never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1d = nn.Conv1d(4, 4, 1)
        self.in_proj, self.out_proj, self.use_mem_eff_path = nn.Linear(4, 4), nn.Linear(4, 4), True

    def forward(self, x: Tensor, inference_params: None = None) -> Tensor:
        x = F.linear(x, self.in_proj.weight)
        if self.use_mem_eff_path and inference_params is None:
            return F.linear(x, self.out_proj.weight, self.out_proj.bias)
        return self.out_proj(x.to(self.out_proj.weight.dtype))


class Busy(Flagged):
    """Its training flag also drops out, so that it may not be switched off."""

    def forward(self, x: Tensor, inference_params: None = None) -> Tensor:
        x = F.dropout(self.in_proj(x), 0.5, training=self.training)
        if self.training:
            return F.linear(x, self.out_proj.weight, self.out_proj.bias)
        return self.out_proj(x)


def test_a_mixer_with_its_own_flag_is_switched_by_it():
    """The flag is put back by the undo; a raw read outside of the flag is refused."""
    model = nn.ModuleDict({"mixer": Flagged()})
    called = Calls(model, "out_proj")
    undo = force_unfused(model, ["mixer.out_proj"])
    model["mixer"](torch.ones(2, 4))
    assert called.seen == ["mixer.out_proj"]
    undo()
    assert model["mixer"].use_mem_eff_path is True
    assert "reads in_proj.weight directly" in str(bypassed(model, "mixer.in_proj"))


def test_a_flag_that_serves_two_ends_is_not_touched():
    """Refused with the name of the flag, rather than a model that silently stops dropping out."""
    with pytest.raises(ValueError, match=r"its switch training also serves another purpose"):
        force_unfused(nn.ModuleDict({"mixer": Busy()}), ["mixer.out_proj"])


def test_what_is_no_mixer_is_left_alone():
    """Bloom reads dense.weight only in an exact mode that is off; that is not ours to judge by source."""
    model = tiny.model("bloom")
    assert bypassed(model, "transformer.h.0.self_attention.dense") is None
    force_unfused(model, list(linears(model)))()


def test_the_source_says_which_reads_are_guarded():
    """Pinned for the installed transformers: a new raw read in a mixer shows here first."""
    mixers = {
        "mamba": ("MambaMixer", {"out_proj", "x_proj", "dt_proj"}, {"dt_proj"}),
        "falcon_mamba": ("FalconMambaMixer", {"out_proj", "x_proj", "dt_proj"}, {"dt_proj"}),
        "jamba": ("JambaMambaMixer", set(), {"dt_proj"}),
        "mamba2": ("Mamba2Mixer", {"out_proj"}, set()),
        "bamba": ("BambaMixer", {"out_proj"}, set()),
        "zamba2": ("Zamba2MambaMixer", {"out_proj"}, set()),
        "falcon_h1": ("FalconH1Mixer", {"out_proj"}, set()),
        "nemotron_h": ("NemotronHMamba2Mixer", {"out_proj"}, set()),
        "granitemoehybrid": ("GraniteMoeHybridMambaLayer", {"out_proj"}, set()),
        "qwen3_next": ("Qwen3NextGatedDeltaNet", set(), set()),
    }
    projections = {"in_proj", "out_proj", "x_proj", "dt_proj", "in_proj_qkvz", "in_proj_ba"}
    for family, (name, guarded, unguarded) in mixers.items():
        reads = raw_reads(getattr(_modeling(family), name))
        assert {child for child in reads.guards if child in projections} == guarded, family
        assert {child for child in reads.unguarded if child in projections} == unguarded, family
        assert not reads.busy, family
        assert all(flags == {"training"} for flags in reads.guards.values()), family
