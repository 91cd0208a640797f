"""LoRA-Mixer's router, which is trained in stages: hard by domain, then soft by score. Begin with HardSoftRouter.

`moelora.set_stage` says which stage a model is in; `moelora.HardSoftSchedule` goes through them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moelora.kernels.gate import LinearGate
from moelora.routers.learned import combined
from moelora.routers.linear import LinearRouter
from moelora.routing import NO_EXPERT, Routing
from moelora.tape import Tape

Stage = Literal["expert", "router", "joint", "sparse"]
"""A part of the training; `HardSoftRouter` defines each."""

STAGES: tuple[str, ...] = get_args(Stage)
"""All stages, in the order of `moelora.HardSoftSchedule`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HardSoft:
    """Options of LoRA-Mixer's router.

    Domains come with the batch, as `model(**batch, expert_ids=ids)`, or from `moelora.given_experts`: an expert's id,
    or -1 for a sample without a domain.

    Attributes:
        top_k: how many experts act on a token in evaluation and in the stage "sparse", K. The paper takes 3; a mixture
            of fewer experts needs fewer. A site with fewer experts uses all it has.
        temperature: divides the scores.
        init_std: standard deviation of the router's first weights.
    """

    reads_ids: ClassVar[bool] = True

    top_k: int = 3
    temperature: float = 1.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if not 0 <= self.init_std < float("inf"):
            raise ValueError(f"init_std must be finite and not negative, got {self.init_std}")

    def build(self, in_features: int, available: Sequence[bool], generator: torch.Generator | None) -> "HardSoftRouter":
        """A router for a site with this input width; `available` says which experts have rows there."""
        return HardSoftRouter(self, in_features, available, generator=generator)


@final
class HardSoftRouter(LinearRouter):
    """Weights of a token of domain d, with z = W x / temperature in fp32, in training by stage:

    - "expert": g_e = 1[e = d]. The router is skipped. -1, or an expert without rows at the site, is the base model.
    - "router": g = softmax(z) over all experts, densely.
    - "joint": g_e = (1 - beta) 1[e = d] + beta softmax(z)_e, with beta the `ramp` of `moelora.set_stage`, from 0 to 1.
      A token without a domain has beta = 1, and so have all if no ids were given. An expert without rows at the site
      adds nothing there, so the weights of its domain sum to beta.
    - "sparse": as in evaluation; the gradient goes through the K kept scores only.

    Without a stage, training is in "router": what a mixture of trained adapters needs. In evaluation, whatever the
    stage, the K best act with g_e = softmax(z)_e over the sum of the kept.

    Source: Li et al. (2025), LoRA-Mixer, https://arxiv.org/abs/2507.00029, whose stages are "expert" and then "router",
    with sparse top-3 in inference. There is no code of the authors. Ours are: that the hard weight is exactly 1, that
    the kept weights are divided by their sum (the paper does not say), a linear map without bias for each site as the
    router, and the stages "joint" and "sparse".
    """

    config: HardSoft
    every_token: bool
    top_k: int

    def __init__(
        self, config: HardSoft, in_features: int, available: Sequence[bool], *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(in_features, available, most=config.top_k, init_std=config.init_std, generator=generator)
        self.config = config

    def forward(self, x_TD: Float[Tensor, "T D"], tape: Tape) -> Routing:
        if not self.training:
            return self._kept(self._scores(x_TD))
        stage = tape.current.stage or "router"
        assert stage in STAGES, stage

        if stage == "expert":
            ids_T = self._domains(x_TD, tape)
            return Routing(ids_T[:, None], (ids_T >= 0).to(torch.float32)[:, None])
        logits_TE = self._scores(x_TD)
        if stage == "sparse":
            return self._kept(logits_TE)

        # every expert acts, in the order of the ids
        weights_TE = logits_TE.softmax(dim=-1)
        if stage == "joint" and tape.has_ids:
            weights_TE = self._between(weights_TE, tape)
        experts_E = torch.arange(self.num_experts, device=x_TD.device)
        if not self.all_available:
            experts_E = experts_E.masked_fill(~self.available_E, NO_EXPERT)
        return Routing(experts_E.expand_as(weights_TE), weights_TE, logits_TE)

    def linear_gate(self) -> LinearGate | None:
        # a gate is handed no tape, so it cannot know the stage
        if self.training or not self.all_available:
            return None
        return LinearGate(self.weight_ED, self.config.temperature, self.top_k, "renormalized")

    def train(self, mode: bool = True) -> "HardSoftRouter":
        super().train(mode)
        self._promise()
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.config}"

    # --- inside ---------------------------------------------------------------------------------------------------

    def _scores(self, x_TD: Tensor) -> Tensor:
        logits_TE = self.scores(x_TD)
        return logits_TE if self.config.temperature == 1.0 else logits_TE / self.config.temperature

    def _kept(self, logits_TE: Tensor) -> Routing:
        """The K best, with weights that sum to 1."""
        chosen_TK, experts_TK = logits_TE.topk(min(self.most, self._num_available), dim=-1)
        return Routing(experts_TK, combined("renormalized", chosen_TK, logits_TE), logits_TE)

    def _between(self, soft_TE: Tensor, tape: Tape) -> Tensor:
        """Between the domain's expert alone and the router's weights, as far as the ramp is."""
        named_T1 = self._given(soft_TE, tape)[:, None]
        share_T1 = (1 - tape.current.ramp) * (named_T1 >= 0).to(torch.float32)
        experts_E = torch.arange(self.num_experts, device=soft_TE.device)
        hard_TE = ((named_T1 == experts_E) & self.available_E).to(torch.float32)
        return share_T1 * hard_TE + (1 - share_T1) * soft_TE

    def _given(self, x_TX: Tensor, tape: Tape) -> Int[Tensor, " T"]:
        """The domain of each token, -1 for none."""
        ids_TK = tape.given_ids(x_TX.device)
        if ids_TK.shape[1] != 1:
            raise ValueError(
                f"a sample has one domain, but {ids_TK.shape[1]} expert ids were given for each token; "
                "give one, in the shape (), (B,) or (B, L)"
            )
        return ids_TK[:, 0]

    def _domains(self, x_TD: Tensor, tape: Tape) -> Int[Tensor, " T"]:
        """The expert of each token's domain; -1 also where that has no rows."""
        return self.present(self._given(x_TD, tape))

    def _set_available(self, available: Sequence[bool], device: torch.device | None = None) -> None:
        super()._set_available(available, device)
        self._num_available = sum(available)
        self._promise()

    def _promise(self) -> None:
        """What layers may rely on: in training up to all experts act on a token, or none."""
        self.every_token = not self.training
        self.top_k = self.num_experts if self.training else min(self.most, self._num_available)
