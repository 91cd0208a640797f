"""Adapters that are hostile or broken, each in one thing, with what the error has to say. Begin with HOSTILE."""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from front_door import CONFIG, WEIGHTS
from safetensors.torch import load, save
from torch import Tensor

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
