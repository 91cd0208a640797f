"""Which sites a model has: by the table, by structure, by name; what is refused, and what the errors say."""

import re
from collections import Counter
from typing import Any

import pytest
from resolved_sites import by_role, last
from torch import nn
from transformers.models.dinov2 import modeling_dinov2

from moelora.integrations import families
from moelora.integrations.families import linears
from moelora.integrations.sites import TargetError
from moelora.integrations.targets import resolve_sites
from moelora.testing import tiny

OLD_DINOV2 = hasattr(modeling_dinov2, "Dinov2SelfAttention")

# Written down by reading the models, not our table: role -> ending -> number of sites in the tiny model.
QKV = {"q_proj": 2, "k_proj": 2, "v_proj": 2}
LLAMA = {"attn_in": {f"self_attn.{name}": 2 for name in QKV}, "attn_out": {"self_attn.o_proj": 2}}
BERT = {
    "attn_in": {"attention.self.query": 2, "attention.self.key": 2, "attention.self.value": 2},
    "attn_out": {"attention.output.dense": 2},
}
BART = {
    "attn_in": {"self_attn.q_proj": 4, "self_attn.k_proj": 4, "self_attn.v_proj": 4},
    "attn_out": {"self_attn.out_proj": 4},
    "cross_in": {"encoder_attn.q_proj": 2, "encoder_attn.k_proj": 2, "encoder_attn.v_proj": 2},
    "cross_out": {"encoder_attn.out_proj": 2},
}
TOWERS = {
    "attn_in": {"self_attn.q_proj": 4, "self_attn.k_proj": 4, "self_attn.v_proj": 4},
    "attn_out": {"self_attn.out_proj": 4},
}
VIT = {
    "attn_in": {"attention.q_proj": 2, "attention.k_proj": 2, "attention.v_proj": 2},
    "attn_out": {"attention.o_proj": 2},
}
# DINOv2 until it took ViT's names, after transformers 5.17
OLD_VIT = {
    "attn_in": {"attention.attention.query": 2, "attention.attention.key": 2, "attention.attention.value": 2},
    "attn_out": {"attention.output.dense": 2},
}
MAMBA = {"ssm_in": {"mixer.in_proj": 2}, "ssm_out": {"mixer.out_proj": 2}}
ONE_ATTENTION = {"self_attn.q_proj": 1, "self_attn.k_proj": 1, "self_attn.v_proj": 1}
HYBRID = {
    "attn_in": ONE_ATTENTION,
    "attn_out": {"self_attn.o_proj": 1},
    "ssm_in": {"mamba.in_proj": 1},
    "ssm_out": {"mamba.out_proj": 1},
}
EXPECTED: dict[str, dict[str, dict[str, int]]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": LLAMA,
    "gemma3": LLAMA,
    "olmo2": LLAMA,
    "cohere2": LLAMA,
    "stablelm": LLAMA,
    "starcoder2": LLAMA,
    "smollm3": LLAMA,
    "granite": LLAMA,
    "glm4": LLAMA,
    "nemotron": LLAMA,
    "mixtral": LLAMA,
    "qwen3_moe": LLAMA,
    "olmoe": LLAMA,
    "gpt_oss": LLAMA,
    "phi": {"attn_in": {f"self_attn.{name}": 2 for name in QKV}, "attn_out": {"self_attn.dense": 2}},
    "opt": {"attn_in": {f"self_attn.{name}": 2 for name in QKV}, "attn_out": {"self_attn.out_proj": 2}},
    "gptj": {"attn_in": {f"attn.{name}": 2 for name in QKV}, "attn_out": {"attn.out_proj": 2}},
    "gpt_neo": {"attn_in": {f"attn.attention.{name}": 2 for name in QKV}, "attn_out": {"attn.attention.out_proj": 2}},
    "phi3": {"attn_in": {"self_attn.qkv_proj": 2}, "attn_out": {"self_attn.o_proj": 2}},
    "gpt2": {"attn_in": {"attn.c_attn": 2}, "attn_out": {"attn.c_proj": 2}},
    "gpt_bigcode": {"attn_in": {"attn.c_attn": 2}, "attn_out": {"attn.c_proj": 2}},
    "gpt_neox": {"attn_in": {"attention.query_key_value": 2}, "attn_out": {"attention.dense": 2}},
    "bloom": {"attn_in": {"self_attention.query_key_value": 2}, "attn_out": {"self_attention.dense": 2}},
    "falcon": {"attn_in": {"self_attention.query_key_value": 2}, "attn_out": {"self_attention.dense": 2}},
    "persimmon": {"attn_in": {"self_attn.query_key_value": 2}, "attn_out": {"self_attn.dense": 2}},
    "mpt": {"attn_in": {"attn.Wqkv": 2}, "attn_out": {"attn.out_proj": 2}},
    "codegen": {"attn_in": {"attn.qkv_proj": 2}, "attn_out": {"attn.out_proj": 2}},
    "modernbert": {"attn_in": {"attn.Wqkv": 2}, "attn_out": {"attn.Wo": 2}},
    "deepseek_v3": {
        "attn_in": {"self_attn.q_a_proj": 2, "self_attn.kv_a_proj_with_mqa": 2},
        "attn_out": {"self_attn.o_proj": 2},
    },
    "bert": BERT,
    "roberta": BERT,
    "electra": BERT,
    "deberta-v2": {
        "attn_in": {"self.query_proj": 2, "self.key_proj": 2, "self.value_proj": 2},
        "attn_out": {"attention.output.dense": 2},
    },
    "distilbert": {
        "attn_in": {"attention.q_lin": 2, "attention.k_lin": 2, "attention.v_lin": 2},
        "attn_out": {"attention.out_lin": 2},
    },
    # one block, run twice
    "albert": {
        "attn_in": {"attention.query": 1, "attention.key": 1, "attention.value": 1},
        "attn_out": {"attention.dense": 1},
    },
    "t5": {
        "attn_in": {"SelfAttention.q": 4, "SelfAttention.k": 4, "SelfAttention.v": 4},
        "attn_out": {"SelfAttention.o": 4},
        "cross_in": {"EncDecAttention.q": 2, "EncDecAttention.k": 2, "EncDecAttention.v": 2},
        "cross_out": {"EncDecAttention.o": 2},
    },
    "bart": BART,
    "whisper": BART,
    "vit": VIT,
    "dinov2": OLD_VIT if OLD_DINOV2 else VIT,
    "clip": TOWERS,
    "siglip": TOWERS,
    "wav2vec2": {
        "attn_in": {"attention.q_proj": 2, "attention.k_proj": 2, "attention.v_proj": 2},
        "attn_out": {"attention.out_proj": 2},
    },
    "mamba": MAMBA,
    "falcon_mamba": MAMBA,
    "mamba2": MAMBA,
    "jamba": HYBRID,
    "bamba": HYBRID,
    "granitemoehybrid": HYBRID,
    # attention and mixer beside each other in both layers
    "falcon_h1": LLAMA | {"ssm_in": {"mamba.in_proj": 2}, "ssm_out": {"mamba.out_proj": 2}},
    # four layers, the second and fourth with attention before the mixer
    "zamba2": LLAMA | {"ssm_in": {"mamba.in_proj": 4}, "ssm_out": {"mamba.out_proj": 4}},
    "nemotron_h": {
        "attn_in": {"mixer.q_proj": 1, "mixer.k_proj": 1, "mixer.v_proj": 1},
        "attn_out": {"mixer.o_proj": 1},
        "ssm_in": {"mixer.in_proj": 1},
        "ssm_out": {"mixer.out_proj": 1},
    },
    "recurrent_gemma": {
        "attn_in": {"temporal_block.q_proj": 1, "temporal_block.k_proj": 1, "temporal_block.v_proj": 1},
        "attn_out": {"temporal_block.o_proj": 1},
        "ssm_in": {"temporal_block.linear_x": 2, "temporal_block.linear_y": 2},
        "ssm_out": {"temporal_block.linear_out": 2},
    },
    "qwen3_next": {
        "attn_in": ONE_ATTENTION,
        "attn_out": {"self_attn.o_proj": 1},
        "ssm_in": {"linear_attn.in_proj_qkvz": 1, "linear_attn.in_proj_ba": 1},
        "ssm_out": {"linear_attn.out_proj": 1},
    },
}

# What reads the same tensor, as sets of last names; everything else reads alone.
TOGETHER: dict[str, list[set[str]]] = {
    "deepseek_v3": [{"q_a_proj", "kv_a_proj_with_mqa"}],
    "bert": [{"query", "key", "value"}],
    "roberta": [{"query", "key", "value"}],
    "electra": [{"query", "key", "value"}],
    "albert": [{"query", "key", "value"}],
    # query and key are called a second time, on the relative positions; value is not
    "deberta-v2": [{"query_proj", "key_proj"}],
    "dinov2": [{"query", "key", "value"} if OLD_DINOV2 else {"q_proj", "k_proj", "v_proj"}],
    "distilbert": [{"q_lin", "k_lin", "v_lin"}],
    "t5": [{"q", "k", "v"}, {"k", "v"}],
    "bart": [{"q_proj", "k_proj", "v_proj"}, {"k_proj", "v_proj"}],
    "whisper": [{"q_proj", "k_proj", "v_proj"}, {"k_proj", "v_proj"}],
    "recurrent_gemma": [{"linear_x", "linear_y"}, {"q_proj", "k_proj", "v_proj"}],
    "qwen3_next": [{"in_proj_qkvz", "in_proj_ba"}, {"q_proj", "k_proj", "v_proj"}],
    **{key: [] for key in ("phi3", "gpt2", "gpt_bigcode", "gpt_neox", "bloom", "falcon", "persimmon")},
    **{key: [] for key in ("mpt", "codegen", "modernbert", "mamba", "falcon_mamba", "mamba2")},
}


def test_every_family_is_expected():
    """No tiny family is left out of the tables of this file."""
    assert set(EXPECTED) == set(tiny.FAMILIES)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_auto_finds_exactly_the_attention_and_state_space_projections(family: str):
    """By the table of families, with the sizes that the modules have, and nothing else."""
    model = tiny.model(family)
    resolution = resolve_sites(model)

    found = by_role(resolution)
    assert set(found) == set(EXPECTED[family])
    for role, endings in EXPECTED[family].items():
        counted = {e: sum(path.endswith("." + e) for path in found[role]) for e in endings}
        assert counted == endings, role
        assert sum(endings.values()) == len(found[role]), role
    for site in resolution.sites:
        module = model.get_submodule(site.path)
        shape = tuple(model.state_dict()[site.path + ".weight"].shape)
        assert (site.in_features, site.out_features) == (shape if type(module).__name__ == "Conv1D" else shape[::-1])
        assert site.aliases == ()
        assert site.reads_encoder == (site.role == "cross_in" and last(site.path) in ("k", "v", "k_proj", "v_proj"))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_structure_finds_what_the_table_says(family: str, monkeypatch: pytest.MonkeyPatch):
    """With an empty table the same sites, roles, groups and encoder readers come from structure and probe alone."""
    model = tiny.model(family)
    by_table = resolve_sites(model)
    monkeypatch.setattr(families, "MODEL_TYPES", {})
    monkeypatch.setattr("moelora.integrations.targets.MODEL_TYPES", {})
    assert resolve_sites(model) == by_table


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_groups_are_what_reads_the_same_tensor(family: str):
    """q, k and v of one layer are together, in cross-attention k and v; a group never spans layers."""
    resolution = resolve_sites(tiny.model(family))
    together = TOGETHER.get(family, [{"q_proj", "k_proj", "v_proj"}])

    assert Counter(path for group in resolution.groups for path in group) == Counter(s.path for s in resolution.sites)
    seen = []
    for group in resolution.groups:
        assert len({re.sub(r"(\.\d+)\..*", r"\1", path) for path in group}) == 1
        if len(group) > 1:
            assert {last(path) for path in group} in together
            seen.append(frozenset(map(last, group)))
    assert set(seen) == set(map(frozenset, together))


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "jamba"])
def test_dt_proj_is_refused_with_the_reason(family: str):
    """Listed beside the sites under "auto"; an error when it is asked for by name, predicate or adapter."""
    model = tiny.model(family)
    paths = [path for path in linears(model) if path.endswith("dt_proj")]
    resolution = resolve_sites(model)
    assert sorted(item.path for item in resolution.refused) == sorted(paths)
    assert all("reads dt_proj.weight directly" in item.reason for item in resolution.refused)
    assert "dt_proj" in str(resolution)
    asked: tuple[dict[str, Any], ...] = (
        {"targets": ["in_proj", "dt_proj"]},
        {"targets": lambda path, module: path.endswith("dt_proj")},
        {"adapter_paths": paths},
    )
    for arguments in asked:
        with pytest.raises(TargetError, match=r"dt_proj.*reads dt_proj\.weight directly") as caught:
            resolve_sites(model, **arguments)
        assert [item.path for item in caught.value.refused] == paths

    # not strict: what can be patched is, the rest is listed
    lenient = resolve_sites(model, targets=["in_proj", "dt_proj"], strict=False)
    assert {last(site.path) for site in lenient.sites} == {"in_proj"}
    assert [item.path for item in lenient.refused] == paths


def test_x_proj_is_a_site_only_when_asked_for():
    """Mamba's x_proj may be patched by name or role, and is not by default."""
    model = tiny.model("mamba")
    assert {site.role for site in resolve_sites(model, targets=["x_proj"]).sites} == {"ssm_x"}
    assert {last(site.path) for site in resolve_sites(model, roles=["ssm_x", "ssm_in"]).sites} == {"x_proj", "in_proj"}


@pytest.mark.parametrize(
    ("family", "mlp_in", "mlp_out"),
    [
        ("llama", {"gate_proj", "up_proj"}, {"down_proj"}),
        ("gpt2", {"c_fc"}, {"c_proj"}),
        ("bert", {"dense"}, {"dense"}),
        ("t5", {"wi"}, {"wo"}),
        ("vit", {"fc1"}, {"fc2"}),
        ("opt", {"fc1"}, {"fc2"}),
        ("modernbert", {"Wi"}, {"Wo"}),
        ("albert", {"ffn"}, {"ffn_output"}),
        ("jamba", {"gate_proj", "up_proj"}, {"down_proj"}),
        ("nemotron_h", {"up_proj"}, {"down_proj"}),
        ("qwen3_next", {"gate_proj", "up_proj"}, {"down_proj"}),
    ],
)
@pytest.mark.parametrize("table", [True, False])
def test_mlp_roles_on_request(
    family: str, mlp_in: set[str], mlp_out: set[str], table: bool, monkeypatch: pytest.MonkeyPatch
):
    """`roles` reaches the MLP too, by table and by structure, and never a router gate or a head."""
    if not table:
        monkeypatch.setattr("moelora.integrations.targets.MODEL_TYPES", {})
    found = by_role(resolve_sites(tiny.model(family), roles=["mlp_in", "mlp_out"]))
    assert {last(path) for path in found["mlp_in"]} == mlp_in
    assert {last(path) for path in found["mlp_out"]} == mlp_out
    assert not [path for paths in found.values() for path in paths if "attention.output" in path]


@pytest.mark.parametrize("table", [True, False])
def test_dinov2s_gated_mlp(table: bool, monkeypatch: pytest.MonkeyPatch):
    """Its large models have a gated MLP: one fused projection, or two, depending on the release."""
    if not table:
        monkeypatch.setattr("moelora.integrations.targets.MODEL_TYPES", {})
    model = tiny.model("dinov2", use_swiglu_ffn=True)
    found = by_role(resolve_sites(model, roles=["mlp_in", "mlp_out"]))
    assert {last(path) for path in found["mlp_in"]} == ({"weights_in"} if OLD_DINOV2 else {"gate_proj", "up_proj"})
    assert {last(path) for path in found["mlp_out"]} == ({"weights_out"} if OLD_DINOV2 else {"down_proj"})


def test_with_adapters_auto_is_what_they_have_factors_for():
    """Attention, MLP or both: exactly the adapters' paths, in the order of the model, roles narrowing them."""
    model = tiny.model("llama")
    paths = {"model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"}
    assert [site.path for site in resolve_sites(model, adapter_paths=paths).sites] == sorted(paths)
    narrowed = resolve_sites(model, adapter_paths=paths, roles=["mlp_in"])
    assert [site.path for site in narrowed.sites] == ["model.layers.1.mlp.up_proj"]
    with pytest.raises(TargetError, match=r"no linear at 'model\.layers\.0\.self_attn\.q_prj'.*near names: .*q_proj"):
        resolve_sites(model, adapter_paths=["model.layers.0.self_attn.q_prj"])


def test_names_are_paths_or_endings_of_whole_parts():
    """`c_proj` is both of GPT-2's, `attn.c_proj` one, `proj` none; roles narrow a list as well."""
    model = tiny.model("gpt2")
    assert len(resolve_sites(model, targets=["c_proj"]).sites) == 4
    assert len(resolve_sites(model, targets=["attn.c_proj"]).sites) == 2
    assert len(resolve_sites(model, targets=["transformer.h.1.attn.c_proj"]).sites) == 1
    assert len(resolve_sites(model, targets=("c_proj", "attn.c_proj"), roles=["attn_out"]).sites) == 2
    with pytest.raises(TargetError, match=r"targets entry 'proj' matches no linear; near names: c_proj"):
        resolve_sites(model, targets=["c_attn", "proj"])


def test_every_entry_must_match_and_near_names_help():
    """One wrong entry beside right ones is an error, which names the entry and what is near to it."""
    model = tiny.model("llama")
    with pytest.raises(TargetError, match=r"'qproj' matches no linear; near names: .*q_proj"):
        resolve_sites(model, targets=["k_proj", "qproj"])
    with pytest.raises(TargetError, match=r"'self_attn.c_attn' matches no linear; near names: .*self_attn\."):
        resolve_sites(model, targets=["self_attn.c_attn"])
    with pytest.raises(TargetError, match=r"'zzz' matches no linear; this model has q_proj, k_proj"):
        resolve_sites(model, targets=["zzz"])
    # an embedding is a module, and no linear
    with pytest.raises(TargetError, match=r"'embed_tokens' matches no linear"):
        resolve_sites(model, targets=["embed_tokens"])


def test_wrong_kinds_of_targets_say_what_to_write():
    """A bare string, an empty list, a predicate that chooses nothing, an unknown role, a role the model has not."""
    model = tiny.model("llama")
    with pytest.raises(TargetError, match=r"write targets=\['q_proj'\]"):
        resolve_sites(model, targets="q_proj")
    with pytest.raises(TargetError, match="targets must name modules"):
        resolve_sites(model, targets=[])
    with pytest.raises(TargetError, match="chose none of the 15 linears"):
        resolve_sites(model, targets=lambda path, module: False)
    with pytest.raises(TargetError, match=r"unknown roles \['attention'\]; expected one or more of attn_in"):
        resolve_sites(model, roles=["attention"])
    with pytest.raises(TargetError, match=r"no linear with role ssm_in; its linears have the roles attn_in, attn_out"):
        resolve_sites(model, roles=["ssm_in"])
    with pytest.raises(TargetError, match="no linear projection"):
        resolve_sites(nn.Sequential(nn.ReLU()))


def test_a_head_is_patched_only_by_name():
    """The output head has the role "other": never automatic, possible by name."""
    model = tiny.model("llama")
    assert [site.role for site in resolve_sites(model, targets=["lm_head"]).sites] == ["other"]
    assert "lm_head" not in {site.path for site in resolve_sites(model).sites}
