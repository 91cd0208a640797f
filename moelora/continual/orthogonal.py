"""How much two experts share, as metrics and as losses. Begin with overlap and mean_overlap.

Axes: R rank rows of the new expert, S of an old one, D input width, O output width. Two experts whose input-side rows
(`A_RD`) are orthogonal read different parts of the input; two whose output-side rows (`B_RO`) are orthogonal write to
different parts of the output. The functions take rows of either side. Old experts get no gradient.

`overlap` says what part of a space is shared, whatever the factors' scale; `o_lora_penalty` and `o3_penalty` are the
losses of two papers, to compare with. `moelora.continual.nullspace` keeps rows orthogonal without a loss.
"""

from collections.abc import Sequence

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from moelora.bank import Expert
from moelora.continual.subspace import row_basis

SIDES = ("in", "out", "both")
"""Which factor is compared: the input-side rows A, the output-side rows B, or the mean of both."""


def overlap(new_RD: Float[Tensor, "R D"], old_SD: Float[Tensor, "S D"]) -> Float[Tensor, ""]:
    """Mean squared cosine of the principal angles between two row spaces: ||Q_old Q_new^T||_F^2 / rank of new.

    Q are orthonormal bases of the rows (QR). In [0, 1]: 0 if the spaces are orthogonal, 1 if the new one lies in the
    old one. It does not change when the rows of either are scaled or mixed, so it cannot be made small by shrinking a
    factor; its gradient is orthogonal to the new rows, and grows as they shrink.

    Dependent rows are judged by the space that they span, and divided by its dimension; `row_basis` says what gradient
    they get. Rows that are all zero, as those of a fresh B, span nothing: 0, with a gradient of 0. No rows, on either
    side: 0.

    Computed in fp64 and returned in the new rows' dtype, at least fp32.
    """
    return _share(new_RD, [row_basis(old_SD.detach())])


def mean_overlap(new_RD: Float[Tensor, "R D"], olds: Sequence[Float[Tensor, "_ D"]]) -> Float[Tensor, ""]:
    """Mean of `overlap` over all predecessors j < t, 0 if there is none.

    A predecessor without rows counts as one that shares nothing. The mean over sites is the caller's.
    """
    return _share(new_RD, [row_basis(old_SD.detach()) for old_SD in olds])


def expert_overlap(new: Expert, olds: Sequence[Expert], side: str) -> Float[Tensor, ""]:
    """`mean_overlap` of one expert with its predecessors at the same site, on the chosen side.

    Raises:
        ValueError: for an unknown side.
    """
    if side not in SIDES:
        raise ValueError(f"unknown side {side!r}; expected one of {SIDES}")
    if side == "in":
        return mean_overlap(new.A_RD, [old.A_RD for old in olds])
    if side == "out":
        return mean_overlap(new.B_RO, [old.B_RO for old in olds])
    return (expert_overlap(new, olds, "in") + expert_overlap(new, olds, "out")) / 2


def o_lora_penalty(new_RD: Float[Tensor, "R D"], olds: Sequence[Float[Tensor, "_ D"]]) -> Float[Tensor, ""]:
    """sum_j sum |A_j A_new^T|: the sum of absolute values, on the input side, against all predecessors.

    O-LoRA, Wang et al. (2023), https://arxiv.org/abs/2310.14152, as its code has it; the paper squares the entries.
    It depends on the factors' scale. Weighed with 0.5 there.
    """
    products = [einsum(old_SD.detach().to(new_RD.dtype), new_RD, "s d, r d -> s r").abs().sum() for old_SD in olds]
    return torch.stack(products).sum() if products else new_RD.new_zeros(())


def o3_penalty(new_RO: Float[Tensor, "R O"], previous_RO: Float[Tensor, "S O"]) -> Float[Tensor, ""]:
    """||B_previous B_new^T||_F^2, on the output side, against the previous request only.

    O3, Gao et al. (2025), eq. 5-6, https://arxiv.org/abs/2407.10223; the paper's A is the output-side factor, while its
    released code takes the input side and all predecessors. It depends on the factors' scale. Weighed with 0.1 there.
    """
    product_SR = einsum(previous_RO.detach().to(new_RO.dtype), new_RO, "s o, r o -> s r")
    return product_SR.square().sum()


# --- inside -----------------------------------------------------------------------------------------------------------


def _share(new_RD: Tensor, bases: Sequence[Tensor]) -> Tensor:
    """Mean over the bases of the share of the new row space that lies in each."""
    basis_RD = row_basis(new_RD)
    shared = [einsum(basis_SD, basis_RD, "s d, r d -> s r").square().sum() for basis_SD in bases]
    # the sum over an empty basis is 0 and still hangs on the new rows, so that a loss of it has a backward pass
    total = torch.stack(shared).sum() if shared else basis_RD.sum() * 0
    mean = total / max(len(basis_RD), 1) / max(len(bases), 1)
    return mean.clamp(max=1).to(torch.promote_types(new_RD.dtype, torch.float32))
