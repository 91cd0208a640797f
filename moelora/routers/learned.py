"""The learned top-k router: one bias-free linear map from a site's input to a score for each expert.

Begin with LearnedRouter; its options are in Learned.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from moelora.kernels.gate import Combine, LinearGate
from moelora.routers.base import AbstractRouter
from moelora.routing import Routing
from moelora.tape import Tape


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned:
    """Options of the learned router.

    Attributes:
        top_k: how many experts act on a token, K. A site with fewer experts uses all it has.
        combine: the weight g_e of a chosen expert, from its probability p_e = softmax(z / temperature)_e.

            - "renormalized": p_e divided by the sum over the chosen; the weights of a token sum to 1.
            - "softmax": p_e itself, as in Switch and LoRAMoE.
            - "constant": 1/K. No gradient reaches the router through the weights.
            - "unit": 1 in the forward pass, the gradient of p_e in the backward pass (straight-through), so that a
              frozen adapter acts at the scale it was trained at (Hard-Routed MoR-LoRA, arXiv 2606.31413).
        temperature: divides the scores.
        noisy: noisy top-k in training, z + N(0, 1) * softplus(W_noise x) (Shazeer et al. 2017, eq. 4,
            arXiv 1701.06538).
        balance_bias_speed: loss-free balancing (Wang et al. 2024, arXiv 2408.15664): a bias, added for the choice
            only, that moves by this much towards the experts with too few tokens after each training call (when the
            next call begins); 0 is off.
        init_std: standard deviation of the router's first weights.
    """

    top_k: int = 2
    combine: Combine = "renormalized"
    temperature: float = 1.0
    noisy: bool = False
    balance_bias_speed: float = 0.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.combine not in get_args(Combine):
            raise ValueError(f"unknown combine {self.combine!r}; expected one of {get_args(Combine)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.balance_bias_speed < 0 or self.init_std < 0:
            raise ValueError("balance_bias_speed and init_std must not be negative")
        if self.top_k == 1 and self.combine == "renormalized":
            raise ValueError(
                "with top_k=1 a renormalized weight is always 1, so the router would learn nothing; "
                "use combine='unit' (weight 1, straight-through gradient) or combine='softmax'"
            )

    def build(self, in_features: int, available: Sequence[bool], generator: torch.Generator | None) -> "LearnedRouter":
        """A router for a site with this input width; `available` says which experts have rows there."""
        return LearnedRouter(self, in_features, available, generator=generator)


@final
class LearnedRouter(AbstractRouter):
    """z = W x, without bias, in fp32; the K best experts act.

    Source: Shazeer et al. 2017 (arXiv 1701.06538), Fedus et al. 2022 (arXiv 2101.03961).
    """

    every_token = True
    top_k: int
    weight_ED: nn.Parameter
    noise_weight_ED: nn.Parameter | None
    balance_bias_E: Tensor

    def __init__(
        self, config: Learned, in_features: int, available: Sequence[bool], *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self._set_available(available)
        shape = (len(available), in_features)
        self.weight_ED = nn.Parameter(torch.empty(shape).normal_(0, config.init_std, generator=generator))
        self.noise_weight_ED = nn.Parameter(torch.zeros(shape)) if config.noisy else None
        self.register_buffer("balance_bias_E", torch.zeros(len(available)) if config.balance_bias_speed else None)

    def forward(self, x_TD: Float[Tensor, "T D"], tape: Tape) -> Routing:
        logits_TE = self._scores(x_TD, tape)
        if not self.all_available:
            logits_TE = logits_TE.masked_fill(~self.available_E, -torch.inf)

        # choose by score, with the balancing bias if there is one
        if self.config.balance_bias_speed:
            experts_TK = (logits_TE + self.balance_bias_E).topk(self.top_k, dim=-1).indices
            chosen_TK = logits_TE.gather(-1, experts_TK)
        else:
            chosen_TK, experts_TK = logits_TE.topk(self.top_k, dim=-1)

        return Routing(experts_TK, self._weights(chosen_TK, logits_TE), logits_TE)

    def keep_experts(self, order: Sequence[int]) -> None:
        keep = torch.tensor(list(order), dtype=torch.long, device=self.weight_ED.device)
        self._replace(lambda weight: weight.detach()[keep])
        self._set_available([bool(self.available_E[index]) for index in order], self.weight_ED.device)

    def add_experts(self, available: Sequence[bool]) -> None:
        def grow(weight: Tensor) -> Tensor:
            return torch.cat([weight.detach(), weight.new_zeros(len(available), *weight.shape[1:])])

        self._replace(grow)
        self._set_available([*self.available_E.tolist(), *available], self.weight_ED.device)

    def linear_gate(self) -> LinearGate | None:
        if self.config.noisy or self.config.balance_bias_speed or not self.all_available:
            return None
        return LinearGate(self.weight_ED, self.config.temperature, self.top_k, self.config.combine)

    @torch.no_grad()
    def balance(self, load_E: Float[Tensor, " E"]) -> None:
        """Move the balancing bias towards the experts with too few tokens: b += speed * sign(mean load - load)."""
        if self.config.balance_bias_speed:
            mean = load_E[self.available_E].mean()
            self.balance_bias_E += self.config.balance_bias_speed * torch.sign(mean - load_E) * self.available_E

    def extra_repr(self) -> str:
        return f"in_features={self.weight_ED.shape[1]}, experts={self.num_experts}, {self.config}"

    # --- inside ---------------------------------------------------------------------------------------------------

    def _scores(self, x_TD: Tensor, tape: Tape) -> Tensor:
        device = x_TD.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._scores(x_TD, tape)

        # fp32: in bf16 the ties between experts fall by chance, and top-k then depends on the batch
        weight_ED = self.weight_ED
        if x_TD.dtype is not torch.float32 or weight_ED.dtype is not torch.float32:
            x_TD, weight_ED = x_TD.float(), weight_ED.float()
        logits_TE = F.linear(x_TD, weight_ED)
        if self.config.noisy and self.training:
            assert self.noise_weight_ED is not None
            spread_TE = F.softplus(F.linear(x_TD.float(), self.noise_weight_ED.float()))
            noise_TE = torch.randn(
                logits_TE.shape, generator=tape.generator, device=logits_TE.device, dtype=logits_TE.dtype
            )
            logits_TE = logits_TE + noise_TE * spread_TE
        return logits_TE if self.config.temperature == 1.0 else logits_TE / self.config.temperature

    def _weights(self, chosen_TK: Tensor, logits_TE: Tensor) -> Tensor:
        combine = self.config.combine
        if combine == "renormalized":
            return chosen_TK.softmax(dim=-1)
        if combine == "constant":
            return torch.full_like(chosen_TK, 1 / self.top_k)
        probabilities_TK = (chosen_TK - logits_TE.logsumexp(dim=-1, keepdim=True)).exp()
        if combine == "softmax":
            return probabilities_TK
        # in brackets: 1 + (p - p) is exactly 1
        return 1 + (probabilities_TK - probabilities_TK.detach())

    def _replace(self, change) -> None:
        for name in ("weight_ED", "noise_weight_ED"):
            weight = getattr(self, name)
            if weight is not None:
                setattr(self, name, nn.Parameter(change(weight), requires_grad=weight.requires_grad))
        if self.config.balance_bias_speed:
            self.balance_bias_E = change(self.balance_bias_E)

    def _set_available(self, available: Sequence[bool], device: torch.device | None = None) -> None:
        super()._set_available(available, device)
        # a site with fewer experts uses all it has
        self.top_k = min(self.config.top_k, sum(available))
