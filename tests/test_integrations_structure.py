"""Models that no table knows: projections are found by structure and proven by the probe."""

import re

import pytest
import torch
from resolved_sites import by_role, last
from torch import Tensor, nn

from moelora.integrations.families import linear_sizes
from moelora.integrations.sites import TargetError
from moelora.integrations.targets import resolve_sites
from moelora.testing import tiny


class Attention(nn.Module):
    """Attention of nobody's library: its own names, its own norm inside."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_queries, self.to_keys, self.to_values = (nn.Linear(width, width + 4) for _ in range(3))
        self.back = nn.Linear(width + 4, width)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        source = x if memory is None else memory
        q, k, v = self.to_queries(x), self.to_keys(source), self.to_values(source)
        return self.back(nn.functional.scaled_dot_product_attention(q, k, v))


class CrossAttention(Attention):
    """The same, reading another sequence."""


class Block(nn.Module):
    """Attention, cross-attention, and an MLP with a gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = Attention(width)
        self.cross = CrossAttention(width)
        self.gate = nn.Linear(width, 3)
        self.widen = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.attention(x)
        x = x + self.cross(x, memory)
        return x + self.narrow(self.widen(x).relu()) * self.gate(x).softmax(-1)[..., :1]


class Custom(nn.Module):
    """A transformer that is no transformers model."""

    def __init__(self, width: int = 8, shared: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        block = Block(width)
        self.blocks = nn.ModuleList([block, block if shared else Block(width)])
        self.head = nn.Linear(width, 11)

    def forward(self, ids: Tensor, memory: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, memory)
        return self.head(x)


INPUTS = {"ids": torch.arange(6).view(2, 3), "memory": torch.ones(2, 5, 8)}


def test_a_module_of_nobodys_library_is_resolved_by_structure():
    """Roles, encoder readers and groups come from what is called with what."""
    resolution = resolve_sites(Custom(), probe_inputs=INPUTS)
    names = {
        role: {path.removeprefix("blocks.").split(".", 1)[1] for path in p} for role, p in by_role(resolution).items()
    }
    assert names == {
        "attn_in": {"attention.to_queries", "attention.to_keys", "attention.to_values"},
        "attn_out": {"attention.back"},
        "cross_in": {"cross.to_queries", "cross.to_keys", "cross.to_values"},
        "cross_out": {"cross.back"},
    }
    assert {last(site.path) for site in resolution.sites if site.reads_encoder} == {"to_keys", "to_values"}
    assert sorted(map(len, resolution.groups)) == [1, 1, 1, 1, 1, 1, 2, 2, 3, 3]
    mlp = by_role(resolve_sites(Custom(), probe_inputs=INPUTS, roles=["mlp_in", "mlp_out"]))
    assert mlp == {
        "mlp_in": ["blocks.0.widen", "blocks.1.widen"],
        "mlp_out": ["blocks.0.narrow", "blocks.1.narrow"],
    }


def test_positional_probe_inputs():
    """A tuple is passed as arguments, a tensor as the only one."""
    assert resolve_sites(Custom(), probe_inputs=tuple(INPUTS.values())) == resolve_sites(Custom(), probe_inputs=INPUTS)
    stack = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    assert len(resolve_sites(stack, targets=["0", "1"], probe_inputs=torch.ones(2, 3)).sites) == 2


def test_a_custom_module_without_inputs_asks_for_them():
    """The error says which argument to give."""
    with pytest.raises(ValueError, match=r"Custom is not a transformers model.*pass probe_inputs="):
        resolve_sites(Custom())


def test_a_shared_module_is_one_site_with_aliases():
    """Two places, one module: one site at the first path, the other path beside it; either may be named."""
    model = Custom(shared=True)
    sites = resolve_sites(model, probe_inputs=INPUTS).sites
    assert len(sites) == 8
    assert all(site.aliases == (site.path.replace("blocks.0", "blocks.1"),) for site in sites)
    by_alias = resolve_sites(model, targets=["blocks.1.attention.back"], probe_inputs=INPUTS).sites
    assert [site.path for site in by_alias] == ["blocks.0.attention.back"]
    by_adapter = resolve_sites(model, adapter_paths=["blocks.1.attention.back"], probe_inputs=INPUTS).sites
    assert by_adapter == by_alias


def test_multihead_attention_of_torch_is_refused():
    """nn.MultiheadAttention reads its projections' weights: nothing can be patched there, and the error says so."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](x)

    model = Encoder()
    with pytest.raises(TargetError, match=r"self_attn\.out_proj.*(never called as a module|fused path)"):
        resolve_sites(model, targets=["out_proj"], probe_inputs=torch.ones(3, 2, 8))
    with pytest.raises(TargetError, match="no linear with role attn_in"):
        resolve_sites(model, probe_inputs=torch.ones(3, 2, 8))


def test_a_tower_that_the_probe_does_not_reach_is_named():
    """The reason says that inputs are missing, not that weights are read directly."""

    class TwoTowers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text = nn.ModuleList([Attention(8)])
            self.image = nn.ModuleList([Attention(8)])

        def forward(self, text: Tensor, image: Tensor | None = None) -> Tensor:
            return self.text[0](text) if image is None else self.image[0](image)

    with pytest.raises(TargetError, match=r"image\.0\.back.*did not reach it"):
        resolve_sites(TwoTowers(), targets=["back"], probe_inputs={"text": torch.ones(1, 2, 8)})
    with pytest.raises(TargetError, match=r"text\.0\.back"):
        resolve_sites(
            TwoTowers(), targets=["back"], probe_inputs={"text": torch.ones(1, 2, 8), "image": torch.ones(1, 2, 8)}
        )


def test_sizes_come_from_attributes_not_weights():
    """Quantised linears by their attribute names, Conv1D by its own; no embedding, norm or convolution is a linear."""

    class Packed(nn.Module):
        def __init__(self, **sizes: int) -> None:
            super().__init__()
            self.__dict__.update(sizes)
            self.register_buffer("weight", torch.zeros(7, 1, dtype=torch.uint8))

    from transformers.pytorch_utils import Conv1D

    assert linear_sizes(nn.Linear(3, 5)) == (3, 5)
    assert linear_sizes(Conv1D(5, 3)) == (3, 5)
    assert linear_sizes(Packed(in_features=3, out_features=5)) == (3, 5)
    assert linear_sizes(Packed(infeatures=3, outfeatures=5)) == (3, 5)
    for other in (nn.Embedding(3, 5), nn.LayerNorm(3), nn.Conv1d(3, 5, 1), nn.Bilinear(2, 3, 5), nn.Identity()):
        assert linear_sizes(other) is None


def test_the_table_prints():
    """One line per role and shape, with counts, sizes and starred paths."""
    text = str(resolve_sites(tiny.model("mamba")))
    assert re.search(r"ssm_in +2 +32 -> 128 +backbone\.layers\.\*\.mixer\.in_proj", text)
    assert re.search(r"refused +2 +MambaMixer reads dt_proj\.weight directly", text)
