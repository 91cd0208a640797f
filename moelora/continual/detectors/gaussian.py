"""One Gaussian for each layer, with a covariance that few rows are enough for. Begin with LayerGaussians.fit."""

from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

LEAST_SHRINKAGE = 1e-6
"""Keeps the covariance invertible where Ledoit and Wolf's coefficient is 0, as it is for a width of 1."""

LEAST_SPREAD = 1e-12
"""Unit-length features in fp32 differ by about 1e-14 in squared length from rounding alone."""


@final
@dataclass(frozen=True, kw_only=True)
class LayerGaussians:
    """Mean and shrunk covariance of unit-length features: V^T diag(variance) V + remainder * (I - V^T V), per layer.

    Nothing D x D is stored: Ledoit and Wolf's estimate is a covariance of rank n - 1, shrunk towards a multiple of the
    identity, so outside the span of the n rows all directions have one variance.

    Attributes:
        mean_SD: of the unit-length features.
        directions_SRD: V, orthonormal rows, the strongest first.
        variance_SR: along these.
        remainder_S: along all others.
    """

    mean_SD: Float[Tensor, "S D"]
    directions_SRD: Float[Tensor, "S R D"]
    variance_SR: Float[Tensor, "S R"]
    remainder_S: Float[Tensor, " S"]

    @classmethod
    def fit(cls, features_NSD: Float[Tensor, "N S D"]) -> "LayerGaussians":
        """Sigma = (1 - rho) C + rho (tr C / D) I with the biased covariance C.

        rho is scikit-learn's `ledoit_wolf_shrinkage`; Ledoit and Wolf (2004), A well-conditioned estimator for
        large-dimensional covariance matrices. The factors are kept in fp32.

        Raises:
            ValueError: if the rows of a layer are all the same.
        """
        from sklearn.covariance import ledoit_wolf_shrinkage

        num_rows, num_layers, width = features_NSD.shape
        means, directions, variances, remainders = [], [], [], []
        for layer in range(num_layers):
            unit_ND = unit_length(features_NSD[:, layer])
            mean_D = unit_ND.mean(0)
            centred_ND = unit_ND - mean_D
            spread = float(centred_ND.square().sum()) / num_rows
            if spread < LEAST_SPREAD:
                raise ValueError(
                    f"the {num_rows} rows do not differ in layer {layer} of the features, up to length; a covariance "
                    "needs different rows"
                )
            shrinkage = max(float(ledoit_wolf_shrinkage(unit_ND.cpu().numpy())), LEAST_SHRINKAGE)
            remainder = shrinkage * spread / width

            # the singular vectors of the rows diagonalise their covariance and its shrunk form
            _, length_R, directions_RD = torch.linalg.svd(centred_ND, full_matrices=False)
            rank = min(num_rows - 1, width)
            means.append(mean_D)
            directions.append(directions_RD[:rank])
            variances.append((1 - shrinkage) * length_R[:rank].square() / num_rows + remainder)
            remainders.append(mean_D.new_tensor(remainder))
        return cls(
            mean_SD=torch.stack(means).float(),
            directions_SRD=torch.stack(directions).float(),
            variance_SR=torch.stack(variances).float(),
            remainder_S=torch.stack(remainders).float(),
        )

    def compressed(self, directions: int) -> "LayerGaussians":
        """Only the strongest directions; all others get their mean variance, so the trace stays.

        Probabilistic PCA, Tipping and Bishop (1999). Unlike a projection on the directions it still measures what lies
        outside them, where other requests are.

        Raises:
            ValueError: for a number below 1.
        """
        if directions < 1:
            raise ValueError(f"directions must be at least 1, got {directions}")
        rank, width = self.directions_SRD.shape[1:]
        if directions >= rank:
            return self
        dropped_S = self.variance_SR[:, directions:].double().sum(-1)
        outside_S = dropped_S + self.remainder_S.double() * (width - rank)
        return LayerGaussians(
            mean_SD=self.mean_SD,
            directions_SRD=self.directions_SRD[:, :directions].clone(),
            variance_SR=self.variance_SR[:, :directions].clone(),
            remainder_S=(outside_S / (width - directions)).float(),
        )

    def distances(self, features_BSD: Float[Tensor, "B S D"]) -> Float[Tensor, "B S"]:
        """(z - mu)^T Sigma^-1 (z - mu) of the unit-length features z, per layer, in fp64.

        By Woodbury's identity in the basis V: with c = V (z - mu) and r the rest, it is sum_k c_k^2 / variance_k +
        |r|^2 / remainder, and |r|^2 = |z - mu|^2 - |c|^2. Mahalanobis++, Mueller and Hein (2025),
        https://arxiv.org/abs/2505.18032, for one class.
        """
        mean_SD, inside_SR, outside_S = self._exact
        centred_BSD = unit_length(features_BSD) - mean_SD
        along_SBR = torch.bmm(centred_BSD.transpose(0, 1), self.directions_SRD.double().mT)
        inside_SB1 = torch.bmm(along_SBR.square(), inside_SR[:, :, None])
        return inside_SB1[:, :, 0].mT + centred_BSD.square().sum(-1) * outside_S

    @cached_property
    def _exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """In fp64: the mean, what multiplies each c_k^2, and what multiplies |z - mu|^2.

        V is orthonormal but for its rounding to fp32, which a small rest does not bear: with V V^T next to the identity
        it is |r|^2 = |z - mu|^2 - 2 |c|^2 + c^T V V^T c, and the diagonal of V V^T is taken as it is. Of a whole basis
        there is no rest.
        """
        rank, width = self.directions_SRD.shape[1:]
        outside_S = 1 / self.remainder_S.double() if rank < width else torch.zeros_like(self.remainder_S.double())
        length_SR = torch.linalg.vector_norm(self.directions_SRD, dim=-1, dtype=torch.float64)
        inside_SR = 1 / self.variance_SR.double() - outside_S[:, None] * (2 - length_SR.square())
        return self.mean_SD.double(), inside_SR, outside_S


def unit_length(features_BD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
    """Features divided by their length, in fp64; of length 1 already, they stay so. Zeros stay zeros."""
    return F.normalize(features_BD.double(), dim=-1, eps=1e-30)
