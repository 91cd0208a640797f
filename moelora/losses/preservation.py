"""The loss that holds parameters where they were. Begin with preservation; `moelora.Anchor` applies it to experts."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def preservation(parameters: Sequence[Tensor], anchors: Sequence[Tensor]) -> Float[Tensor, ""]:
    """sum_i ||theta_i - theta_i^0||^2, in fp32: 0 where nothing has moved.

    LoRA-Mixer, Li et al. (2025), eq. 11, https://arxiv.org/abs/2507.00029, without its weight beta, whose value is not
    known. It is a sum over all numbers, so it grows with the number and the size of the experts.

    Args:
        parameters: the theta_i as they are.
        anchors: as they were; no gradient goes there.

    Raises:
        ValueError: if there are none, or their shapes differ.
    """
    shapes, expected = [tuple(theta.shape) for theta in parameters], [tuple(anchor.shape) for anchor in anchors]
    if not shapes or shapes != expected:
        raise ValueError(
            f"{len(shapes)} parameters and {len(expected)} anchors were given; expected one anchor or more, "
            f"of the parameters' shapes {shapes[:4]}, got {expected[:4]}"
        )
    distances = [
        (theta.float() - anchor.detach().float()).square().sum()
        for theta, anchor in zip(parameters, anchors, strict=True)
    ]
    return torch.stack(distances).sum()
