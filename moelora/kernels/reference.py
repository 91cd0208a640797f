"""What a mixture is, written so that it can be read: the specification of every other implementation.

    y_TO = base_TO + ((x_TD @ A_RD.T) * gate_TR) @ B_RO

with gate_TR[t, j] the weight of row j's owner for token t, times the owner's scale.

Tokens for which no expert acts get `base_TO` bit for bit.
"""

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from moelora.kernels.factors import Factors
from moelora.routing import Routing, active_tokens, dense_weights


def mix(
    base_TO: Float[Tensor, "T O"], x_TD: Float[Tensor, "T D"], factors: Factors, routing: Routing
) -> Float[Tensor, "T O"]:
    """Base output plus the routed mixture, as the head of this file defines it."""
    gate_TE = dense_weights(routing, factors.scale_E.shape[0]) * factors.scale_E
    gate_TR = gate_TE[:, factors.owner_R]

    hidden_TR = einsum(x_TD, factors.A_RD.to(x_TD.dtype), "t d, r d -> t r")
    gated_TR = (hidden_TR * gate_TR).to(x_TD.dtype)
    delta_TO = einsum(gated_TR, factors.B_RO.to(x_TD.dtype), "t r, r o -> t o")
    if factors.bias_EO is not None:
        delta_TO = delta_TO + einsum(gate_TE.to(x_TD.dtype), factors.bias_EO.to(x_TD.dtype), "t e, e o -> t o")

    return torch.where(active_tokens(routing), base_TO + delta_TO.to(base_TO.dtype), base_TO)
