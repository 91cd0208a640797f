"""Which parts of a model are models themselves: encoders, decoders, towers. Begin with inner_stacks."""

from torch import nn
from transformers import PreTrainedModel


def inner_stacks(model: nn.Module) -> list[nn.Module]:
    """Every `PreTrainedModel` inside a model, without the model itself.

    Each is called with its own inputs and padding mask, and `generate` calls an encoder without calling the model
    around it.
    """
    return [module for module in model.modules() if isinstance(module, PreTrainedModel) and module is not model]
