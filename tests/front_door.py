"""What tests of the front door share: adapters made by PEFT, outputs, and what a refusal must leave as it was."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from adapters_on_disk import main_output
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from untouched import untouched

import moelora
from moelora.testing import tiny

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def output_of(model: nn.Module) -> Tensor:
    """What a tiny model answers to its own inputs."""
    with torch.no_grad():
        return main_output(model(**tiny.inputs(model)))


def alone(model: nn.Module, name: str) -> Tensor:
    """The same with one expert at weight 1."""
    with moelora.use_experts(model, {name: 1.0}):
        return output_of(model)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Equal to fp32 rounding: 1e-5 of the largest value."""
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def lora(family: str, folder: Path, config: LoraConfig, *, model: nn.Module | None = None, std: float = 0.1) -> Tensor:
    """Make a random adapter with PEFT, save it, and return the output of PEFT's own model with it."""
    adapted = get_peft_model(tiny.model(family) if model is None else model, config)
    generator = torch.Generator().manual_seed(len(folder.name))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, std, generator=generator)
    adapted.save_pretrained(str(folder))
    return output_of(adapted.eval())


def in_memory(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """A folder's adapter as a state dict and its config."""
    return load_file(folder / WEIGHTS), json.loads((folder / "adapter_config.json").read_text())


def files_below(*folders: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file."""
    found = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


@contextmanager
def nothing_happens(model: nn.Module, *folders: Path) -> Iterator[None]:
    """What runs inside leaves the model as it was, and the files in these folders and in the hub client's home."""
    folders = (*folders, Path(os.environ["HF_HOME"]))
    before = files_below(*folders)
    with untouched(model):
        yield
    assert not moelora.is_patched(model)
    assert files_below(*folders) == before, "files were written"
