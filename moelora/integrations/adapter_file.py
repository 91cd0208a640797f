"""Read a safetensors file that somebody else wrote: header first, bounds first, then all bytes in one read.

The digest is of exactly the bytes that the tensors view: the file is read once into memory, hashed there, and the
tensors are windows on that buffer. The format: https://github.com/huggingface/safetensors#format. Begin with read_file.
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeGuard

import torch
from torch import Tensor

from moelora.integrations.adapter_types import AdapterError, Limits, shown

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Other kinds may stand in a file beside the factors (strict=False leaves them out), so their sizes must be known.
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1} | {
    "I16": 2,
    "U16": 2,
    "I32": 4,
    "U32": 4,
    "I64": 8,
    "U64": 8,
    "F8_E8M0": 1,
    "C64": 8,
}


class TensorEntry(NamedTuple):
    """One tensor as the header announces it: kind of number, shape, and its place in the data region."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """A weight file in memory: its checked header, its bytes, and their digest."""

    entries: dict[str, TensorEntry]
    buffer: bytearray
    data_start: int
    sha256: str

    def tensor(self, key: str) -> Tensor:
        """A tensor of the file, as a window on the buffer (a copy where it is not aligned)."""
        dtype, shape, start, end = self.entries[key]
        kind = FLOATS[dtype]
        offset = self.data_start + start
        if offset % _SIZES[dtype]:
            return torch.frombuffer(self.buffer[offset : self.data_start + end], dtype=kind).view(shape)
        return torch.frombuffer(self.buffer, dtype=kind, count=math.prod(shape), offset=offset).view(shape)

    def is_finite(self, keys: list[str]) -> bool:
        """Whether all these tensors are free of NaN and Inf.

        One sum over the whole data region answers for a sane file: a sum is finite only if all its terms are.
        """
        kinds = {entry.dtype for entry in self.entries.values()}
        offset = self.data_start
        if len(kinds) == 1 and kinds <= set(FLOATS) and offset % 8 == 0 and len(self.buffer) > offset:
            kind = FLOATS[kinds.pop()]
            if _sum_is_finite(torch.frombuffer(self.buffer, dtype=kind, offset=offset)):
                return True
        return all(tensor_is_finite(self.tensor(key)) for key in keys)


def tensor_is_finite(tensor: Tensor) -> bool:
    """Whether a tensor is free of NaN and Inf: by its sum, and exactly only where the sum overflows."""
    return _sum_is_finite(tensor) or bool(torch.isfinite(tensor).all())


def _sum_is_finite(tensor: Tensor) -> bool:
    # fp32: sums of fp16 overflow where no term does
    precise = tensor.dtype if tensor.dtype == torch.float64 else torch.float32
    return math.isfinite(tensor.sum(dtype=precise).item())


def weights_path(folder: Path, where: str) -> Path:
    """The safetensors file of an adapter folder; a folder that has only a pickle is refused."""
    path = folder / WEIGHTS_NAME
    if path.is_file():
        return path
    if (folder / "adapter_model.bin").exists():
        raise AdapterError(
            f"{where}: only adapter_model.bin, a pickle, which can run code when it is read; expected "
            f"{WEIGHTS_NAME}. Load it where you trust it and save it again with safe_serialization=True"
        )
    raise AdapterError(f"{where}: no {WEIGHTS_NAME} in the folder; expected a PEFT LoRA folder")


def read_file(path: Path, limits: Limits) -> AdapterFile:
    """A whole file, checked and hashed.

    Raises:
        AdapterError: for a file or header beyond the limits, or a header that does not describe the file.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        header, data_start = _read_header(file, size, limits)
        entries = parse_header(header, limits, data_bytes=size - data_start)
        buffer = bytearray(size)
        file.seek(0)
        if file.readinto(buffer) != size:
            raise AdapterError(f"{path.name} changed while it was read; try again")
    return AdapterFile(entries=entries, buffer=buffer, data_start=data_start, sha256=hashlib.sha256(buffer).hexdigest())


def read_header(path: Path, limits: Limits) -> tuple[dict[str, TensorEntry], int]:
    """Only the header of a file, and the file's size in bytes."""
    with path.open("rb") as file:
        size = path.stat().st_size
        header, data_start = _read_header(file, size, limits)
    return parse_header(header, limits, data_bytes=size - data_start), size


def _read_header(file: BinaryIO, size: int, limits: Limits) -> tuple[dict[str, Any], int]:
    if size > limits.file_bytes:
        raise AdapterError(f"the weight file has {size} bytes; expected at most {limits.file_bytes}")
    if size < 8:
        raise AdapterError(f"the weight file has {size} bytes; that is no safetensors file")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(limits.header_bytes, size - 8):
        raise AdapterError(
            f"the safetensors header claims {length} bytes in a file of {size}; expected at most "
            f"{min(limits.header_bytes, size - 8)}. The file is truncated, damaged, or no safetensors file"
        )
    try:
        header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"the safetensors header is not valid JSON: {shown(str(error))}") from error
    if not isinstance(header, dict):
        raise AdapterError(f"the safetensors header holds {type(header).__name__}; expected a JSON object")
    return header, 8 + length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a name occurs twice")
    return unique


def parse_header(header: Mapping[str, Any], limits: Limits, *, data_bytes: int | None = None) -> dict[str, TensorEntry]:
    """The tensors that a header announces, in the order of their data.

    Sizes must follow from shapes, and the tensors must tile the data region without holes or overlaps.

    Args:
        data_bytes: size of the data region; None where only the header is known.

    Raises:
        AdapterError: naming the tensor and what is wrong with it.
    """
    count = len(header) - ("__metadata__" in header)
    if count > limits.tensors:
        raise AdapterError(f"the file announces {count} tensors; expected at most {limits.tensors}")
    entries = {key: _entry(key, found) for key, found in header.items() if key != "__metadata__"}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))

    # the data region: tiled, and as long as announced
    place = elements = 0
    for key, entry in entries.items():
        if entry.start != place:
            raise AdapterError(f"tensor {shown(key)} begins at {entry.start}, expected {place}: a hole or an overlap")
        place = entry.end
        elements += math.prod(entry.shape)
    if elements > limits.elements:
        raise AdapterError(f"the file announces {elements} numbers; expected at most {limits.elements}")
    if data_bytes is not None and place != data_bytes:
        raise AdapterError(f"the header describes {place} bytes of data, the file holds {data_bytes}")
    return entries


def _entry(key: str, found: object) -> TensorEntry:
    if not isinstance(found, Mapping):
        raise AdapterError(f"tensor {shown(key)}: its header entry is {shown(found)}; expected an object")
    dtype, shape, offsets = found.get("dtype"), found.get("shape"), found.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise AdapterError(f"tensor {shown(key)}: dtype {shown(dtype)}; expected one of {sorted(_SIZES)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise AdapterError(f"tensor {shown(key)}: shape {shown(shape)}, data_offsets {shown(offsets)} are malformed")
    start, end = offsets
    if end - start != math.prod(shape) * _SIZES[dtype]:
        raise AdapterError(
            f"tensor {shown(key)}: shape {shown(shape)} of {dtype} takes {math.prod(shape) * _SIZES[dtype]} bytes, "
            f"its data_offsets {shown(offsets)} give {end - start}"
        )
    return TensorEntry(dtype, tuple(shape), start, end)


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    # type, not isinstance: JSON's true is an int to Python. The bound keeps products of hostile sizes cheap.
    return (
        isinstance(values, list)
        and len(values) <= 8
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )
