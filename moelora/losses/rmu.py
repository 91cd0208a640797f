"""Unlearning by hidden states: misdirect those of what is to be forgotten, hold the others. Begin with rmu.

    control_D = control_vector(model.config.hidden_size, scale=20.0, generator=generator)     # once, then fixed
    loss = rmu(forget_hidden_BLD, control_D, forget_mask_BL) + alpha * rmu_retain(hidden_BLD, frozen_BLD, mask_BL)

Li et al. (2024), the WMDP benchmark, https://arxiv.org/abs/2403.03218. Both terms are squared distances of one layer's
hidden states; code that takes a mean over the width as well divides both by D.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def rmu(
    hidden_BLD: Float[Tensor, "B L D"], control_D: Float[Tensor, " D"], valid_BL: Bool[Tensor, "B L"]
) -> Float[Tensor, ""]:
    """||h - c u||^2, mean over a sequence's valid tokens, then over sequences.

    Args:
        hidden_BLD: of texts to be forgotten, after the layer that is trained.
        control_D: c u, a fixed direction times a length (`control_vector`).
        valid_BL: which tokens count; sequences without any do not count.
    """
    return _mean_square(hidden_BLD - control_D, valid_BL)


def rmu_retain(
    hidden_BLD: Float[Tensor, "B L D"], frozen_BLD: Float[Tensor, "B L D"], valid_BL: Bool[Tensor, "B L"]
) -> Float[Tensor, ""]:
    """||h - h_frozen||^2, mean over a sequence's valid tokens, then over sequences: 0 where nothing has moved.

    Args:
        hidden_BLD: of texts to be kept, at the same layer.
        frozen_BLD: the same by the model before unlearning; no gradient goes there.
        valid_BL: which tokens count; sequences without any do not count.
    """
    return _mean_square(hidden_BLD - frozen_BLD.detach(), valid_BL)


def control_vector(width: int, *, scale: float, generator: torch.Generator) -> Float[Tensor, " D"]:
    """c u: a direction drawn once, entries uniform in [0, 1) and then of unit length, times `scale`. In fp32.

    Args:
        width: D, that of the hidden states.
        scale: c, the length; a model's own matter, 20 in OpenUnlearning's setting for layer 7 of 7 B models.
        generator: draws u.
    """
    direction_D = torch.rand(width, generator=generator, device=generator.device)
    return scale * direction_D / direction_D.norm()


# --- inside -----------------------------------------------------------------------------------------------------------


def _mean_square(difference_BLD: Tensor, valid_BL: Tensor) -> Tensor:
    dtype = torch.promote_types(difference_BLD.dtype, torch.float32)
    # where, not times: what stands in padding may be anything
    square_BL = torch.where(valid_BL[..., None], difference_BLD.to(dtype), 0).square().sum(2)
    tokens_B = valid_BL.sum(1)
    return (square_BL.sum(1) / tokens_B.clamp(min=1)).sum() / (tokens_B > 0).sum().clamp(min=1)
