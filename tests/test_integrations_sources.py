"""What a user may call an adapter: folders, hub ids, objects; names; and a live PeftModel."""

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from moelora.integrations.adapter_report import inspect_adapter
from moelora.integrations.adapters import AdapterError, AdapterSource, load_adapters, progress_shown
from moelora.integrations.sources import (
    FolderSource,
    HubSource,
    StateDictSource,
    check_name,
    check_revision,
    check_subfolder,
    parse_source,
    parse_sources,
)

TENSORS = {"model.q.lora_A.weight": torch.ones(2, 3), "model.q.lora_B.weight": torch.ones(4, 2)}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


def folder(path: Path) -> Path:
    """A PEFT folder."""
    path.mkdir(parents=True)
    save_file(TENSORS, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.mark.parametrize(
    ("text", "name", "source"),
    [
        ("org/math-lora", "math-lora", HubSource(repo_id="org/math-lora")),
        ("gpt2-lora", "gpt2-lora", HubSource(repo_id="gpt2-lora")),
        ("org/code@9f3c2ab", "code", HubSource(repo_id="org/code", revision="9f3c2ab")),
        ("org/code@refs/pr/3", "code", HubSource(repo_id="org/code", revision="refs/pr/3")),
        ("org/many:law", "law", HubSource(repo_id="org/many", subfolder="law")),
        ("org/many:a/b.c", "b.c", HubSource(repo_id="org/many", subfolder="a/b.c")),
        ("org/many@v1.0:law", "law", HubSource(repo_id="org/many", revision="v1.0", subfolder="law")),
        ("org/llama-3.1", "llama-3.1", HubSource(repo_id="org/llama-3.1")),
    ],
)
def test_hub_ids(text: str, name: str, source: HubSource):
    """The forms of a hub id, each with its name."""
    assert parse_source(text) == {name: source}


@pytest.mark.parametrize(
    "text",
    [
        "org/../etc",
        "a/b/c",
        "org/na me",
        "org/na--me",
        "/etc/passwd",
        "./nowhere",
        "~/nowhere",
        "org/name.git",
        "org/name@",
        "org/name@../main",
        "org/name@/etc",
        "org/name@a b",
        "org/name@-x",
        "org/name:",
        "org/name:..",
        "org/name:a/../../b",
        "org/name:/etc",
        "org/name:a//b",
        "org/name:a\\b",
        "org/name:.hidden",
        "http://host/name",
        "org/name\n",
        "\0",
        "x" * 5000,
        "",
    ],
)
def test_what_is_no_source(text: str):
    """Traversal, absolute paths and malformed ids are refused before anything is opened."""
    with pytest.raises(AdapterError):
        parse_source(text)


@given(st.text(max_size=30))
def test_sub_folders_and_revisions_stay_inside(text: str):
    """Whatever passes the checks has no way up, no root, no backslash, no control character."""
    for check in (check_subfolder, check_revision, check_name):
        try:
            check(text)
        except AdapterError:
            continue
        assert ".." not in text
        assert not text.startswith(("/", "-", "."))
        assert re.fullmatch(r"[A-Za-z0-9._ /+=-]+", text)
        assert check is not check_name or re.fullmatch(r"[A-Za-z0-9._-]+", text)


@pytest.mark.parametrize("name", ["/tmp/out", "../x", "a/b", "", ".", "..", "a b", "ä", "x" * 129, "a\n", 3, None])
def test_names_that_are_paths(name: object):
    """A name with anything but letters, digits, '-', '_' and '.' is refused."""
    with pytest.raises(AdapterError, match="cannot name an expert"):
        parse_sources({name: (TENSORS, CONFIG)})


@pytest.mark.parametrize("name", ["math", "llama-3.1", "forward", "_x", "3", "a.b-c_d"])
def test_names_that_are_names(name: str):
    """Names with dots, digits, or those of module attributes are names like any other."""
    (adapter,) = load_adapters({name: (TENSORS, CONFIG)})

    assert adapter.name == name


def test_derived_names_are_unique_and_tidy(tmp_path: Path):
    """Folders give their last part, with a number where it is taken, and odd characters replaced."""
    first, second, odd = (folder(tmp_path / name) for name in ("a/law", "b/law", "c/my läw (v2)"))

    names = [adapter.name for adapter in load_adapters([first, str(second), odd, (TENSORS, CONFIG)])]

    assert names == ["law", "law-2", "my-l-w-v2", "expert-3"]


def test_a_local_folder_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`org/name` is the folder of that name where there is one."""
    folder(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)

    assert parse_source("org/name") == {"name": FolderSource(folder=Path("org/name"))}


def test_folders_that_are_none(tmp_path: Path):
    """A file, an empty folder, and a folder of adapters say what to pass."""
    inside = folder(tmp_path / "many" / "law")

    with pytest.raises(AdapterError, match="pass its folder"):
        parse_source(inside / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="holds the adapters law in sub-folders"):
        parse_source(tmp_path / "many")
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        parse_source(str(tmp_path))
    with pytest.raises(AdapterError, match="no folder"):
        parse_source(tmp_path / "nowhere")


def test_state_dicts_and_their_configs():
    """A pair, a mapping of two keys, and a LoraConfig object mean the same."""
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q"])

    adapters = load_adapters(
        {"a": (TENSORS, CONFIG), "b": {"state_dict": TENSORS, "config": CONFIG}, "c": (TENSORS, config)}
    )

    for adapter in adapters:
        assert adapter.source.kind == "state_dict"
        (site,) = adapter.factors.values()
        assert site.scale == 2.0
        assert torch.equal(site.B_RO, torch.ones(2, 4))
    assert isinstance(parse_source((TENSORS, CONFIG))[""], StateDictSource)


@pytest.mark.parametrize(
    "experts", ["org/name", Path("x"), {"state_dict": TENSORS, "config": CONFIG}, nn.Linear(2, 2), 3, None, [], {}]
)
def test_one_source_is_not_a_list(experts: object):
    """A single source, or none, says that a list or a mapping is expected."""
    with pytest.raises(AdapterError, match="expected"):
        parse_sources(experts)


@pytest.mark.parametrize("source", [nn.Linear(2, 2), 3, (TENSORS, "config"), (1, 2, 3), ({"a": 1}, CONFIG), ("a", "b")])
def test_objects_that_are_no_source(source: object):
    """Other modules, numbers and pairs of other things are refused."""
    with pytest.raises(AdapterError):
        load_adapters([source])


def test_sources_round_trip():
    """A source survives its dict; an unknown field does not."""
    source = AdapterSource(kind="hub", location="org/name", revision="main", commit="abc", sha256="00")

    assert AdapterSource.from_dict(source.to_dict()) == source
    with pytest.raises(AdapterError, match="unknown fields"):
        AdapterSource.from_dict(source.to_dict() | {"token": "x"})


class Block(nn.Module):
    """A model of two projections and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.score = nn.Linear(3, 4), nn.Linear(3, 5), nn.Linear(4, 2)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The head of q."""
        return self.score(self.q(x_TD)) + self.v(x_TD).sum()


def peft_model(**config: object) -> peft.PeftModel:
    """A model with the adapters "default" (rank 2) and "math" (rank 3), all of whose factors are random."""
    model = peft.get_peft_model(Block(), peft.LoraConfig(r=2, target_modules=["q", "v"], **config))  # type: ignore[arg-type]
    model.add_adapter("math", peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q"], use_rslora=True, lora_bias=True))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model


def test_a_live_model_gives_all_its_adapters():
    """Each adapter's delta, computed from our factors, is what its PEFT layer adds."""
    model = peft_model()
    x_TD = torch.randn(7, 3)

    default, math = load_adapters([model])

    assert (default.name, math.name) == ("default", "math")
    assert set(default.factors) == {"q", "v"}
    assert set(math.factors) == {"q"}
    for adapter in (default, math):
        model.set_adapter(adapter.name)
        for path, site in adapter.factors.items():
            layer: Any = model.get_submodule(f"base_model.model.{path}")
            bias = 0 if site.bias_O is None else site.bias_O
            ours = site.scale * (x_TD @ site.A_RD.T @ site.B_RO + bias)
            theirs = layer(x_TD) - layer.base_layer(x_TD)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_names_of_a_live_models_adapters():
    """In a mapping, several adapters of one model get the given name as a prefix, a single one the name itself."""
    model = peft_model()

    assert list(parse_sources({"mine": model})) == ["mine-default", "mine-math"]
    model.delete_adapter("math")
    assert list(parse_sources({"mine": model})) == ["mine"]


def test_the_live_scale_counts():
    """A scale that was changed on the live model is taken, and said."""
    model = peft_model()
    layer: Any = model.get_submodule("base_model.model.q")
    layer.scaling["default"] = 0.125

    default, _ = load_adapters([model])

    assert default.factors["q"].scale == 0.125
    assert default.factors["v"].scale == 8 / 2
    assert any("live scale" in note for note in default.notes)


def test_a_merged_model_is_refused():
    """Merged factors act already; routed on top they would act twice."""
    model = peft_model()
    model.merge_adapter(["default"])

    with pytest.raises(AdapterError, match="merged into the base"):
        load_adapters([model])


def test_a_dora_model_is_refused():
    """use_dora is refused on a live model as in a file."""
    with pytest.raises(AdapterError, match="use_dora=True"):
        load_adapters([peft_model(use_dora=True)])


def test_a_trained_head_of_a_live_model():
    """modules_to_save is refused when strict, and left out otherwise."""
    model = peft_model(modules_to_save=["score"])

    with pytest.raises(AdapterError, match="modules_to_save"):
        load_adapters([model])
    default, _ = load_adapters([model], strict=False)
    assert set(default.factors) == {"q", "v"}
    assert any("modules_to_save" in note for note in default.notes)


def test_a_live_model_of_another_kind():
    """IA3 and other kinds of PEFT are refused by their name."""
    model = peft.get_peft_model(Block(), peft.IA3Config(target_modules=["q"], feedforward_modules=[]))

    with pytest.raises(AdapterError, match="peft_type='IA3'"):
        load_adapters([model])


def test_a_report_of_a_live_model():
    """The first adapter is described, and the others are named."""
    report = inspect_adapter(peft_model())

    assert report.ok
    assert (report.name, report.ranks, report.scales, report.sites) == ("default", (2,), (4.0,), 2)
    assert any("math" in note for note in report.notes)


@pytest.mark.filterwarnings("ignore:.*invalid shape.*lora_B.bias:peft.utils.warning.PeftWarning")
def test_peft_saves_what_we_read(tmp_path: Path):
    """A folder written by PEFT, sub-folder included, reads back as the live adapters."""
    model = peft_model()
    model.save_pretrained(str(tmp_path / "saved"))

    from_disk = load_adapters([tmp_path / "saved", tmp_path / "saved" / "math"])

    for disk, live in zip(from_disk, load_adapters([model]), strict=True):
        assert set(disk.factors) == set(live.factors)
        for path, site in live.factors.items():
            assert torch.equal(site.A_RD, disk.factors[path].A_RD)
            assert torch.equal(site.B_RO, disk.factors[path].B_RO)
            assert site.scale == disk.factors[path].scale


def test_progress_is_shown_in_terminals_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """No bar without a terminal or with the hub's bars off; True forces it."""
    load_adapters([(TENSORS, CONFIG)])
    assert capsys.readouterr().err == ""

    load_adapters([(TENSORS, CONFIG)], progress=True)
    assert "loading adapters: 100%" in capsys.readouterr().err

    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    assert not progress_shown()
