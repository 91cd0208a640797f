"""moelora: mixtures of LoRA experts for PyTorch and Hugging Face transformers.

Begin with `patch_model`. The public names below are loaded when they are first used, so that
`import moelora` itself needs nothing but torch.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from moelora.config import AuxLosses as AuxLosses
    from moelora.config import MoELoRAConfig as MoELoRAConfig
    from moelora.config import register_router as register_router
    from moelora.integrations.adapter_report import inspect_adapter as inspect_adapter
    from moelora.integrations.adapters import AdapterError as AdapterError
    from moelora.lifecycle import add_expert as add_expert
    from moelora.lifecycle import remove_expert as remove_expert
    from moelora.lifecycle import set_trainable as set_trainable
    from moelora.mixture import aux_loss as aux_loss
    from moelora.mixture import disabled as disabled
    from moelora.mixture import expert_names as expert_names
    from moelora.mixture import given_experts as given_experts
    from moelora.mixture import is_patched as is_patched
    from moelora.mixture import print_trainable_parameters as print_trainable_parameters
    from moelora.mixture import record as record
    from moelora.mixture import use_experts as use_experts
    from moelora.patch import patch_model as patch_model
    from moelora.patch import resolve_targets as resolve_targets
    from moelora.patch import unpatch_model as unpatch_model
    from moelora.routers.given import Given as Given
    from moelora.routers.learned import Learned as Learned
    from moelora.routing import Routing as Routing
    from moelora.saving import export_adapter as export_adapter
    from moelora.saving import load as load
    from moelora.saving import push_to_hub as push_to_hub
    from moelora.saving import save as save

_HOMES = {
    "AdapterError": "moelora.integrations.adapters",
    "AuxLosses": "moelora.config",
    "Given": "moelora.routers.given",
    "Learned": "moelora.routers.learned",
    "MoELoRAConfig": "moelora.config",
    "Routing": "moelora.routing",
    "add_expert": "moelora.lifecycle",
    "aux_loss": "moelora.mixture",
    "disabled": "moelora.mixture",
    "expert_names": "moelora.mixture",
    "export_adapter": "moelora.saving",
    "given_experts": "moelora.mixture",
    "inspect_adapter": "moelora.integrations.adapter_report",
    "is_patched": "moelora.mixture",
    "load": "moelora.saving",
    "patch_model": "moelora.patch",
    "print_trainable_parameters": "moelora.mixture",
    "push_to_hub": "moelora.saving",
    "record": "moelora.mixture",
    "register_router": "moelora.config",
    "remove_expert": "moelora.lifecycle",
    "resolve_targets": "moelora.patch",
    "save": "moelora.saving",
    "set_trainable": "moelora.lifecycle",
    "unpatch_model": "moelora.patch",
    "use_experts": "moelora.mixture",
}

__all__ = [*sorted(_HOMES), "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'moelora' has no attribute {name!r}")
    value = getattr(_import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
