"""The losses that O3 trains its detector's backbone with. Begin with contrastive_entropy."""

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def contrastive_entropy(queries_SND: Float[Tensor, "S N D"], keys_SND: Float[Tensor, "S N D"]) -> Float[Tensor, ""]:
    """-sum_i sum_l sum_j p_ilj log p_ilj with p_il = softmax_j(q_il . k_lj): from 0 to S * N * log N.

    Gao et al. (2025), eq. 7, https://arxiv.org/abs/2407.10223: raw inner products, without temperature and without unit
    length, summed over layers and queries. Nothing in it says that key i belongs to query i: it is 0 as well where all
    queries are sure of one wrong key, and only the language model's loss beside it (`contrastive_entropy_with_mlm`)
    keeps the features from that.

    Args:
        queries_SND: for S layers and N rows, the mean over the tokens of a row with some of them masked.
        keys_SND: the same of the rows without masks, by the key encoder. A frozen or momentum encoder hands them in
            detached; this function does not.
    """
    dtype = torch.promote_types(queries_SND.dtype, torch.float32)
    logits_SNM = einsum(queries_SND.to(dtype), keys_SND.to(dtype), "s n d, s m d -> s n m")
    log_p_SNM = logits_SNM.log_softmax(-1)
    return -(log_p_SNM.exp() * log_p_SNM).sum()


def contrastive_entropy_with_mlm(
    queries_SND: Float[Tensor, "S N D"],
    keys_SND: Float[Tensor, "S N D"],
    logits_NLV: Float[Tensor, "N L V"],
    label_NL: Int[Tensor, "N L"],
) -> Float[Tensor, ""]:
    """`contrastive_entropy` plus the masked language model's cross-entropy: summed over a row's masked tokens, mean
    over rows.

    Gao et al. (2025), eq. 8, https://arxiv.org/abs/2407.10223, which divides by the number of rows and not, as is
    common, by that of masked tokens.

    Args:
        queries_SND: as in `contrastive_entropy`.
        keys_SND: as in `contrastive_entropy`.
        logits_NLV: over the vocabulary, of the rows with masks.
        label_NL: the token that stands under each mask; -100 for tokens that are not masked.
    """
    dtype = torch.promote_types(logits_NLV.dtype, torch.float32)
    masked = F.cross_entropy(logits_NLV.to(dtype).flatten(0, 1), label_NL.flatten(), ignore_index=-100, reduction="sum")
    return contrastive_entropy(queries_SND, keys_SND) + masked / max(len(logits_NLV), 1)
