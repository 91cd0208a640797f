"""The mixture in plain torch, three ways: `dense` over all rank rows, `gathered` and `sliced` over those that act.

All add to the base output, and leave rows without experts as they are. `dense` costs T x R whatever is chosen;
`gathered` copies K x P rows for every token and so costs the same for 8 experts as for 800; `sliced` is for one token.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from moelora.kernels.factors import Factors
from moelora.routing import Routing, active_tokens, dense_weights


def dense(
    base_TO: Float[Tensor, "T O"], x_TD: Float[Tensor, "T D"], factors: Factors, routing: Routing, *, every_token: bool
) -> Float[Tensor, "T O"]:
    """Two matrix products over all experts, gated in between."""
    gate_TE = dense_weights(routing, factors.scale_E.shape[0]) * factors.scale_E
    if factors.shared_A_PD is None:
        hidden_TR = F.linear(x_TD, factors.A_RD.to(x_TD.dtype))
        gated_TR = (hidden_TR * gate_TE[:, factors.owner_R]).to(x_TD.dtype)
    else:
        # what all experts read is computed once
        hidden_TP = F.linear(x_TD, factors.shared_A_PD.to(x_TD.dtype))
        gated_TR = (gate_TE[:, :, None] * hidden_TP[:, None]).flatten(1).to(x_TD.dtype)
    delta_TO = gated_TR @ factors.B_RO.to(x_TD.dtype)
    if factors.bias_EO is not None:
        delta_TO = delta_TO + gate_TE.to(x_TD.dtype) @ factors.bias_EO.to(x_TD.dtype)
    return add(base_TO, delta_TO, routing, every_token=every_token)


def gathered(
    base_TO: Float[Tensor, "T O"], x_TD: Float[Tensor, "T D"], factors: Factors, routing: Routing, *, every_token: bool
) -> Float[Tensor, "T O"]:
    """Fetch the rows of the experts that each token chose, and multiply by these alone."""
    # -1, "no expert", is the last row of both tables
    rows_TN = factors.rows_FP[routing.experts_TK].flatten(1)
    gate_TN = (factors.fill_FP[routing.experts_TK] * routing.weights_TK[..., None]).flatten(1)

    A_TND = factors.A_RD[rows_TN].to(x_TD.dtype)
    hidden_TN = (A_TND @ x_TD[..., None])[..., 0]
    gated_TN = (hidden_TN * gate_TN).to(x_TD.dtype)
    delta_TO = (gated_TN[:, None] @ factors.B_RO[rows_TN].to(x_TD.dtype))[:, 0]

    if factors.bias_EO is not None:
        empty_1O = factors.bias_EO.new_zeros(1, factors.bias_EO.shape[1])
        bias_FO = torch.cat([factors.bias_EO, empty_1O]).to(x_TD.dtype)
        gate_TK = routing.weights_TK * F.pad(factors.scale_E, (0, 1))[routing.experts_TK]
        delta_TO = delta_TO + (gate_TK.to(x_TD.dtype)[:, None] @ bias_FO[routing.experts_TK])[:, 0]
    return add(base_TO, delta_TO, routing, every_token=every_token)


def sliced(
    base_1O: Float[Tensor, "1 O"], x_1D: Float[Tensor, "1 D"], factors: Factors, routing: Routing
) -> Float[Tensor, "1 O"]:
    """One token, expert by expert, each a slice of the rows: nothing is copied, and an empty slot is no work.

    Reads the ids on the host and gives no gradients: for a decode step on a CPU, where every call counts.
    """
    out_1O = base_1O
    for expert, weight in zip(routing.experts_TK.tolist()[0], routing.weights_TK.tolist()[0], strict=True):
        if expert >= 0 and weight != 0:
            A_DR, B_RO, scale = factors.slices[expert]
            hidden_1R = torch.mm(x_1D, A_DR)
            if out_1O is base_1O:
                out_1O = torch.addmm(base_1O, hidden_1R, B_RO, alpha=weight * scale)
            else:
                out_1O.addmm_(hidden_1R, B_RO, alpha=weight * scale)
    return out_1O


def add(base_TO: Tensor, delta_TO: Tensor, routing: Routing, *, every_token: bool) -> Tensor:
    """Base plus delta; where a token may be without experts, its base output untouched."""
    mixed_TO = base_TO + delta_TO.to(base_TO.dtype)
    return mixed_TO if every_token else torch.where(active_tokens(routing), mixed_TO, base_TO)
