"""The front door refuses with a sentence that helps, and the model is exactly as it was. `dry_run` changes nothing."""

import json
from typing import Any

import pytest
import torch
from adapters_on_disk import main_output, peft_model, sites_of
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from untouched import untouched

import moelora
from moelora.config import AuxLosses, MoELoRAConfig
from moelora.testing import tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Adapters of gpt2 (attention; one with a part in the MLP), of a wider gpt2, of bert, and a broken one."""
    folder = tmp_path_factory.mktemp("adapters")
    peft_model("gpt2", folder / "a", seed=1)
    peft_model("gpt2", folder / "b", seed=2)
    peft_model("gpt2", folder / "mlp", seed=3, paths=[*sites_of("gpt2"), "transformer.h.0.mlp.c_fc"])
    peft_model("bert", folder / "bert", seed=4)
    peft_model("gpt2", folder / "broken", seed=5)
    config = json.loads((folder / "broken" / "adapter_config.json").read_text())
    (folder / "broken" / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    (folder / "empty").mkdir()
    return folder


class Mlp(nn.Module):
    """No Hugging Face model, so that nothing can be guessed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.outer(self.inner(x).relu())


FRESH: dict[str, Any] = {"num_experts": 2, "rank": 2}

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nothing to mix": ({}, "nothing to mix: pass experts="),
    "a rank alone": ({"rank": 2}, "need both num_experts and rank"),
    "a number alone": ({"num_experts": 2}, "need both num_experts and rank"),
    "rank 0": ({"num_experts": 2, "rank": 0}, "at least 1, got 2 and 0"),
    "no experts": ({"num_experts": 0, "rank": 2}, "at least 1, got 0 and 2"),
    "unknown router": (
        FRESH | {"router": "learnt"},
        r"unknown router 'learnt'; expected one of \['arrow', .*'given', .*'learned', ",
    ),
    "top_k of another router": (FRESH | {"router": "arrow", "top_k": 3}, r"pass the router's configuration, Arrow\("),
    "router of another type": (FRESH | {"router": AuxLosses()}, "router must be a router's configuration"),
    "top_k too large": (FRESH | {"top_k": 3}, "top_k=3 experts per token, but there are 2; lower top_k"),
    "top_k 0": (FRESH | {"top_k": 0}, "top_k must be at least 1"),
    "router and config": (FRESH | {"config": MoELoRAConfig(), "router": "given"}, "router is given twice"),
    "top_k and config": (FRESH | {"config": MoELoRAConfig(), "top_k": 1}, "router is given twice"),
    "top_k and router": (
        FRESH | {"router": moelora.Learned(top_k=1, combine="unit"), "top_k": 1},
        "top_k is given twice",
    ),
    "unknown target": (FRESH | {"targets": ["c_atn"]}, "'c_atn' matches no linear.*c_attn"),
    "one target as text": (FRESH | {"targets": "c_attn"}, r"write targets=\['c_attn'\]"),
    "no target": (FRESH | {"targets": []}, "targets must name modules"),
    "a predicate that chooses none": (FRESH | {"targets": lambda path, module: False}, "predicate chose none"),
    "unknown role": (FRESH | {"roles": ["attention"]}, r"unknown roles \['attention'\].*attn_in"),
    "a role that the model lacks": (FRESH | {"roles": ["ssm_in"]}, "no linear with role ssm_in.*roles attn_in"),
    "one source as text": ({"experts": "org/a"}, "experts is one source"),
    "an empty list": ({"experts": []}, "experts is empty"),
    "a number as source": ({"experts": [3]}, "3 is no adapter source"),
    "a wrong name": ({"experts": {"../a": "org/a"}}, "cannot name an expert"),
    "a model as source": ({"experts": [Mlp()]}, "a Mlp is no adapter source"),
    "a bad revision": ({"experts": ["org/a@../x"]}, "expected a branch, a tag, a commit"),
    "offline": ({"experts": ["org/a"], "local_files_only": True}, "org/a"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument(case):
    """Each is refused before anything is changed."""
    arguments, match = WRONG[case]
    model = tiny.model("gpt2")
    with untouched(model), pytest.raises((ValueError, TypeError), match=f"{match}|Type-check error"):
        moelora.patch_model(model, **arguments)
    assert not moelora.is_patched(model)


@pytest.mark.parametrize(
    ("names", "options", "match"),
    [
        (["bert"], {}, r"8 factors of adapter 'bert' .*fit nowhere in this model.*another base model"),
        (["a", "bert"], {"strict": False}, r"factors of adapter 'bert' .*fit nowhere"),
        (["broken"], {}, "use_dora"),
        (["empty"], {}, "has no adapter_config.json"),
        (["nowhere"], {}, "no folder"),
        (
            ["mlp"],
            {"targets": ["c_attn"], "top_k": 1},
            r"3 of 5 projections of adapter 'mlp' lie outside.*strict=False",
        ),
        (["mlp"], {"roles": ["attn_in", "attn_out"], "top_k": 1}, r"1 of 5 projections of adapter 'mlp' lie outside"),
        (["a"], {"targets": ["c_fc"], "strict": False, "top_k": 1}, "has no factors at any of the targets"),
        (["a"], {}, "top_k=2 experts per token, but there are 1"),
    ],
)
def test_an_adapter_that_does_not_fit(folders, names, options, match):
    """Of another base, of another kind, or cut by the targets."""
    model = tiny.model("gpt2")
    with untouched(model), pytest.raises(ValueError, match=match):
        moelora.patch_model(model, {name: folders / name for name in names}, **options)


def test_an_adapter_of_another_width(folders):
    """The same names with other shapes: both are named."""
    model = tiny.model("gpt2", n_embd=64)
    with untouched(model), pytest.raises(ValueError, match=r"c_attn.*32.*64|c_attn.*64.*32"):
        moelora.patch_model(model, [folders / "a", folders / "b"])


def test_names_that_are_taken(folders):
    """A fresh expert and an adapter of the same name; two equal folders in a list get names of their own."""
    model = tiny.model("gpt2")
    with untouched(model), pytest.raises(ValueError, match=r"experts need different names.*expert0"):
        moelora.patch_model(model, {"expert0": folders / "a"}, **FRESH)
    moelora.patch_model(model, [folders / "a", folders / "a"])
    assert moelora.expert_names(model) == ["a", "a-2"]


def test_what_is_dropped_is_listed(folders, caplog):
    """strict=False leaves a part of an adapter out, and says so in the plan and in the log."""
    model = tiny.model("gpt2")
    arguments = {"targets": ["c_attn"], "strict": False}
    with untouched(model):
        plan = moelora.patch_model(model, [folders / "mlp", folders / "a"], dry_run=True, **arguments)

    assert "note: dropped: 3 of 5 projections of adapter 'mlp' lie outside the targets" in str(plan)
    assert any("3 of 5 projections of adapter 'mlp'" in line for line in caplog.messages)
    moelora.patch_model(model, [folders / "mlp", folders / "a"], **arguments)
    assert all(path.endswith("c_attn") for path in model._moelora.layers)


def test_a_plan_is_a_table_and_changes_nothing(folders):
    """Every site with its role and widths, every expert with its rank and where it is from."""
    model = tiny.model("gpt2")
    with untouched(model):
        plan = moelora.patch_model(model, {"law": folders / "a"}, num_experts=1, rank=3, dry_run=True)

    text = str(plan)
    for line in (
        "attn_in       2  32 -> 96  transformer.h.*.attn.c_attn",
        "attn_out      2  32 -> 32  transformer.h.*.attn.c_proj",
    ):
        assert line in text.splitlines()
    assert "expert 0: law (frozen, rank [2, 4], 4 sites) from" in text
    assert "expert 1: expert0 (trained, rank [3], 4 sites) from rank 3" in text
    assert not moelora.is_patched(model)


def test_patched_twice():
    """The first mixture stays; after unpatching there is room for another."""
    model = moelora.patch_model(tiny.model("gpt2"), **FRESH)
    with untouched(model):
        for verb in (lambda: moelora.patch_model(model, **FRESH), lambda: moelora.resolve_targets(model)):
            with pytest.raises(ValueError, match=r"patched already; call moelora\.unpatch_model"):
                verb()
    moelora.patch_model(moelora.unpatch_model(model), num_experts=3, rank=1)
    assert len(moelora.expert_names(model)) == 3


def test_a_model_with_peft_layers(folders):
    """A PeftModel, and a model with injected layers: both say to pass the adapter as a source."""
    for model in (
        peft_model("gpt2"),
        inject_adapter_in_model(LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True), tiny.model("gpt2")),
    ):
        with untouched(model), pytest.raises(ValueError, match=r"carries PEFT layers.*as an expert source"):
            moelora.patch_model(model, **FRESH)


def test_a_model_whose_inputs_cannot_be_guessed():
    """It asks for probe_inputs; with wrong ones it shows what failed; with right ones it is patched."""
    model = Mlp()
    with untouched(model), pytest.raises(ValueError, match="probe_inputs"):
        moelora.patch_model(model, targets=["inner"], **FRESH)
    with untouched(model), pytest.raises(ValueError, match="probe forward of Mlp failed"):
        moelora.patch_model(model, targets=["inner"], probe_inputs=torch.zeros(2, 5), **FRESH)

    moelora.patch_model(model, targets=["inner"], probe_inputs=torch.zeros(2, 4), **FRESH)
    assert model(torch.zeros(2, 4)).shape == (2, 4)


def test_verbs_for_a_model_that_is_not_patched():
    """Each says what to call first."""
    model = tiny.model("gpt2")

    def enter(context) -> None:
        with context:
            pass

    for verb in (
        lambda: moelora.unpatch_model(model),
        lambda: moelora.expert_names(model),
        lambda: moelora.aux_loss(model),
        lambda: moelora.print_trainable_parameters(model),
        lambda: enter(moelora.disabled(model)),
        lambda: enter(moelora.record(model)),
        lambda: enter(moelora.use_experts(model, "a")),
        lambda: enter(moelora.given_experts(model, 0)),
    ):
        with untouched(model), pytest.raises(ValueError, match=r"GPT2LMHeadModel is no patched model.*patch_model"):
            verb()


@pytest.mark.parametrize(
    ("experts", "options", "match"),
    [
        ("expert9", {}, "no expert 'expert9'; this model has 2 experts, such as .*expert0"),
        ({"expert0": 1.0, "exprt1": 1.0}, {}, "no expert 'exprt1'.*expert1"),
        (["expert0", "nobody"], {}, "no expert 'nobody'"),
        ({"expert0": float("nan")}, {}, "weight of expert 'expert0' is nan"),
        ({"expert0": float("inf")}, {}, "weight of expert 'expert0' is inf"),
        ([], {}, "empty list"),
        ([3], {}, "a name, a mapping from names to weights or None, got 3"),
        ("expert0", {"repeats": 2}, "repeats belongs to a list of rows"),
    ],
)
def test_a_fixed_mixture_that_cannot_be(experts, options, match):
    """Found when the context is entered; afterwards the router decides again."""
    model = moelora.patch_model(tiny.model("gpt2"), **FRESH)
    settings = model._moelora.tape.settings
    with (
        pytest.raises((ValueError, TypeError), match=f"{match}|Type-check"),
        moelora.use_experts(model, experts, **options),
    ):
        pass
    assert model._moelora.tape.settings == settings


def test_a_fixed_mixture_of_the_wrong_number_of_rows():
    """Found in the call: the error counts rows and names `repeats`; the next call is a good one."""
    model = moelora.patch_model(tiny.model("gpt2"), **FRESH)
    inputs = tiny.inputs(model, batch=3)
    with torch.no_grad():
        expected = main_output(model(**inputs))
        with moelora.use_experts(model, ["expert0", None]):
            with pytest.raises(ValueError, match=r"each of 2 rows.*shape \(3, 7\).*repeats="):
                model(**inputs)
        with moelora.use_experts(model, ["expert0"] * 3):
            model(**inputs)
        assert torch.equal(main_output(model(**inputs)), expected)


def test_aux_loss_without_routings():
    """In evaluation, and with losses that weigh nothing, it says what is missing."""
    model = moelora.patch_model(tiny.model("gpt2"), **FRESH)
    inputs = tiny.inputs(model)
    model(**inputs)
    with pytest.raises(ValueError, match=r"no routing was kept in the last call.*training mode"):
        moelora.aux_loss(model)
    moelora.unpatch_model(model)
    moelora.patch_model(model, config=MoELoRAConfig(losses=AuxLosses(load_balance=0.0)), **FRESH).train()(**inputs)
    with pytest.raises(ValueError, match="losses that weigh something"):
        moelora.aux_loss(model)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"backend": "triton9"}, "unknown backend 'triton9'.*'auto'"),
        ({"share_router": True, "router": moelora.Given()}, "share_router has no meaning"),
    ],
)
def test_a_configuration_that_cannot_be(options, match):
    """Found when it is made, not when the model runs."""
    with pytest.raises(ValueError, match=match):
        MoELoRAConfig(**options)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_of_losses(weight):
    """A loss weighs a finite number, at least 0."""
    with pytest.raises(ValueError, match="weight of the loss z_loss must be finite"):
        AuxLosses(z_loss=weight)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"top_k": 1}, "renormalized weight is always 1"),
        ({"combine": "sum"}, "unknown combine 'sum'"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"init_std": -1.0}, "must not be negative"),
        ({"balance_bias_speed": -1.0}, "must not be negative"),
    ],
)
def test_a_router_that_cannot_be(options, match):
    """Found when it is made. Under the checks of these tests a wrong word is a TypeError before that."""
    with pytest.raises((ValueError, TypeError), match=f"{match}|Type-check error"):
        moelora.Learned(**options)
