"""Mixtures that must not be loaded, and models that must not be saved. The model is as it was after each refusal."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from adapters_on_disk import peft_model
from safetensors.torch import load_file, save_file
from untouched import untouched

import moelora
from moelora.testing import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of two adapters and a fresh expert, saved beside its adapters."""
    folder = tmp_path_factory.mktemp("saved")
    peft_model("gpt2", folder / "a", seed=1)
    peft_model("gpt2", folder / "b", seed=2)
    model = moelora.patch_model(tiny.model("gpt2"), {"a": folder / "a", "b": folder / "b"}, num_experts=1, rank=2)
    moelora.save(model, folder / "mix")
    return folder


@pytest.fixture
def mix(saved: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    shutil.copytree(saved / "mix", tmp_path / "mix")
    return tmp_path / "mix"


def refused(folder: Path, match: str, model=None, **options) -> None:
    """Loading raises a ValueError that says this, and leaves no trace."""
    model = tiny.model("gpt2") if model is None else model
    with untouched(model), pytest.raises(ValueError, match=match):
        moelora.load(model, folder, **options)
    assert not moelora.is_patched(model)


def edit(folder: Path, change) -> None:
    """Change the manifest."""
    path = folder / "moelora_config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_no_mixture_there(tmp_path):
    """A folder without a manifest, and no folder at all; a Path is never taken for a hub id."""
    refused(tmp_path, "holds no mixture")
    refused(tmp_path / "nowhere", "there is no folder")
    refused(Path("nowhere"), "there is no folder")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "malformed"),
        ('{"schema_version": [1, 0]', "malformed"),
        ("[]", "malformed"),
        ('{"schema_version": [1, 0]}', "malformed: no 'sites'"),
        ('{"schema_version": "one"}', "malformed"),
        ("[" * 100_000, "malformed"),
    ],
)
def test_a_manifest_that_is_none(mix, text, match):
    """Truncated, empty, of another form, nested without end."""
    (mix / "moelora_config.json").write_text(text)
    refused(mix, match)


def field(*path: object):
    """A setter of one value inside the manifest."""

    def setter(values, value) -> None:
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = value

    return setter


@pytest.mark.parametrize(
    ("place", "value", "match"),
    [
        (("experts", 2, "folder"), "../../elsewhere", "folder of 'expert0'"),
        (("experts", 2, "folder"), "/etc", "folder of 'expert0'"),
        (("experts", 2, "folder"), None, "source.kind of 'expert0'"),
        (("experts", 0, "source", "kind"), "hub", "source.commit of 'a'"),
        (("experts", 0, "source", "extra"), 1, "unknown fields"),
        (("experts", 0, "sha256"), "abc", "sha256 of 'a'"),
        (("experts", 0, "trainable"), "yes", "trainable of 'a'"),
        (("experts", 0, "ranks"), {"nowhere": 3}, "ranks of 'a'"),
        (("experts", 0, "scales"), {}, "ranks and scales of 'a'"),
        (("experts", 0, "name"), "b", "different names"),
        (("experts", 0, "name"), 3, "name of an expert"),
        (("experts",), [], "experts"),
        (("experts",), [1], "malformed"),
        (("sites",), {}, "sites"),
        (("sites",), {"x": 1}, "site 'x'"),
        (("base_model",), None, "base_model"),
        (("config",), [], "malformed"),
        (("config", "router", "kind"), "oracle", "unknown router 'oracle'"),
        (("config", "router", "surprise"), 1, "surprise"),
        (("config", "surprise"), 1, "surprise"),
        (("config", "dropout"), 2.0, "dropout"),
    ],
)
def test_a_manifest_with_a_wrong_value(mix, place, value, match):
    """Each is named; nothing outside the folder can be pointed at."""
    edit(mix, lambda values: field(*place)(values, value))
    refused(mix, f"malformed.*{match}|{match}.*malformed|malformed")
    with pytest.raises(ValueError, match=re.compile(match)):
        moelora.load(tiny.model("gpt2"), mix)


def test_versions(mix):
    """A newer minor version is read with a warning, a newer major one refused."""
    edit(mix, lambda values: values.update(schema_version=[2, 0]))
    refused(mix, "schema version 2.0.*upgrade moelora")

    edit(mix, lambda values: values.update(schema_version=[1, 7]))
    with pytest.warns(UserWarning, match=r"schema version 1\.7, newer than 1\.0"):
        assert moelora.is_patched(moelora.load(tiny.model("gpt2"), mix))


def change_tensors(mix: Path, change) -> None:
    """Change routers.safetensors."""
    tensors = load_file(mix / "routers.safetensors")
    change(tensors, next(iter(tensors)))
    save_file(tensors, mix / "routers.safetensors")


def test_routers_that_are_damaged_or_do_not_fit(mix):
    """Missing, truncated, another shape, a tensor too few or too many, NaN, and a key that aims at an expert."""
    whole = (mix / "routers.safetensors").read_bytes()
    (mix / "routers.safetensors").unlink()
    refused(mix, "no routers.safetensors")
    (mix / "routers.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(mix, "is damaged")

    site = "transformer.h.0.attn.c_attn"
    changes = [
        (lambda tensors, first: tensors.pop(first), "1 tensors missing"),
        (lambda tensors, first: tensors.update(more=torch.zeros(1)), "1 unknown"),
        (lambda tensors, first: tensors.update({first: torch.zeros(2, 2)}), "1 of another shape"),
        (lambda tensors, first: tensors[first].fill_(torch.nan), "hold NaN"),
        (lambda tensors, first: tensors.update({f"base/{site}.bank.A_trainable_RD": torch.zeros(2, 1)}), "1 unknown"),
        (lambda tensors, first: tensors.update({"base/nowhere": torch.zeros(2)}), "1 unknown"),
    ]
    for change, match in changes:
        (mix / "routers.safetensors").write_bytes(whole)
        change_tensors(mix, change)
        refused(mix, match)


def test_an_expert_that_has_changed(saved, mix, tmp_path):
    """Its weights or its scales: inside the mixture, or at the place that it is said to have moved to."""
    shutil.copytree(saved / "a", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 9}))
    refused(mix, "expert 'a' has changed at its source: its ranks or scales", experts={"a": tmp_path / "a"})

    weights = tmp_path / "a" / "adapter_model.safetensors"
    save_file({key: value * 2 for key, value in load_file(weights).items()}, weights)
    refused(mix, "expert 'a' is not the one this mixture was saved with.*sha-256", experts={"a": tmp_path / "a"})

    weights = mix / "experts" / "000" / "adapter_model.safetensors"
    assert not weights.exists()
    weights = mix / "experts" / "002" / "adapter_model.safetensors"
    save_file({key: value + 1 for key, value in load_file(weights).items()}, weights)
    refused(mix, "expert 'expert0' is not the one this mixture was saved with.*sha-256")


def test_another_base(mix):
    """Another family, another size, and the same size with other weights."""
    refused(mix, "its model_type is 'llama', expected 'gpt2'", tiny.model("llama"))
    refused(mix, "its parameters is", tiny.model("gpt2", num_hidden_layers=3))
    refused(mix, "parameters hold other values", tiny.model("gpt2", seed=5))


def test_a_base_that_differs_a_little_is_loaded_with_a_warning(mix):
    """Another dtype; or another value outside the sites, such as a head that is new each time."""
    with pytest.warns(UserWarning, match="saved on a base in float32, this one is in bfloat16"):
        moelora.load(tiny.model("gpt2").bfloat16(), mix)
    model = tiny.model("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.bias += 1
    with pytest.warns(UserWarning, match=r"1 parameters of this base hold other values.*ln_f\.bias"):
        moelora.load(model, mix)


def test_a_patched_model_is_not_patched_again(mix):
    """Loading into a patched model says to unpatch it first, and leaves the first mixture in place."""
    model = moelora.patch_model(tiny.model("gpt2"), num_experts=2, rank=2)
    with untouched(model), pytest.raises(ValueError, match="patched already"):
        moelora.load(model, mix)


@pytest.mark.parametrize("place", ["router", "bank"])
def test_diverged_weights_are_not_saved(place, tmp_path):
    """NaN in a router or an expert is found before anything is written; an older mixture there stays whole."""
    model = moelora.patch_model(tiny.model("gpt2"), num_experts=2, rank=2)
    moelora.save(model, tmp_path / "mix")
    before = {path: path.read_bytes() for path in (tmp_path / "mix").rglob("*") if path.is_file()}
    broken = [parameter for name, parameter in model.named_parameters() if f".{place}." in name][-1]
    with torch.no_grad():
        broken[0, 0] = torch.nan

    for folder in (tmp_path / "mix", tmp_path / "new"):
        with pytest.raises(ValueError, match=r"tensors hold NaN or Inf.*diverged"):
            moelora.save(model, folder)

    assert {path: path.read_bytes() for path in (tmp_path / "mix").rglob("*") if path.is_file()} == before
    assert not (tmp_path / "new").exists()


def test_saving_a_model_that_is_not_patched(tmp_path):
    """The error says what to call first."""
    for verb in (moelora.save, lambda model, folder: moelora.export_adapter(model, folder, weights="a")):
        with pytest.raises(ValueError, match=r"call moelora\.patch_model"):
            verb(tiny.model("gpt2"), tmp_path / "mix")
    assert not (tmp_path / "mix").exists()
