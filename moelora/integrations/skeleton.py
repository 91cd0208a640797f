"""A model from its config alone, whose weights take no memory: every parameter is one number, seen many times.

Begin with `skeleton`, and call the model inside `cheap_projections`. It is for questions about structure, such as which
modules a forward calls; what it computes means nothing. An architecture whose code is not in transformers has none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModel

from moelora.integrations.hub.client import patiently
from moelora.integrations.hub.names import check_token, checked_place

VALUE = 0.01
"""What every parameter holds: small, and not zero, since some models divide by what they compute."""


def skeleton(
    source: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
) -> nn.Module:
    """The model that a config.json describes, in the class that it names.

    Args:
        source: a folder, a config.json, or a hub id, also `id@revision`.
        revision, token, endpoint, cache_dir, local_files_only: for the hub.

    Raises:
        ValueError: if there is no config, or transformers does not know its architecture. No code is downloaded.
    """
    path = Path(source).expanduser()
    if path.is_file():
        path = path.parent
    if not path.is_dir():
        if source.startswith((".", "/", "~")):
            raise ValueError(f"there is no folder {source!r}; expected one with a config.json, or a hub id")
        repo_id, _, own_revision = source.partition("@")
        place = checked_place(repo_id, revision=own_revision or revision, endpoint=endpoint)
        check_token(token)
        found = patiently(
            lambda: hf_hub_download(
                place.repo_id,
                "config.json",
                revision=place.revision,
                token=token,
                endpoint=place.endpoint,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            ),
            place,
            token,
        )
        path = Path(found).parent
    if not (path / "config.json").is_file():
        raise ValueError(f"{str(path)!r} has no config.json, so it describes no model")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        named = next(iter(getattr(config, "architectures", None) or []), None)
        kind = getattr(transformers, named, None) if isinstance(named, str) else None
        # the others read all experts at once, which kernels refuse for numbers that share their memory
        config._experts_implementation = "eager"
        with _parameters_on_meta():
            model = AutoModel.from_config(config) if kind is None else kind(config)
    except Exception as error:
        raise ValueError(f"the config of {source!r} makes no model: {type(error).__name__}: {error}") from error
    return _filled(model).eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules that are made inside get parameters without memory; their buffers are real."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _filled(model: nn.Module) -> nn.Module:
    """The model with one number behind each parameter; tied parameters stay tied."""
    known: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                number = torch.tensor(VALUE if parameter.is_floating_point() else 0, dtype=torch.float32)
                if not parameter.is_floating_point():
                    number = number.to(parameter.dtype)
                made = known.setdefault(
                    id(parameter), nn.Parameter(number.expand(parameter.shape), requires_grad=False)
                )
                module._parameters[name] = made
    return model


class cheap_projections(TorchFunctionMode):
    """Inside, a product with a weight that is one number is a sum, so that a model of any size runs in no time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and len(args) >= 2 and not any(args[1].stride()):
            x, weight = args[:2]
            bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
            y = _sums(x, weight.shape[0])
            return y if bias is None else y + bias
        return func(*args, **(kwargs or {}))


def _sums(x: Tensor, width: int) -> Tensor:
    return (x.sum(-1, keepdim=True) * VALUE).expand(*x.shape[:-1], width).contiguous()
