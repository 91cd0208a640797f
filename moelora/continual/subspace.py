"""Row spaces: an orthonormal basis, the complement, projections. Begin with row_basis and project_rows.

Axes: R rank rows, S rows of a basis, C rows of its complement, D width. The rows of a bank's `A_RD` live in the inputs
of a site, those of its `B_RO` in the outputs; every function here takes either.
"""

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

RANK_TOLERANCE = 1e-6
"""Rows of length 1 whose smallest singular value is below this share of the largest count as dependent: what differs
by less is rounding of fp32 rows."""

_ORTHONORMAL_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 1e-2}


def row_basis(rows_RD: Float[Tensor, "R D"]) -> Float[Tensor, "S D"]:
    """Orthonormal basis of the span of the rows, in fp64; S is their rank. Differentiable.

    The lengths of the rows do not matter, a zero row adds nothing. Linearly dependent rows have a basis too, and a
    finite gradient: the S combinations of rows that span the space are chosen without a gradient, and a plain QR of
    these has one, which is the gradient among rows of the same rank. Rows that stay dependent thus feel no pull to
    become independent.
    """
    exact_RD = rows_RD.double()
    independent_SD = einsum(_independent_SR(exact_RD.detach()), exact_RD, "s r, r d -> s d")
    return torch.linalg.qr(independent_SD.mT).Q.mT


def complement(basis_SD: Float[Tensor, "S D"]) -> Float[Tensor, "C D"]:
    """Orthonormal basis of what is orthogonal to all rows of an orthonormal basis: C = D - S rows, in fp64.

    The smaller one to store where a basis has more than D / 2 rows, as DualGPM does (InfLoRA, Liang and Li 2024,
    https://arxiv.org/abs/2404.00228).

    Raises:
        ValueError: if the rows of the basis are not orthonormal.
    """
    check_orthonormal(basis_SD)
    return torch.linalg.qr(basis_SD.double().mT, mode="complete").Q.mT[basis_SD.shape[0] :]


def project_rows(rows_RD: Float[Tensor, "R D"], basis_SD: Float[Tensor, "S D"]) -> Float[Tensor, "R D"]:
    """The rows without their part in the span of an orthonormal basis: X - (X Q^T) Q, done twice.

    The first pass leaves rounding errors of what it took away, the second takes these away too ("twice is enough",
    Kahan, in Parlett, The Symmetric Eigenvalue Problem, 1980), also for rows that lie almost in the span. What is left
    is the rounding of the rows' own dtype.

    Raises:
        ValueError: if the rows of the basis are not orthonormal.
    """
    check_orthonormal(basis_SD)
    return projected(rows_RD, basis_SD)


def projected(rows_RD: Float[Tensor, "R D"], basis_SD: Float[Tensor, "S D"]) -> Float[Tensor, "R D"]:
    """`project_rows` with a basis that has been checked before; it waits for no device."""
    wide = torch.promote_types(torch.promote_types(rows_RD.dtype, basis_SD.dtype), torch.float32)
    left_RD, basis_SD = rows_RD.to(wide), basis_SD.to(wide)
    for _ in range(2):
        share_RS = einsum(left_RD, basis_SD, "r d, s d -> r s")
        left_RD = left_RD - einsum(share_RS, basis_SD, "r s, s d -> r d")
    return left_RD.to(rows_RD.dtype)


def check_orthonormal(basis_SD: Float[Tensor, "S D"]) -> None:
    """Raise ValueError unless the rows are orthonormal, to the rounding of their dtype."""
    gram_SS = einsum(basis_SD.double(), basis_SD.double(), "s d, t d -> s t")
    error = (gram_SS - torch.eye(len(gram_SS), dtype=gram_SS.dtype, device=gram_SS.device)).abs()
    worst = float(error.max()) if error.numel() else 0.0
    # not "worst > ...", which NaN would pass
    if not worst <= _ORTHONORMAL_TOLERANCE[basis_SD.dtype]:
        raise ValueError(
            f"expected a basis of orthonormal rows, got one whose products differ from the identity by {worst:.2g}; "
            "make it with row_basis(rows)"
        )


# --- inside -----------------------------------------------------------------------------------------------------------


def _independent_SR(rows_RD: Tensor) -> Tensor:
    """Combinations of the rows that are orthonormal but for rounding, and span the same space."""
    length_R1 = rows_RD.norm(dim=-1, keepdim=True)
    scale_R1 = torch.where(length_R1 > 0, length_R1, 1).reciprocal()
    unit_RD = rows_RD * scale_R1
    # R x R in fp64: singular values down to 1e-8 of the largest can be told from rounding, more than the tolerance asks
    square_R, vectors_RR = torch.linalg.eigh(einsum(unit_RD, unit_RD, "r d, s d -> r s"))
    largest = square_R.amax() if len(square_R) else 0.0
    kept_R = (square_R > 0) & (square_R > RANK_TOLERANCE**2 * largest)
    return (vectors_RR[:, kept_R] * square_R[kept_R].rsqrt()).mT * scale_R1.mT
