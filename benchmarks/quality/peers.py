"""PEFT's own mixtures of the same adapters. Begin with mixture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import ArrowConfig, XLoraConfig, create_arrow_model, get_peft_model

from benchmarks.quality.study import Method


def mixture(base: Any, folders: Mapping[str, Path], method: Method) -> Any:
    """A PeftModel that mixes adapters: Arrow, which trains nothing, or X-LoRA, which trains its classifier."""
    places = [str(folder) for folder in folders.values()]
    if method.router == "arrow":
        return create_arrow_model(
            base_model=base,
            task_specific_adapter_paths=places,
            general_adapter_paths=[],
            arrow_config=ArrowConfig(**method.router_options),
        )
    # it reads the base's last hidden state in a pass of its own, and keeps no cache
    base.config.use_cache = False
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=base.config.hidden_size,
        layerwise_scalings=True,
        # PEFT 0.21 finds its adapters only by these names
        adapters={str(number): place for number, place in enumerate(places)},
    )
    return get_peft_model(base, config)
