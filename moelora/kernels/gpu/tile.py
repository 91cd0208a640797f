"""How a kernel cuts its work. Begin with Tile."""

from typing import NamedTuple


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


def fitted(tile: Tile, numbers: int, fixed: int, itemsize: int) -> Tile:
    """The tile with as many stages as shared memory has room for.

    A table is measured at few sizes, and a kernel takes more memory with, say, a larger router.

    Args:
        numbers: that one stage holds, of `itemsize` bytes each.
        fixed: that are held besides.
    """
    stages = (SHARED_BYTES // itemsize - fixed) // max(1, numbers)
    return tile._replace(stages=max(1, min(tile.stages, stages)))
