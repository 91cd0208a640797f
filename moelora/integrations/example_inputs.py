"""Small valid inputs for a `transformers` model, made from its config alone: text, images, audio, or several of them.

Begin with `example_inputs`. It is what the probe feeds to a model when the user gives nothing.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

AUDIO_SAMPLES = 6400  # 0.4 s at 16 kHz: more frames than the widest time mask of the speech encoders (10)


def example_inputs(
    model: nn.Module, *, batch: int, length: int, generator: torch.Generator, decoder_length: int | None = None
) -> dict[str, Tensor]:
    """Keyword arguments for one forward: `batch` rows of `length` tokens, and `decoder_length` for the decoder.

    Raises ValueError for a module that has no `transformers` config, and for a main input we know no recipe for.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config") or not hasattr(model, "main_input_name"):
        raise ValueError(
            f"{type(model).__name__} is not a transformers model, so no inputs can be made for it; "
            "pass probe_inputs= (a dict of keyword arguments or a tuple of arguments of its forward)"
        )
    accepted = inspect.signature(model.forward).parameters
    name = str(model.main_input_name)
    made: dict[str, Tensor] = {}

    # the main input
    if name == "input_ids":
        made[name] = _tokens(config, batch, length, generator)
    elif name == "pixel_values":
        made[name] = _images(config, batch, generator)
    elif name == "input_features":
        made[name] = _features(config, batch, generator)
    elif name == "input_values":
        made[name] = torch.randn(batch, AUDIO_SAMPLES, generator=generator)
    else:
        raise ValueError(
            f"{type(model).__name__} takes {name!r}, for which no inputs can be made; "
            "pass probe_inputs= (a dict of keyword arguments of its forward)"
        )

    # towers beside the main one
    if "pixel_values" in accepted and name != "pixel_values" and _has_two_towers(config):
        made["pixel_values"] = _images(config, batch, generator)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        made["decoder_input_ids"] = _tokens(config, batch, decoder_length or length, generator)

    first = next(iter(model.parameters()), None)
    if first is None:
        return made
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return {key: x.to(first.device, dtype) if x.is_floating_point() else x.to(first.device) for key, x in made.items()}


def _has_two_towers(config: Any) -> bool:
    """CLIP and its kin always need both inputs; a chat model with a vision tower is probed by its text."""
    both = hasattr(config, "vision_config") and hasattr(config, "text_config")
    return both and (hasattr(config, "projection_dim") or "siglip" in str(config.model_type))


def _tokens(config: Any, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Random ids above the special ones, closed by the end token, which some heads pool at."""
    text = config.get_text_config()
    vocabulary = int(text.vocab_size)
    lowest = min(8, vocabulary - 1)
    ids = torch.randint(lowest, vocabulary, (batch, length), generator=generator)
    end = getattr(text, "eos_token_id", None)
    end = end[0] if isinstance(end, (list, tuple)) else end
    if end is not None and 0 <= end < vocabulary:
        ids[:, -1] = end
    return ids


def _images(config: Any, batch: int, generator: torch.Generator) -> Tensor:
    # a config of two parts keeps the image size in the part that sees
    parts = (config, getattr(config, "vision_config", None), getattr(config, "encoder", None))
    vision = next((part for part in parts if hasattr(part, "image_size")), config)
    size = getattr(vision, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
    return torch.randn(batch, getattr(vision, "num_channels", 3), height, width, generator=generator)


def _features(config: Any, batch: int, generator: torch.Generator) -> Tensor:
    """Log-mel features; learned frame positions fix their number at twice as many, since the stem halves them."""
    frames = 2 * int(getattr(config, "max_source_positions", 50))
    bins = next(
        (int(getattr(config, key)) for key in ("num_mel_bins", "input_feat_per_channel") if hasattr(config, key)), 80
    )
    return torch.randn(batch, bins, frames, generator=generator)
