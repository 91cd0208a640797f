"""Move factors between split projections (q, k, v) and one fused projection, without changing the delta.

Fusing stacks the A rows of the parts and puts their B rows on the diagonal: ranks add up. Splitting cuts the output
columns of B and shares A. Only layouts of plain blocks [q; k; v] and [gate; up] are moved; where a fused projection
interleaves its heads, the order depends on the model's code, and that is refused. Begin with fuse and split.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moelora.integrations.adapter_types import SiteFactors

QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")

FUSED_PARTS: dict[str, tuple[str, ...]] = {"qkv_proj": QKV, "Wqkv": QKV, "gate_up_proj": GATE_UP}
"""Name of a fused projection -> the names of its parts, in the order of its rows."""

# Model types whose own code cuts the fused output into plain blocks, read in transformers 5.23.
_PLAIN_BLOCKS = {
    "qkv_proj": frozenset({"phi3", "phi4_multimodal"}),
    "Wqkv": frozenset({"mpt", "modernbert", "dbrx"}),
    "gate_up_proj": frozenset(
        {"phi3", "phi4_multimodal", "glm", "glm4", "glm4v", "glm4v_text", "glm_ocr", "glm_image", "dia", "zamba2"}
    ),
}
# Model types that interleave the heads in a fused projection of the same name.
_INTERLEAVED = {"qkv_proj": frozenset({"codegen", "minimax"})}

INTERLEAVED_NAMES = frozenset({"query_key_value"})
"""Fused projections that interleave their heads, each family in its own way: gpt_neox, bloom, falcon, persimmon."""


def fusing_refused(fused: str, model_type: str | None) -> str | None:
    """Why split factors cannot be put on this fused projection of the model; None when they can."""
    if fused in INTERLEAVED_NAMES or model_type in _INTERLEAVED.get(fused, ()):
        return f"the model fuses q, k and v per head in {fused}; where its rows belong depends on the model's code"
    if model_type not in _PLAIN_BLOCKS.get(fused, ()):
        return f"the model fuses them in {fused}, and the order of its rows is not known for model_type={model_type!r}"
    return None


def splitting_refused(fused: str, model_type: str | None) -> str | None:
    """Why fused factors of this name cannot be cut for the model's split projections; None when they can."""
    if fused in INTERLEAVED_NAMES or model_type in _INTERLEAVED.get(fused, ()):
        return f"the adapter fuses q, k and v per head in {fused}; which rows are whose depends on its model's code"
    return None


def part_widths(parts: Sequence[str], known: dict[str, int], total: int) -> tuple[int, ...] | None:
    """Output widths of all parts of a fused projection, from those of the parts that are present.

    Of q, k and v the last two are equally wide, as are gate and up. None when the widths cannot add up.
    """
    if parts == GATE_UP:
        widths = (total // 2, total - total // 2)
    else:
        other = known.get("k_proj", known.get("v_proj"))
        if other is None:
            other = (total - known["q_proj"]) // 2
        widths = (total - 2 * other, other, other)
    fits = sum(widths) == total and min(widths) > 0
    return widths if fits and all(known.get(part, w) == w for part, w in zip(parts, widths, strict=True)) else None


def fuse(blocks: Sequence[SiteFactors | None], widths: Sequence[int]) -> SiteFactors:
    """One pair of factors for the fused projection; None stands for a part that the adapter does not touch.

    Where the parts' scales differ, the ratio to the first one's is multiplied into B in (at least) fp32.
    """
    present = [block for block in blocks if block is not None]
    scale = next((block.scale for block in present if block.scale != 0), 0.0)
    same = all(block.scale == scale for block in present)
    has_bias = any(block.bias_O is not None for block in present)
    dtype = present[0].B_RO.dtype
    for block in present[1:]:
        dtype = torch.promote_types(dtype, block.B_RO.dtype)
    if not same:
        dtype = torch.promote_types(dtype, torch.float32)

    rank, total = sum(block.A_RD.shape[0] for block in present), sum(widths)
    B_RO = present[0].B_RO.new_zeros(rank, total, dtype=dtype)
    bias_O = present[0].B_RO.new_zeros(total, dtype=dtype) if has_bias else None
    row = column = 0
    for block, width in zip(blocks, widths, strict=True):
        if block is not None:
            ratio = 1.0 if same else block.scale / scale
            rows = slice(row, row + block.A_RD.shape[0])
            B_RO[rows, column : column + width] = _scaled(block.B_RO, ratio, dtype)
            if bias_O is not None and block.bias_O is not None:
                bias_O[column : column + width] = _scaled(block.bias_O, ratio, dtype)
            row = rows.stop
        column += width
    return SiteFactors(A_RD=torch.cat([block.A_RD for block in present]), B_RO=B_RO, scale=scale, bias_O=bias_O)


def split(factors: SiteFactors, widths: Sequence[int]) -> list[SiteFactors]:
    """One pair of factors per part, in order: the same A, and the part's columns of B as views."""
    Bs = factors.B_RO.split(list(widths), dim=1)
    biases = [None] * len(widths) if factors.bias_O is None else factors.bias_O.split(list(widths))
    return [
        SiteFactors(A_RD=factors.A_RD, B_RO=B_RO, scale=factors.scale, bias_O=bias_O)
        for B_RO, bias_O in zip(Bs, biases, strict=True)
    ]


def _scaled(tensor: Tensor, ratio: float, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if ratio == 1.0 else tensor.to(dtype) * ratio
