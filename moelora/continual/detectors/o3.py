"""The detectors of O3, to reproduce its tables with. Begin with O3Paper; use Mahalanobis for anything else.

Gao et al. (2025), On Large Language Model Continual Unlearning, ICLR, https://arxiv.org/abs/2407.10223. The paper and
the released code disagree on most points, so there are two detectors. Both score what the features give them: the paper
takes the average over tokens in every layer of a RoBERTa trained with `losses.contrastive_entropy_with_mlm`, not
normalised (`HiddenStates.means`); the code takes 12 of its 24 layers and averages over padding too.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from moelora.continual.detectors.ball import enclosing_ball
from moelora.continual.detectors.base import Detector
from moelora.continual.detectors.o3_layers import O3Layers
from moelora.continual.detectors.o3_weights import TwoGaussians, weight_code_scienceqa, weight_code_tofu, weight_eq13
from moelora.continual.detectors.parts import part_from

LEAST_ROWS = 10
"""Of which 20 % are D_rest, whose deviation needs two."""

GAMMA = 1000.0

Variant = Literal["scienceqa", "tofu"]


@dataclass(frozen=True, kw_only=True)
class FittedO3Paper:
    """What `O3Paper` learns: the layers' statistics, the ball H(c, R), and the mixture of distances to it."""

    layers: O3Layers
    centre_S: Float[Tensor, " S"]
    radius: Float[Tensor, ""]
    mixture: TwoGaussians


@final
class O3Paper(Detector):
    """Eq. 9 to 13 of the paper. **Its weight is never below 0.5**: the gate does not close, for any input.

    The score is the boundary distance |s - c| - R of the layers' scores s from a ball (eq. 12). The paper fits the ball
    by a "one-class SVM" and names neither kernel nor nu; here it is the smallest ball that holds the scores of D_used,
    which is support vector data description (Tax and Duin, 2004) without slack. The score is not standardised, so it
    does not belong into a `SumOf`.

    Args:
        zeta: how steep the weight is; the paper has 10.
        used: share of the rows that are D_used, for the statistics and the ball; the others are D_rest.
        seed: of that split.
    """

    kind: ClassVar[str] = "o3_paper"
    zeta: float
    used: float
    seed: int

    def __init__(self, *, zeta: float = 10.0, used: float = 0.8, seed: int = 0) -> None:
        if not zeta > 0:
            raise ValueError(f"zeta must be positive, got {zeta}")
        check_share(used)
        self.zeta, self.used, self.seed = zeta, used, seed
        warnings.warn(
            "O3Paper is O3 as printed: its weight, a sigmoid of a number that is never negative, is at least 0.5 for "
            "every input, so the adapter is never switched off. It is here to trace published tables; use Mahalanobis "
            "with a calibrated gate instead",
            stacklevel=2,
        )

    def weight(self, features_BSD: Float[Tensor, "B S D"]) -> Float[Tensor, " B"]:
        """w of eq. 13, fp32: from 0.5, where an input is nothing like the request or too near it, to sigmoid(zeta).

        Raises:
            ValueError: as `score` does.
        """
        return _weights(self, features_BSD, lambda u_B: weight_eq13(u_B, self.zeta))

    def _fit(self, features_NSD: Tensor, row_N: Tensor) -> FittedO3Paper:
        used_NSD, rest_MSD = split(features_NSD, row_N, self.used, self.seed)
        layers = O3Layers.fit(used_NSD)
        centre_S, radius = enclosing_ball(layers.scores(used_NSD, mahalanobis=1.0, gamma=GAMMA))
        distances = [
            (layers.scores(part, mahalanobis=1.0, gamma=GAMMA) - centre_S).norm(dim=-1) - radius
            for part in (used_NSD, rest_MSD)
        ]
        return FittedO3Paper(layers=layers, centre_S=centre_S, radius=radius, mixture=TwoGaussians.paper(*distances))

    def _score(self, fitted: FittedO3Paper, features_BSD: Tensor) -> Tensor:
        scores_BS = fitted.layers.scores(features_BSD, mahalanobis=1.0, gamma=GAMMA)
        return (scores_BS - fitted.centre_S).norm(dim=-1) - fitted.radius

    def _settings(self) -> dict[str, Any]:
        return {"zeta": self.zeta, "used": self.used, "seed": self.seed}

    def _restore(self, tensors: Mapping[str, Tensor]) -> FittedO3Paper:
        return part_from(FittedO3Paper, tensors)


@dataclass(frozen=True, kw_only=True)
class FittedO3Code:
    """What `O3Code` learns: the layers' statistics, the hyperplane of the SVM, and the mixture of its outputs."""

    layers: O3Layers
    normal_S: Float[Tensor, " S"]
    offset: Float[Tensor, ""]
    mixture: TwoGaussians


@final
class O3Code(Detector):
    """The released code: -0.5 d_Maha + 1000 d_Cos, a linear one-class SVM, and hand-set cut-offs for the weight.

    The score is the SVM's raw output, `score_samples` for "scienceqa" and `decision_function` for "tofu". **Its
    direction is not identified**: the two terms oppose each other, and a linear SVM on scores that all lie on one side
    of the origin projects on their mean. Where the Mahalanobis term dominates (few rows, many dimensions) far inputs
    score high, and where the cosine does they score low. The code hides this behind a two-sided weight, and so only
    `weight` is to be read.

    Args:
        variant: "scienceqa": nu 0.1, 80 % of the rows in D_used, weights of 0, 1.2 and a window between; "tofu": nu
            0.01, 70 %, weights of 0, 1 and 10 w^2 between.
        seed: of the split.
    """

    kind: ClassVar[str] = "o3_code"
    variant: Variant
    seed: int

    def __init__(self, variant: Variant = "scienceqa", *, seed: int = 0) -> None:
        if variant not in get_args(Variant):
            raise ValueError(f"unknown variant {variant!r}; expected one of {get_args(Variant)}")
        self.variant, self.seed = variant, seed

    def weight(self, features_BSD: Float[Tensor, "B S D"]) -> Float[Tensor, " B"]:
        """The weight by the variant's cut-offs, fp32: `weight_code_scienceqa` or `weight_code_tofu`.

        Raises:
            ValueError: as `score` does.
        """
        return _weights(self, features_BSD, weight_code_scienceqa if self.variant == "scienceqa" else weight_code_tofu)

    def _fit(self, features_NSD: Tensor, row_N: Tensor) -> FittedO3Code:
        from sklearn.svm import OneClassSVM

        share, nu = (0.8, 0.1) if self.variant == "scienceqa" else (0.7, 0.01)
        used_NSD, rest_MSD = split(features_NSD, row_N, share, self.seed)
        layers = O3Layers.fit(used_NSD)
        used_NS, rest_MS = (layers.scores(part, mahalanobis=-0.5, gamma=GAMMA) for part in (used_NSD, rest_MSD))
        svm = OneClassSVM(kernel="linear", nu=nu).fit(used_NS.cpu().numpy())

        # score_samples is the product with the normal, decision_function is that less the offset
        normal_S = used_NS.new_tensor(svm.coef_[0].copy())
        offset = float(svm.offset_[0]) if self.variant == "tofu" else 0.0
        distances = [scores @ normal_S - offset for scores in (used_NS, rest_MS)]
        return FittedO3Code(
            layers=layers,
            normal_S=normal_S,
            offset=normal_S.new_tensor(offset),
            mixture=TwoGaussians.code(*distances),
        )

    def _score(self, fitted: FittedO3Code, features_BSD: Tensor) -> Tensor:
        scores_BS = fitted.layers.scores(features_BSD, mahalanobis=-0.5, gamma=GAMMA)
        return scores_BS @ fitted.normal_S - fitted.offset

    def _settings(self) -> dict[str, Any]:
        return {"variant": self.variant, "seed": self.seed}

    def _restore(self, tensors: Mapping[str, Tensor]) -> FittedO3Code:
        return part_from(FittedO3Code, tensors)


def split(features_NSD: Tensor, row_N: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """D_used and D_rest, drawn at random by prompt.

    Raises:
        ValueError: for too few prompts.
    """
    prompts, index_N = row_N.unique(return_inverse=True)
    if len(prompts) < LEAST_ROWS:
        raise ValueError(f"O3's split needs features of at least {LEAST_ROWS} prompts, got {len(prompts)}; add prompts")
    order_P = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))
    used_N = (order_P < min(max(round(share * len(prompts)), 2), len(prompts) - 2))[index_N].to(features_NSD.device)
    return features_NSD[used_N], features_NSD[~used_N]


def check_share(used: float) -> None:
    """Raise ValueError unless some rows are used and some are not."""
    if not 0 < used < 1:
        raise ValueError(f"used is a share between 0 and 1, got {used}")


@torch.no_grad()
def _weights(detector: O3Paper | O3Code, features_BSD: Tensor, weigh: Callable[[Tensor], Tensor]) -> Tensor:
    fitted = detector._check_for_scores(features_BSD)
    return weigh(fitted.mixture.typicality(detector._score(fitted, features_BSD))).float()
