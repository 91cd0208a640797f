"""What happens around a forward call of a patched model. Begin with StackHooks and RootHooks.

Hooks are bound methods of small objects, so that a deep copy of the model copies them with their tape.
"""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moelora.aux_losses import distinct, weigh
from moelora.call_settings import GivenIds, checked_ids
from moelora.config import AuxLosses, MoELoRAConfig
from moelora.latch import prompt_mask, put, turn_of
from moelora.layer import MoELoRALinear
from moelora.routers.learned import LearnedRouter
from moelora.routing import dense_weights
from moelora.tape import Frame, Tape

IDS = "expert_ids"
"""The argument of a patched model that takes ids of experts (or tasks) along with a batch."""

TOKENS = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")
# the cache's name before and since transformers 5.24
CACHES = ("past_key_values", "cache")
CONVERSATIONS = (*CACHES, "cache_params")
INPUTS = (*TOKENS, "input_features", "input_values", "pixel_values")


class StackHooks:
    """Tell the tape what its stack (the model, or an encoder or decoder inside it) was called with."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.names: tuple[str, ...] = ()

    def attach(self, stack: nn.Module) -> list[Any]:
        """Register the hooks on a stack."""
        # looked up once: torch.compile traces no signature, and FSDP changes the class
        self.names = argument_names(type(stack))
        return [
            stack.register_forward_pre_hook(self.begin, with_kwargs=True),
            # before all hooks of others, which see what the call returns in the end
            stack.register_forward_hook(self.decide, with_kwargs=True, prepend=True),
            stack.register_forward_hook(self.end, always_call=True),
        ]

    def begin(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A stack begins."""
        self.open(args, kwargs)

    def open(self, args: tuple[Any, ...], kwargs: dict[str, Any], given: GivenIds | None = None) -> None:
        """Tell the tape, and which ids came with the call."""
        values = dict(zip(self.names, args, strict=False)) | kwargs
        if given is None and self.tape.depth == 0 and self.tape.classifier is not None:
            given = self.tape.classifier.begin(values)
        settings = None if self.tape.gates is None else self.tape.gates.begin(values)
        wanted = given or self.tape.settings.given
        # only ids of tokens depend on it, and a cache of states alone, Mamba's, does not count
        start = cached_length(values) if self.tape.depth == 0 and wanted and wanted.ids.ndim > 1 else 0
        self.tape.begin(read_frame(values, self.tape), start=start, given=given, settings=settings)

    def decide(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """A stack has run; gates that watched it may open now, and have it run again: the output then."""
        gates = self.tape.gates
        return None if gates is None or self.tape.depth != 1 else gates.decide(stack, args, kwargs)

    def end(self, stack: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """A stack ends, or failed."""
        gates = self.tape.gates
        if gates is not None and not gates.is_ours():
            # refused, since another thread's call is running: that one goes on
            return
        self.tape.end()
        if self.tape.depth == 0 and self.tape.classifier is not None:
            self.tape.classifier.end(output)
        if self.tape.depth == 0 and gates is not None:
            gates.end(output)


class RootHooks(StackHooks):
    """The same for the patched model itself, which also keeps the routings of training and adds their losses.

    Args:
        tape: of the model.
        layers: its patched sites.
        config: its options.
    """

    names: tuple[str, ...]
    layers: Mapping[str, MoELoRALinear]
    config: MoELoRAConfig
    losses: AuxLosses
    some_gradient: bool
    settled: bool

    def __init__(self, tape: Tape, layers: Mapping[str, MoELoRALinear], config: MoELoRAConfig) -> None:
        super().__init__(tape)
        self.layers, self.config, self.losses = layers, config, config.losses
        self.without_gradient: set[str] | None = None
        self.some_gradient = False
        self.settled = False  # the biases have moved for the last call

    def attach(self, stack: nn.Module) -> list[Any]:
        # before `end`, which closes the call
        return [stack.register_forward_hook(self.finish, with_kwargs=True), *super().attach(stack)]

    def begin(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.tape.gates is not None:
            self.tape.gates.free()
        self.tape.restart()
        outermost, given = self.tape.depth == 0, None
        if outermost:
            self.balance()
            if IDS in kwargs:
                kwargs = dict(kwargs)
                given = GivenIds(ids=self.check_ids(kwargs.pop(IDS)))
        self.open(args, kwargs, given)
        if outermost and self.latches:
            self.open_conversation(stack, args, kwargs)
        if outermost:
            self.settled = False
        if outermost and stack.training and torch.is_grad_enabled():
            wanted = len(self.losses.active()) > 0 or len(self.balanced()) > 0 or self.tape.current.own_loss
            self.tape.collect(wanted, supervised=self.losses.gate_cross_entropy > 0)
            if not torch.compiler.is_compiling():
                self.watch_gradients(stack)
        return None if given is None else (args, kwargs)

    def finish(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """What a training call returns: its loss with those on the routings, watched for its backward pass."""
        if self.tape.turn is not None and self.tape.turn.first and self.tape.depth == 1:
            values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
            cache = next((value for value in values if hasattr(value, "get_seq_length")), None)
            if cache is not None:
                put(self.tape.turn, cache)
        if self.tape.depth != 1 or not stack.training or not torch.is_grad_enabled():
            return None
        changed = self.add_losses(stack, kwargs, output)
        if not torch.compiler.is_compiling():
            self.tape.follow(tensors_in(output if changed is None else changed))
        return changed

    def add_losses(self, stack: nn.Module, kwargs: dict[str, Any], output: Any) -> Any:
        """The output with the weighted losses added to the model's own; None where there is nothing to add."""
        if not self.tape.records or not self.losses.active() or self.tape.current.own_loss:
            return None
        loss = loss_in(output, kwargs)
        if loss is None:
            return None
        aux = weigh(self.tape.routings_with_gradient(), self.losses)
        if aux is None:
            return None
        total = loss + (aux * token_share(stack, kwargs)).to(loss.dtype)
        if isinstance(output, tuple):
            return (total, *output[1:])
        if isinstance(output, Mapping):
            output["loss"], output["aux_loss"] = total, aux.detach()  # pyright: ignore[reportIndexIssue]
        else:
            output.loss, output.aux_loss = total, aux.detach()
        return output

    @property
    def latches(self) -> bool:
        """Whether the router decides by prompts, and keeps its decisions along a conversation."""
        return getattr(self.config.router, "latches", False)

    def open_conversation(self, stack: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Tell the tape which tokens are prompt, and find what was decided before in the call's cache.

        Raises:
            ValueError: where prompts are not known: under a compiler, in encoder-decoder models, without tokens.
        """
        router, frame = self.config.router, self.tape.frame
        if torch.compiler.is_compiling():
            raise ValueError(
                f"{router} keeps decisions on the key-value cache, which a compiled model cannot; do not compile it as "
                "a full graph, and in generate pass disable_compile=True with a static cache"
            )
        values = dict(zip(self.names, args, strict=False)) | dict(kwargs)
        name = next((name for name in TOKENS if isinstance(values.get(name), Tensor)), None)
        encoder_decoder = getattr(getattr(stack, "config", None), "is_encoder_decoder", False)
        if frame is None or name is None or encoder_decoder:
            raise ValueError(
                f"{router} decides by prompts, which are for decoder models of tokens (input_ids or inputs_embeds); "
                f"this {type(stack).__name__} was called with {sorted(values)}"
            )
        cache = next((values[name] for name in CONVERSATIONS if values.get(name) is not None), None)
        labels_BL = values["labels"] if values.get("labels") is not None else self.tape.current.labels_BL
        if not predicts_next(stack):
            labels_BL = None
        self.tape.open_conversation(prompt_mask(values[name], frame.mask_BL, labels_BL), turn_of(cache))

    def check_ids(self, ids: Any) -> Tensor:
        """Ids that came with a call, as a tensor of those that the router knows.

        Raises:
            ValueError: for anything else.
        """
        router = self.config.router
        if not reads_ids(self.config):
            raise ValueError(f"expert_ids were passed, but this model's router would not look at them: it is {router}")
        tensor = torch.as_tensor(ids)
        if tensor.dtype == torch.bool:
            raise ValueError(f"expert_ids must be integers, got {tensor.dtype} {tuple(tensor.shape)}")
        count = len(getattr(router, "tasks", ())) or len(next(iter(self.layers.values())).bank)
        # a look at the values waits for the device; a compiler and a graph that is captured cannot
        look = not (torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing()))
        return checked_ids(tensor, count, name=IDS, look=look)

    # --- loss-free balancing --------------------------------------------------------------------------------------

    def balanced(self) -> dict[str, LearnedRouter]:
        """The sites whose router keeps a balancing bias."""
        routers = ((site, layer.router) for site, layer in self.layers.items())
        return {
            site: router
            for site, router in routers
            if isinstance(router, LearnedRouter) and router.config.balance_bias_speed
        }

    @torch.no_grad()
    def balance(self) -> None:
        """Move the balancing biases by what the last training call chose: when the next begins, or before a save."""
        if self.settled:
            return
        self.settled = True
        done: set[int] = set()
        # without records no site needs a look, which compiled code would repeat for each of them at every call
        for site, router in self.balanced().items() if self.tape.records else ():
            for record in distinct({site: self.tape.records.get(site, [])}):
                if id(router) not in done:
                    chosen = record.routing._replace(weights_TK=torch.ones_like(record.routing.weights_TK))
                    load_TE = dense_weights(chosen, router.num_experts)
                    if record.valid_T is not None:
                        load_TE = load_TE * record.valid_T[:, None]
                    router.balance(load_TE.sum(0))
            done.add(id(router))

    # --- tensors that get no gradient -----------------------------------------------------------------------------

    def watch_gradients(self, model: nn.Module) -> None:
        """After the first training step, name every trainable tensor that got no gradient."""
        if self.without_gradient is None:
            self.without_gradient = set()
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and parameter.is_leaf:
                    self.without_gradient.add(name)
                    parameter.register_post_accumulate_grad_hook(_GradientSeen(self, name))
        elif self.some_gradient and self.without_gradient:
            names, self.without_gradient = sorted(self.without_gradient), set()
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            warnings.warn(
                f"{len(names)} trainable tensors got no gradient in the first training step: {shown}. "
                "They will not be trained: freeze them (moelora.set_trainable), or look for what cuts them off.",
                stacklevel=2,
            )

    def watch_anew(self) -> None:
        """Other tensors are trained from now on: the next training step is a first one."""
        self.without_gradient, self.some_gradient = None, False

    def __getstate__(self) -> dict[str, Any]:
        # a copy of the model has parameters of its own to watch
        return {**self.__dict__, "without_gradient": None, "some_gradient": False}


class _GradientSeen:
    """Strikes a parameter off the list when its first gradient arrives."""

    def __init__(self, hooks: RootHooks, name: str) -> None:
        self.hooks, self.name = hooks, name

    def __call__(self, parameter: Tensor) -> None:
        self.hooks.some_gradient = True
        if self.hooks.without_gradient:
            self.hooks.without_gradient.discard(self.name)


def reads_ids(config: MoELoRAConfig) -> bool:
    """Whether a mixture has a use for ids that are given from outside: its router, or a loss on it."""
    return getattr(config.router, "reads_ids", False) or config.losses.gate_cross_entropy > 0


def argument_names(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of the positional arguments of a module's forward."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def predicts_next(model: nn.Module) -> bool:
    """Whether a transformers model is a decoder whose labels are its inputs, each predicted by the token before it."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    # some causal classes are older than the naming that transformers reads the loss from
    old = type(model).__name__.endswith("LMHeadModel")
    return old or getattr(model, "loss_type", None) in ("ForCausalLM", "ForConditionalGeneration")


def read_frame(values: Mapping[str, Any], tape: Tape) -> Frame:
    """Batch, length and padding mask of a stack, from what it was called with.

    The mask is two-dimensional only at the top of a model and, with a static cache, not even there. A stack that was
    handed a mask of another form takes over that of the stack around it, if the input is the same, or reads its
    diagonal.
    """
    batch = length = None
    name = next((name for name in INPUTS if isinstance(values.get(name), Tensor)), None)
    if name is not None:
        batch = values[name].shape[0]
        length = values[name].shape[1] if name in TOKENS else None
    # an encoder-decoder model's own mask is its encoder's, which gets it handed on
    mask = values.get("decoder_attention_mask" if str(name).startswith("decoder_") else "attention_mask")
    if isinstance(mask, Mapping):
        # one for each kind of attention, which agree on the padding
        mask = next(iter(mask.values()), None)
    outer = tape.frame
    if isinstance(mask, Tensor) and mask.ndim != 2:
        if outer is not None and (outer.batch, outer.length) == (batch, length):
            mask = outer.mask_BL
        else:
            mask = own_keys(mask, length, values)
    encoder_mask = values.get("encoder_attention_mask")
    return Frame(batch, length, two_dimensional(mask, batch, length), two_dimensional(encoder_mask, None, None))


def own_keys(mask: Tensor, length: int | None, values: Mapping[str, Any]) -> Tensor | None:
    """From an attention mask (B, 1, L, keys), boolean or additive, which tokens see themselves: padding does not.

    A single token, as in decoding, is never padding. None for a mask of another form.
    """
    if mask.ndim != 4 or length is None or length == 1 or mask.shape[2] != length:
        return None
    start = cached_length(values)
    if mask.shape[3] < start + length:
        return None
    seen_BLL = mask[:, 0, :, start : start + length]
    own_BL = seen_BLL.diagonal(dim1=1, dim2=2)
    return own_BL if mask.dtype == torch.bool else own_BL == 0


def two_dimensional(mask: Any, batch: int | None, length: int | None) -> Tensor | None:
    """A mask that is a (B, at least L) tensor; None for anything else."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    fits = (batch is None or mask.shape[0] == batch) and (length is None or mask.shape[1] >= length)
    return mask if fits else None


def cached_length(values: Mapping[str, Any]) -> int:
    """How many tokens the key-value cache of a call already holds."""
    for name in CACHES:
        cache = values.get(name)
        if cache is not None and hasattr(cache, "get_seq_length"):
            return int(cache.get_seq_length())
    return 0


def loss_in(output: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The loss in a model's output: under "loss", or first in a tuple if labels were given."""
    if isinstance(output, tuple):
        loss = output[0] if output and kwargs.get("labels") is not None else None
    else:
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) and loss.ndim == 0 else None


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors that a model returned at the top level."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return [value for value in values if isinstance(value, Tensor)]


def token_share(model: nn.Module, kwargs: Mapping[str, Any]) -> Tensor | float:
    """The part that this call's tokens are of the optimiser step's, as Trainer counts them; 1 without such a count.

    Trainer divides the sum of the token losses by the tokens of all accumulated calls on all devices. The losses on
    routings are means over a call, and weighted by this share they add up to one mean over the step.
    """
    items, labels = kwargs.get("num_items_in_batch"), kwargs.get("shift_labels", kwargs.get("labels"))
    if items is None or not isinstance(labels, Tensor):
        return 1.0
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    shifted = getattr(model, "loss_type", None) == "ForCausalLM" and not encoder_decoder
    if shifted and kwargs.get("shift_labels") is None:
        labels = labels[..., 1:]
    return labels.ne(-100).sum() / items
