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
from moelora.routers.linear import LinearRouter, linear_in_fp32
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
        inference_temperature: takes its place in evaluation, where routing is to be softer or harder than it was in
            training (MeteoRA, arXiv 2405.13053, takes 15 to 30 for texts that switch between tasks); None for the same.
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
    inference_temperature: float | None = None
    noisy: bool = False
    balance_bias_speed: float = 0.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.combine not in get_args(Combine):
            raise ValueError(f"unknown combine {self.combine!r}; expected one of {get_args(Combine)}")
        for name in ("temperature", "inference_temperature"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
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
class LearnedRouter(LinearRouter):
    """z = W x, without bias, in fp32; the K best experts act.

    Source: Shazeer et al. 2017 (arXiv 1701.06538), Fedus et al. 2022 (arXiv 2101.03961).
    """

    noise_weight_ED: nn.Parameter | None
    balance_bias_E: Tensor

    def __init__(
        self, config: Learned, in_features: int, available: Sequence[bool], *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(in_features, available, most=config.top_k, init_std=config.init_std, generator=generator)
        self.config = config
        shape = (len(available), in_features)
        self.noise_weight_ED = nn.Parameter(torch.zeros(shape)) if config.noisy else None
        self.register_buffer("balance_bias_E", torch.zeros(len(available)) if config.balance_bias_speed else None)

    def forward(self, x_TD: Float[Tensor, "T D"], tape: Tape) -> Routing:
        logits_TE = self._scores(x_TD, tape)

        # choose by score, with the balancing bias if there is one
        if self.config.balance_bias_speed:
            experts_TK = (logits_TE + self.balance_bias_E).topk(self.top_k, dim=-1).indices
            chosen_TK = logits_TE.gather(-1, experts_TK)
        else:
            chosen_TK, experts_TK = logits_TE.topk(self.top_k, dim=-1)

        return Routing(experts_TK, combined(self.config.combine, chosen_TK, logits_TE), logits_TE)

    @property
    def temperature(self) -> float:
        """What the scores are divided by, in training or in evaluation."""
        config = self.config
        if self.training or config.inference_temperature is None:
            return config.temperature
        return config.inference_temperature

    def linear_gate(self) -> LinearGate | None:
        if self.config.noisy or self.config.balance_bias_speed or not self.all_available:
            return None
        return LinearGate(self.weight_ED, self.temperature, self.top_k, self.config.combine)

    @torch.no_grad()
    def balance(self, load_E: Float[Tensor, " E"]) -> None:
        """Move the balancing bias towards the experts with too few tokens: b += speed * sign(mean load - load)."""
        if self.config.balance_bias_speed:
            mean = load_E[self.available_E].mean()
            self.balance_bias_E += self.config.balance_bias_speed * torch.sign(mean - load_E) * self.available_E

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.config}"

    # --- inside ---------------------------------------------------------------------------------------------------

    def _scores(self, x_TD: Tensor, tape: Tape) -> Tensor:
        logits_TE = self.scores(x_TD)
        if self.config.noisy and self.training:
            assert self.noise_weight_ED is not None
            spread_TE = F.softplus(linear_in_fp32(x_TD, self.noise_weight_ED))
            noise_TE = torch.randn(
                logits_TE.shape, generator=tape.generator, device=logits_TE.device, dtype=logits_TE.dtype
            )
            logits_TE = logits_TE + noise_TE * spread_TE
        return logits_TE if self.temperature == 1.0 else logits_TE / self.temperature

    def _rows(self) -> dict[str, Tensor]:
        rows = {"noise_weight_ED": self.noise_weight_ED, "balance_bias_E": self.balance_bias_E}
        return super()._rows() | {name: tensor for name, tensor in rows.items() if tensor is not None}


def combined(
    combine: Combine, chosen_TK: Float[Tensor, "T K"], logits_TE: Float[Tensor, "T E"]
) -> Float[Tensor, "T K"]:
    """Weights of the chosen experts from their scores and those of all; `Learned` says what each `combine` means."""
    if combine == "renormalized":
        return chosen_TK.softmax(dim=-1)
    if combine == "constant":
        return torch.full_like(chosen_TK, 1 / chosen_TK.shape[-1])
    probabilities_TK = (chosen_TK - logits_TE.logsumexp(dim=-1, keepdim=True)).exp()
    if combine == "softmax":
        return probabilities_TK
    # in brackets: 1 + (p - p) is exactly 1
    return 1 + (probabilities_TK - probabilities_TK.detach())
