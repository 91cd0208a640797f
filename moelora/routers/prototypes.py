"""What an expert's factors say of the inputs that it is for. Begin with arrow_prototype.

A prototype is known up to its sign, since v and -v are singular vectors of the same map. Here the sign is a convention:
the entry of largest magnitude is positive.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moelora.bank import Expert


def arrow_prototype(A_RD: Float[Tensor, "R D"], B_RO: Float[Tensor, "R O"]) -> Float[Tensor, " D"]:
    """The unit input that the weight change B^T A lengthens most: its top right singular vector.

    Exact, in fp64: with thin QR decompositions of the factors only an R x R core is left to be decomposed, and B^T A is
    never formed. Where several directions are lengthened alike, it is one of them.

    Source: Ostapenko et al. 2024 (arXiv 2405.11157), section 4.1.

    Returns:
        In fp64, on the factors' device if that is a CUDA device, else on the CPU. Zeros where the map is zero: without
        rows, and for a fresh expert, whose B is zero.
    """
    return shared_prototype([Expert(A_RD, B_RO)])


def shared_prototype(experts: Sequence[Expert]) -> Float[Tensor, " D"]:
    """The same for one expert at several sites that read the same input: of their maps, one upon the other.

    That is the unit input to which all of them together add most: it maximises the sum of |scale_s B_s^T A_s x|^2 over
    the sites s. The scale that the expert was trained at counts, since it may differ from site to site.
    """
    # |B^T A x| = |Q R A x| = |R A x|: what matters of B is its small triangle
    core_CD = torch.cat([_core_CD(expert) for expert in experts])
    zeros_D = core_CD.new_zeros(core_CD.shape[1])
    if not core_CD.any():
        return zeros_D

    basis_DM, triangle_MC = torch.linalg.qr(core_CD.T)
    _, _, right_MM = torch.linalg.svd(triangle_MC.T, full_matrices=False)
    prototype_D = basis_DM @ right_MM[0]
    return prototype_D * prototype_D[prototype_D.abs().argmax()].sign()


def _core_CD(expert: Expert) -> Tensor:
    """A matrix of few rows that lengthens every input as the expert does."""
    # not every kind of device knows fp64
    device = expert.A_RD.device if expert.A_RD.is_cuda else torch.device("cpu")
    A_RD, B_RO = (factor.detach().to(device, torch.float64) for factor in (expert.A_RD, expert.B_RO))
    if not expert.rank:
        return A_RD
    triangle_CR = torch.linalg.qr(B_RO.T, mode="r").R
    return expert.scale * (triangle_CR @ A_RD)
