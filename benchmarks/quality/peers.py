"""PEFT's own mixtures of the same adapters. Begin with mixture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import ArrowConfig, XLoraConfig, create_arrow_model, get_peft_model

from benchmarks.quality.study import Method


def mixture(base: Any, folders: Mapping[str, Path], method: Method) -> Any:
    """A PeftModel that mixes adapters: Arrow (trains nothing) or X-LoRA (trains its classifier)."""
    if method.router == "arrow":
        return create_arrow_model(
            base_model=base,
            task_specific_adapter_paths=[str(folder) for folder in folders.values()],
            general_adapter_paths=[],
            arrow_config=ArrowConfig(**method.router_options),
        )
    # X-LoRA reads the base's last hidden state in a pass of its own, and cannot keep a cache
    base.config.use_cache = False
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=base.config.hidden_size,
        xlora_depth=1,
        layerwise_scalings=True,
        adapters={name: str(folder) for name, folder in folders.items()},
    )
    return get_peft_model(base, config)
