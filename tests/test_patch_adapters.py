"""Adapters through the front door: every kind of source and of LoRA, and what each does once it is in a model."""

from pathlib import Path

import pytest
import torch
import transformers
from adapters_on_disk import peft_model
from front_door import WEIGHTS, alone, assert_same, in_memory, lora, output_of
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import moelora
from moelora import Learned, MoELoRAConfig
from moelora.mixture import find_mixture
from moelora.testing import tiny
from moelora.testing.hub_server import HubServer

REAL = Path(__file__).parent / "data" / "adapter_gpt2_tigrinya"


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    """Three adapters of a tiny Llama, on disk, with what PEFT makes of each."""
    folder = tmp_path_factory.mktemp("adapters")
    found = {}
    for seed, name in enumerate(("math", "code", "law"), start=1):
        found[name] = (folder / name, output_of(peft_model("llama", folder / name, seed=seed)))
    return found


def test_a_list_of_every_kind_of_source(three, tmp_path, monkeypatch):
    """Folders, hub ids with revisions and sub-folders, state dicts and a PeftModel, in one list, with derived names."""
    folders = {name: folder for name, (folder, _) in three.items()}
    live = PeftModel.from_pretrained(tiny.model("llama"), str(folders["law"]), adapter_name="court")
    live.load_adapter(str(folders["math"]), "sums")
    state_dict, config = in_memory(folders["code"])
    monkeypatch.chdir(folders["math"].parent)
    with HubServer({"acme/math-lora": folders["math"], "acme/many": {}}) as hub:
        first = hub.repos["acme/math-lora"].refs["main"]
        changed = {path.name: path.read_bytes() for path in folders["code"].glob("adapter*")}
        hub.repos["acme/math-lora"].commit(changed)
        in_folder = {f"eu/law/{path.name}": path.read_bytes() for path in folders["law"].glob("adapter*")}
        tagged = hub.repos["acme/many"].commit(in_folder)
        hub.repos["acme/many"].tag("v1")
        hub.repos["acme/many"].commit(dict.fromkeys(in_folder))

        model = moelora.patch_model(
            tiny.model("llama"),
            [
                folders["math"],
                str(folders["code"]),
                "./law",
                "acme/math-lora",
                f"acme/math-lora@{first}",
                "acme/many@v1:eu/law",
                (state_dict, config),
                {"state_dict": state_dict, "config": config},
                live,
            ],
            endpoint=hub.endpoint,
            cache_dir=tmp_path,
        )

    wanted = {
        "math": "math",
        "code": "code",
        "law": "law",
        "math-lora": "code",  # main has moved on
        "math-lora-2": "math",
        "law-2": "law",
        "expert-6": "code",
        "expert-7": "code",
        "court": "law",
        "sums": "math",
    }
    assert moelora.expert_names(model) == list(wanted)
    for name, adapter in wanted.items():
        assert_same(alone(model, name), three[adapter][1])
    sources = dict(zip(wanted, find_mixture(model)[1].sources, strict=True))
    assert sources["math-lora-2"]["commit"] == first
    assert (sources["law-2"]["commit"], sources["law-2"]["subfolder"]) == (tagged, "eu/law")
    assert len({source["sha256"] for source in sources.values()} - {None}) == 3


def test_a_mapping_gives_the_names(three, tmp_path):
    """Names are the user's own, with dots too, in the order of the mapping; `revision` counts where none is named."""
    with HubServer({"acme/math-lora": three["math"][0]}) as hub:
        first = hub.repos["acme/math-lora"].refs["main"]
        hub.repos["acme/math-lora"].commit({path.name: path.read_bytes() for path in three["code"][0].glob("a*")})
        experts = {"llama-3.1": "acme/math-lora", "forward": three["law"][0], "weight": in_memory(three["code"][0])}
        model = moelora.patch_model(
            tiny.model("llama"), experts, revision=first, endpoint=hub.endpoint, cache_dir=tmp_path
        )

    assert moelora.expert_names(model) == ["llama-3.1", "forward", "weight"]
    for name, adapter in {"llama-3.1": "math", "forward": "law", "weight": "code"}.items():
        assert_same(alone(model, name), three[adapter][1])


def test_a_live_model_counts_as_it_is_now(three):
    """A PeftModel's scale may have been changed since it was loaded; the mixture takes what acts now."""
    live = PeftModel.from_pretrained(tiny.model("llama"), str(three["law"][0]))
    for module in live.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", 0.5)
    expected = output_of(live.eval())

    model = moelora.patch_model(tiny.model("llama"), {"half": live}, router="given")

    assert_same(alone(model, "half"), expected)
    assert (alone(model, "half") - three["law"][1]).abs().max() > 1e-3


def test_a_report_of_a_folder_and_of_a_hub_id(three, tmp_path):
    """`inspect_adapter` says what would be loaded, from the config and the header alone."""
    local = moelora.inspect_adapter(three["law"][0])
    with HubServer({"acme/law": three["law"][0]}) as hub:
        remote = moelora.inspect_adapter("acme/law", endpoint=hub.endpoint, cache_dir=tmp_path)
        commit = hub.repos["acme/law"].refs["main"]

    for report in (local, remote):
        assert report.ok, report.problems
        assert (report.name, report.ranks, report.sites) == ("law", (2, 4), 8)
        assert report.scales == (1.25, 2.0, 4.0)  # alpha 8 over ranks 4 and 2, and 5 over 4
        assert report.targets == ("k_proj", "o_proj", "q_proj", "v_proj")
        assert "loads       yes" in str(report)
    assert remote.source.commit == commit
    assert not list(tmp_path.rglob("*.safetensors")), "a report downloads no weights"


def gpt2() -> nn.Module:
    """A random GPT-2 of the smallest released shape, with few tokens; always the same."""
    config = transformers.GPT2Config(n_layer=12, n_embd=768, n_head=12, vocab_size=64, n_positions=16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(config).eval()


def test_the_trained_gpt2_adapter_equals_peft():
    """On a GPT-2 of its shape its logits are those of PEFT's own model, and all of its 72 tensors are in the banks."""
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = PeftModel.from_pretrained(gpt2(), str(REAL)).eval()(ids).logits

    model = gpt2()
    with torch.no_grad():
        base = model(ids).logits
        moelora.patch_model(model, {"tigrinya": REAL}, router="given")
        with moelora.use_experts(model, "tigrinya"):
            got = model(ids).logits

    assert_same(got, expected)
    assert (expected - base).abs().max() > 1e-3 * base.abs().max(), "the adapter does something"

    tensors = load_file(REAL / WEIGHTS)
    assert len(tensors) == 72
    for path, layer in find_mixture(model)[1].layers.items():
        expert = layer.bank.expert(0)
        assert torch.equal(expert.A_RD, tensors.pop(f"base_model.model.{path}.lora_A.weight"))
        assert torch.equal(expert.B_RO.T, tensors.pop(f"base_model.model.{path}.lora_B.weight"))
        assert expert.scale == 4.0
    assert not tensors, "every tensor of the file is used"


QV = ["q_proj", "v_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
KINDS = {
    "lora_bias": LoraConfig(r=4, lora_alpha=8, target_modules=QV, lora_bias=True),
    "rank and alpha patterns": LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=[*QV, "o_proj"],
        rank_pattern={"q_proj": 2, r"model\.layers\.1\.self_attn\.o_proj": 7, r"layers.\d+.self_attn.v_proj": 3},
        alpha_pattern={r"layers\.0\..*": 5, "v_proj": 32},
    ),
    "rsLoRA": LoraConfig(r=5, lora_alpha=8, target_modules=QV, use_rslora=True, rank_pattern={"v_proj": 2}),
    "rsLoRA with bias": LoraConfig(r=5, lora_alpha=3, target_modules=QV, use_rslora=True, lora_bias=True),
    "MLP only": LoraConfig(r=4, lora_alpha=8, target_modules=MLP),
    "one layer": LoraConfig(r=4, lora_alpha=8, target_modules=QV, layers_to_transform=[1]),
    "all-linear": LoraConfig(r=2, lora_alpha=8, target_modules="all-linear"),
    "a regular expression": LoraConfig(
        r=2, lora_alpha=8, target_modules=r".*layers\.[01]\.(mlp\.up|self_attn\.k)_proj"
    ),
    "negative alpha": LoraConfig(r=2, lora_alpha=-8, target_modules=QV),
    "Gaussian start": LoraConfig(r=2, lora_alpha=8, target_modules=QV, init_lora_weights="gaussian"),
}


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:.*have invalid shape")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_lora_equals_peft(kind, tmp_path):
    """Alone and beside another adapter with other targets and another rank."""
    expected = lora("llama", tmp_path / "it", KINDS[kind])
    other = lora("llama", tmp_path / "other", LoraConfig(r=3, lora_alpha=6, target_modules=["k_proj", "down_proj"]))

    model = moelora.patch_model(tiny.model("llama"), [tmp_path / "it", tmp_path / "other"])

    assert_same(alone(model, "it"), expected)
    assert_same(alone(model, "other"), other)
    assert (expected - output_of(tiny.model("llama"))).abs().max() > 1e-3, "the adapter does something"


@pytest.mark.parametrize(
    "router", [Learned(), Learned(top_k=3, combine="softmax"), Learned(top_k=1, combine="unit"), Learned(noisy=True)]
)
def test_an_expert_without_rows_at_a_site_is_never_chosen(router, tmp_path):
    """Adapters with different targets under a learned router: at a site only those act that have rows there."""
    targets = {"a": QV, "b": ["q_proj", "o_proj"], "c": ["down_proj"], "d": ["q_proj"]}
    for name, modules in targets.items():
        lora("llama", tmp_path / name, LoraConfig(r=2, lora_alpha=8, target_modules=modules))
    model = moelora.patch_model(tiny.model("llama"), [tmp_path / name for name in targets], router=router)

    for mode in (model.train(), model.eval()):
        with moelora.record(mode) as recording:
            output_of(mode)
        assert len(recording) == 8
        for site, routing in recording.items():
            leaf = site.rpartition(".")[2]
            present = {index for index, modules in enumerate(targets.values()) if leaf in modules}
            chosen = set(routing.experts_TK.flatten().tolist())
            assert chosen <= present
            assert routing.experts_TK.shape[1] == min(router.top_k, len(present))
            absent = [index for index in range(len(targets)) if index not in present]
            assert routing.logits_TE is not None
            assert torch.isneginf(routing.logits_TE[:, absent]).all()
            if router.combine == "renormalized":
                torch.testing.assert_close(routing.weights_TK.sum(-1), torch.ones(len(routing.weights_TK)))


def test_part_of_an_adapter_is_another_adapter(tmp_path):
    """Targets that would drop a part are refused; with strict=False the rest is loaded and the loss is said."""
    lora("llama", tmp_path / "wide", LoraConfig(r=2, lora_alpha=8, target_modules=[*QV, "down_proj"]))
    narrow = lora("llama", tmp_path / "less", LoraConfig(r=2, lora_alpha=8, target_modules=QV))
    tensors = load_file(tmp_path / "wide" / WEIGHTS)
    save_file({key: value for key, value in tensors.items() if "down_proj" not in key}, tmp_path / "less" / WEIGHTS)
    del narrow
    config = MoELoRAConfig(router=Learned(top_k=1, combine="unit"))

    with pytest.raises(ValueError, match=r"2 of 6 projections of adapter 'wide'.*strict=False"):
        moelora.patch_model(tiny.model("llama"), [tmp_path / "wide"], targets=QV, config=config)
    plan = moelora.patch_model(
        tiny.model("llama"), [tmp_path / "wide"], targets=QV, strict=False, dry_run=True, config=config
    )
    model = moelora.patch_model(tiny.model("llama"), [tmp_path / "wide"], targets=QV, strict=False, config=config)
    less = moelora.patch_model(tiny.model("llama"), [tmp_path / "less"], config=config)

    assert "dropped: 2 of 6 projections of adapter 'wide'" in str(plan)
    assert torch.equal(alone(model, "wide"), alone(less, "less"))
