"""Hostile and broken adapters at the front door: a clear error, the model as it was, nothing written, nothing run.

Every case spoils one thing of an adapter that is fine otherwise (the first test loads it), so it is refused for that.
"""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from front_door import alone, nothing_happens
from hostile_adapters import HOSTILE, files, write

import moelora
from moelora.integrations.hub import client
from moelora.testing import tiny
from moelora.testing.hub_server import HubServer
from moelora.testing.hub_wire import Fault


@pytest.fixture
def model() -> Any:
    """A tiny Llama that each refusal must leave as it is."""
    return tiny.model("llama")


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's home, the working directory and the temporary folder are ours, so that we see what is written."""
    for name in ("home", "work", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "work")


def test_the_adapter_that_is_spoiled_below_is_fine(tmp_path):
    """Without its fault, each of the cases below would load."""
    model = tiny.model("llama")
    moelora.patch_model(model, [write(tmp_path / "fine", files())], router="given")

    assert alone(model, "fine").isfinite().all()


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_folder_is_refused(case, model, tmp_path):
    """Beside a good adapter, strict: the error names the adapter and what is wrong, and nothing has happened."""
    content, message = HOSTILE[case]
    good, bad = write(tmp_path / "good", files()), write(tmp_path / "bad", content)

    with nothing_happens(model, tmp_path):
        with pytest.raises(ValueError, match=rf"(?s)bad.*({message})"):
            moelora.patch_model(model, {"good": good, "it": bad})
        report = moelora.inspect_adapter(bad)

    base_or_values = ("too wide", "more layers", "architecture", "NaN in", "Inf in")
    assert report.ok == any(words in case for words in base_or_values), "known from config and header alone"


@pytest.mark.parametrize(
    "case", ["NaN in A", "the embedding", "truncated", "r of a million in the config", "alpha of 1e30"]
)
def test_a_hostile_repository_is_refused(case, model, tmp_path):
    """The same from a hub: only the cache is written to."""
    content, message = HOSTILE[case]
    with HubServer({"acme/good": files(), "evil/bad": content}) as hub, nothing_happens(model, *home(tmp_path)):
        with pytest.raises(ValueError, match=rf"(?s)evil/bad.*({message})"):
            moelora.patch_model(model, ["acme/good", "evil/bad"], endpoint=hub.endpoint, cache_dir=tmp_path / "cache")


def home(folder: Path) -> list[Path]:
    """What must stay empty: everything but the cache."""
    return [folder / name for name in ("home", "work", "temporary")]


@pytest.mark.parametrize("fault", [{"corrupt": True}, {"truncate_to": 100}], ids=["another byte", "truncated"])
def test_a_corrupted_download_is_refused(fault, model, tmp_path, monkeypatch):
    """What arrives must be what was announced; the next attempt downloads it anew and works."""
    monkeypatch.setattr(client, "RETRY_PAUSES", (0.01,))
    options = {"cache_dir": tmp_path / "cache", "router": "given"}
    with HubServer({"acme/law": files()}) as hub:
        hub.fail(Fault(path="/large/", **fault))
        with nothing_happens(model, *home(tmp_path)), pytest.raises(moelora.AdapterError, match="acme/law"):
            moelora.patch_model(model, ["acme/law"], endpoint=hub.endpoint, **options)
        hub.faults.clear()
        again = moelora.patch_model(tiny.model("llama"), ["acme/law"], endpoint=hub.endpoint, **options)

    assert moelora.expert_names(again) == ["law"]


SOURCES = {
    "a name that is an absolute path": {"/etc/evil": "x"},
    "a name that climbs": {"../../evil": "x"},
    "a name with a slash": {"a/b": "x"},
    "a name with a backslash": {"a\\..\\b": "x"},
    "a hidden name": {".ssh": "x"},
    "a name with a null character": {"a\0b": "x"},
    "an empty name": {"": "x"},
    "a long name": {"x" * 500: "x"},
    "a subfolder that climbs": ["acme/many:../../../etc"],
    "a subfolder that climbs inside": ["acme/many:law/../../etc"],
    "an absolute subfolder": ["acme/many:/etc"],
    "a subfolder with a backslash": ["acme/many:..\\..\\etc"],
    "an encoded subfolder": ["acme/many:%2e%2e/etc"],
    "a repository that climbs": ["../../etc"],
    "a repository of three parts": ["acme/many/../../etc"],
    "a repository with a query": ["acme/many?x=1"],
    "a revision that climbs": ["acme/many@../../main"],
    "an address": ["https://evil.example/adapter"],
    "a file address": ["file:///etc/passwd"],
    "a file": [__file__],
    "nothing": [],
    "None": [None],
    "a model that is no PeftModel": [torch.nn.Linear(2, 2)],
    "a state dict without a config": [{"a": torch.zeros(2)}],
    "one source and no list": "acme/many",
}


@pytest.mark.parametrize("case", SOURCES)
def test_a_source_that_reaches_elsewhere_is_refused(case, model, tmp_path):
    """Names and places are checked before anything is asked or read: the hub sees no request."""
    good = write(tmp_path / "good", files())
    wanted: Any = SOURCES[case]
    if isinstance(wanted, dict):
        wanted = dict.fromkeys(wanted, good)
    with HubServer({"acme/many": {f"law/{name}": data for name, data in files().items()}}) as hub:
        with nothing_happens(model, tmp_path), pytest.raises(moelora.AdapterError):
            moelora.patch_model(model, wanted, endpoint=hub.endpoint, cache_dir=tmp_path / "cache")

        assert hub.requests == []


def test_a_token_is_in_no_message(model, tmp_path):
    """A refused download says what to do, without the token."""
    with HubServer({}, tokens={"hf_secret": "acme"}) as hub:
        hub.add_repo("other/vault", files(), private=True)
        with (
            nothing_happens(model, *home(tmp_path)),
            pytest.raises(moelora.AdapterError, match="other/vault") as caught,
        ):
            moelora.patch_model(
                model, ["other/vault"], endpoint=hub.endpoint, cache_dir=tmp_path / "cache", token="hf_secret"
            )

    error: BaseException | None = caught.value
    while error is not None:
        assert "hf_secret" not in str(error)
        error = error.__cause__ or error.__context__


EXTRAS = ("the embedding", "a weight of the base", "a base layer", "a head", "something unknown", "modules to save")


@pytest.mark.parametrize("case", EXTRAS)
def test_left_out_means_left_out(case, model, tmp_path):
    """With strict=False what is no factor stays in the file: the LoRA acts, and the base keeps its weights."""
    bad, good = write(tmp_path / "bad", HOSTILE[case][0]), write(tmp_path / "good", files())
    base = {name: value.clone() for name, value in model.state_dict().items()}
    plan = moelora.patch_model(model, [bad, good], strict=False, dry_run=True)
    moelora.patch_model(model, [bad, good], strict=False)

    assert "note: bad: left out: " in str(plan)
    assert torch.equal(alone(model, "bad"), alone(model, "good"))
    now = moelora.unpatch_model(model).state_dict()
    assert now.keys() == base.keys()
    assert all(torch.equal(now[name], value) for name, value in base.items())


SLOW = {
    "target_modules": {"target_modules": r"(([a-z._0-9]+)+)+\.nowhere$"},
    "exclude_modules": {"exclude_modules": r"^(a+)+$|(.*)*(.*)*(.*)*x$"},
    "layers_pattern": {"layers_pattern": r"(.*.*)*=", "layers_to_transform": [0]},
    "rank_pattern": {"rank_pattern": {r"(([a-z._0-9]+)+)+\.nowhere": 2}},
    "alpha_pattern": {"alpha_pattern": {r"(.*)*(.*)*(.*)*(.*)*nowhere": 2, r"(x+x+)+y": 3}},
}


@pytest.mark.parametrize("field", SLOW)
def test_a_regular_expression_cannot_hang(field, tmp_path):
    """Expressions that keep Python's `re` busy for hours match nothing here, in a moment."""
    folder = write(tmp_path / "slow", files(**SLOW[field]))
    model = tiny.model("llama")

    start = time.perf_counter()
    moelora.patch_model(model, [folder], router="given")
    report = moelora.inspect_adapter(folder)

    assert time.perf_counter() - start < 5
    assert report.ok, report.problems
    assert report.scales == (2.0,)


def test_nothing_that_a_config_names_is_imported(tmp_path):
    """auto_mapping and its like are read, never followed; the adapter loads as what it is."""
    (tmp_path / "work" / "evil_library.py").write_text("open('imported', 'w')")
    mapping = {"base_model_class": "Model", "parent_library": "evil_library"}
    folder = write(
        tmp_path / "it", files(auto_mapping=mapping, runtime_config={"x": "evil_library"}, megatron_core="evil_library")
    )

    model = moelora.patch_model(tiny.model("llama"), [folder], router="given")

    assert moelora.expert_names(model) == ["it"]
    assert not (tmp_path / "work" / "imported").exists()


def test_a_refusal_after_loading_leaves_the_model_too(model, tmp_path):
    """What is found wrong last, between a good adapter and the model, is refused before anything is changed."""
    good = write(tmp_path / "good", files())
    refused: list[tuple[dict[str, Any], str]] = [
        ({"targets": ["q_proj"]}, "lie outside the targets"),
        ({"targets": ["query"]}, "matches no linear"),
        ({"roles": ["ssm_in"]}, "ssm_in"),
        ({"top_k": 2}, "top_k=2 experts per token, but there are 1"),
        ({"top_k": 1, "num_experts": 2, "rank": 0}, "at least 1"),
        ({"router": "learnt"}, "unknown router 'learnt'"),
        ({"router": "given", "probe_inputs": {"nonsense": 1}}, "nonsense"),
    ]
    for options, message in refused:
        with nothing_happens(model, tmp_path), pytest.raises(ValueError, match=message):
            moelora.patch_model(model, [good], **options)
