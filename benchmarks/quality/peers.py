"""PEFT's own mixture of the same adapters. Begin with arrow.

X-LoRA of PEFT 0.21 is missing: it did not load these adapters (a KeyError inside PEFT).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import ArrowConfig, create_arrow_model

from benchmarks.quality.study import Method


def arrow(base: Any, folders: Mapping[str, Path], method: Method) -> Any:
    """A PeftModel that routes by Arrow, which trains nothing."""
    return create_arrow_model(
        base_model=base,
        task_specific_adapter_paths=[str(folder) for folder in folders.values()],
        general_adapter_paths=[],
        arrow_config=ArrowConfig(**method.router_options),
    )
