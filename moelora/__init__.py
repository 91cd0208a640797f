"""moelora: mixtures of LoRA experts for PyTorch and Hugging Face transformers.

Begin with `patch_model`. The public names below are loaded when they are first used, so that
`import moelora` itself needs nothing but torch.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from moelora import continual as continual
    from moelora.anchor import Anchor as Anchor
    from moelora.classifying import by_estimator as by_estimator
    from moelora.classifying import by_module as by_module
    from moelora.classifying import set_classifier as set_classifier
    from moelora.config import AuxLosses as AuxLosses
    from moelora.config import MoELoRAConfig as MoELoRAConfig
    from moelora.config import register_router as register_router
    from moelora.gating import set_gates as set_gates
    from moelora.integrations.adapter_report import inspect_adapter as inspect_adapter
    from moelora.integrations.adapters import AdapterError as AdapterError
    from moelora.integrations.rloo_trainer import RLOOTrainer as RLOOTrainer
    from moelora.lifecycle import add_expert as add_expert
    from moelora.lifecycle import remove_expert as remove_expert
    from moelora.lifecycle import set_trainable as set_trainable
    from moelora.merging import merge as merge
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
    from moelora.phatgoose import train_phatgoose as train_phatgoose
    from moelora.rloo import RLOOLoss as RLOOLoss
    from moelora.rloo import rloo_backward as rloo_backward
    from moelora.rloo import rloo_loss as rloo_loss
    from moelora.router_start import warm_start as warm_start
    from moelora.routers.arrow import Arrow as Arrow
    from moelora.routers.classifier import Classifier as Classifier
    from moelora.routers.gated import Gated as Gated
    from moelora.routers.given import Given as Given
    from moelora.routers.hard_soft import HardSoft as HardSoft
    from moelora.routers.learned import Learned as Learned
    from moelora.routers.phatgoose import Phatgoose as Phatgoose
    from moelora.routers.rloo import RLOO as RLOO
    from moelora.routers.sparsegen import Sparsegen as Sparsegen
    from moelora.routers.task_embedding import TaskEmbedding as TaskEmbedding
    from moelora.routing import Routing as Routing
    from moelora.saving import export_adapter as export_adapter
    from moelora.saving import load as load
    from moelora.saving import push_to_hub as push_to_hub
    from moelora.saving import save as save
    from moelora.scenarios import CrossScenario as CrossScenario
    from moelora.scenarios import cross_scenario as cross_scenario
    from moelora.selection import select_experts as select_experts
    from moelora.stages import HardSoftSchedule as HardSoftSchedule
    from moelora.stages import set_stage as set_stage

_HOMES = {
    "AdapterError": "moelora.integrations.adapters",
    "Anchor": "moelora.anchor",
    "Arrow": "moelora.routers.arrow",
    "AuxLosses": "moelora.config",
    "Classifier": "moelora.routers.classifier",
    "CrossScenario": "moelora.scenarios",
    "Gated": "moelora.routers.gated",
    "Given": "moelora.routers.given",
    "HardSoft": "moelora.routers.hard_soft",
    "HardSoftSchedule": "moelora.stages",
    "Learned": "moelora.routers.learned",
    "MoELoRAConfig": "moelora.config",
    "Phatgoose": "moelora.routers.phatgoose",
    "RLOO": "moelora.routers.rloo",
    "RLOOLoss": "moelora.rloo",
    "RLOOTrainer": "moelora.integrations.rloo_trainer",
    "Routing": "moelora.routing",
    "Sparsegen": "moelora.routers.sparsegen",
    "TaskEmbedding": "moelora.routers.task_embedding",
    "add_expert": "moelora.lifecycle",
    "aux_loss": "moelora.mixture",
    "by_estimator": "moelora.classifying",
    "by_module": "moelora.classifying",
    "cross_scenario": "moelora.scenarios",
    "disabled": "moelora.mixture",
    "expert_names": "moelora.mixture",
    "export_adapter": "moelora.saving",
    "given_experts": "moelora.mixture",
    "inspect_adapter": "moelora.integrations.adapter_report",
    "is_patched": "moelora.mixture",
    "load": "moelora.saving",
    "merge": "moelora.merging",
    "patch_model": "moelora.patch",
    "print_trainable_parameters": "moelora.mixture",
    "push_to_hub": "moelora.saving",
    "record": "moelora.mixture",
    "register_router": "moelora.config",
    "remove_expert": "moelora.lifecycle",
    "resolve_targets": "moelora.patch",
    "rloo_backward": "moelora.rloo",
    "rloo_loss": "moelora.rloo",
    "save": "moelora.saving",
    "select_experts": "moelora.selection",
    "set_classifier": "moelora.classifying",
    "set_gates": "moelora.gating",
    "set_stage": "moelora.stages",
    "set_trainable": "moelora.lifecycle",
    "train_phatgoose": "moelora.phatgoose",
    "unpatch_model": "moelora.patch",
    "use_experts": "moelora.mixture",
    "warm_start": "moelora.router_start",
}

__all__ = [*sorted(_HOMES), "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name == "continual":
        return _import_module("moelora.continual")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'moelora' has no attribute {name!r}")
    value = getattr(_import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
