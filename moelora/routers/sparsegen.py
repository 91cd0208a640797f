"""A router that learns how many experts act on each token: LD-MoLE's sparsegen projection of the scores.

Begin with SparsegenRouter; its options are in Sparsegen, the projection is `sparsegen`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from moelora.routers.linear import LinearRouter, linear_in_fp32
from moelora.routing import NO_EXPERT, Routing
from moelora.tape import Tape

FIRST_BIAS = -2.5
"""Of the network that gives lambda: log_sigmoid(-2.5) = -2.58, with which nearly all experts act at first.

The value of LD-MoLE's code.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sparsegen:
    """Options of the sparsegen router (LD-MoLE, Zhuang et al. 2025, arXiv 2509.25684).

    How many experts act is learned, from one to all of them; `AuxLosses(over_budget=..., budget=2)` asks for few.

    Attributes:
        hidden: width of the small network that says how sparse a token's weights are. The source shares one network
            (of width 64 to 512) among all sites of one input width; here each router has its own, a narrower one.
        epsilon: keeps lambda below 1 - epsilon, where a division by 1 - lambda is safe.
        init_std: standard deviation of the router's first weights.
    """

    hidden: int = 32
    epsilon: float = 0.01
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {self.hidden}")
        if not 0 < self.epsilon < 1:
            raise ValueError(f"epsilon must lie between 0 and 1, got {self.epsilon}")
        if self.init_std < 0:
            raise ValueError(f"init_std must not be negative, got {self.init_std}")

    def build(
        self, in_features: int, available: Sequence[bool], generator: torch.Generator | None
    ) -> "SparsegenRouter":
        """A router for a site with this input width; `available` says which experts have rows there."""
        return SparsegenRouter(self, in_features, available, generator=generator)


@final
class SparsegenRouter(LinearRouter):
    """u = W x; lambda = log_sigmoid(MLP(x)) + 1 - epsilon; weights p = sparsegen(u, lambda), which sum to 1.

    All in fp32. A `Routing` has a slot for each expert that the site has, in their order; those with weight 0 are
    empty. Its scores are u.

    Attributes:
        hidden_weight_HD: first layer of the network, of H hidden units with a ReLU.
        hidden_bias_H: its bias.
        out_weight_1H: second layer.
        out_bias_1: its bias.
    """

    hidden_weight_HD: nn.Parameter
    hidden_bias_H: nn.Parameter
    out_weight_1H: nn.Parameter
    out_bias_1: nn.Parameter
    places_K: Tensor
    most: int

    def __init__(
        self,
        config: Sparsegen,
        in_features: int,
        available: Sequence[bool],
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(in_features, available, most=len(available), init_std=config.init_std, generator=generator)
        self.config = config
        first_HD = torch.empty(config.hidden, in_features).normal_(0, in_features**-0.5, generator=generator)
        self.hidden_weight_HD = nn.Parameter(first_HD)
        self.hidden_bias_H = nn.Parameter(torch.zeros(config.hidden))
        second_1H = torch.empty(1, config.hidden).normal_(0, config.init_std, generator=generator)
        self.out_weight_1H = nn.Parameter(second_1H)
        self.out_bias_1 = nn.Parameter(torch.full((1,), FIRST_BIAS))

    def forward(self, x_TD: Float[Tensor, "T D"], tape: Tape) -> Routing:
        logits_TE = self.scores(x_TD)
        weights_TE = sparsegen(logits_TE, self.sparsity(x_TD))

        # one slot for each expert that the site has, empty where the projection left nothing
        weights_TK = weights_TE if self.all_available else weights_TE[:, self.places_K]
        experts_TK = torch.where(weights_TK > 0, self.places_K, NO_EXPERT)
        return Routing(experts_TK, weights_TK, logits_TE)

    def sparsity(self, x_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T 1"]:
        """lambda of each token, below 1 - epsilon: the larger, the fewer experts act."""
        hidden_TH = (linear_in_fp32(x_TD, self.hidden_weight_HD) + self.hidden_bias_H.float()).relu()
        raw_T1 = linear_in_fp32(hidden_TH, self.out_weight_1H) + self.out_bias_1.float()
        return F.logsigmoid(raw_T1) + (1 - self.config.epsilon)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.config}"

    # --- inside ---------------------------------------------------------------------------------------------------

    def _set_available(self, available: Sequence[bool], device: torch.device | None = None) -> None:
        self.most = len(available)
        super()._set_available(available, device)
        places_K = torch.tensor([index for index, there in enumerate(available) if there], device=device)
        self.register_buffer("places_K", places_K.long(), persistent=False)


def sparsegen(logits_TE: Float[Tensor, "T E"], lam_T1: Float[Tensor, "T 1"]) -> Float[Tensor, "T E"]:
    """argmin over the simplex of |p - u|^2 - lambda |p|^2, exactly: p_e = max(u_e - tau, 0) / (1 - lambda).

    With u sorted downwards, S = max{j : 1 - lambda + j u_(j) > sum_{i<=j} u_(i)} experts act, and
    tau = (sum_{i<=S} u_(i) - 1 + lambda) / S. Laha et al. (2018), https://arxiv.org/abs/1810.11975; lambda = 0 is
    sparsemax, lambda towards 1 one-hot, and a very negative lambda uniform.

    Args:
        logits_TE: the scores u, -inf for an expert that cannot be chosen.
        lam_T1: lambda < 1 of each token.
    """
    room_T1 = 1 - lam_T1
    # the answer does not change with a constant; without it sums of large scores lose the differences
    shifted_TE = logits_TE - logits_TE.detach().amax(-1, keepdim=True)
    sorted_TE = shifted_TE.sort(dim=-1, descending=True).values
    sums_TE = sorted_TE.cumsum(-1)
    rank_E = torch.arange(1, logits_TE.shape[1] + 1, device=logits_TE.device, dtype=logits_TE.dtype)
    # the best expert always acts
    support_T1 = (room_T1 + rank_E * sorted_TE > sums_TE).sum(-1, keepdim=True).clamp(min=1)
    tau_T1 = (sums_TE.gather(-1, support_T1 - 1) - room_T1) / support_T1
    return (shifted_TE - tau_T1).relu() / room_T1
