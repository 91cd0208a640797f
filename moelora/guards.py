"""What a patched model needs around it: hooks, checkpointing's gradients, and a guard on saving. Begin with guard.

Everything is put on the instance, as bound methods of small objects (a deep copy of the model takes them along), and
comes with its undo.
"""

from collections.abc import Callable, Iterator, Set
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moelora.folder import trained_names, write_checkpoint
from moelora.hooks import StackHooks
from moelora.integrations.stacks import inner_stacks
from moelora.mixture import Mixture, find_mixture

DDP_IGNORED = "_ddp_params_and_buffers_to_ignore"
KEYS_NOT_SAVED = "_keys_to_ignore_on_save"
TIED_KEYS = "get_expanded_tied_weights_keys"


def guard(model: nn.Module, mixture: Mixture) -> list[Callable[[], None]]:
    """Put hooks and guards on a model that has just been patched; returns the undos."""
    handles = mixture.hooks.attach(model)
    for stack in inner_stacks(model):
        handles += StackHooks(mixture.tape).attach(stack)
    undo: list[Callable[[], None]] = [handle.remove for handle in handles]

    embeddings = _input_embeddings(model)
    if embeddings is not None:
        undo.append(embeddings.register_forward_hook(_InputGradients(model).require).remove)
    if hasattr(model, "save_pretrained"):
        saving = _SaveGuard(model)
        undo.append(_override(model, "save_pretrained", saving.save_pretrained))
        undo.append(_override(model, "push_to_hub", saving.push_to_hub))
    if hasattr(model, KEYS_NOT_SAVED):
        undo.append(_override(model, KEYS_NOT_SAVED, _KeysNotSaved(model)))
    if hasattr(model, TIED_KEYS):
        undo.append(_override(model, TIED_KEYS, _TiedOutside(model).keys))
    undo.append(_override(model, DDP_IGNORED, [*getattr(model, DDP_IGNORED, []), *frozen_buffers(mixture)]))
    return undo


def frozen_buffers(mixture: Mixture) -> list[str]:
    """Names of the buffers that never change, which DDP need not send around before every forward."""
    return [f"{site}.bank.{name}" for site, layer in mixture.layers.items() for name, _ in layer.bank.named_buffers()]


class _TiedOutside:
    """The tied weights of a model, without those inside patched projections.

    A base's tied weights are one tensor already. Models that tie whole blocks (zamba2) would, when `tie_weights` runs
    again, give one site's router and experts to another.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def keys(self, *args: Any, **kwargs: Any) -> dict[str, str]:
        root, mixture = find_mixture(self.model)
        tied = getattr(type(root), TIED_KEYS)(root, *args, **kwargs)
        inside = tuple(f"{site}." for site in mixture.layers)
        return {target: source for target, source in tied.items() if not target.startswith(inside)}


class _KeysNotSaved(Set[str]):
    """The keys that a checkpoint of Trainer does not hold because nothing trains them.

    When it resumes, Trainer lists missing keys in a warning unless they are exactly these.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def _keys(self) -> set[str]:
        root, mixture = find_mixture(self.model)
        return set(root.state_dict()) - trained_names(root, mixture)

    def __contains__(self, key: object) -> bool:
        return key in self._keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys())

    def __len__(self) -> int:
        return len(self._keys())


class _InputGradients:
    """Let the embeddings' output require a gradient under activation checkpointing.

    The base is frozen, so nothing in front of the first site asks for one; reentrant checkpointing then takes a block
    without such an input for one that needs no backward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def require(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        wanted = self.model.training and torch.is_grad_enabled() and is_checkpointing(self.model)
        if wanted and isinstance(output, Tensor) and output.is_leaf:
            output.requires_grad_()


class _SaveGuard:
    """`save_pretrained` of a patched model.

    The plain call would write the base under the wrappers' names, and `from_pretrained` would start what it does not
    find at random. Trainer's call, which hands over a state dict, writes a mixture folder that it can resume from.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        # Trainer names it even where it is None
        if "state_dict" not in kwargs:
            raise ValueError(
                "this model is patched: save_pretrained would write the base under names that from_pretrained does not "
                f"find. Call moelora.save(model, {str(save_directory)!r}) for the mixture, or "
                "moelora.unpatch_model(model) first for the base"
            )
        if kwargs.get("is_main_process", True):
            root, mixture = find_mixture(self.model)
            write_checkpoint(root, mixture, save_directory, state_dict=kwargs["state_dict"])

    def push_to_hub(self, repo_id: str, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            f"this model is patched: call moelora.push_to_hub(model, {str(repo_id)!r}) for the mixture, or "
            "moelora.unpatch_model(model) first for the base"
        )


def is_checkpointing(model: nn.Module) -> bool:
    """Whether a Hugging Face model runs with activation checkpointing. The name changed within transformers 5."""
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):
        if hasattr(type(model), name):
            return bool(getattr(model, name))
    return False


def _input_embeddings(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_input_embeddings", None)
    if getter is None:
        return None
    try:
        return getter()
    except NotImplementedError:  # transformers' answer for models without embeddings, such as audio encoders
        return None


def _override(model: nn.Module, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute on the instance; the undo puts back what the instance had, if anything."""
    known = name in vars(model)
    before = vars(model).get(name)
    object.__setattr__(model, name, value)
    # partials, no closures: a copy of the model copies its undo along
    return partial(object.__setattr__, model, name, before) if known else partial(object.__delattr__, model, name)
