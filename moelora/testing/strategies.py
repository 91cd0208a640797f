"""Hypothesis strategies for what moelora passes around. Begin with `experts` and `routings`."""

from typing import Any

import torch
from hypothesis import strategies as st

from moelora.bank import Expert
from moelora.routing import Routing


@st.composite
def experts(draw: Any, in_features: int, out_features: int, min_size: int = 1, max_size: int = 5) -> Any:
    """A list of experts of mixed ranks (0 too), scales and biases."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    made = []
    for _ in range(draw(st.integers(min_size, max_size))):
        rank = draw(st.sampled_from([0, 1, 2, 3, 8, 17]))
        bias_O = torch.randn(out_features, generator=generator) if rank and draw(st.booleans()) else None
        made.append(
            Expert(
                torch.randn(rank, in_features, generator=generator),
                torch.randn(rank, out_features, generator=generator),
                draw(st.sampled_from([1.0, 0.5, 2.0, 16 / 7, -1.5])),
                bias_O,
            )
        )
    return made


@st.composite
def routings(draw: Any, num_experts: int, num_tokens: int) -> Any:
    """A routing with distinct ids within each token, empty slots and zero weights among them."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    chosen = draw(st.integers(1, num_experts))
    experts_TK = torch.rand(num_tokens, num_experts, generator=generator).argsort(-1)[:, :chosen]
    weights_TK = torch.randn(num_tokens, chosen, generator=generator)
    empty = torch.rand(experts_TK.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    zero = torch.rand(experts_TK.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3]))
    return Routing(
        experts_TK.masked_fill(empty, -1),
        weights_TK.masked_fill(empty | zero, 0.0),
        torch.randn(num_tokens, num_experts, generator=generator),
    )
