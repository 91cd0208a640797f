"""From the keys and shapes of a state dict to factor pairs per module. Begin with lay_out.

The layout is computed from names and shapes alone, before any number is read, so that inspecting a remote header and
loading a file apply the same rules.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelora.integrations.adapter_config import AdapterConfig
from moelora.integrations.adapter_file import FLOATS
from moelora.integrations.adapter_types import AdapterError, Limits, SiteFactors, listed, shown
from moelora.integrations.keys import parse_key

_MAX_KEY = 1024
_DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class TensorShape(NamedTuple):
    """What is known of a tensor before it is read; `dtype` in the words of safetensors."""

    dtype: str
    shape: tuple[int, ...]


class SiteKeys(NamedTuple):
    """The keys of one module's factors, its rank and widths, and the scale that the config gives it."""

    A: str
    B: str
    bias: str | None
    rank: int
    in_features: int
    out_features: int
    scale: float


class Layout(NamedTuple):
    """Attributes: sites (module path to keys), problems (one sentence each), left_out (tensors that are no factors)."""

    sites: dict[str, SiteKeys]
    problems: list[str]
    left_out: list[str]


def shapes_of(state_dict: Mapping[Any, Any]) -> dict[str, TensorShape]:
    """What a file's header would say of tensors in memory."""
    shapes = {}
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise AdapterError(f"state dict entry {shown(key)} is a {type(value).__name__}; expected name -> tensor")
        shapes[key] = TensorShape(_DTYPE_NAMES.get(value.dtype, str(value.dtype)), tuple(value.shape))
    return shapes


def lay_out(shapes: Mapping[str, TensorShape], config: AdapterConfig, limits: Limits) -> Layout:
    """Pair every A with its B, check both against each other and against the config, and name what is left over."""
    parts: dict[str, dict[str, str]] = {}
    foreign: dict[str, list[str]] = {}
    adapters: set[str] = set()
    problems: list[str] = []
    for key in shapes:
        if len(key) > _MAX_KEY:
            problems.append(f"{shown(key)} has {len(key)} characters; expected at most {_MAX_KEY}")
            continue
        path, part, adapter, kind = parse_key(key)
        if part is None:
            foreign.setdefault(kind or "", []).append(key)
            continue
        if adapter is not None:
            adapters.add(adapter)
        slots = parts.setdefault(path, {})
        if part in slots and len(adapters) < 2:
            problems.append(f"{shown(slots[part])} and {shown(key)} both name lora_{part} of {shown(path)}")
        slots[part] = key

    # several adapters in one state dict: which one is meant is not for us to guess
    if len(adapters) > 1:
        names = shown(sorted(adapters))
        return Layout({}, [f"the keys hold several adapters {names}; pass one adapter's state dict at a time"], [])

    sites: dict[str, SiteKeys] = {}
    for path, slots in parts.items():
        site = _site(path, slots, shapes, config, limits)
        if isinstance(site, str):
            problems.append(site)
        else:
            sites[path] = site
    if not parts:
        problems.append("no LoRA tensors; expected keys that end in lora_A.weight and lora_B.weight")
    left_out = [f"{len(keys)} x {kind}: {listed([shown(key) for key in keys], 3)}" for kind, keys in foreign.items()]
    return Layout(sites, problems, left_out)


def _site(
    path: str, slots: dict[str, str], shapes: Mapping[str, TensorShape], config: AdapterConfig, limits: Limits
) -> SiteKeys | str:
    """One module's keys, or the sentence that says what is wrong with them."""
    if "A" not in slots or "B" not in slots:
        present, missing = ("A", "B") if "A" in slots else ("B", "A")
        return f"{shown(path)} has no lora_{missing} ({'only lora_' + present}); the file is incomplete"
    A, B = shapes[slots["A"]], shapes[slots["B"]]
    if A.dtype not in FLOATS or B.dtype not in FLOATS:
        return f"{shown(path)}: factors of dtype {A.dtype}, {B.dtype}; expected one of {sorted(FLOATS)}"

    # shapes: two matrices that share the rank
    if len(A.shape) != 2 or len(B.shape) != 2:
        return (
            f"{shown(path)}: lora_A {A.shape}, lora_B {B.shape}; expected two matrices (r, in) and (out, r). "
            "LoRA on convolutions and on stacked parameters cannot be routed"
        )
    (rank, in_features), (out_features, rank_of_B) = A.shape, B.shape
    if 0 in A.shape or 0 in B.shape:
        return f"{shown(path)}: lora_A {A.shape}, lora_B {B.shape} are empty; gather sharded weights before saving"
    if rank != rank_of_B:
        return f"{shown(path)}: lora_A {A.shape} has rank {rank}, lora_B {B.shape} has rank {rank_of_B}"
    if rank > limits.rank:
        return f"{shown(path)}: rank {rank}; expected at most {limits.rank}"
    announced = config.rank(path)
    if announced != rank:
        return f"{shown(path)}: the factors have rank {rank}, r and rank_pattern of the config say {announced}"

    # the bias of B, announced and present or neither
    bias = slots.get("bias")
    if (bias is not None) != config.lora_bias:
        return (
            f"{shown(path)}: lora_bias is {config.lora_bias} in the config, the file has "
            f"{'a' if bias is not None else 'no'} lora_B.bias; the config and the file must agree"
        )
    if bias is not None and (shapes[bias].shape != (out_features,) or shapes[bias].dtype not in FLOATS):
        return f"{shown(path)}: lora_B.bias {shapes[bias].dtype} {shapes[bias].shape}; expected ({out_features},)"

    scale = config.scale(path, rank)
    if not abs(scale) <= limits.scale:
        return f"{shown(path)}: scale {scale:g} (lora_alpha / r); expected at most {limits.scale:g}"
    return SiteKeys(slots["A"], slots["B"], bias, rank, in_features, out_features, scale)


def factor_keys(sites: Iterable[SiteKeys]) -> list[str]:
    """The keys of all factors of these sites."""
    return [key for site in sites for key in (site.A, site.B, site.bias) if key is not None]


def build_factors(sites: Mapping[str, SiteKeys], tensor: Callable[[str], Tensor]) -> dict[str, SiteFactors]:
    """Factors per module path, with lora_B as a transposed view."""
    return {
        path: SiteFactors(
            A_RD=tensor(site.A),
            B_RO=tensor(site.B).t(),
            scale=site.scale,
            bias_O=None if site.bias is None else tensor(site.bias),
        )
        for path, site in sites.items()
    }
