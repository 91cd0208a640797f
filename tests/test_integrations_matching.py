"""Placing adapters on models: exact names, other prefixes, older names, fused and split projections, and refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from moelora.integrations.adapters import Adapter, AdapterError, AdapterSource, SiteFactors, load_adapters
from moelora.integrations.matching import match_adapter
from moelora.testing import tiny

GPT2 = Path(__file__).parent / "data" / "adapter_gpt2_tigrinya"


def linears(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Every linear of a model with its widths."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[path] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            found[path] = (module.weight.shape[0], module.weight.shape[1])
    return found


def factors(width: int, out: int, rank: int = 2, scale: float = 2.0, bias: bool = False) -> SiteFactors:
    """Random factors; B as a transposed view, as they come out of a file."""
    bias_O = torch.randn(out) if bias else None
    return SiteFactors(A_RD=torch.randn(rank, width), B_RO=torch.randn(out, rank).t(), scale=scale, bias_O=bias_O)


def adapter(sites: dict[str, tuple[int, int]], **options: float) -> Adapter:
    """An adapter with random factors at these paths."""
    source = AdapterSource(kind="state_dict", location="test")
    found = {path: factors(*widths, **options) for path, widths in sites.items()}  # type: ignore[arg-type]
    return Adapter(name="x", source=source, factors=found)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3", "bert", "t5", "vit", "mamba", "deberta-v2"])
def test_exact_names(family: str):
    """An adapter of the model's own paths matches module by module, and its factors are the same objects."""
    sites = linears(tiny.model(family))
    given_adapter = adapter(sites)

    match = match_adapter(given_adapter, sites, model_type=family).check()

    assert match.factors == given_adapter.factors
    assert match.unmatched == ()
    assert match.notes == ()


def test_the_real_adapter_fits_gpt2():
    """The trained adapter finds all 36 modules of a GPT-2 of its shape, both c_proj of every block."""
    config = transformers.GPT2Config(n_layer=12, n_embd=768, vocab_size=16, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    (loaded,) = load_adapters([GPT2])

    match = match_adapter(loaded, linears(model), model_type="gpt2").check()
    bare = match_adapter(loaded, linears(model.transformer), model_type="gpt2").check()

    assert len(match.factors) == 36
    assert "transformer.h.11.mlp.c_proj" in match.factors
    assert set(bare.factors) == {path.removeprefix("transformer.") for path in match.factors}
    assert len(bare.notes) == 1


def test_the_real_adapter_does_not_fit_a_wider_gpt2():
    """A base of other widths is refused with both widths in the message."""
    config = transformers.GPT2Config(n_layer=1, n_embd=48, n_head=4, vocab_size=16, n_positions=8)
    (loaded,) = load_adapters([GPT2])

    with pytest.raises(AdapterError, match=r"fits no module.*768 to 2304 wide.*48 to 144"):
        match_adapter(loaded, linears(transformers.GPT2LMHeadModel(config)), model_type="gpt2").check(strict=False)


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_missing_and_extra_prefixes(family: str):
    """A prefix that the model has and the adapter has not, or the other way round, does not matter."""
    sites = {path: widths for path, widths in linears(tiny.model(family)).items() if path.count(".") > 2}
    cut = {path.partition(".")[2]: widths for path, widths in sites.items()}
    longer = {f"model.{path}": widths for path, widths in sites.items()}

    for paths in (cut, longer):
        match = match_adapter(adapter(paths), sites, model_type=family).check()
        assert list(match.factors) == list(sites)


def test_ambiguous_prefixes_are_refused():
    """A path that two towers could mean is not guessed."""
    sites = {"text.layers.0.q_proj": (8, 8), "vision.layers.0.q_proj": (8, 8), "text.layers.1.q_proj": (8, 8)}

    match = match_adapter(adapter({"layers.0.q_proj": (8, 8), "layers.1.q_proj": (8, 8)}), sites)

    assert list(match.factors) == ["text.layers.1.q_proj"]
    ((path, reason),) = match.unmatched
    assert path == "layers.0.q_proj"
    assert "text.layers.0.q_proj, vision.layers.0.q_proj" in reason


V4_NAMES = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}


@pytest.mark.parametrize("with_model", [False, True])
def test_vit_adapters_of_transformers_4(with_model: bool):
    """Every projection of ViT is found by its name of before the renaming, without and with a head."""
    model = tiny.model("vit")
    sites = {path: widths for path, widths in linears(model).items() if ".layers." in f".{path}"}
    old = {}
    for path, widths in sites.items():
        name = path.replace("layers.", "encoder.layer.").replace("mlp.fc1", "intermediate.dense")
        name = name.replace("mlp.fc2", "output.dense")
        for new, before in V4_NAMES.items():
            name = name.replace(new, before)
        old[name] = widths

    match = match_adapter(adapter(old), sites, model_type="vit", model=model if with_model else None).check()

    assert len(sites) >= 12
    assert list(match.factors) == list(sites)
    assert list(match.notes) == [f"{len(sites)} module paths were matched under another name or prefix"]


def test_dinov2_adapters_of_transformers_4():
    """DINOv2 kept its layer list and renamed its attention."""
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    sites = linears(transformers.Dinov2Model(config))
    old = {}
    for path, widths in sites.items():
        name = path
        for new, before in V4_NAMES.items():
            name = name.replace(new, before)
        old[f"dinov2.{name}"] = widths

    match = match_adapter(adapter(old), sites, model_type="dinov2").check()

    assert list(match.factors) == list(sites)


def test_llava_adapters_of_transformers_4():
    """A composite model moved its towers; with the model at hand the renames inside its towers are known too."""
    small: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**small, vocab_size=50),
        vision_config=transformers.CLIPVisionConfig(**small, image_size=8, patch_size=4),
    )
    model = transformers.LlavaForConditionalGeneration(config)
    old = {
        "language_model.model.layers.0.self_attn.q_proj": (16, 16),
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj": (16, 16),
        "multi_modal_projector.linear_1": (16, 16),
    }

    match = match_adapter(adapter(old), linears(model), model_type="llava", model=model).check()
    without = match_adapter(adapter(old), linears(model), model_type="llava")

    assert list(match.factors) == [
        "model.language_model.layers.0.self_attn.q_proj",
        "model.vision_tower.encoder.layers.0.self_attn.q_proj",
        "model.multi_modal_projector.linear_1",
    ]
    assert [path for path, _ in without.unmatched] == ["vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"]


def test_mixtral_adapters_of_transformers_4():
    """Attention matches; experts, which are stacked parameters now, are counted and refused."""
    sites = linears(tiny.model("mixtral"))
    attention = {path: widths for path, widths in sites.items() if "self_attn" in path}
    experts = {f"model.layers.0.block_sparse_moe.experts.{expert}.w1": (32, 56) for expert in range(4)}

    match = match_adapter(adapter(attention | experts), sites, model_type="mixtral")

    assert set(match.factors) == set(attention)
    assert {path for path, _ in match.unmatched} == set(experts)
    assert any("8 expert tensors" in note for note in match.notes)
    with pytest.raises(AdapterError, match="4 of its modules have no place"):
        match.check()
    assert match.check(strict=False) is match


def test_what_matches_nothing_names_its_neighbours():
    """A path that the model does not have is reported with the nearest ones."""
    sites = linears(tiny.model("llama"))

    match = match_adapter(adapter({"model.layers.9.self_attn.q_proj": (32, 48)}), sites, model_type="llama")

    with pytest.raises(AdapterError, match=r"nearest are model\.layers\.\d\.self_attn\.q_proj"):
        match.check(strict=False)


def test_one_module_named_twice():
    """Two paths of an adapter that mean one module are refused, not overwritten in silence."""
    sites = {"model.layers.0.q_proj": (8, 8)}

    match = match_adapter(adapter({"model.layers.0.q_proj": (8, 8), "layers.0.q_proj": (8, 8)}), sites)

    assert "names one module twice" in match.unmatched[0][1]


def llama_from(phi3: nn.Module) -> nn.Module:
    """The Llama that computes what this Phi-3 computes, with split projections."""
    config: Any = phi3.config
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters=config.rope_parameters,
            max_position_embeddings=config.max_position_embeddings,
            pad_token_id=config.pad_token_id,
        )
    ).eval()
    weights = {}
    for name, weight in phi3.state_dict().items():
        parent = name.rpartition(".weight")[0].rpartition(".")[0]
        if "qkv_proj" in name:
            key_width = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
            blocks = weight.split([weight.shape[0] - 2 * key_width, key_width, key_width])
            weights |= {
                f"{parent}.{part}.weight": block
                for part, block in zip(("q_proj", "k_proj", "v_proj"), blocks, strict=True)
            }
        elif "gate_up_proj" in name:
            weights |= dict(
                zip((f"{parent}.gate_proj.weight", f"{parent}.up_proj.weight"), weight.chunk(2), strict=True)
            )
        else:
            weights[name] = weight
    llama.load_state_dict(weights)
    return llama


def add(model: nn.Module, sites: dict[str, SiteFactors]) -> nn.Module:
    """Merge factors into a model's weights."""
    with torch.no_grad():
        for path, site in sites.items():
            model.get_submodule(path).weight += site.scale * (site.A_RD.T @ site.B_RO).T  # type: ignore[operator, arg-type]
    return model


@pytest.mark.parametrize("leaves", ["q k v o gate up down", "q v", "k", "up"])
def test_split_adapters_on_a_fused_model(leaves: str):
    """An adapter of split projections changes Phi-3 exactly as it changes the equivalent Llama."""
    phi3 = tiny.model("phi3")
    llama = llama_from(phi3)
    inputs = tiny.inputs(phi3)
    torch.testing.assert_close(llama(**inputs).logits, phi3(**inputs).logits, rtol=1e-4, atol=1e-5)
    names = tuple(f"{leaf}_proj" for leaf in leaves.split())
    chosen = {path: widths for path, widths in linears(llama).items() if path.endswith(names)}
    given_adapter = adapter(chosen, scale=0.5)

    match = match_adapter(given_adapter, linears(phi3), model_type="phi3").check()

    before = phi3(**inputs).logits
    after = add(phi3, match.factors)(**inputs).logits
    torch.testing.assert_close(after, add(llama, given_adapter.factors)(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, after, atol=1e-3)


def test_fused_adapters_on_a_split_model():
    """An adapter of Phi-3's fused projections changes the equivalent Llama exactly as it changes Phi-3."""
    phi3 = tiny.model("phi3")
    llama = llama_from(phi3)
    inputs = tiny.inputs(phi3)
    sites = {path: widths for path, widths in linears(phi3).items() if path != "lm_head"}
    given_adapter = adapter(sites, scale=0.5)

    match = match_adapter(given_adapter, linears(llama), model_type="llama").check()

    after = add(llama, match.factors)(**inputs).logits
    torch.testing.assert_close(after, add(phi3, given_adapter.factors)(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert any("split onto" in note for note in match.notes)


@pytest.mark.parametrize("family", ["gpt_neox", "bloom", "falcon"])
def test_interleaved_heads_are_refused(family: str):
    """Split factors have no certain place in a projection that interleaves its heads."""
    sites = linears(tiny.model(family))
    fused = next(path for path in sites if path.endswith("query_key_value"))
    path = f"{fused.rpartition('.')[0]}.q_proj"

    match = match_adapter(adapter({path: (32, 32)}), sites, model_type=family)

    assert "per head in query_key_value" in match.unmatched[0][1]


def test_interleaved_factors_are_refused():
    """Factors of a projection that interleaves its heads are not cut for a split model."""
    sites = linears(tiny.model("llama"))

    match = match_adapter(adapter({"model.layers.0.self_attn.query_key_value": (32, 96)}), sites, model_type="llama")

    assert "per head in query_key_value" in match.unmatched[0][1]


def test_fused_names_of_unknown_order_are_refused():
    """A fused projection of an unknown architecture is not guessed to be q, k, v."""
    sites = {"model.layers.0.attn.qkv_proj": (8, 24)}

    match = match_adapter(adapter({"model.layers.0.attn.q_proj": (8, 8)}), sites, model_type="codegen")
    unknown = match_adapter(adapter({"model.layers.0.attn.q_proj": (8, 8)}), sites)

    assert "per head" in match.unmatched[0][1]
    assert "not known for model_type=None" in unknown.unmatched[0][1]


@pytest.mark.parametrize("widths", [(8, 5), (6, 8)])
def test_fused_widths_that_do_not_add_up(widths: tuple[int, int]):
    """Parts that cannot make up the fused projection are refused with the widths."""
    sites = {"model.layers.0.attn.qkv_proj": (8, 24)}
    parts = {"model.layers.0.attn.q_proj": (8, 8), "model.layers.0.attn.v_proj": widths}

    match = match_adapter(adapter(parts), sites, model_type="phi3")

    assert match.factors == {}
    assert all("do not make up" in reason for _, reason in match.unmatched)


def test_a_fused_adapter_of_other_widths():
    """A fused projection whose rows are not those of the model's parts is refused."""
    sites = {f"model.layers.0.attn.{part}": (8, 8) for part in ("q_proj", "k_proj", "v_proj")}

    match = match_adapter(adapter({"model.layers.0.attn.qkv_proj": (8, 20)}), sites, model_type="llama")

    assert "together are 8 to 24" in match.unmatched[0][1]
