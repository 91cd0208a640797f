"""Which configuration a kernel takes, from shapes alone. Begin with tile_for.

The tables are JSON files, one for each kind of GPU, written by `python -m moelora.kernels.tune`. A GPU that has none
takes that of the H100.
"""

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from moelora.kernels.gpu.launch import power_of_two
from moelora.kernels.gpu.tile import Tile

FOLDER = Path(__file__).parent / "tuned"
DEFAULT = "nvidia_h100_80gb_hbm3"
"""The table of GPUs that have none of their own."""


def tile_for(kernel: str, shape_TW: Sequence[int], count: int, dtype: torch.dtype) -> Tile:
    """The tile of a kernel for this many tokens, a wide axis of this length, and this many rank rows.

    Sizes are rounded up to powers of two, so that the table is asked few different questions.
    """
    tokens, width = shape_TW
    tile = _nearest(kernel, power_of_two(tokens), power_of_two(width), power_of_two(count), device_name())
    return _for_fp32(tile) if dtype is torch.float32 else tile


def pays_delta_first(tokens: int, in_features: int, out_features: int) -> bool:
    """Whether the mixture is to be written before the base's product accumulates onto it."""
    return _delta_first(power_of_two(tokens), power_of_two(in_features), power_of_two(out_features), device_name())


def rule(name: str) -> int:
    """A number of the table that says where one path ends and another begins."""
    return table(device_name())["rules"][name]


@lru_cache
def device_name() -> str:
    """The name of the table for the GPU at hand."""
    if not torch.cuda.is_available():
        return DEFAULT
    name = torch.cuda.get_device_name().lower().replace(" ", "_")
    return name if (FOLDER / f"{name}.json").exists() else DEFAULT


@lru_cache
def table(name: str) -> dict[str, Any]:
    """A table as it stands in its file."""
    return json.loads((FOLDER / f"{name}.json").read_text())


@lru_cache(maxsize=4096)
def _nearest(kernel: str, tokens: int, width: int, count: int, name: str) -> Tile:
    entries = table(name)["tiles"][kernel]
    best = min(entries, key=lambda entry: _distance(entry["key"], (tokens, width, count)))
    return Tile(**best["tile"])


@lru_cache(maxsize=4096)
def _delta_first(tokens: int, in_features: int, out_features: int, name: str) -> bool:
    rules = table(name)["delta_first"]
    return min(rules, key=lambda rule: _distance(rule["key"], (tokens, in_features, out_features)))["pays"]


@lru_cache
def _for_fp32(tile: Tile) -> Tile:
    """The tables are measured in bf16; numbers of twice the size, in products of three, leave room for half as many."""
    if not tile.rows:
        return tile
    columns, inner = max(16, min(64, tile.columns)), max(16, min(32, tile.inner // 2))
    return tile._replace(rows=min(64, tile.rows), columns=columns, inner=inner, stages=min(2, tile.stages))


def _distance(key: list[int], sizes: tuple[int, ...]) -> float:
    return sum(abs(math.log2(max(1, a)) - math.log2(max(1, b))) for a, b in zip(key, sizes))
