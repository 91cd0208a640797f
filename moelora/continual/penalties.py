"""Losses on what a new expert shares with older ones, over many sites at once. Begin with site_penalty.

Axes: G sites of one shape, R rank rows of the new expert, P rows of all old bases, D width.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from moelora.continual.orthogonal import o3_penalty, o_lora_penalty
from moelora.continual.sites import Site
from moelora.continual.subspace import RANK_TOLERANCE, row_basis


def site_penalty(mode: str, sites: Sequence[Site], side: str) -> "Shares | Products":
    """The loss of a mode on side "in" or "out", not weighed, as a function of the new factors' present values.

    "penalty": mean over sites and predecessors of `overlap`. "o_lora": sum over sites of `o_lora_penalty`. "o3": sum
    over sites and predecessors of `o3_penalty`, divided by the number of blocks.
    """
    pairs = [(site.new_rows(side), site.old_rows(side)) for site in sites]
    return Shares(pairs) if mode == "penalty" else Products(mode, pairs, blocks=num_blocks([s.path for s in sites]))


@final
class Shares:
    """Mean over sites of `mean_overlap`, with its gradient, all sites of one shape in one go.

    With X orthonormal rows that span a site's new rows and P the projection on an old span, the overlap is
    tr(X P X^T) / R. X is a combination of the rows that is chosen without a gradient; that it must stay orthonormal is
    the second term of tr((2 I - X X^T) X P X^T), the expansion of (X X^T)^-1 about I to first order. Value and gradient
    are those of `moelora.continual.orthogonal.overlap`, without a QR for each site.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Sequence[Tensor]]]) -> None:
        groups: dict[tuple[object, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for new_RD, olds in pairs:
            # each predecessor weighs the same, however many rows it has
            bases = [row_basis(old_SD.detach()) / math.sqrt(len(olds)) for old_SD in olds]
            olds_PD = torch.cat(bases) if bases else new_RD.new_zeros(0, new_RD.shape[1])
            if len(olds_PD):
                groups[(*new_RD.shape, len(olds_PD), new_RD.device)].append((new_RD, olds_PD))
        self._groups = [
            ([new_RD for new_RD, _ in group], torch.stack([olds_PD for _, olds_PD in group]))
            for group in groups.values()
        ]
        self._num_sites = len(pairs)

    def __call__(self) -> Float[Tensor, ""]:
        """In fp32; 0 without a gradient where there are no old rows."""
        parts = []
        for number, (news, olds_GPD) in enumerate(self._groups):
            # a model that is moved takes its parameters along, not the bases
            olds_GPD = olds_GPD.to(news[0].device)
            self._groups[number] = news, olds_GPD
            parts.append(_shares_G(torch.stack(news).double(), olds_GPD).sum())
        return (_sum(parts) / max(self._num_sites, 1)).float()


@final
class Products:
    """The losses of O-LoRA and O3 over sites, which are products of the factors themselves."""

    def __init__(self, mode: str, pairs: Sequence[tuple[Tensor, Sequence[Tensor]]], *, blocks: int) -> None:
        self._of_site = {"o_lora": o_lora_penalty, "o3": _o3_penalties}[mode]
        self._over = blocks if mode == "o3" else 1
        self._pairs = [(new_RD, [old_SD.detach() for old_SD in olds]) for new_RD, olds in pairs]

    def __call__(self) -> Float[Tensor, ""]:
        """In fp32; 0 without a gradient where there are no old rows."""
        values = [
            self._of_site(new_RD, [old_SD.to(new_RD.device) for old_SD in olds]) for new_RD, olds in self._pairs if olds
        ]
        return _sum(values) / self._over


def num_blocks(paths: Sequence[str]) -> int:
    """How many blocks of a model these sites are in; that of `model.layers.3.self_attn.q_proj` is `model.layers.3`."""
    found = [re.match(r"(?:.*?\.)?\d+(?=\.|$)", path) for path in paths]
    return len({"" if match is None else match.group() for match in found})


# --- inside -----------------------------------------------------------------------------------------------------------


def _shares_G(news_GRD: Tensor, olds_GPD: Tensor) -> Tensor:
    """The mean overlap at each of G sites."""
    with torch.no_grad():
        length_GR1 = news_GRD.norm(dim=-1, keepdim=True)
        scale_GR1 = torch.where(length_GR1 > 0, length_GR1, 1).reciprocal()
        unit_GRD = news_GRD * scale_GR1
        square_GR, vectors_GRR = torch.linalg.eigh(unit_GRD @ unit_GRD.mT)
        kept_GR = (square_GR > 0) & (square_GR > RANK_TOLERANCE**2 * square_GR[:, -1:])
        # combinations that are not kept stay in place as zeros, so that all sites have as many
        weight_GR = torch.where(kept_GR, torch.where(kept_GR, square_GR, 1).rsqrt(), 0)
        mix_GXR = (vectors_GRR * weight_GR[:, None]).mT * scale_GR1.mT
    spanned_GXD = mix_GXR @ news_GRD
    shared_GPX = olds_GPD @ spanned_GXD.mT
    inside_GXX = shared_GPX.mT @ shared_GPX
    gram_GXX = spanned_GXD @ spanned_GXD.mT
    trace_G = 2 * inside_GXX.diagonal(dim1=-2, dim2=-1).sum(-1) - (gram_GXX * inside_GXX).sum((-2, -1))
    return trace_G / kept_GR.sum(-1).clamp(min=1)


def _o3_penalties(new_RD: Tensor, olds: Sequence[Tensor]) -> Tensor:
    return torch.stack([o3_penalty(new_RD, old_SD) for old_SD in olds]).sum()


def _sum(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.to(values[0].device) for value in values]).sum() if values else torch.zeros(())
