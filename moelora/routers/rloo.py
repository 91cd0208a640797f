"""The router that is trained by reinforcement, with equal weights for all that act. Begin with RLOORouter.

Its weights are constants, so no gradient of the language model's loss reaches it: `moelora.rloo_loss` trains it.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moelora.bank import ExpertBank
from moelora.kernels.gate import LinearGate
from moelora.plackett_luce import gumbel_like, ordered_log_prob
from moelora.routers.linear import LinearRouter
from moelora.routing import Routing
from moelora.tape import Tape

Weight = Literal["rslora", "lora", "mean", "sum"]
Granularity = Literal["token", "prompt"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RLOO:
    """Options of ReMix's router.

    Attributes:
        top_k: how many experts act on a token, k. A site with fewer experts uses all it has.
        weight: what a chosen expert's B A x is multiplied by. "lora" and "rslora" take the place of the scale that an
            expert was trained at, and need experts of one rank r at each site; "mean" and "sum" keep that scale s_e.

            - "rslora": 2 / sqrt(k r), as one adapter of rank k r with alpha 2 would have it. For experts that are
              trained together with the router; the better of the two in the paper.
            - "lora": 2 / (k r).
            - "mean": s_e / k, for adapters that are frozen.
            - "sum": s_e.
        granularity: who gets a choice of its own: each "token", or each "prompt". For a prompt the input is averaged
            over its tokens, and the choice holds for the answer too: in training as the labels say, in generation as
            long as the key-value cache lives.
        init_std: standard deviation of the router's first weights.
    """

    top_k: int = 2
    weight: Weight = "rslora"
    granularity: Granularity = "token"
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        for name, kind in (("weight", Weight), ("granularity", Granularity)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; expected one of {get_args(kind)}")
        if self.init_std < 0:
            raise ValueError(f"init_std must not be negative, got {self.init_std}")

    @property
    def latches(self) -> bool:
        """Whether a choice is kept along a conversation."""
        return self.granularity == "prompt"

    def build(self, in_features: int, available: Sequence[bool], generator: torch.Generator | None) -> "RLOORouter":
        """A router for a site with this input width; `available` says which experts have rows there."""
        if sum(available) <= self.top_k:
            warnings.warn(
                f"a site has {sum(available)} experts and all of them act, top_k={self.top_k}; there logQ carries no "
                "signal and the router learns nothing",
                stacklevel=2,
            )
        return RLOORouter(self, in_features, available, generator=generator)


@final
class RLOORouter(LinearRouter):
    """q = softmax(W x) without bias, in fp32; k experts act, with equal weights.

    In training they are drawn from q one after the other, without replacement (`topk(z + Gumbel noise)`); in
    evaluation the k best act. The input is detached, so that experts in front of the router get the gradient of the
    supervised loss and nothing else.

    Source: ReMix, Qiu et al. 2026 (arXiv 2603.10160). Which experts of which token are chosen is not said there;
    `granularity` is ours, and so are the weights "mean" and "sum".

    Attributes:
        gain_E: what `weight` makes of an expert's rank and scale, without k; None where it needs neither.
    """

    gain_E: Tensor | None

    def __init__(
        self, config: RLOO, in_features: int, available: Sequence[bool], *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(in_features, available, most=config.top_k, init_std=config.init_std, generator=generator)
        self.config = config
        # saved with the router, since a router that is loaded is not started again; NaN until it is known
        replaces = config.weight in ("rslora", "lora")
        self.register_buffer("gain_E", torch.full((len(available),), torch.nan) if replaces else None)

    def start_from(self, banks: Sequence[ExpertBank], experts: Sequence[int]) -> None:
        """Take note of the experts' ranks and scales, which `weight` replaces.

        Raises:
            ValueError: if the experts of a site differ in rank, or one of them in its scale between sites that share
                this router, or its scale is 0.
        """
        if self.gain_E is None:
            return
        ranks = {rank for bank in banks for rank in bank.ranks if rank}
        if len(ranks) > 1:
            raise ValueError(
                f"weight={self.config.weight!r} gives all experts of a site one weight, made from their rank, but the "
                f"ranks are {sorted(ranks)}; take experts of one rank, or weight='mean' or 'sum'"
            )
        gain_E = self.gain_E.tolist()
        for expert in experts:
            scales = {bank.scales[expert] for bank in banks if bank.ranks[expert]}
            if len(scales) > 1 or 0.0 in scales:
                raise ValueError(
                    f"weight={self.config.weight!r} takes the place of an expert's scale, which must be one number and "
                    f"not 0 at the sites of this router; expert {expert} has {sorted(scales)}"
                )
            # an expert that is absent is never chosen
            gain_E[expert] = self._gain(ranks.copy().pop(), scales.pop()) if scales else 0.0
        self.gain_E.copy_(torch.tensor(gain_E))

    def forward(self, x_TD: Float[Tensor, "T D"], tape: Tape) -> Routing:
        x_TD = x_TD.detach()
        if self.config.granularity == "token":
            logits_TE = self.scores(x_TD)
            experts_TK = self._choose(logits_TE, tape)
            log_prob_T = ordered_log_prob(logits_TE, experts_TK) if self.training else None
            return Routing(experts_TK, self._weights(experts_TK), logits_TE, log_prob_T)

        logits_BE, experts_BK = self._of_prompt(x_TD, tape)
        length = x_TD.shape[0] // max(logits_BE.shape[0], 1)
        experts_TK, logits_TE = (values.repeat_interleave(length, 0) for values in (experts_BK, logits_BE))
        log_prob_T = None
        if self.training:
            # a row has chosen once: its first token has the log-probability, and a sum over tokens counts it once
            log_prob_B1 = ordered_log_prob(logits_BE, experts_BK)[:, None]
            log_prob_T = torch.cat([log_prob_B1, log_prob_B1.new_zeros(len(log_prob_B1), length - 1)], 1).flatten()
        return Routing(experts_TK, self._weights(experts_TK), logits_TE, log_prob_T)

    def linear_gate(self) -> LinearGate | None:
        # the kernels' gate neither draws nor keeps a choice; "unit" has a gradient that this router does not have
        if self.training or self.config.granularity == "prompt" or not self.all_available:
            return None
        if self.config.weight == "mean":
            return LinearGate(self.weight_ED, 1.0, self.top_k, "constant")
        if self.config.weight == "sum" and not torch.is_grad_enabled():
            return LinearGate(self.weight_ED, 1.0, self.top_k, "unit")
        return None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.config}"

    # --- inside ---------------------------------------------------------------------------------------------------

    def _choose(self, logits_TE: Tensor, tape: Tape) -> Int[Tensor, "T K"]:
        """k experts, in the order in which they are drawn."""
        keys_TE = logits_TE.detach()
        if self.training:
            keys_TE = keys_TE + gumbel_like(keys_TE, tape.generator)
        return keys_TE.topk(self.top_k, dim=-1).indices

    def _of_prompt(self, x_TD: Tensor, tape: Tape) -> tuple[Tensor, Tensor]:
        """Scores and experts of each row: what its conversation began with, or by the mean input of its prompt."""
        prompt_BL = tape.prompt_of(tape.leading)
        kept = None if tape.turn is None else tape.turn.recall(id(self), rows=prompt_BL.shape[0])
        if kept is not None:
            return kept[0], kept[1]
        x_BLD = x_TD.float().unflatten(0, tuple(prompt_BL.shape))
        # where, not times: what stands in padding may be anything
        sum_BD = torch.where(prompt_BL[:, :, None], x_BLD, 0).sum(1)
        logits_BE = self.scores(sum_BD / prompt_BL.sum(1, keepdim=True).clamp(min=1))
        experts_BK = self._choose(logits_BE, tape)
        if tape.turn is not None:
            tape.turn.keep(id(self), (logits_BE, experts_BK))
        return logits_BE, experts_BK

    def _weights(self, experts_TK: Tensor) -> Float[Tensor, "T K"]:
        """g_e, with which the layer multiplies an expert's own scale s_e."""
        k = self.top_k
        if self.gain_E is None:
            return torch.full(
                experts_TK.shape, 1 / k if self.config.weight == "mean" else 1.0, device=experts_TK.device
            )
        return self.gain_E.float()[experts_TK] / (k if self.config.weight == "lora" else k**0.5)

    def _gain(self, rank: int, scale: float) -> float:
        return 2 / ((rank if self.config.weight == "lora" else rank**0.5) * scale)

    def _rows(self) -> dict[str, Tensor]:
        return super()._rows() | ({} if self.gain_E is None else {"gain_E": self.gain_E})
