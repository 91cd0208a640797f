"""The gates of a mixture whose experts act only where they are called for. Begin with set_gates.

    features = HiddenStates(model)

    def gates(inputs):
        prompts = {name: inputs.get(name) for name in ("input_ids", "attention_mask")}
        return gate_weight(features(prompts).score(detector), calibration)[:, None]

    moelora.set_gates(model, gates)

They are asked before a call of the model begins, once for a generation, and what they said is kept on the call's
key-value cache. Keys and values of a token hold the experts that acted on it, so nothing is opened halfway. Gates that
read the model's own hidden states may have them from the call itself (see `moelora/prefill.py`).
"""

import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moelora.cache_state import remember
from moelora.call_settings import Settings
from moelora.classifying import cached_tokens, size_of, spread
from moelora.hooks import CONVERSATIONS, INPUTS, TOKENS, read_frame
from moelora.mixture import Mixture, disabled, find_mixture
from moelora.open_calls import OpenCalls
from moelora.prefill import Prefill, PrefillGates, Tap, cards, find_taps, prompt_of
from moelora.routers.gated import Gated
from moelora.tape import Tape, in_backward

Gates = Callable[[Mapping[str, Any]], Tensor]
"""From the arguments of a call to weights (B, E), one for each row and expert; exactly 0 is closed."""

ATTRIBUTE = "_moelora_gates"
_NUMBERS = itertools.count()


def set_gates(model: nn.Module, gates: Any) -> None:
    """Let a function open and close the experts, for a model that was patched with `router="gated"`.

    The function gets the arguments of a call by name, without its caches, and with an `attention_mask` of the call's
    own tokens, whatever its form was. It may call the model, which is then its base model, bit for bit, as under
    `moelora.disabled`. It runs without gradient, and draws random numbers of its own: those of the call are the same as
    without it.

    It is asked once for a generation. Single tokens behind it take over the weights of their row, beams and samples of
    a prompt too. Several new tokens behind a cache are a new turn, for which it is asked again, and sees these tokens
    alone: a gate that was open stays open, and one that would open wider is an error. An encoder's gates go on to its
    decoder. Without a cache each step is a call of its own, with the whole text, for which it is asked.

    A function that is also a `moelora.prefill.PrefillGates` costs next to nothing where its gates stay closed: a call
    that begins a conversation runs as the base model and tells it the means of its hidden states. If a gate opens, the
    call is taken back and runs again. That is for text alone, no longer than its window, in evaluation without gradient
    and without a recording; decoders and encoders. Everything else asks the function itself, before the call.

    Fixed mixtures (`moelora.use_experts`) and `moelora.disabled` come first. Neither a saved mixture nor a copy of the
    model holds the function, and a mixture without it does not run.

    Args:
        model: a patched model.
        gates: a function that returns weights (B, E), finite and not negative, in the order of
            `moelora.expert_names(model)`; exactly 0 is closed. What a NaN score means is the function's to say, see
            `moelora.continual.calibration.gate_weight`. None takes the function away.

    Raises:
        ValueError: if the model has another router, or is running; in a call, if the weights are no such tensor, a gate
            opens in a conversation that has begun, a cache comes from a call that was not gated by this function, or
            another thread's call of the model has not ended.
    """
    root, mixture = find_mixture(model)
    asked: Gates | None = gates
    if not isinstance(mixture.config.router, Gated):
        raise ValueError(
            f'this model\'s router would not look at gates: it is {mixture.config.router}; patch with router="gated"'
        )
    if not (gates is None or callable(gates)):
        raise ValueError(f"expected a function of the call's arguments that returns weights (B, E), got {gates!r}")
    if mixture.tape.gates is not None:
        mixture.tape.gates.free()
    mixture.tape.gates = None if asked is None else _Asked(asked, root, mixture)


# --- inside -----------------------------------------------------------------------------------------------------------


class Decision(NamedTuple):
    """What gates have said, kept on a cache or an encoder's output: which gates, and of which experts."""

    number: int
    names: tuple[str, ...]
    weights_BE: Tensor
    closed: bool  # all of them; known here, since to look at a tensor's values waits for the device


@final
class _Asked:
    """Asks the gates before a call begins, and keeps the answer on what the call hands on.

    The tape is one for all threads, so a second call while one is running would take the first one's gates for its own.
    It is refused.
    """

    def __init__(self, gates: Gates, root: nn.Module, mixture: Mixture) -> None:
        self.gates = gates
        self.told = gates if isinstance(gates, PrefillGates) else None  # the same, if it can be told hidden states
        self.root, self.mixture = weakref.ref(root), weakref.ref(mixture)
        self.number = next(_NUMBERS)
        self.taps: dict[tuple[int, ...], list[Tap] | None] = {}
        self.prefill: Prefill | None = None  # of the running call, where it is watched
        self.running: Decision | None = None
        self.asking = False
        self.thread: int | None = None  # whose call is running
        self.open = OpenCalls()  # the same, for whether it still runs
        self.claiming = threading.Lock()

    # --- the call -------------------------------------------------------------------------------------------------

    def free(self) -> None:
        """Before the model itself begins, which never runs inside itself: forget a call that has not ended.

        Raises:
            ValueError: if another thread's call is running, or the gates are being asked.
        """
        mixture = self.mixture()
        if mixture is None or torch.compiler.is_compiling() or in_backward():
            return
        if self.asking and self.thread == threading.get_ident():
            return
        self.claim()
        if mixture.tape.depth:
            mixture.tape.forget()
        self.forget()

    def begin(self, values: Mapping[str, Any]) -> Settings | None:
        """What a call with these arguments has to do; None if it has begun already, or nobody looks at gates in it."""
        mixture, root = self.mixture(), self.root()
        if mixture is None or root is None or in_backward():
            return None
        tape, settings = mixture.tape, mixture.tape.settings
        without = tape.depth > 0 or settings.disabled or settings.fixed is not None
        if torch.compiler.is_compiling():
            if without:
                return None
            raise ValueError(
                "gates are asked outside of compiled code, and keep what they said on the key-value cache; do not "
                "compile a gated model as a full graph, and in generate pass disable_compile=True with a static cache"
            )
        self.claim()
        if without or self.asking:
            return None

        # a call that goes on takes over, from its cache or from its encoder
        rows, length = size_of(values)
        caches = [values[name] for name in CONVERSATIONS if values.get(name) is not None]
        encoded = values.get("encoder_outputs")
        goes_on = bool(caches) and cached_tokens(caches[0]) != 0
        before = caches[0] if goes_on else encoded
        names = tuple(mixture.names)
        if before is not None:
            kept = self.kept_on(before, names)
            weights_BE = spread(kept.weights_BE, rows, 0)
            if goes_on and encoded is None and (length or 1) > 1:
                refuse_opening(self.ask(root, shown(values, tape), mixture, rows), weights_BE, names)
            return self.settle(kept._replace(weights_BE=weights_BE), caches, tape)

        # one that begins is watched, or the gates are asked before it
        seen = shown(values, tape)
        self.prefill = self.watched(root, values, seen, tape, caches)
        if self.prefill is not None:
            keep(caches, None)
            return replace(settings, disabled=True)
        weights_BE = self.ask(root, seen, mixture, rows)
        return self.settle(Decision(self.number, names, weights_BE, not bool(weights_BE.any())), caches, tape)

    def decide(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A stack has run that was watched, or was not; what it returns instead, if a gate opens now."""
        prefill, self.prefill = self.prefill, None
        mixture, root = self.mixture(), self.root()
        if prefill is None or mixture is None or root is None:
            return None
        tape, frame, caches = mixture.tape, mixture.tape.frame, [state.cache for state in prefill.caches]
        assert frame is not None
        tape.end()
        try:
            weights_BE = self.weigh(root, prefill, mixture)
            decision = Decision(self.number, tuple(mixture.names), weights_BE, not bool(weights_BE.any()))
        except BaseException:
            prefill.take_back()
            raise

        # closed: it is the answer; open: once more, from the start
        if not decision.closed:
            prefill.take_back()
        tape.begin(frame, settings=self.settle(decision, caches, tape))
        return None if decision.closed else stack.forward(*args, **kwargs)

    def settle(self, decision: Decision, caches: Iterable[Any], tape: Tape) -> Settings:
        """The running call's gates are known: what it has to do."""
        self.running = decision
        keep(caches, decision)
        # nobody is added where all are closed; but training needs a graph, and who records wants to see them closed
        idle = decision.closed and not tape.recordings and not torch.is_grad_enabled()
        return replace(tape.settings, disabled=True) if idle else replace(tape.settings, gates_BE=decision.weights_BE)

    def end(self, output: Any) -> None:
        """A call is over, or failed, and what it hands on knows its gates."""
        if self.asking or in_backward():
            return
        decision = self.running
        self.forget()
        if decision is not None and output is not None:
            parts = output if isinstance(output, tuple) else [getattr(output, name, None) for name in CONVERSATIONS]
            caches = [part for part in parts if part is not None and not isinstance(part, Tensor | tuple)]
            keep(caches or [output], decision)

    def forget(self) -> None:
        """No call is running."""
        if self.prefill is not None:
            self.prefill.close()
        self.prefill = self.running = self.thread = None
        self.asking = False
        self.open.clear()

    def is_ours(self) -> bool:
        """Whether a call that ends on this thread is the one that has begun, and none that was refused."""
        return torch.compiler.is_compiling() or in_backward() or self.thread == threading.get_ident()

    def claim(self) -> None:
        """This thread's call begins, or goes on.

        Raises:
            ValueError: if another thread's has not ended.
        """
        with self.claiming:
            if self.open.interrupted:
                self.forget()
            if self.thread is None:
                self.open.begin()
            elif self.thread != threading.get_ident():
                raise ValueError(
                    "another thread's call of this model has not ended, and two at once would share their gates; "
                    "let one wait for the other (a threading.Lock around each call), or give each thread its own copy"
                )
            self.thread = threading.get_ident()

    # --- what the gates say ---------------------------------------------------------------------------------------

    @contextmanager
    def aside(self, root: nn.Module) -> Iterator[None]:
        """The gates are at work: the model is its base model for them, and the call does not notice."""
        self.asking = True
        try:
            with torch.random.fork_rng(devices=cards()), torch.no_grad(), disabled(root):
                yield
        finally:
            self.asking = False

    def ask(self, root: nn.Module, seen: Mapping[str, Any], mixture: Mixture, rows: int | None) -> Float[Tensor, "B E"]:
        """The gates' answer to a call's arguments, checked, where its tensors are."""
        with self.aside(root):
            answer = self.gates(seen)
        name = next((name for name in INPUTS if isinstance(seen.get(name), Tensor)), None)
        return checked(answer, rows, len(mixture.names), None if name is None else seen[name].device)

    def weigh(self, root: nn.Module, prefill: Prefill, mixture: Mixture) -> Float[Tensor, "B E"]:
        """The same, from what was seen of the call."""
        ids_BL, means_BSD = prefill.prompt.ids_BL, prefill.means()
        if means_BSD is None:
            self.taps = dict.fromkeys(self.taps)
            return self.ask(root, prefill.seen, mixture, len(ids_BL))
        assert self.told is not None
        with self.aside(root):
            answer = self.told.of_means(means_BSD)
        return checked(answer, len(ids_BL), len(mixture.names), ids_BL.device)

    def watched(
        self, root: nn.Module, values: Mapping[str, Any], seen: Mapping[str, Any], tape: Tape, caches: Iterable[Any]
    ) -> Prefill | None:
        """A call that begins, if the gates can be told its hidden states, and it can be taken back."""
        gates, config = self.told, getattr(root, "config", None)
        if gates is None or torch.is_grad_enabled() or root.training or tape.recordings:
            return None
        states = [remember(cache) for cache in caches]
        known = [state for state in states if state is not None]
        if len(known) < len(states) or getattr(config, "is_encoder_decoder", False):
            return None
        prompt = prompt_of(values, seen.get("attention_mask"), gates.window)
        if prompt is None:
            return None

        # where the hidden states come from is looked up once
        layers = tuple(gates.layers)
        if layers not in self.taps:
            with self.aside(root):
                self.taps[layers] = find_taps(root, layers, prompt.beginning)
        taps = self.taps[layers]
        return None if taps is None else Prefill(taps, prompt, seen, known)

    def kept_on(self, owner: Any, names: tuple[str, ...]) -> Decision:
        """What these gates have said when the call began that `owner` comes from."""
        decision: Decision | None = getattr(owner, ATTRIBUTE, None)
        if decision is None or decision.number != self.number:
            raise ValueError(
                f"this call goes on from a {type(owner).__name__} of a call for which these gates were not asked, so "
                "nobody knows which experts it had; start a new call with the whole conversation and no cache"
            )
        if decision.names != names:
            raise ValueError(
                f"this call goes on from one with the experts {list(decision.names)}, and now there are {list(names)}; "
                "start a new call with the whole conversation and no cache"
            )
        return decision


def shown(values: Mapping[str, Any], tape: Tape) -> dict[str, Any]:
    """What the gates see of a call's arguments: no caches, which a call in between would fill, and a plain mask."""
    seen = {name: value for name, value in values.items() if name not in CONVERSATIONS}
    name = next((name for name in TOKENS if isinstance(values.get(name), Tensor)), None)
    if name is None or name.startswith("decoder_") or values.get("attention_mask") is None:
        return seen
    batch, length = values[name].shape[:2]
    mask_BL = read_frame(values, tape).mask_BL
    if mask_BL is None and length == 1:
        # a single token that comes with a mask of another form is never padding
        mask_BL = torch.ones(batch, 1, dtype=torch.long, device=values[name].device)
    if mask_BL is not None:
        # with a cache the mask covers the past as well; ours are its last columns
        seen["attention_mask"] = mask_BL[:, -length:].long()
    return seen


def checked(answer: Any, rows: int | None, experts: int, device: torch.device | None) -> Float[Tensor, "B E"]:
    """The gates' answer as fp32 weights.

    Raises:
        ValueError: if it is no tensor of such weights for as many rows and experts.
    """
    shape = tuple(answer.shape) if isinstance(answer, Tensor) else None
    fits = shape is not None and len(shape) == 2 and shape[1] == experts and rows in (None, shape[0])
    if not fits or answer.is_complex():
        came = f"a {type(answer).__name__}" if shape is None else f"{answer.dtype} {shape}"
        raise ValueError(
            f"expected the gates to return weights of shape ({rows}, {experts}), rows x experts, got {came}"
        )
    weights_BE = answer.detach().to(device=device or answer.device, dtype=torch.float32)
    wrong_BE = ~torch.isfinite(weights_BE) | (weights_BE < 0)
    if bool(wrong_BE.any()):
        row, expert = wrong_BE.nonzero()[0].tolist()
        raise ValueError(
            f"the gate of expert {expert} has the weight {float(weights_BE[row, expert])} for row {row}; expected a "
            "finite number, not negative. Whether a score that is NaN opens or closes is for the function to say, as "
            "gate_weight(scores, calibration, nan_policy=...) does"
        )
    return weights_BE


def refuse_opening(asked_BE: Tensor, kept_BE: Tensor, names: tuple[str, ...]) -> None:
    """Raise if a gate would open wider than it stood when the conversation began."""
    wider_BE = asked_BE > kept_BE.to(asked_BE.device)
    if bool(wider_BE.any()):
        opened = [names[expert] for expert in wider_BE.any(0).nonzero()[:, 0].tolist()]
        raise ValueError(
            f"this turn opens the gates of {opened} for rows {wider_BE.any(1).nonzero()[:, 0].tolist()}, but the cache "
            "was filled while they were not as wide open; start a new call with the whole conversation and no cache"
        )


def keep(owners: Iterable[Any], decision: Decision | None) -> None:
    """Leave a decision on the objects that a later call may come with; a deep copy takes it along."""
    for owner in owners:
        try:
            setattr(owner, ATTRIBUTE, decision)
        except AttributeError:  # tuples and the like: a later call that comes with one is refused
            continue
