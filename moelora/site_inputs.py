"""What the patched sites of a model read while it runs on somebody's batches. Begin with listen."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from moelora.layer import MoELoRALinear
from moelora.mixture import find_mixture


@contextmanager
def listen(model: nn.Module, hear: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `hear(site, x_TD)` with each input of each site, detached and without padding, while this context lasts."""
    _, mixture = find_mixture(model)

    def heard(layer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(layer, MoELoRALinear)
        x = args[0].detach()
        mixture.tape.leading = x.shape[:-1]
        valid_T = mixture.tape.valid_tokens(reads_encoder=layer.reads_encoder)
        x_TD = x.reshape(-1, x.shape[-1])
        hear(layer.site, x_TD if valid_T is None else x_TD[valid_T])

    handles = [layer.register_forward_pre_hook(heard) for layer in mixture.layers.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module of the model is in evaluation mode while this context lasts, and then in the mode that it was in."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
