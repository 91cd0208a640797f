"""How an encoder answers items of several skills: a head for each, on the last layer's mean. Begin with Answers."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality.skills import Batch, Item, Skill, in_order

NORM = 5.0
"""Length that a text's features are brought to, near to what the encoder's have by themselves."""

SHARPNESS = 20.0
"""Of a fresh multiple-choice head: what it multiplies cosines by."""


class Classes(nn.Module):
    """A linear map of an item's one text to its classes."""

    def __init__(self, width: int, classes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight_CD = nn.Parameter(0.05 * torch.randn(classes, width, generator=generator))
        self.bias_C = nn.Parameter(torch.zeros(classes))

    def forward(self, features_NPD: Float[Tensor, "N P D"]) -> Float[Tensor, "N C"]:
        """Scores of the classes."""
        return F.linear(features_NPD[:, 0], self.weight_CD, self.bias_C)


class Choice(nn.Module):
    """Question times answer, feature by feature, each with a weight; at first a multiple of the cosine."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight_D = nn.Parameter(torch.full((width,), SHARPNESS / NORM**2))

    def forward(self, features_NPD: Float[Tensor, "N P D"]) -> Float[Tensor, "N C"]:
        """Scores of the answers, which stand behind the question."""
        question_N1D, answer_NCD = features_NPD[:, :1], features_NPD[:, 1:]
        return (self.weight_D * question_N1D * answer_NCD).sum(-1)


def fresh_head(skill: Skill, width: int, generator: torch.Generator) -> nn.Module:
    """A head that has learned nothing."""
    return Classes(width, skill.classes, generator) if skill.classes else Choice(width)


def features_of(encoder: Any, batch: Batch, **more: Any) -> Float[Tensor, "B D"]:
    """The mean of the last layer over each row's tokens, of length NORM."""
    mask_BL = batch.attention_mask_BL
    hidden_BLD = encoder(input_ids=batch.input_ids_BL, attention_mask=mask_BL, **more).last_hidden_state
    mask_BL1 = mask_BL.unsqueeze(-1).to(hidden_BLD.dtype)
    return NORM * F.normalize((hidden_BLD * mask_BL1).sum(1) / mask_BL1.sum(1), dim=-1)


class Answers(nn.Module):
    """An encoder with a head for each skill, in the skills' order.

    The encoder is called `module`, as in torch's own wrappers, so that moelora finds the mixture in it.
    """

    def __init__(self, encoder: Any, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.module = encoder
        self.heads = nn.ModuleList(heads)

    def forward(self, batch: Batch, *, ids: bool = False) -> dict[str, Tensor]:
        """Under "loss" the mean cross-entropy over all items; with `ids` routers are told each row's skill."""
        scores = self.scores(batch, **({"expert_ids": batch.skill_B} if ids else {}))
        losses = [
            F.cross_entropy(scores_NC, batch.items[skill][1], reduction="sum") for skill, scores_NC in scores.items()
        ]
        return {"loss": torch.stack(losses).sum() / sum(len(label_N) for _, label_N in batch.items.values())}

    def scores(self, batch: Batch, **more: Any) -> Mapping[int, Float[Tensor, "N C"]]:
        """Scores of each item's answers, by skill."""
        features_BD = features_of(self.module, batch, **more)
        return {skill: self.heads[skill](features_BD[rows_NP]) for skill, (rows_NP, _) in batch.items.items()}

    def right(self, batch: Batch) -> int:
        """How many items are answered rightly."""
        scores = self.scores(batch)
        return sum(int((scores[skill].argmax(-1) == label_N).sum()) for skill, (_, label_N) in batch.items.items())


@torch.no_grad()
def encode(encoder: Any, items: Sequence[Item], device: str) -> tuple[Float[Tensor, "N P D"], Int[Tensor, " N"]]:
    """Features of all texts of one skill's items, and the right answers; the order is another."""
    found, labels = [], []
    for batch in in_order(0, items, 64):
        moved = batch.to(device)
        rows_NP, label_N = moved.items[0]
        found.append(features_of(encoder, moved)[rows_NP])
        labels.append(label_N)
    return torch.cat(found), torch.cat(labels)


def fit_head(head: nn.Module, features_NPD: Tensor, label_N: Tensor, strength: float) -> None:
    """Fit a head on fixed features to the end, by L-BFGS.

    Logistic regression with C = `strength` for features of length 1. The penalty is on the distance from where the head
    begins, which is zero but for noise where there are classes.
    """
    start = [parameter.detach().clone() for parameter in head.parameters()]
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")
    factor = NORM**2 / (2 * strength * len(label_N))

    def closure() -> Tensor:
        optimizer.zero_grad()
        moved = [(parameter - begin).square().sum() for parameter, begin in zip(head.parameters(), start, strict=True)]
        loss = F.cross_entropy(head(features_NPD), label_N) + factor * torch.stack(moved).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
