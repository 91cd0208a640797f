"""A frozen linear and what is added to it, in the order that costs least. Begin with add_to_base.

Delta first: the mixture is written, then the base's product accumulates onto it, so that nobody reads the output. It
rounds otherwise than the bare base, and so is only for outputs of which no row must be the base's own.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from moelora.kernels.gpu.tiles import pays_delta_first

Add = Callable[..., Tensor]
"""Write to its first argument the mixture plus `base_TO` and `bias_O`, either of which may be None."""


def add_to_base(x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None, add: Add, *, every_token: bool) -> Tensor:
    """x @ weight.T + bias + mixture."""
    if every_token and pays_delta_first(x_TD.shape[0], *weight_OD.shape[::-1]):
        out_TO = x_TD.new_empty(x_TD.shape[0], weight_OD.shape[0])
        add(out_TO, base_TO=None, bias_O=bias_O)
        return out_TO.addmm_(x_TD, weight_OD.t())
    out_TO = F.linear(x_TD, weight_OD, bias_O)
    return add(out_TO, base_TO=out_TO, bias_O=None)


def input_gradient(grads: list[Tensor | None], weights_OD: list[Tensor], like_TD: Tensor, add: Add) -> Tensor:
    """The gradient with respect to x: of the mixture, and of each linear whose output has a gradient."""
    pairs = [(grad, weight) for grad, weight in zip(grads, weights_OD) if grad is not None]
    tokens, width = like_TD.shape
    if not pairs or pays_delta_first(tokens, pairs[0][1].shape[0], width):
        out_TD = torch.empty_like(like_TD, memory_format=torch.contiguous_format)
        add(out_TD, base_TO=None, bias_O=None)
        for grad, weight in pairs:
            out_TD.addmm_(grad, weight)
        return out_TD
    out_TD = pairs[0][0] @ pairs[0][1]
    for grad, weight in pairs[1:]:
        out_TD.addmm_(grad, weight)
    return add(out_TD, base_TO=out_TD, bias_O=None)
