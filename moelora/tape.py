"""The state that all sites of one patched model share during one call. Begin with Tape.

A patched model owns one tape. Hooks on the model (see `mixture.py`) call `begin` and `end`; layers ask `current` what
they have to do and leave their routings in `write`. Three rules, each with a reason:

- *Settings are copied when a call begins.* Activation checkpointing runs a layer a second time during backward, when a
  context such as `disabled` may long be over; the second run must see what the first saw.
- *A backward pass knows its call*: hooks on what a call returned notice when backward enters it. The tape is a plain
  object and neither thread-local nor a context variable, because recomputation runs on autograd's own threads.
- *A second run is never recorded*: the routings of a call are written while it runs, and only then.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moelora.call_settings import GivenIds, Settings
from moelora.latch import Turn
from moelora.open_calls import OpenCalls
from moelora.routing import Routing

CALLS_BEFORE_BACKWARD = 16
"""How many calls keep what reentrant checkpointing has to hand to their second pass."""


def in_backward() -> bool:
    """True while autograd runs a backward pass on this thread."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


class Frame(NamedTuple):
    """What one stack (the model, or an encoder or decoder inside it) knows of its own input."""

    batch: int | None = None
    length: int | None = None
    mask_BL: Tensor | None = None
    encoder_mask_BL: Tensor | None = None


class Record(NamedTuple):
    """One routing of one site in one call, and which of its tokens are real (None: all).

    `repeated` marks the answer of a shared router that another site has written already: losses count it once.
    `target_T` are the ids that were given for the tokens, where a loss compares them with the router's choice.
    """

    routing: Routing
    valid_T: Tensor | None
    repeated: bool = False
    target_T: Tensor | None = None


@dataclass(eq=False, frozen=True, kw_only=True)
class Call:
    """One call of the model: its number, its settings, how many tokens the cache held when it began, its prompts."""

    number: int
    settings: Settings
    start: int
    prompt_BL: Tensor | None = None


@dataclass
class Tape:
    """See the head of this file."""

    settings: Settings = field(default_factory=Settings)
    generator: torch.Generator | None = None  # of noisy routers; None is torch's own, which checkpointing restores
    recordings: "list[dict[str, list[Record]]]" = field(default_factory=list)
    classifier: Any = None  # names the experts of a call when it begins, see `moelora/classifying.py`
    gates: Any = None  # opens and closes the experts of a call before it begins, see `moelora/gating.py`

    leading: tuple[int, ...] = ()  # shape, without its last axis, of the input that a site is at work on

    _call: Settings = field(default_factory=Settings)
    _start: int = 0  # tokens that the cache held when the call began
    _prompt_BL: Tensor | None = None  # which tokens of the call are prompt, where somebody decides by prompts
    _turn: Turn | None = None  # the call as a part of its conversation, likewise
    _number: int = 0  # of the call; compiled code does not count, or it would be compiled for each number
    _frames: list[Frame] = field(default_factory=list)
    _open: OpenCalls = field(default_factory=OpenCalls)  # of these frames, those that compiled code did not begin
    _backward: list[Call] = field(default_factory=list)  # calls that the running backward pass goes through
    _task: int = -1  # autograd's number of that pass
    _collecting: bool = False
    _supervised: bool = False
    _shared: "dict[int, tuple[weakref.ref[Tensor], Routing]]" = field(default_factory=dict)
    _handed: "dict[str, tuple[weakref.ref[Tensor], tuple[Tensor, Routing, bool]]]" = field(default_factory=dict)
    records: dict[str, list[Record]] = field(default_factory=dict)
    leaves: dict[str, list[tuple[int, Routing]]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a model starts a life of its own: settings and open calls stay behind."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(Tape().__dict__)

    # --- the call -------------------------------------------------------------------------------------------------

    def begin(
        self, frame: Frame, *, start: int = 0, given: GivenIds | None = None, settings: Settings | None = None
    ) -> None:
        """A stack begins. The outermost one opens a new call, unless it is run again during backward.

        Args:
            frame: what the stack was called with.
            start: tokens that the cache holds already.
            given: ids that came with the call itself, in place of those in `settings`.
            settings: what the call has to do, where that is for gates to say, in place of the tape's settings.
        """
        if self.depth == 0 and not in_backward():
            self._call = self.settings if settings is None else settings
            if given is not None:
                self._call = replace(self._call, given=given)
            self._start = start
            self._prompt_BL = self._turn = None
            if not torch.compiler.is_compiling():
                self._number += 1
            self._collecting = self._supervised = False
            self._backward.clear()
            self._shared.clear()
            self._handed.clear()
            self.records.clear()
        if not torch.compiler.is_compiling():
            self._open.begin()
        self._frames.append(frame)

    def end(self) -> None:
        """A stack ends. The outermost one closes the call, whose records stay until the next."""
        if not self._frames:
            # a call that was refused before it began
            return
        self._frames.pop()
        if not torch.compiler.is_compiling():
            self._open.end()
        if not self._frames:
            self._turn = None
            self._shared.clear()
            self._handed.clear()

    def restart(self) -> None:
        """The model itself begins, which never runs inside itself: what nobody knows to be running has ended."""
        if self._frames and (torch.compiler.is_compiling() or not self._open.known):
            self.forget()

    def forget(self) -> None:
        """Close a call that nothing else has closed, however deep it was, and keep nothing of it."""
        self._frames.clear()
        self._turn = self._prompt_BL = None
        self._shared.clear()
        self._handed.clear()
        self.records.clear()
        # last: until then a second interruption leaves it to be closed again
        self._open.clear()

    def open_conversation(self, prompt_BL: Bool[Tensor, "B L"], turn: Turn) -> None:
        """Tell those who decide by prompts which tokens of the running call are prompt, and what came before it."""
        self._prompt_BL, self._turn = prompt_BL, turn

    def collect(self, wanted: bool, *, supervised: bool = False) -> None:
        """Keep the routings of the running call for its losses, or do not; `supervised`: with the given ids."""
        self._collecting, self._supervised = wanted, supervised

    @property
    def frame(self) -> Frame | None:
        """The innermost running stack's frame."""
        return self._frames[-1] if self._frames else None

    @property
    def batch(self) -> int | None:
        """How many rows the innermost running stack works on."""
        return self._frames[-1].batch if self._frames else None

    @property
    def depth(self) -> int:
        """How many stacks are running, one inside the other; those that were interrupted are not."""
        if not torch.compiler.is_compiling() and self._open.interrupted:
            self.forget()
        return len(self._frames)

    @property
    def current(self) -> Settings:
        """What a layer that runs now has to do: the call's settings within it and in its backward pass."""
        if self.depth:
            return self._call
        return self.second_pass().settings if in_backward() else self.settings

    @property
    def collecting(self) -> bool:
        """True while routings of the running call are kept for losses or recordings."""
        wanted = self._collecting or len(self.recordings) > 0
        return wanted and len(self._frames) > 0 and not in_backward()

    def follow(self, outputs: Iterable[Tensor]) -> None:
        """Notice when backward enters the running call, by what the call returned."""
        enter = partial(self._enter_backward, self._latest())
        for output in outputs:
            if output.requires_grad:
                output.register_hook(enter)

    def _latest(self) -> Call:
        return Call(number=self._number, settings=self._call, start=self._start, prompt_BL=self._prompt_BL)

    def _enter_backward(self, call: Call, gradient: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task = task
            self._backward.clear()
        if call not in self._backward:
            self._backward.append(call)

    def second_pass(self) -> Call:
        """The call that a layer is run again for, during backward.

        Raises:
            ValueError: if the pass goes through several calls whose settings differ.
        """
        calls = self._backward or [self._latest()]
        if any(call.settings is not calls[0].settings for call in calls):
            raise ValueError(
                "one backward pass goes through calls with different fixed mixtures or given ids, and activation "
                "checkpointing runs their layers again without saying for which call; call backward() for each of "
                "them, or switch activation checkpointing off"
            )
        return calls[0]

    # --- routings -------------------------------------------------------------------------------------------------

    def shared(self, key: int, x: Tensor) -> Routing | None:
        """The routing that a router which serves several sites has already given for this very tensor."""
        known = self._shared.get(key)
        return known[1] if known is not None and known[0]() is x else None

    def share(self, key: int, x: Tensor, routing: Routing) -> None:
        """Keep a routing for the other sites of the same router.

        In a second pass too, which has to save the very tensors that the first saved. The input is held weakly: it may
        be gone before the next call.
        """
        self._shared[key] = (weakref.ref(x), routing)

    def hand_on(self, site: str, x: Tensor, made: tuple[Tensor, Routing, bool]) -> None:
        """Keep what a layer has computed for another one of the same input: output, routing, whether it is repeated."""
        self._handed[site] = (weakref.ref(x), made)

    def take(self, site: str, x: Tensor) -> tuple[Tensor, Routing, bool] | None:
        """What another layer has computed for this one from this very tensor. It is taken once."""
        handed = self._handed.pop(site, None)
        return handed[1] if handed is not None and handed[0]() is x else None

    def write(self, site: str, routing: Routing, *, reads_encoder: bool = False, repeated: bool = False) -> None:
        """Keep a site's routing for losses and recordings."""
        target_T = self._target_ids(routing.experts_TK.device) if self._supervised else None
        record = Record(routing, self.valid_tokens(reads_encoder=reads_encoder), repeated, target_T)
        if self._collecting:
            self.records.setdefault(site, []).append(record)
        for recording in self.recordings:
            recording.setdefault(site, []).append(Record(routing.detach(), record.valid_T))

    def routings_with_gradient(self) -> dict[str, list[Record]]:
        """The call's records, in a form that a loss can be computed from and differentiated.

        Reentrant checkpointing runs the first pass without a graph. Its routings are replaced by leaves here; what the
        loss sends into a leaf reaches the router when `attach` meets the same routing in the second pass.
        """
        for site, records in self.records.items() if torch.is_grad_enabled() else ():
            for index, (routing, valid_T, repeated, target_T) in enumerate(records):
                if routing.logits_TE is not None and not routing.logits_TE.requires_grad and not repeated:
                    leaf = routing._replace(
                        logits_TE=routing.logits_TE.detach().requires_grad_(),
                        weights_TK=routing.weights_TK.detach().requires_grad_(),
                    )
                    self.leaves.setdefault(site, []).append((self._number, leaf))
                    records[index] = Record(leaf, valid_T, repeated, target_T)
        self._forget_leaves()
        return self.records

    def _forget_leaves(self) -> None:
        """Let go of leaves that were never asked for, so that calls without a backward pass do not pile up."""
        for waiting in self.leaves.values():
            while waiting and waiting[0][0] <= self._number - CALLS_BEFORE_BACKWARD:
                _known(waiting.pop(0)[1].logits_TE).register_hook(_too_late)

    def attach(self, site: str, output: Tensor, routing: Routing) -> Tensor:
        """The site's output, which in a second pass also carries the gradients that wait for its routing."""
        waiting = self.leaves.get(site)
        if not waiting or routing.logits_TE is None or not routing.logits_TE.requires_grad or not in_backward():
            return output
        # several calls may wait, and a module that a model uses several times has several routings in each: the same
        # input gives the same scores
        alone = len(waiting) == 1 and waiting[0][0] == self._number
        for index, (_, leaf) in enumerate(waiting):
            if alone or _same(_known(leaf.logits_TE), routing.logits_TE):
                del waiting[index]
                return _Attach.apply(
                    output, routing.logits_TE, routing.weights_TK, _known(leaf.logits_TE).grad, leaf.weights_TK.grad
                )
        return output

    def valid_tokens(self, *, reads_encoder: bool = False) -> Bool[Tensor, " T"] | None:
        """Which tokens of the input at work are no padding; None where all count."""
        frame, leading = self._frames[-1], self.leading
        mask_BL = frame.encoder_mask_BL if reads_encoder else frame.mask_BL
        if mask_BL is None:
            return None
        batch, length = frame.batch, mask_BL.shape[1] if reads_encoder else frame.length
        if length is None or leading not in {(batch, length), (mask_BL.shape[0] * length,)}:
            return None
        # with a cache the mask covers the past as well; ours are its last columns
        return mask_BL[:, -length:].reshape(-1).bool()

    def _target_ids(self, device: torch.device) -> Int[Tensor, " T"]:
        """What a supervised router should have chosen: the first of the given ids of each token."""
        if not self.has_ids:
            raise ValueError(
                "the loss gate_cross_entropy compares each router's scores with ids that say who should act, and none "
                "came with this training call; call the model as model(**batch, expert_ids=ids), or inside "
                "`with moelora.given_experts(model, ids):`"
            )
        return self.given_ids(device)[:, 0]

    @property
    def turn(self) -> Turn | None:
        """The running call as a part of its conversation; None in a second pass, which decides again what it did."""
        return self._turn if self._frames and not in_backward() else None

    def prompt_of(self, leading: tuple[int, ...]) -> Bool[Tensor, "B L"]:
        """Which tokens of an input of shape `leading` + (D,) are prompt.

        Raises:
            ValueError: if nobody knows, or the input is not that of all rows and tokens of the call.
        """
        prompt_BL = self._prompt_BL if self._frames else self.second_pass().prompt_BL
        if prompt_BL is None:
            raise ValueError(
                "this mixture decides by prompts, which only a call of the patched model itself tells; "
                "call model(...), not a part of it"
            )
        batch, length = prompt_BL.shape
        if leading not in {(batch, length), (batch * length,)}:
            raise ValueError(
                f"this mixture decides by prompts of {batch} rows of {length} tokens, but the input of a site has the "
                f"shape {tuple(leading)}; leave such sites out of targets, or take granularity='token'"
            )
        return prompt_BL

    @property
    def has_ids(self) -> bool:
        """Whether ids were given for the call."""
        return self.current.given is not None

    def given_ids(self, device: torch.device) -> Int[Tensor, "T K"]:
        """The ids that were handed in, for the tokens of the input at work."""
        given = self.current.given
        if given is None:
            raise ValueError(
                "this mixture is routed by ids that are given from outside, and none were given; "
                "call the model inside `with moelora.given_experts(model, ids):`, or as model(**batch, expert_ids=ids)"
            )
        start = self._start if self._frames else self.second_pass().start
        return given.of_tokens(self.leading, start).to(device)


class _Attach(torch.autograd.Function):
    """The identity on `output`, whose backward pass also sends given gradients to a routing's logits and weights."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, logits_TE: Tensor, weights_TK: Tensor, *gradients: Tensor | None) -> Tensor:
        ctx.gradients = gradients
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return (grad_outputs[0], *ctx.gradients, None, None)


def _same(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left, right)


def _too_late(gradient: Tensor) -> None:
    raise ValueError(
        f"more than {CALLS_BEFORE_BACKWARD} calls of the model came between a call and its backward pass; with "
        "reentrant activation checkpointing the losses on its routings are lost by then: call backward() earlier, "
        "or use non-reentrant checkpointing"
    )


def _known(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
