"""Stacks that must not be loaded, whoever wrote them. The model is as it was after each refusal."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_stacks import PROMPTS, made
from torch import Tensor, nn
from untouched import untouched

import moelora
from moelora.continual import UnlearningStack
from moelora.continual.stack_manifest import digest_of, read_stack
from moelora.mixture import find_mixture
from moelora.testing import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a stack of two requests; nobody changes it."""
    folder = tmp_path_factory.mktemp("saved") / "stack"
    made(requests=2).save(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    shutil.copytree(saved, tmp_path / "stack")
    return tmp_path / "stack"


def refused(folder: Path, match: str, base: nn.Module | None = None) -> None:
    """Loading raises a ValueError that says this, and leaves no trace."""
    model: nn.Module = tiny.model("llama") if base is None else base
    with untouched(model), pytest.raises(ValueError, match=match):
        UnlearningStack.load(model, folder)
    assert not moelora.is_patched(model)


def edit(folder: Path, change: Callable[[Any], None], name: str = "stack.json") -> None:
    """Change a file's values; the digest of a manifest is made to fit."""
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))
    if name != "stack.json":
        renew(folder, name)


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change stack.safetensors, and its digest."""
    tensors = load_file(folder / "stack.safetensors")
    change(tensors)
    save_file(tensors, folder / "stack.safetensors")
    renew(folder, "stack.safetensors")


def renew(folder: Path, name: str) -> None:
    """Let stack.json name a file that was changed."""
    edit(folder, lambda values: values["digests"].update({name: digest_of(folder / name)}))


def put(values: Any, place: tuple[Any, ...], value: Any) -> None:
    """Set one value inside of others."""
    for key in place[:-1]:
        values = values[key]
    values[place[-1]] = value


GATE = ("experts", 0, "gate")


@pytest.mark.parametrize(
    ("place", "value", "match"),
    [
        (("kind",), "Oracle", "kind: expected 'UnlearningStack', got 'Oracle'"),
        (("surprise",), 1, r"stack.json: missing \[\], unknown \['surprise'\]"),
        (("digests",), {}, "digests: missing"),
        (("digests", "../../etc/passwd"), "0", r"digests: missing \[\], unknown"),
        (("settings", "rank"), 0, "rank: expected a positive whole number, got 0"),
        (("settings", "rank"), True, "rank: expected a positive whole number, got True"),
        (("settings", "alpha"), -1.0, "does not fit this model: alpha must be positive"),
        (("settings", "targets"), {"a": 1}, "targets: expected text or a list of texts"),
        (("settings", "seed"), 10**30, "seed: expected a whole number"),
        (("settings", "union"), "trust", "unknown union 'trust'"),
        (("settings", "combine"), "all", "unknown combine 'all'"),
        (("settings", "combine"), "max_single", "the mixture has other options than those of its stack"),
        (("settings", "orthogonality", "mode"), "eval", "unknown mode 'eval'"),
        (("settings", "extra"), 1, r"settings: missing \[\], unknown \['extra'\]"),
        (("features", "layers"), [1, 1.5], "layers: expected a list of whole numbers"),
        (("features", "layers"), [99], "layers must be numbers from 1.*its base is LlamaForCausalLM"),
        (("features", "layers"), [1], r"fitted to features of \(layers, width\) \(2, 32\), got \(1, 32\)"),
        (("features", "stride"), 0, "stride must lie between 1 and window"),
        (("detector", "kind"), "os.system", "unknown detector 'os.system'"),
        (("detector", "settings", "folds"), "5", "folds of detector: expected a whole number"),
        (("detector", "settings", "folds"), 1, "folds must be at least 2"),
        (("detector", "settings", "code"), 1, "settings of detector: expected some of"),
        (("detector",), {"kind": "relative_mahalanobis", "settings": {}}, "not the tensors of a LayerGaussians"),
        (("holds_features",), True, "holds_features: expected false, got True"),
        (("experts",), [], "experts: expected a list"),
        (("experts", 0, "name"), "../x", "cannot name an expert"),
        (("experts", 0, "name"), "request-2", "experts: expected different names"),
        (("experts", 0, "name"), "other", r"speaks of the experts \['other', 'request-2'\], but the mixture has"),
        (("experts", 0, "losses"), ["1"], "losses of 'request-1': expected finite numbers"),
        (("experts", 0, "overlap"), float("nan"), "overlap of 'request-1': expected a finite number, got nan"),
        (GATE, None, "gates: expected 2 for 2 experts, got 1"),
        ((*GATE, "certificate"), None, "certificates: expected 2 for 2 gates, got 1"),
        ((*GATE, "certificate", "tau_hi"), float("inf"), "tau_hi of certificate of 'request-1': expected a finite"),
        ((*GATE, "certificate", "tau_lo"), 1e9, "expected finite tau_lo <= tau_hi"),
        ((*GATE, "certificate", "miss", "seen"), 0, "misses of certificate of 'request-1': expected 2 of 12"),
        ((*GATE, "certificate", "miss", "samples"), 9999, "misses of certificate of 'request-1'"),
        ((*GATE, "certificate", "fire", "bound"), 1.5, "fire of certificate of 'request-1'"),
        ((*GATE, "certificate", "fire", "kept"), 1, "kept of fire of certificate of 'request-1': expected true or"),
        ((*GATE, "certificate", "union_fire_bound"), -0.5, "union_fire_bound of certificate of 'request-1'"),
        ((*GATE, "certificate", "guarantee"), "absolute", "unknown guarantee 'absolute'"),
        ((*GATE, "promise", "nan_policy"), "ignore", "unknown nan_policy 'ignore'"),
        ((*GATE, "promise", "max_miss"), 1.5, "max_miss of 'request-1' must lie strictly between 0 and 1"),
        ((*GATE, "promise", "on_conflict"), "shrug", "on_conflict of 'request-1': expected one of"),
        ((*GATE, "standard", "deviation"), 0.0, "a positive deviation"),
        ((*GATE, "detector", "width"), 31, r"shape of gaussians\.\w+ of detector of 'request-1': expected S and D"),
        ((*GATE, "detector", "kind"), "nearest", "neighbours|not the tensors of|unexpected keyword"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_wrong_value_is_named(folder, place, value, match):
    """Each by its own sentence, before the model is changed."""
    edit(folder, lambda values: put(values, place, value))
    refused(folder, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda tensors: tensors.pop("001.held_N"), "held_N of 'request-2': expected finite distances"),
        (lambda tensors: tensors["000.held_N"].fill_(torch.inf), "held_N of 'request-1': expected finite distances"),
        (lambda tensors: tensors.update({"000.held_N": torch.zeros(2, 2)}), "held_N of 'request-1'"),
        (lambda tensors: tensors.pop("000.detector.standard.mean_S"), "not the tensors of a FittedMahalanobis"),
        (lambda tensors: tensors.update({"000.more": torch.zeros(1)}), r"stack.safetensors: expected.*'000.more'"),
        (lambda tensors: tensors.update({"007.held_N": torch.zeros(1)}), r"stack.safetensors: expected.*'007.held_N'"),
        (lambda tensors: tensors.update({"recipe.x": torch.zeros(1)}), r"stack.safetensors: expected.*'recipe.x'"),
        (lambda tensors: tensors["000.detector.gaussians.mean_SD"].fill_(torch.nan), "mean_SD.*finite numbers"),
        (lambda tensors: tensors["000.detector.gaussians.remainder_S"].neg_(), "remainder_S.*positive numbers"),
        (
            lambda tensors: tensors.update({"000.detector.gaussians.mean_SD": torch.zeros(2, 32, dtype=torch.int64)}),
            "mean_SD.*finite numbers in fp32 or fp64",
        ),
        (
            lambda tensors: tensors.update({"000.detector.gaussians.directions_SRD": torch.zeros(2, 3, 32)}),
            "variance_SR has shape|directions_SRD has shape",
        ),
    ],
)
def test_a_wrong_tensor_is_named(folder, change, match):
    """Missing, unknown, of another shape or dtype, not finite, of another sign."""
    edit_tensors(folder, change)
    refused(folder, match)


HOSTILE = [None, True, -1, 0, 10**400, 1e308, "x", "\0" * 9, [], [[]], {}, {"kind": "sum"}, float("nan"), float("inf")]


def places_in(values: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in nested values."""
    children = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, child in children:
        yield (*place, key)
        yield from places_in(child, (*place, key))


# a newer minor version is read, with a warning
@pytest.mark.filterwarnings("ignore:the stack in .* was written with schema version")
def test_any_wrong_value_is_refused_or_harmless(saved, tmp_path):
    """Whatever stands at whatever place: a ValueError and nothing else, or what is read is whole."""
    shutil.copytree(saved, tmp_path / "stack")
    path = tmp_path / "stack" / "stack.json"
    whole = json.loads(path.read_text())
    places = list(places_in(whole))

    @settings(max_examples=150, deadline=None)
    @given(place=st.sampled_from(places), value=st.sampled_from(HOSTILE), gone=st.booleans())
    def check(place: tuple[Any, ...], value: Any, gone: bool) -> None:
        values = copy.deepcopy(whole)
        put(values, place, value)
        if gone:
            parent = values
            for key in place[:-1]:
                parent = parent[key]
            del parent[place[-1]]
        path.write_text(json.dumps(values))
        try:
            read = read_stack(tmp_path / "stack", "UnlearningStack")
        except ValueError:
            return
        again, _ = read.state()
        assert [entry.name for entry in read.entries] == [entry["name"] for entry in again["experts"]]

    check()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "malformed"),
        ("[]", "malformed"),
        ('{"schema_version": [1]}', "malformed"),
        ('{"schema_version": [1e999, 0]}', "malformed"),
        ('{"schema_version": [1, true]}', "malformed: schema_version must be two integers"),
        ('{"schema_version": [1, 0]}', "malformed: stack.json: missing"),
        ("[" * 100_000, "malformed"),
    ],
)
def test_a_file_that_is_no_stack(folder, text, match):
    """Truncated, empty, of another form, nested without end; and none at all."""
    (folder / "stack.json").write_text(text)
    refused(folder, match)
    (folder / "stack.json").unlink()
    refused(folder, r"holds no stack: it has no stack\.json.*moelora\.load")
    refused(folder.parent / "nowhere", "there is no folder")


def test_versions(folder):
    """A newer minor version is read with a warning, a newer major one refused."""
    edit(folder, lambda values: values.update(schema_version=[2, 0]))
    refused(folder, "schema version 2.0, this moelora reads 1.x; upgrade moelora")
    edit(folder, lambda values: values.update(schema_version=[1, 7]))
    with pytest.warns(UserWarning, match=r"schema version 1\.7, newer than 1\.0"):
        assert len(UnlearningStack.load(tiny.model("llama"), folder).requests) == 2


@pytest.mark.parametrize("name", ["moelora_config.json", "routers.safetensors", "stack.safetensors"])
def test_files_of_different_saves_are_not_mixed(folder, name, tmp_path):
    """One of another save, damaged or missing, as after a save that was interrupted."""
    made(seed=1).save(tmp_path / "other")
    (folder / name).write_bytes((tmp_path / "other" / name).read_bytes() + b" ")
    refused(folder, f"{name}.*is not the one that its stack.json was saved with")
    (folder / name).unlink()
    refused(folder, f"{name}.*its sha-256 is missing")


def test_a_mixture_that_is_saved_over_a_stack_is_not_taken_for_it(folder):
    """The stack's own files are left there, and do not fit."""
    moelora.save(moelora.patch_model(tiny.model("llama"), num_experts=2, rank=2), folder)
    refused(folder, r"moelora_config\.json.*another mixture was saved over the stack")


@pytest.mark.parametrize(
    ("place", "value", "match"),
    [
        (("config", "router", "mergeable"), True, "the mixture has other options"),
        (("config", "router"), {"kind": "learned", "top_k": 2}, "the mixture has other options"),
        (("config", "dropout"), 0.5, "the mixture has other options"),
        (("experts", 0, "folder"), None, "source.kind of 'request-1'"),
        (("experts", 0, "scales", "model.layers.0.self_attn.q_proj"), 10**400, "scales of 'request-1'|malformed"),
        (("base_model", "parameters"), 7, "this is not the base model of the mixture"),
    ],
)
def test_a_mixture_that_a_stack_does_not_make(folder, place, value, match):
    """Gates that experts could leave, another router, experts that lie elsewhere."""
    edit(folder, lambda values: put(values, place, value), "moelora_config.json")
    refused(folder, match)


def test_an_expert_of_a_stack_is_not_read_from_elsewhere(folder, tmp_path):
    """A folder on this disk that a stranger names."""
    shutil.copytree(folder / "experts" / "000", tmp_path / "secret")

    def move(values: Any) -> None:
        expert = values["experts"][0]
        expert["folder"], expert["source"] = (
            None,
            {**expert["source"], "kind": "folder", "location": str(tmp_path / "secret")},
        )

    edit(folder, move, "moelora_config.json")
    refused(folder, r"the experts \['request-1'\] do not lie in the stack's folder")


def test_another_base_and_a_patched_one(folder):
    """Of another size, with other weights, or with a mixture in it: refused, and as it was."""
    refused(folder, "does not fit this model.*its base is LlamaForCausalLM", tiny.model("llama", hidden_size=64))
    refused(folder, "hold other values", tiny.model("llama", seed=3))
    model = moelora.patch_model(tiny.model("llama"), num_experts=2, rank=2)
    with untouched(model), pytest.raises(ValueError, match="patched already"):
        UnlearningStack.load(model, folder)


def test_a_failure_behind_the_checks_leaves_the_base(folder, monkeypatch):
    """Whatever it is."""

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moelora.continual.stack.set_gates", fail)
    model = tiny.model("llama")
    with untouched(model), pytest.raises(KeyboardInterrupt):
        UnlearningStack.load(model, folder)
    assert not moelora.is_patched(model)


def test_the_mixture_alone_does_not_run(folder):
    """moelora.load brings no gates; a call says who does, and neither merges nor answers without them."""
    model = moelora.load(tiny.model("llama"), folder)
    for call in (lambda: model(**PROMPTS), lambda: model.generate(**PROMPTS, max_new_tokens=2)):
        with pytest.raises(ValueError, match=r"there are none for this call.*UnlearningStack\.load"):
            call()
    with pytest.raises(ValueError, match="must not leave the gates"):
        moelora.merge(model, weights="request-1")


def test_a_gated_mixture_of_an_earlier_version_is_read(tmp_path):
    """Its configuration does not say whether experts may leave their gates: they may."""
    model = moelora.patch_model(tiny.model("llama"), num_experts=2, rank=2, router="gated")
    moelora.save(model, tmp_path / "mix")
    path = tmp_path / "mix" / "moelora_config.json"
    values = json.loads(path.read_text())
    del values["config"]["router"]["mergeable"]
    path.write_text(json.dumps(values))
    loaded = moelora.load(tiny.model("llama"), tmp_path / "mix")
    assert find_mixture(loaded)[1].config == find_mixture(model)[1].config
