"""Who a base model is, as data for a manifest, and whether another model is the same. Begin with describe_base.

A digest covers a few values spread over a parameter: enough to tell models apart, at a cost that does not grow with
them. It is no protection against somebody who builds a second model with the same digests.
"""

import hashlib
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

SAMPLED = 32
"""How many values of a parameter its digest covers."""


def describe_base(model: nn.Module) -> dict[str, Any]:
    """What the manifest says of the base model: enough to notice another one, no path of anybody's disk."""
    config = getattr(model, "config", None)
    name = str(getattr(model, "name_or_path", "") or "")
    looks_like_id = name.count("/") <= 1 and name[:1] not in {"", ".", "/", "~"} and "\\" not in name
    return {
        "class": type(model).__name__,
        "model_type": getattr(config, "model_type", None),
        "name": name if looks_like_id else None,
        "dtype": base_dtype_name(model),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "digests": {name: digest(parameter) for name, parameter in model.named_parameters()},
    }


def base_dtype_name(model: nn.Module) -> str:
    """The floating dtype that most numbers of a model have, such as "bfloat16"."""
    counts: dict[str, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            name = str(parameter.dtype).removeprefix("torch.")
            counts[name] = counts.get(name, 0) + parameter.numel()
    return max(counts, key=lambda name: counts[name]) if counts else "none"


def digest(parameter: Tensor) -> str | None:
    """Eight digits for a parameter's shape and a sample of its values; None where they are not here."""
    if parameter.is_meta or parameter.is_complex() or type(parameter.data).__name__ == "DTensor":
        return None
    flat = parameter.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED].to("cpu", torch.float32)
    return hashlib.sha256(repr(tuple(parameter.shape)).encode() + sample.numpy().tobytes()).hexdigest()[:8]


def check_base(
    model: nn.Module, expected: Mapping[str, Any], *, sites: Collection[str], restored: Collection[str] = ()
) -> None:
    """Refuse a model that is not the base of a mixture, and warn of what else differs.

    Args:
        model: not patched yet.
        expected: what `describe_base` said of the base.
        sites: module paths of the mixture; other weights there are another base.
        restored: parameters that the mixture brings along, whatever the model has now.

    Raises:
        ValueError: naming what differs.
    """
    own = describe_base(model)
    for key in ("model_type", "parameters"):
        if own[key] != expected.get(key):
            raise ValueError(
                f"this is not the base model of the mixture: its {key} is {own[key]!r}, "
                f"expected {expected.get(key)!r} ({expected.get('name') or expected.get('class')})"
            )
    if own["dtype"] != expected.get("dtype"):
        warnings.warn(
            f"the mixture was saved on a base in {expected.get('dtype')}, this one is in {own['dtype']}; the logits "
            "will differ by rounding, and the weights of the base were not compared",
            stacklevel=4,
        )
        return
    known = expected.get("digests", {})
    other = sorted(
        name
        for name, found in own["digests"].items()
        if name not in restored and None not in (found, known.get(name, "")) and found != known.get(name)
    )
    if any(name.rpartition(".")[0] in sites for name in other) or 2 * len(other) > len(own["digests"]):
        raise ValueError(
            f"this is not the base model of the mixture: {len(other)} of its {len(own['digests'])} parameters hold "
            f"other values, such as {other[:3]}; expected {expected.get('name') or expected.get('class')}"
        )
    if other:
        warnings.warn(
            f"{len(other)} parameters of this base hold other values than when the mixture was saved: {other[:5]}. "
            "The logits will differ. If they are new and were trained, make them trainable before saving",
            stacklevel=4,
        )
