"""One mixture for each task, the same for all tokens of it. Begin with TaskEmbeddingRouter; options in TaskEmbedding.

Since the input has no say in it, the mixture of a task can be folded into the base model: `moelora.merge`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moelora.routers.linear import linear_in_fp32
from moelora.routers.rows import RowRouter
from moelora.routing import NO_EXPERT, Routing
from moelora.tape import Tape


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskEmbedding:
    """Options of the task router. Tasks come from `moelora.given_experts`, or with the batch as `expert_ids`.

    Attributes:
        tasks: their names; the position of a name is the task's id.
        width: of a task's embedding.
        init_std: standard deviation of the gate's first weights; the embeddings start with 1.
    """

    reads_ids: ClassVar[bool] = True

    tasks: Sequence[str]
    width: int = 64
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if isinstance(self.tasks, str):
            raise ValueError(f"tasks must be several names, got the one text {self.tasks!r}; pass ({self.tasks!r},)")
        # a list, which is what JSON makes of them, could be changed and has no hash
        object.__setattr__(self, "tasks", tuple(self.tasks))
        named = all(isinstance(task, str) and task for task in self.tasks)
        if not self.tasks or not named or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks must be different names, one at least, got {self.tasks}")
        if self.width < 1:
            raise ValueError(f"the width of a task's embedding must be at least 1, got {self.width}")
        if not self.init_std >= 0:
            raise ValueError(f"init_std must not be negative, got {self.init_std}")

    def build(
        self, in_features: int, available: Sequence[bool], generator: torch.Generator | None
    ) -> "TaskEmbeddingRouter":
        """A router for a site; `available` says which experts have rows there."""
        return TaskEmbeddingRouter(self, available, generator=generator)


@final
class TaskEmbeddingRouter(RowRouter):
    """g = softmax(W_g Emb[task]) over all experts, in fp32; a token without a task (-1) is the base model's.

    Axes of its own: M tasks, H the width of an embedding. An expert without rows at a site has no share there. It has
    no scores of tokens, so the losses on scores have nothing to say about it.

    Source: MOELoRA (Liu et al. 2023, arXiv 2310.18339).
    """

    every_token = False
    top_k: int
    config: TaskEmbedding
    embedding_MH: nn.Parameter
    weight_EH: nn.Parameter

    def __init__(
        self, config: TaskEmbedding, available: Sequence[bool], *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.config = config
        tasks, width = len(config.tasks), config.width
        self._set_available(available)
        self.embedding_MH = nn.Parameter(torch.empty(tasks, width).normal_(generator=generator))
        weight_EH = torch.empty(len(available), width)
        self.weight_EH = nn.Parameter(weight_EH.normal_(0, config.init_std, generator=generator))

    def forward(self, x_TD: Float[Tensor, "T D"], tape: Tape) -> Routing:
        tasks_TK = tape.given_ids(x_TD.device)
        if tasks_TK.shape[1] != 1:
            raise ValueError(f"a token has one task, but {tasks_TK.shape[1]} ids were given for each; give ids (B, L)")

        # a mixture for each task, handed out to the tokens
        weights_ME = self.mixtures()
        weights_TE = weights_ME[tasks_TK[:, 0].clamp(min=0)]

        # all experts in their order; nobody for a token without a task, and nobody who is not there
        active_TE = (tasks_TK >= 0) & self.available_E
        experts_TE = torch.arange(self.num_experts, device=x_TD.device).expand_as(weights_TE)
        return Routing(experts_TE.masked_fill(~active_TE, NO_EXPERT), weights_TE.masked_fill(~active_TE, 0.0))

    def mixtures(self) -> Float[Tensor, "M E"]:
        """The weights of the experts in each task's mixture; those that are there sum to 1."""
        logits_ME = linear_in_fp32(self.embedding_MH, self.weight_EH)
        return logits_ME.masked_fill(~self.available_E, -torch.inf).softmax(dim=-1)

    def _rows(self) -> dict[str, Tensor]:
        return {"weight_EH": self.weight_EH}

    def _set_available(self, available: Sequence[bool], device: torch.device | None = None) -> None:
        super()._set_available(available, device)
        # all experts have a share
        self.top_k = len(available)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, {self.config}"
