"""Decisions that are made once and hold for a whole conversation. Begin with turn_of, then Turn.

A conversation is a key-value cache: it is empty when the first call begins, and whoever goes on hands it in again. What
was decided in the first call is kept on the cache object itself. So it lives as long as the cache, a deep copy of a
cache (a prompt that several answers go on from) takes it along, and a cache that is emptied for another prompt begins
anew.
"""

from typing import Any, final

import torch
from jaxtyping import Bool
from torch import Tensor

ATTRIBUTE = "_moelora_latch"


@final
class Latch:
    """What was decided for each row in a conversation's first call: by whom, and in the order of the uses."""

    kept: dict[int, list[tuple[Tensor, ...]]]

    def __init__(self) -> None:
        self.kept = {}


@final
class Turn:
    """One call of a conversation.

    In its first call nobody recalls anything: whoever decides keeps the decision. In later calls everybody recalls.
    A module that runs several times in a call decides as often, and recalls in the same order.
    """

    latch: Latch
    first: bool

    def __init__(self, latch: Latch, *, first: bool) -> None:
        self.latch, self.first = latch, first
        self._used: dict[int, int] = {}

    def recall(self, key: int, *, rows: int) -> tuple[Tensor, ...] | None:
        """What `key` has decided, for each of this call's rows; None in the first call, where it decides now.

        Beams and samples of one prompt are rows that stand together, so a cache whose rows have been repeated has the
        decision of each row repeated.

        Raises:
            ValueError: if there is no such decision, or it was made for rows that this call does not have.
        """
        if self.first:
            return None
        place = self._used.get(key, 0)
        self._used[key] = place + 1
        kept = self.latch.kept.get(key, [])
        if place >= len(kept):
            raise ValueError(
                "this conversation goes on at a site that did not take part in its first call, so nothing was decided "
                "there; was the mixture disabled or fixed then? Begin with an empty cache"
            )
        return tuple(_for_rows(values, rows) for values in kept[place])

    def keep(self, key: int, values: tuple[Tensor, ...]) -> None:
        """Keep a decision, tensors with one row for each row of the batch. It carries no gradient."""
        self.latch.kept.setdefault(key, []).append(tuple(value.detach() for value in values))


def turn_of(cache: Any) -> Turn:
    """The turn of a call that was handed this key-value cache, None for no cache yet.

    Raises:
        ValueError: for a cache that holds tokens of a conversation nobody here has seen the beginning of.
    """
    if cache is None:
        return Turn(Latch(), first=True)
    if is_empty(cache):
        turn = Turn(Latch(), first=True)
        put(turn, cache)
        return turn
    latch = getattr(cache, ATTRIBUTE, None)
    if latch is None:
        raise ValueError(
            f"this call goes on from a {type(cache).__name__} that this model has not filled in a call of its own, so "
            "what was decided for its prompt is not known; begin with an empty cache, or hand in the one that the "
            "first call returned"
        )
    return Turn(latch, first=False)


def put(turn: Turn, cache: Any) -> None:
    """Keep a first turn's decisions on the cache that the call has made."""
    setattr(cache, ATTRIBUTE, turn.latch)


def is_empty(cache: Any) -> bool:
    """Whether a key-value cache, or a cache of recurrent states, holds no tokens yet.

    Raises:
        ValueError: for something that does not tell, such as tuples of tensors.
    """
    if not hasattr(cache, "get_seq_length"):
        raise ValueError(
            f"expected a transformers Cache, which tells how many tokens it holds; got {type(cache).__name__}"
        )
    try:
        return int(cache.get_seq_length()) == 0
    except ValueError:
        # transformers' answer where no layer has keys and values
        return not cache.has_previous_state()


def prompt_mask(tokens: Tensor, mask_BL: Tensor | None, labels_BL: Tensor | None) -> Bool[Tensor, "B L"]:
    """Which tokens are prompt: all that are real, up to a row's first label.

    Behind it a prompt would know the answer, in training, that it is to be the prompt of. A row's first token is prompt
    also where it has a label, since no token predicts it.
    """
    batch, length = tokens.shape[:2]
    real_BL = (
        torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
        if mask_BL is None
        else mask_BL[:, -length:].bool()
    )
    if labels_BL is None:
        return real_BL
    before_BL = (labels_BL != -100).cumsum(1) == 0
    first_BL = real_BL.cumsum(1) == 1
    return real_BL & (before_BL.to(real_BL.device) | first_BL)


def _for_rows(values: Tensor, rows: int) -> Tensor:
    known = values.shape[0]
    if not known or rows % known:
        raise ValueError(
            f"this conversation began with {known} rows and goes on with {rows}; expected as many, or a multiple where "
            "each row is repeated"
        )
    return values if rows == known else values.repeat_interleave(rows // known, 0)
