"""O3's score of each layer, as published. Begin with O3Layers."""

import sys
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from moelora.continual.detectors.gaussian import unit_length


@final
@dataclass(frozen=True, kw_only=True)
class O3Layers:
    """Mean, pseudo-inverse of the biased covariance and all features of D_used, per layer, in fp64. O3, eq. 9.

    The pseudo-inverse is that of scikit-learn's `EmpiricalCovariance`: eigenvalues up to D * eps times the largest
    count as zero, and a direction without variance adds nothing to the distance, however far a row lies along it. With
    N rows in at least N - 1 dimensions every one of them has the distance N - 1.

    Attributes:
        mean_SD: of the features, whose length stays as it is.
        directions_SRD: eigenvectors of the covariance.
        precision_SR: reciprocals of its eigenvalues; 0 where these count as zero.
        bank_NSD: the features, at unit length.
    """

    mean_SD: Float[Tensor, "S D"]
    directions_SRD: Float[Tensor, "S R D"]
    precision_SR: Float[Tensor, "S R"]
    bank_NSD: Float[Tensor, "N S D"]

    @classmethod
    def fit(cls, used_NSD: Float[Tensor, "N S D"]) -> "O3Layers":
        """The statistics of these rows."""
        exact_SND = used_NSD.double().transpose(0, 1)
        mean_S1D = exact_SND.mean(1, keepdim=True)
        _, length_SR, directions_SRD = torch.linalg.svd(exact_SND - mean_S1D, full_matrices=False)
        variance_SR = length_SR.square() / len(used_NSD)
        least_S1 = variance_SR[:, :1] * (used_NSD.shape[-1] * sys.float_info.epsilon)
        positive_SR = variance_SR > least_S1
        return cls(
            mean_SD=mean_S1D[:, 0],
            directions_SRD=directions_SRD,
            precision_SR=torch.where(positive_SR, 1 / torch.where(positive_SR, variance_SR, 1.0), 0.0),
            bank_NSD=unit_length(used_NSD),
        )

    def mahalanobis(self, features_BSD: Float[Tensor, "B S D"]) -> Float[Tensor, "B S"]:
        """(f - mu)^T Sigma^+ (f - mu). O3, eq. 10: squared, no root."""
        columns = [
            ((features_BSD[:, layer].double() - self.mean_SD[layer]) @ self.directions_SRD[layer].mT).square()
            @ self.precision_SR[layer]
            for layer in range(features_BSD.shape[1])
        ]
        return torch.stack(columns, dim=-1)

    def cosine(self, features_BSD: Float[Tensor, "B S D"]) -> Float[Tensor, "B S"]:
        """Minus the largest cosine with a row of D_used: -1 for these rows themselves. O3, eq. 11, first line."""
        columns = [
            -(unit_length(features_BSD[:, layer]) @ self.bank_NSD[:, layer].mT).amax(-1)
            for layer in range(features_BSD.shape[1])
        ]
        return torch.stack(columns, dim=-1)

    def scores(self, features_BSD: Float[Tensor, "B S D"], *, mahalanobis: float, gamma: float) -> Float[Tensor, "B S"]:
        """mahalanobis * d_Maha + gamma * d_Cos. O3, eq. 11, has 1 and 1000; the released code has -0.5 and 1000."""
        return mahalanobis * self.mahalanobis(features_BSD) + gamma * self.cosine(features_BSD)
