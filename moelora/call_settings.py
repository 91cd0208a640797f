"""What one call of a patched model has to do: stay shut, take a fixed mixture, take given ids. Begin with Settings."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moelora.routing import NO_EXPERT, Routing


@dataclass(frozen=True, kw_only=True)
class FixedMixture:
    """A mixture that somebody fixed by hand: for all rows (N = 1) or one per row of the batch (N = B).

    `repeats` rows in a row belong together: an encoder runs before the model repeats its rows and sees one of them.
    """

    experts_NK: Int[Tensor, "N K"]
    weights_NK: Float[Tensor, "N K"]
    repeats: int = 1

    def routing(self, leading: tuple[int, ...], device: torch.device, batch: int | None = None) -> Routing:
        """The routing of an input whose shape is `leading` + (D,), in a stack that runs on `batch` rows."""
        experts_NK, weights_NK = self.experts_NK.to(device), self.weights_NK.to(device)
        if self.repeats > 1 and batch is not None and batch * self.repeats == experts_NK.shape[0]:
            experts_NK, weights_NK = experts_NK[:: self.repeats], weights_NK[:: self.repeats]
        return Routing(spread_rows(experts_NK, leading), spread_rows(weights_NK, leading))


@dataclass(frozen=True, kw_only=True)
class GivenIds:
    """Expert ids handed in from outside: per call (), per row (B,), per token (B, L) or per token and slot (B, L, K).

    `rest` is the id for tokens behind the given ones, as in generation; None makes such a token an error.
    """

    ids: Tensor
    rest: int | None = None

    def of_tokens(self, leading: tuple[int, ...], start: int) -> Int[Tensor, "T K"]:
        """The ids of an input of shape `leading` + (D,) that begins behind `start` cached tokens.

        Raises:
            ValueError: if the ids are given for other rows, or the input goes on behind the last of them.
        """
        ids = self.ids
        if ids.ndim <= 1:
            return spread_rows(ids.reshape(-1, 1), leading)
        batch, known = ids.shape[:2]
        length, remainder = divmod(math.prod(leading), batch)
        if remainder or (len(leading) > 1 and leading != (batch, length)):
            raise ValueError(
                f"expert ids were given for {batch} rows of {known} tokens, but the input has the shape "
                f"{tuple(leading)}; give ids per row, or one id for each token of this input"
            )
        stop = start + length
        if stop > known:
            if self.rest is None:
                raise ValueError(
                    f"expert ids were given for {known} tokens of each row, but the call reaches token {stop}; "
                    "give ids for all tokens, or say with `rest=` which expert takes those behind"
                )
            ids = torch.cat([ids, ids.new_full((batch, stop - known, *ids.shape[2:]), self.rest)], dim=1)
        return ids[:, start:stop].reshape(batch * length, -1)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a call has to do. The defaults are a mixture at work.

    `own_loss` says that whoever calls the model in training computes a loss on its routings, which are kept and not
    weighed into `output.loss`; the labels of that loss are `labels_BL`, where the model does not get them.
    `gates_BE` are the weights that the gates of a call gave its rows (`moelora.set_gates`), closed where exactly 0.
    `stage` and `ramp` are for routers that are trained in stages (`moelora.set_stage`): which one, and how far it is.
    """

    disabled: bool = False
    fixed: FixedMixture | None = None
    given: GivenIds | None = None
    gates_BE: Float[Tensor, "B E"] | None = None
    own_loss: bool = False
    labels_BL: Tensor | None = None
    stage: str | None = None
    ramp: float = 0.0


def spread_rows(values_NK: Tensor, leading: tuple[int, ...]) -> Tensor:
    """One row of values for each of N rows, repeated for every token of that row: (N, K) -> (T, K).

    Raises:
        ValueError: if an input of shape `leading` + (D,) has no N rows.
    """
    rows, tokens = values_NK.shape[0], math.prod(leading)
    if rows == 1:
        return values_NK.expand(tokens, -1)
    fits = leading[0] == rows if len(leading) > 1 else tokens % rows == 0
    if not fits:
        raise ValueError(
            f"a mixture was given for each of {rows} rows, but the input of this site has the shape {tuple(leading)}; "
            "give one entry for each row of the batch (with beam search or several return sequences, "
            "`repeats=` says how often the model repeats a row), or one mixture for all rows"
        )
    return values_NK.repeat_interleave(tokens // rows, dim=0)


def checked_ids(ids: Tensor, count: int, *, name: str = "ids", look: bool = True) -> Int[Tensor, "..."]:
    """Ids that are given from outside, as int64.

    Args:
        ids: for a call (), its rows (B,), its tokens (B, L), or several for each (B, L, K).
        count: how many experts, or tasks, there are.
        name: what the caller calls them, for the errors.
        look: whether the values are looked at, which waits for the device.

    Raises:
        ValueError: for another shape or dtype, or an id that is neither -1 nor below `count`.
    """
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.ndim > 3 or not ids.numel():
        raise ValueError(
            f"{name} must be integers of shape (), (B,), (B, L) or (B, L, K), got {ids.dtype} {tuple(ids.shape)}"
        )
    ids = ids.long()
    if look and not (int(ids.min()) >= NO_EXPERT and int(ids.max()) < count):
        raise ValueError(
            f"{name} must lie between -1 (base model) and {count - 1}, got {int(ids.min())} to {int(ids.max())}"
        )
    return ids
