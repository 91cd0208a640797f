"""Hostile and broken adapters at the front door: a clear error, the model as it was, nothing written, nothing run.

Every case spoils one thing of an adapter that is fine otherwise (the first test loads it), so it is refused for that.
"""

import json
import pickle
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from front_door import CONFIG, WEIGHTS, alone, nothing_happens
from safetensors.torch import load, save
from torch import Tensor

import moelora
from moelora.integrations.hub import client
from moelora.testing import tiny
from moelora.testing.hub_server import HubServer
from moelora.testing.hub_wire import Fault

PREFIX = "base_model.model.model.layers"
Q = f"{PREFIX}.0.self_attn.q_proj"


def good_tensors() -> dict[str, Tensor]:
    """A LoRA of rank 2 on the first layer's q (32 to 48 wide) and v (32 to 24) of the tiny Llama."""
    generator = torch.Generator().manual_seed(0)
    widths = {"q_proj": 48, "v_proj": 24}
    tensors = {}
    for leaf, out in widths.items():
        path = f"{PREFIX}.0.self_attn.{leaf}"
        tensors[f"{path}.lora_A.weight"] = torch.randn(2, 32, generator=generator)
        tensors[f"{path}.lora_B.weight"] = torch.randn(out, 2, generator=generator)
    return tensors


def good_config() -> dict[str, Any]:
    """Its config."""
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}


def files(tensors: dict[str, Tensor] | None = None, **fields: Any) -> dict[str, bytes]:
    """An adapter's files: the good one's, but for these tensors and these fields of the config."""
    config = json.dumps(good_config() | fields).encode()
    return {CONFIG: config, WEIGHTS: save(good_tensors() | (tensors or {}), {"format": "pt"})}


def with_header(change: Callable[[dict[str, Any]], None]) -> dict[str, bytes]:
    """The good adapter with a header that lies."""
    content = files()[WEIGHTS]
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return files() | {WEIGHTS: struct.pack("<Q", len(text)) + text + content[8 + length :]}


def with_text(text: bytes, *, length: int | None = None) -> dict[str, bytes]:
    """The good config beside a weight file with this text as its header."""
    return files() | {WEIGHTS: struct.pack("<Q", len(text) if length is None else length) + text}


def set_entry(**values: Any) -> Callable[[dict[str, Any]], None]:
    """Change the header's entry of one tensor."""
    return lambda header: header[f"{Q}.lora_A.weight"].update(values)


class Bomb:
    """What a pickle runs when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("bomb-went-off", "w"))


def spoiled(key: str, value: float) -> dict[str, Tensor]:
    """One number of one tensor is this value."""
    tensor = good_tensors()[key].clone()
    tensor[-1, -1] = value
    return {key: tensor}


def renamed(old: str, new: str) -> dict[str, bytes]:
    """The good adapter with other module names."""
    tensors = {key.replace(old, new): value for key, value in load(files()[WEIGHTS]).items()}
    return files() | {WEIGHTS: save(tensors)}


def of_width(width: int, out: int, path: str = Q) -> dict[str, Tensor]:
    """Factors of other widths."""
    return {f"{path}.lora_A.weight": torch.randn(2, width), f"{path}.lora_B.weight": torch.randn(out, 2)}


def without(name: str) -> dict[str, bytes]:
    """One of the files is not there."""
    return {path: content for path, content in files().items() if path != name}


NAN, INF = float("nan"), float("inf")
DEEP = b'{"a":' * 100_000

HOSTILE: dict[str, tuple[dict[str, bytes], str]] = {
    # the weight file
    "pickle only": (without(WEIGHTS) | {"adapter_model.bin": pickle.dumps(Bomb())}, "pickle, which can run code"),
    "pickle under the right name": (files() | {WEIGHTS: pickle.dumps(Bomb()) * 9}, "no safetensors file"),
    "no weights": (without(WEIGHTS), f"no {WEIGHTS}"),
    "empty file": (files() | {WEIGHTS: b""}, "0 bytes"),
    "truncated": (files() | {WEIGHTS: files()[WEIGHTS][:-40]}, "header describes .* bytes"),
    "header of 2^63 bytes": (with_text(b"{}", length=2**63), "claims 9223372036854775808 bytes"),
    "header longer than the file": (with_text(b"{}", length=10**6), "claims 1000000 bytes"),
    "header is no JSON": (with_text(b"{not json}"), "not valid JSON"),
    "header is a list": (with_text(b"[1, 2]"), "expected a JSON object"),
    "header nested deeply": (with_text(DEEP), "not valid JSON"),
    "one name twice": (with_text(b'{"a": {}, "a": {}}'), "twice"),
    "shape larger than its data": (with_header(set_entry(shape=[2**40, 32])), "takes .* bytes"),
    "negative shape": (with_header(set_entry(shape=[-2, -32])), "malformed"),
    "shape of a thousand axes": (with_header(set_entry(shape=[1] * 1000)), "malformed"),
    "shape as text": (with_header(set_entry(shape="2x32")), "malformed"),
    "data of another tensor": (with_header(set_entry(data_offsets=[64, 320])), "hole or an overlap|begins at"),
    "unknown dtype": (with_header(set_entry(dtype="F99")), "dtype 'F99'"),
    "integers": (files({f"{Q}.lora_A.weight": torch.ones(2, 32, dtype=torch.int32)}), "factors of dtype I32"),
    # what the config says against what is there
    "r of a million in the config": (files(r=10**6), "r=1000000: expected a whole number from 1 to 1024"),
    "r of a million in a pattern": (files(rank_pattern={"q_proj": 10**6}), "rank_pattern.*from 1 to 1024"),
    "another r than the file's": (files(r=4), "have rank 2, r and rank_pattern of the config say 4"),
    "really a huge rank": (
        files({f"{Q}.lora_A.weight": torch.ones(1500, 32), f"{Q}.lora_B.weight": torch.ones(48, 1500)}),
        "rank 1500; expected at most 1024",
    ),
    "A without B": (renamed("q_proj.lora_B", "k_proj.lora_B"), "has no lora_[AB]"),
    "ranks that differ": (files({f"{Q}.lora_B.weight": torch.ones(48, 3)}), "rank 2, lora_B .* has rank 3"),
    "empty factors": (files({f"{Q}.lora_A.weight": torch.ones(0, 32)}), "are empty"),
    "a bias that was not announced": (files({f"{Q}.lora_B.bias": torch.ones(48)}), "lora_bias is False"),
    "a bias that is not there": (files(lora_bias=True), "lora_bias is True"),
    "two names of one module": (files(of_width(32, 48, "base_model.model." + Q)), "both name lora_A"),
    "config is no JSON": (files() | {CONFIG: b"peft_type: LORA"}, "not valid JSON"),
    "config is a list": (files() | {CONFIG: b"[]"}, "expected a JSON object"),
    "config nested deeply": (files() | {CONFIG: DEEP}, "not valid JSON"),
    "config of many megabytes": (files(task_type="x" * 5_000_000), "expected at most"),
    "no config": (without(CONFIG), f"no {CONFIG}"),
    # tensors that would overwrite the base
    "the embedding": (
        files({"base_model.model.model.embed_tokens.weight": torch.zeros(99, 32)}),
        "overwrite the shared",
    ),
    "a weight of the base": (
        files({f"{PREFIX}.1.mlp.up_proj.weight": torch.zeros(56, 32)}),
        "overwrite the shared base",
    ),
    "a base layer": (files({f"{Q}.base_layer.weight": torch.zeros(48, 32)}), "overwrite the shared base"),
    "a norm": (files({"base_model.model.model.norm.weight": torch.zeros(32)}), "overwrite the shared base"),
    "a head": (files({"base_model.model.lm_head.weight": torch.zeros(99, 32)}), "overwrite the shared base"),
    "a LoRA on the embedding": (files({f"{PREFIX[:-7]}.embed.lora_embedding_A": torch.zeros(2, 99)}), "an embedding"),
    "something unknown": (files({"extra": torch.zeros(3)}), "not a LoRA factor"),
    # numbers
    "NaN in A": (files(spoiled(f"{Q}.lora_A.weight", NAN)), "1 tensors hold NaN or Inf: .*q_proj.lora_A"),
    "Inf in B": (files(spoiled(f"{Q}.lora_B.weight", INF)), "1 tensors hold NaN or Inf: .*q_proj.lora_B"),
    "-Inf in A": (files(spoiled(f"{Q}.lora_A.weight", -INF)), "NaN or Inf"),
    "NaN in a bias": (
        files(
            {
                f"{PREFIX}.0.self_attn.{leaf}.lora_B.bias": torch.full((out,), NAN)
                for leaf, out in (("q_proj", 48), ("v_proj", 24))
            },
            lora_bias=True,
        ),
        "2 tensors hold NaN or Inf",
    ),
    "alpha of 1e30": (files(lora_alpha=1e30), "lora_alpha=1e[+]30"),
    "alpha of NaN": (files(lora_alpha=NAN), "lora_alpha=nan"),
    "alpha of Infinity": (files(lora_alpha=INF), "lora_alpha=inf"),
    "alpha as text": (files(lora_alpha="16"), "lora_alpha='16'"),
    "alpha that makes a scale of 50,000": (files(lora_alpha=100_000), "scale 50000 .*expected at most 10000"),
    "alpha of 1e30 in a pattern": (files(alpha_pattern={"v_proj": 1e30}), "alpha_pattern.*1e[+]30"),
    # another base
    "too wide": (files(of_width(64, 96) | of_width(64, 48, f"{PREFIX}.0.self_attn.v_proj")), "another base"),
    "one site too wide": (files(of_width(32, 64)), "32 to 64 wide, .* is 32 to 48; was it trained on another base"),
    "more layers": (renamed("layers.0", "layers.40"), "no such linear module"),
    "another architecture": (renamed("self_attn.q_proj", "attention.query"), "no such linear module"),
    # other formulas, and what changes the base
    "DoRA": (files(use_dora=True), "use_dora=True"),
    "DoRA that the config hides": (files({f"{Q}.lora_magnitude_vector": torch.ones(48)}), "DoRA"),
    "PiSSA": (files(init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4'.*changes the base weights"),
    "biases of the base": (files(bias="all"), "bias='all'"),
    "modules to save": (files(modules_to_save=["lm_head"]), "modules_to_save"),
    "another kind of adapter": (files(peft_type="IA3"), "peft_type='IA3'"),
    "a formula of tomorrow": (files(use_hyper_lora=True), "use_hyper_lora"),
    # regular expressions
    "a pattern that is no expression": (files(rank_pattern={"(((": 2}), "rank_pattern"),
    "a pattern with a look-behind": (files(alpha_pattern={"(?<=a)b": 2}), "alpha_pattern"),
    "a pattern of 10,000 letters": (files(rank_pattern={"(a|b)" * 2000: 2}), "rank_pattern"),
}


def write(folder: Path, content: dict[str, bytes]) -> Path:
    """An adapter's files in a folder."""
    folder.mkdir(parents=True)
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return folder


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
