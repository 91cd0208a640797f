"""Gates that look at the hidden states of the very call that they are for. Begin with PrefillGates.

A gate on hidden states would have the model run twice on every prompt: for the gates, and for the answer. Instead the
call runs as the base model, while hooks on its blocks take the means of the prompt's hidden states. If all gates stay
closed, that was the answer; else it is taken back, and the call runs again with its experts.

Axes: B rows, L tokens, S layers, D width, E experts.
"""

import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, final, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moelora.cache_state import CacheState
from moelora.hooks import CONVERSATIONS, argument_names

PROBE_LENGTH = 4
"""How many tokens the model is shown to learn which modules give its hidden states."""

READ = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "cache_position", *CONVERSATIONS)
NO_MATTER = ("use_cache", "labels", "return_dict", "logits_to_keep", "num_items_in_batch")
NO_MATTER_EITHER = "output_"
"""Arguments that leave the hidden states alone, by name and by how their names begin."""


@runtime_checkable
class PrefillGates(Protocol):
    """A function for `moelora.set_gates` that can also be told the means of hidden states, which it then need not make.

    Both ways must give the same weights but for rounding: `of_means` for prompts of at most `window` tokens, from the
    states of the model that the gates are set on; the call itself for any inputs.

    Attributes:
        layers: which hidden states, counted as in `output_hidden_states`: 0 are the embeddings, 1 the output of the
            first block, the last one's comes after the final norm.
        window: the most tokens of a prompt that one mean is taken of.
    """

    @property
    def layers(self) -> Sequence[int]: ...

    @property
    def window(self) -> int: ...

    def __call__(self, inputs: Mapping[str, Any]) -> Tensor:
        """From the arguments of a call to weights (B, E)."""
        ...

    def of_means(self, means_BSD: Float[Tensor, "B S D"]) -> Float[Tensor, "B E"]:
        """From the mean of each prompt's hidden states over its tokens, in fp32, to weights (B, E)."""
        ...


class Prompt(NamedTuple):
    """The tokens of a call: which count, None for all of them."""

    ids_BL: Tensor
    valid_BL: Tensor | None

    @property
    def beginning(self) -> Int[Tensor, "1 L"]:
        """Up to four tokens of the first row."""
        ids_L = self.ids_BL[0] if self.valid_BL is None else self.ids_BL[0][self.valid_BL[0]]
        return ids_L[None, :PROBE_LENGTH]


def prompt_of(values: Mapping[str, Any], mask_BL: Any, window: int) -> Prompt | None:
    """The prompt of a call whose hidden states are those that a reader of plain text would have; None for another.

    That is text alone, all of it prompt, in rows of at most `window` tokens, each token at the position that it has
    without the padding.

    Args:
        values: the arguments of the call.
        mask_BL: its padding mask (B, L), if that is known.
        window: the most tokens that a row may have.
    """
    ids_BL = values.get("input_ids")
    others = [name for name, value in values.items() if value is not None and name not in (*READ, *NO_MATTER)]
    if not isinstance(ids_BL, Tensor) or ids_BL.ndim != 2 or not ids_BL.numel():
        return None
    if any(not name.startswith(NO_MATTER_EITHER) for name in others):
        return None
    labels = values.get("labels")
    if isinstance(labels, Tensor) and labels.ndim > 1:
        # a label for each token: answers are in the text, and the gates' own function may want to leave them out
        return None
    mask, position_BL = values.get("attention_mask"), values.get("position_ids")
    length = ids_BL.shape[1]
    if position_BL is not None:
        if not isinstance(position_BL, Tensor) or position_BL.ndim != 2 or position_BL.shape[1] != length:
            return None
        position_BL = position_BL.to(ids_BL.device)

    # `generate` hands on no mask without padding, and one of attention for static caches; anybody else's may be of any
    # form. A look at a value waits for the device, so there is one for each call
    if mask is None:
        stands = length <= window and (position_BL is None or bool((position_BL == numbers_of(ids_BL)).all()))
        return Prompt(ids_BL, None) if stands else None
    plain = isinstance(mask, Tensor) and mask.shape == ids_BL.shape
    if not plain and not any(getattr(values.get(name), "is_compileable", False) for name in CONVERSATIONS):
        return None
    if not isinstance(mask_BL, Tensor) or mask_BL.shape != ids_BL.shape:
        return None

    # where each token stands, if padding is left out
    valid_BL = mask_BL.to(ids_BL.device) != 0
    place_BL = valid_BL.cumsum(1) - 1
    position_BL = numbers_of(ids_BL) if position_BL is None else position_BL
    stands_BL = (position_BL == place_BL) | ~valid_BL
    fits = stands_BL.all() & (place_BL[:, -1] >= 0).all() & (place_BL[:, -1] < window).all()
    fits, full = torch.stack([fits, valid_BL.all()]).tolist()
    return Prompt(ids_BL, None if full else valid_BL) if fits else None


def numbers_of(ids_BL: Int[Tensor, "B L"]) -> Int[Tensor, "1 L"]:
    """Of a row's tokens, from 0."""
    return torch.arange(ids_BL.shape[1], device=ids_BL.device)[None]


class Tap(NamedTuple):
    """A module that gives hidden states: in which of its calls it gives which of them, and how often it is called."""

    module: "weakref.ref[nn.Module]"
    slots: dict[int, list[int]]
    calls: int


def find_taps(root: nn.Module, layers: Sequence[int], ids_BL: Int[Tensor, "1 L"]) -> list[Tap] | None:
    """Which modules of a model give its hidden states `layers`, found by running it on a few tokens.

    A module gives a hidden state if its output is that tensor, the same memory, and nothing is written to it later.
    None if there is no such module for one of them.
    """
    model: Any = root
    backbone: nn.Module = getattr(model, "base_model", root)
    heard: list[_Heard] = []
    calls: dict[nn.Module, int] = {}
    handles = [
        module.register_forward_hook(partial(_hear, heard, calls, path)) for path, module in backbone.named_modules()
    ]
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in argument_names(type(backbone)) else {}
    try:
        output = backbone(
            input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL), output_hidden_states=True, **options
        )
    finally:
        for handle in handles:
            handle.remove()
    states = getattr(output, "hidden_states", None)
    if states is None or min(layers) < 0 or len(states) <= max(layers):
        return None

    # of several the outermost, the block itself
    found: dict[nn.Module, dict[int, list[int]]] = {}
    for slot, layer in enumerate(layers):
        giving = [each for each in heard if each.gives(states[layer])]
        if not giving:
            return None
        first = min(giving, key=lambda each: each.path.count("."))
        found.setdefault(first.module, {}).setdefault(first.number, []).append(slot)
    return [Tap(weakref.ref(module), slots, calls[module]) for module, slots in found.items()]


class _Heard(NamedTuple):
    """An output of a module: in which of its calls, the tensor (alive, so that its address is its own), its values."""

    path: str
    module: nn.Module
    number: int
    output: Tensor
    values: Tensor

    def gives(self, state: Tensor) -> bool:
        same = self.output.data_ptr() == state.data_ptr() and self.output.numel() == state.numel()
        return same and torch.equal(self.values.view_as(state), state)


def _hear(
    heard: list[_Heard], calls: dict[nn.Module, int], path: str, module: nn.Module, args: Any, output: Any
) -> None:
    calls[module] = number = calls.get(module, 0) + 1
    tensor = first_of(output)
    if tensor is not None and tensor.ndim == 3:
        heard.append(_Heard(path, module, number, tensor, tensor.clone()))


@final
class Prefill:
    """A call that runs as the base model while the means of its hidden states are taken, and can be taken back.

    Args:
        taps: where the hidden states come from.
        prompt: the tokens of the call.
        seen: what the gates are shown, if they are asked the plain way after all.
        caches: the caches that came with the call, as they were.
    """

    prompt: Prompt
    seen: Mapping[str, Any]
    caches: Sequence[CacheState]
    random: Any
    number: int

    def __init__(
        self, taps: Sequence[Tap], prompt: Prompt, seen: Mapping[str, Any], caches: Sequence[CacheState]
    ) -> None:
        self.prompt, self.seen, self.caches = prompt, seen, caches
        self.random = random_states()
        self.number = sum(len(slots) for tap in taps for slots in tap.slots.values())
        self.found: dict[int, Tensor] = {}
        self.called: dict[int, int] = {}
        self.handles: list[Any] = []
        for place, tap in enumerate(taps):
            module = tap.module()
            if module is not None:
                self.handles.append(module.register_forward_hook(partial(self.take, place, tap)))

    def take(self, place: int, tap: Tap, module: nn.Module, args: Any, output: Any) -> None:
        """The hidden states of a module have come."""
        self.called[place] = number = self.called.get(place, 0) + 1
        if number > tap.calls:
            # a later call of the model, after one that was interrupted: nobody has closed this
            self.close()
            return
        states_BLD, (batch, length) = first_of(output), self.prompt.ids_BL.shape
        slots = tap.slots.get(number, [])
        if slots and states_BLD is not None and states_BLD.ndim == 3 and states_BLD.shape[:2] == (batch, length):
            mean_BD = masked_mean(states_BLD, self.prompt.valid_BL)
            self.found.update(dict.fromkeys(slots, mean_BD))

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def means(self) -> Float[Tensor, "B S D"] | None:
        """The means, where the call's tokens are; None if the model no longer gives what it gave when it was looked at.

        A module that has been exchanged since then is not called.
        """
        self.close()
        if len(self.found) != self.number:
            return None
        device = self.prompt.ids_BL.device
        return torch.stack([self.found[slot].to(device) for slot in range(self.number)], dim=1)

    def take_back(self) -> None:
        """Make the caches and the random numbers' states what they were when the call began."""
        for state in self.caches:
            state.put_back()
        set_random_states(self.random)


def masked_mean(states_BLD: Float[Tensor, "B L D"], valid_BL: Bool[Tensor, "B L"] | None) -> Float[Tensor, "B D"]:
    """Mean over the tokens that count, in fp32."""
    if valid_BL is None:
        return states_BLD.mean(1, dtype=torch.float32)
    valid_BL = valid_BL.to(states_BLD.device)
    # where, not times: what stands in padding may be anything
    kept_BLD = torch.where(valid_BL[:, :, None], states_BLD, 0.0)
    return kept_BLD.sum(1, dtype=torch.float32) / valid_BL.sum(1, keepdim=True)


def first_of(output: Any) -> Tensor | None:
    """The tensor that a module returned, alone or first in a tuple."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) and first.is_floating_point() else None


def cards() -> list[int]:
    """The GPUs whose random numbers a call may draw."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


def random_states() -> list[Tensor]:
    """The states of torch's own generators: the CPU's, and each card's."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(card) for card in cards())]


def set_random_states(states: Sequence[Tensor]) -> None:
    """Set them to what `random_states` gave; cards that have come since then are left alone."""
    torch.set_rng_state(states[0])
    for card, state in enumerate(states[1:]):
        torch.cuda.set_rng_state(state, card)
