"""Fusing and splitting factors never changes what they add."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moelora.integrations.adapter_types import SiteFactors
from moelora.integrations.fused import fuse, part_widths, split


def factors(width: int, out: int, rank: int = 2, scale: float = 2.0, bias: bool = False) -> SiteFactors:
    """Random factors; B as a transposed view, as they come out of a file."""
    bias_O = torch.randn(out) if bias else None
    return SiteFactors(A_RD=torch.randn(rank, width), B_RO=torch.randn(out, rank).t(), scale=scale, bias_O=bias_O)


def delta(site: SiteFactors, x_TD: Tensor) -> Tensor:
    """What factors add to their module's output."""
    bias = 0 if site.bias_O is None else site.bias_O
    return site.scale * (x_TD.to(site.A_RD.dtype) @ site.A_RD.T @ site.B_RO.to(site.A_RD.dtype) + bias)


widths_of_parts = st.tuples(st.integers(1, 5), st.integers(1, 5)).map(lambda pair: (pair[0], pair[1], pair[1]))


@given(widths_of_parts, st.data())
def test_fusing_keeps_the_delta(widths: tuple[int, int, int], data: st.DataObject):
    """The fused factors add to every block what its part added: any ranks, scales, biases, and absent parts."""
    blocks = [
        data.draw(
            st.none()
            | st.builds(
                factors,
                st.just(6),
                st.just(width),
                rank=st.integers(1, 3),
                scale=st.sampled_from([0.0, 0.25, 1.0, 3.0, -2.0]),
                bias=st.booleans(),
            )
        )
        for width in widths
    ]
    if all(block is None for block in blocks):
        blocks[0] = factors(6, widths[0])
    x_TD = torch.randn(4, 6)

    fused = fuse(blocks, widths)

    expected = [
        torch.zeros(4, width) if block is None else delta(block, x_TD)
        for block, width in zip(blocks, widths, strict=True)
    ]
    assert fused.A_RD.shape[0] == sum(block.A_RD.shape[0] for block in blocks if block is not None)
    torch.testing.assert_close(delta(fused, x_TD), torch.cat(expected, dim=1), rtol=1e-5, atol=1e-5)


@given(widths_of_parts, st.booleans())
def test_splitting_keeps_the_delta(widths: tuple[int, int, int], bias: bool):
    """The parts' deltas, side by side, are the fused delta, bit for bit, and A is shared."""
    fused, x_TD = factors(6, sum(widths), bias=bias), torch.randn(4, 6)

    parts = split(fused, widths)

    hidden_TR = x_TD @ fused.A_RD.T
    for part, columns in zip(parts, (hidden_TR @ fused.B_RO).split(list(widths), dim=1), strict=True):
        torch.testing.assert_close(hidden_TR @ part.B_RO, columns, rtol=1e-6, atol=1e-6)
        assert part.A_RD is fused.A_RD
    assert torch.equal(torch.cat([part.B_RO for part in parts], dim=1), fused.B_RO)
    if fused.bias_O is not None:
        assert torch.equal(torch.cat([part.bias_O for part in parts if part.bias_O is not None]), fused.bias_O)


@given(widths_of_parts, st.lists(st.booleans(), min_size=3, max_size=3).filter(any))
def test_widths_of_absent_parts(widths: tuple[int, int, int], present: list[bool]):
    """Any one of q, k and v gives the widths of the others, because k and v are equally wide."""
    parts = ("q_proj", "k_proj", "v_proj")
    known = {part: width for part, width, here in zip(parts, widths, present, strict=True) if here}

    assert part_widths(parts, known, sum(widths)) == widths
    assert part_widths(parts, known | {"k_proj": sum(widths)}, sum(widths)) is None
