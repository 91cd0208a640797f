"""How a kernel cuts its work. Begin with Tile."""

from typing import NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """One configuration of one kernel; which of the sizes a kernel reads stands in its file.

    Attributes:
        rows: tokens (or, in products over tokens, wide columns) that one program owns.
        columns: columns that one program computes at a time.
        inner: length of a step along the axis that is summed over.
        split: into how many parts, each a program of its own, the summed axis is cut; partial sums are added in order.
        warps, stages: of Triton.
    """

    rows: int = 64
    columns: int = 128
    inner: int = 64
    split: int = 1
    warps: int = 4
    stages: int = 3


SHARED_BYTES = 225_000
"""What a kernel's buffers may take of the shared memory of a multiprocessor; a block may have 227 KiB on Hopper."""


def fitted(tile: Tile, numbers: int, fixed: int, like: Tensor) -> Tile:
    """The tile with as many stages as shared memory has room for.

    A table is measured at few sizes, and a kernel takes more memory with, say, a larger router.

    Args:
        numbers: that one stage holds, of the dtype of `like`.
        fixed: that are held besides.
    """
    stages = (SHARED_BYTES // like.element_size() - fixed) // max(1, numbers)
    return tile._replace(stages=max(1, min(tile.stages, stages)))


def for_rows(tile: Tile, *matrices: Tensor | None) -> Tile:
    """The tile; where the stride of a matrix's rows is no multiple of 16 numbers, a smaller one of a product.

    Triton knows of no alignment then. Such rows are copied number by number and through registers, in which a large
    tile has no room.
    """
    if all(matrix.stride(-2) % 16 == 0 for matrix in matrices if matrix is not None):
        return tile
    return tile._replace(inner=32, warps=8, stages=2)


def for_tail(tile: Tile, like: Tensor) -> Tile:
    """The tile of a kernel that takes two products in one pass, the second of them, the tail, as narrow as 16 columns.

    Triton 3.6 loses its way in shared memory (wrong sums, illegal access) with products of three tf32 where a warp
    has less than 16 x 16 numbers of the tail to itself.
    """
    return tile._replace(rows=64, warps=4) if like.dtype is torch.float32 else tile
