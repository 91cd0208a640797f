"""What a stack's gates say about the prompts of a call. Begin with gates_of."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from moelora.continual.examples import prompts_of
from moelora.continual.features import HiddenStates, Windows

READ = ("input_ids", "attention_mask", "token_type_ids", "labels")

Features = Callable[[Any], Windows]
"""From prompts to features: `HiddenStates`, `ExternalEncoder`, or a function of yours."""

Decide = Callable[[Windows], Tensor]
"""From features of prompts to weights (B, E), one for each expert."""


def gates_of(
    model: nn.Module, features: Features, decide: Decide
) -> "StateGates | Callable[[Mapping[str, Any]], Tensor]":
    """A function for `moelora.set_gates` on this model, cheap if the features are its own hidden states."""
    if isinstance(features, HiddenStates) and features.model is model:
        return StateGates(features, decide)
    return lambda inputs: decide(features(_prompts(inputs)))


@final
class StateGates:
    """Gates on the model's own hidden states, which need not be computed twice (`moelora.prefill.PrefillGates`).

    Attributes:
        layers: whose hidden states.
        window: the longest prompt that is one window.
    """

    layers: Sequence[int]
    window: int

    def __init__(self, features: HiddenStates, decide: Decide) -> None:
        self._features, self._decide = features, decide
        self.layers, self.window = features.layers, features.window

    def __call__(self, inputs: Mapping[str, Any]) -> Float[Tensor, "B E"]:
        """From the arguments of a call; of texts with labels for each token, only the prompts are read."""
        return self._decide(self._features(_prompts(inputs)))

    def of_means(self, means_BSD: Float[Tensor, "B S D"]) -> Float[Tensor, "B E"]:
        """From mean hidden states of prompts of one window each."""
        rows = len(means_BSD)
        row_W = torch.arange(rows, device=means_BSD.device)
        return self._decide(Windows(F.normalize(means_BSD.float(), dim=-1), row_W, rows))


def _prompts(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    batch = {name: inputs[name] for name in READ if isinstance(inputs.get(name), Tensor)}
    if "input_ids" not in batch:
        raise ValueError(
            f"the gates of a stack read input_ids, and this call has {sorted(inputs)}; pass token ids, or set "
            "gates of your own with moelora.set_gates"
        )
    batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    return prompts_of(batch)
