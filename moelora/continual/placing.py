"""The rows of a new expert's A, chosen before training, at one site of a model. Begin with placed_rows and next_rows.

Axes: R rank rows of the new expert, S those of an old one, D input width, N rows of a basis.
"""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moelora.continual.basis import benign_basis, designed_rows
from moelora.continual.covariance import InputCovariance
from moelora.continual.subspace import project_rows, row_basis

TAKEN = 1e-6
"""A basis row that shares more than this with an old expert (squared cosine) is taken; more for coarser dtypes, where
rounding gives rows a share of those that they were not made of."""


def placed_rows(
    forget: InputCovariance, avoid: InputCovariance, olds: Sequence[Float[Tensor, "_ D"]], *, rank: int, energy: float
) -> Float[Tensor, "R D"]:
    """`designed_rows` that see the most of the forget inputs, and nothing of the benign ones and of the old rows.

    Raises:
        ValueError: for inputs that span nothing, or if too few directions are left.
    """
    avoided_SD = benign_basis(avoid, energy)
    olds = [old_SD.detach().to(avoided_SD) for old_SD in olds]
    if olds:
        # the benign basis stays as it is; of the old rows, what is not in it yet
        avoided_SD = torch.cat([avoided_SD, row_basis(project_rows(row_basis(torch.cat(olds)), avoided_SD))])
        avoided_SD = row_basis(avoided_SD)
    return designed_rows(forget, avoided_SD.to(forget.moment_DD), rank)


def next_rows(
    olds: Sequence[Float[Tensor, "_ D"]], *, rank: int, width: int, seed: int, site: str
) -> Float[Tensor, "R D"]:
    """The first rows of a site's fixed orthonormal basis that no old expert has, in fp64.

    The basis is that of `FixedBasis.random`, drawn from the seed and the site's path, as far as it is needed: its first
    N rows are the QR of the first N Gaussian rows. PLAN (ICCV 2025) takes every task's A from one fixed basis and
    trains B only. Rows of an expert that was removed are free again.

    Raises:
        ValueError: if fewer than `rank` are left, or the old experts' rows are not from this basis.
    """
    used = sum(len(old_SD) for old_SD in olds)
    if used + rank > width:
        raise ValueError(
            f"the older experts have {used} rows of width {width}, so {max(width - used, 0)} are left of the basis, "
            f"but rank is {rank}; lower the rank, or keep fewer experts apart"
        )
    digest = hashlib.sha256(f"{seed} {site}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    # drawn row by row: how torch fills a matrix depends on its size
    gaussian_ND = torch.stack(
        [torch.randn(width, generator=generator, dtype=torch.float64) for _ in range(used + rank)]
    )
    basis_ND = torch.linalg.qr(gaussian_ND.mT).Q.mT
    free_N = torch.ones(len(basis_ND), dtype=torch.bool)
    for old_SD in olds:
        shared_N = (basis_ND @ row_basis(old_SD.detach().cpu()).mT).square().sum(-1)
        free_N &= shared_N <= max(TAKEN, torch.finfo(old_SD.dtype).eps ** 2 / 8)
    free_RD = basis_ND[free_N][:rank]
    if len(free_RD) < rank:
        raise ValueError(
            "the older experts' rows of A are not from this site's basis, so its other rows would overlap with them; "
            "train all experts in mode 'basis' with one seed, or take mode 'nullspace'"
        )
    return free_RD


def paired_moments(
    sites: Sequence[str], avoid: "Mapping[str, InputCovariance] | None", forget: "Mapping[str, InputCovariance] | None"
) -> dict[str, tuple[InputCovariance, InputCovariance]]:
    """What to read and what to avoid at each site, `forget` first; empty if neither is given.

    Raises:
        ValueError: if only one is given, or a site is missing.
    """
    if avoid is None and forget is None:
        return {}
    if avoid is None or forget is None:
        raise ValueError("avoid and forget belong together: A is placed outside of the one and inside the other")
    for what, given in (("avoid", avoid), ("forget", forget)):
        missing = [site for site in sites if site not in given]
        if missing:
            raise ValueError(
                f"{what} has no moments of {len(missing)} of {len(sites)} sites, such as {missing[:3]}; "
                "make it with gather(model, batches) of the same patched model"
            )
    return {site: (forget[site], avoid[site]) for site in sites}
