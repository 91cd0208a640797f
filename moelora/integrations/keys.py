"""Read the keys of a LoRA state dict: which module, which factor. Begin with parse_key.

PEFT writes `base_model.model.<module path>.lora_A.weight`. In the wild the prefix may be missing, doubled, or mixed
with those of torch.compile and of data parallelism, and the adapter's name may still sit inside the key.
"""

from functools import lru_cache
from typing import NamedTuple

_WRAPPERS = ("base_model.model.", "module.")
_WRAPPER_SEGMENTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_FACTORS = {
    ("lora_A", "weight"): "A",
    ("lora_B", "weight"): "B",
    ("lora_B", "bias"): "bias",
}

# a segment of the key -> what the tensor is and what to do; the first that occurs decides
_FOREIGN = {
    "lora_magnitude_vector": "the magnitude of a DoRA adapter; DoRA is not additive, retrain with use_dora=False",
    "lora_embedding_A": "a LoRA on an embedding; only linear projections can be routed",
    "lora_embedding_B": "a LoRA on an embedding; only linear projections can be routed",
    "token_adapter": "trained token rows (trainable_token_indices)",
    "trainable_tokens_delta": "trained token rows (trainable_token_indices)",
    "modules_to_save": "a full weight (modules_to_save)",
    "lora_down": "a LoRA in the kohya format; convert it to PEFT's format",
    "lora_up": "a LoRA in the kohya format; convert it to PEFT's format",
    "lora_E": "a singular value of AdaLoRA; convert it to plain LoRA",
    "lora_diag": "a diagonal of KaSA; convert it to plain LoRA",
}


class ParsedKey(NamedTuple):
    """One key, read.

    Attributes:
        path: module path with wrapper prefixes removed.
        part: "A", "B" or "bias" (of B); None for a tensor that is no LoRA factor.
        adapter: the adapter's name when the key still holds it.
        foreign: what the tensor is when it is no LoRA factor.
    """

    path: str
    part: str | None
    adapter: str | None = None
    foreign: str | None = None


def strip_wrappers(path: str) -> str:
    """A module path without the prefixes that PEFT, torch.compile, FSDP and data parallelism put before it."""
    if "_wrapped_module" in path or "_orig_mod" in path:
        path = ".".join(segment for segment in path.split(".") if segment not in _WRAPPER_SEGMENTS)
    stripped = True
    while stripped:
        stripped = False
        for prefix in _WRAPPERS:
            if path.startswith(prefix):
                path, stripped = path[len(prefix) :], True
    return path


@lru_cache(maxsize=32_768)  # adapters of one family share their keys
def parse_key(key: str) -> ParsedKey:
    """Split a key of a LoRA state dict into module path and factor.

    `...q_proj.lora_A.weight` and `...q_proj.lora_A.my.name.weight` are both read; everything else is `foreign`.
    """
    for marker in ("lora_A", "lora_B"):
        before, found, after = key.rpartition(f".{marker}.")
        if found:
            adapter, dot, leaf = after.rpartition(".")
            part = _FACTORS.get((marker, leaf))
            if part is not None and before:
                return ParsedKey(strip_wrappers(before), part, adapter if dot else None)
    return ParsedKey(strip_wrappers(key), None, None, _describe_foreign(key))


def _describe_foreign(key: str) -> str:
    segments = key.split(".")
    for segment in segments:
        if segment in _FOREIGN:
            return _FOREIGN[segment]
    if "base_layer" in segments:
        return "a weight of the base model (base_layer); it would overwrite the shared base"
    if segments[-1] in ("weight", "bias") and not any("lora" in segment for segment in segments):
        return "a full weight of the base model or of a head; it would overwrite the shared base"
    return "not a LoRA factor"
