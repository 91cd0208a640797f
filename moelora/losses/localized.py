"""Balance with a preference: some experts are meant for some kinds of rows. Begin with localized_balance."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def localized_balance(
    weights_TE: Float[Tensor, "T E"],
    groups_E: Int[Tensor, " E"],
    kinds_B: Int[Tensor, " B"],
    rows_T: Int[Tensor, " T"],
    valid_T: Bool[Tensor, " T"] | None = None,
    *,
    delta: float,
    available_E: Bool[Tensor, " E"] | None = None,
) -> Float[Tensor, ""]:
    """Squared coefficient of variation of Z_be over rows and experts: 0 at (localised) balance.

    Z_be is the mean weight of expert e over the tokens of row b, times 1 + delta where the expert's group is the row's
    kind and 1 - delta elsewhere. Dou et al. (2024), LoRAMoE, https://arxiv.org/abs/2312.09979, whose code takes two
    groups and sums over padding too; the mean makes it independent of the rows' lengths, and is the same where they are
    equal. The variance is the population's.

    Z is constant where an expert's weight is proportional to 1 / (1 + delta) in rows of its own kind and 1 / (1 -
    delta) in others. A positive delta, as the formula is printed, therefore moves weight away from the experts of a
    row's own kind; a negative one moves it towards them.

    Args:
        weights_TE: weight of each expert for each token, 0 where it was not chosen (`routing.dense_weights`).
        groups_E: the group that each expert belongs to.
        kinds_B: the kind of each row; an expert matches a row whose kind is its group.
        rows_T: the row that each token is from, from 0.
        valid_T: which tokens count; None for all. A row without any counts for nothing.
        delta: strength and direction of the preference, between -1 and 1; 0 balances each row alike.
        available_E: which experts can be chosen at this site; None for all.

    Raises:
        ValueError: if delta is not between -1 and 1.
    """
    if not -1 < delta < 1:
        raise ValueError(f"delta must lie between -1 and 1, got {delta}")
    valid = torch.ones_like(rows_T, dtype=torch.bool) if valid_T is None else valid_T
    # what stands in padding may be anything
    counted_TE = torch.where(valid[:, None], weights_TE, 0)
    sums_BE = weights_TE.new_zeros(len(kinds_B), len(groups_E)).index_add(0, rows_T, counted_TE)
    tokens_B = weights_TE.new_zeros(len(kinds_B)).index_add(0, rows_T, valid.to(weights_TE.dtype))
    means_BE = sums_BE / tokens_B.clamp(min=1)[:, None]
    matches_BE = groups_E == kinds_B[:, None]
    z_BE = means_BE * torch.where(matches_BE, 1 + delta, 1 - delta)

    counts_BE = (tokens_B > 0)[:, None] & (
        torch.ones_like(groups_E, dtype=torch.bool) if available_E is None else available_E
    )
    cells = counts_BE.sum().clamp(min=1)
    mean = torch.where(counts_BE, z_BE, 0).sum() / cells
    variance = torch.where(counts_BE, (z_BE - mean).square(), 0).sum() / cells
    return variance / mean.square().clamp(min=torch.finfo(mean.dtype).tiny)
