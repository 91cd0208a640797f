"""Orthogonal adapters, detectors, calibrated gates, and the stacks that put them on a model.

Begin with UnlearningStack and ContinualStack. The names below are loaded when they are first used; what the stacks are
made of has a file for each noun.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moelora.continual.certificate import Certificate as Certificate
    from moelora.continual.continual_stack import ContinualStack as ContinualStack
    from moelora.continual.continual_stack import Task as Task
    from moelora.continual.detectors import LayerGaussians as LayerGaussians
    from moelora.continual.detectors import Mahalanobis as Mahalanobis
    from moelora.continual.detectors import Nearest as Nearest
    from moelora.continual.detectors import RelativeMahalanobis as RelativeMahalanobis
    from moelora.continual.detectors import RelativeNearest as RelativeNearest
    from moelora.continual.detectors import SumOf as SumOf
    from moelora.continual.examples import Collate as Collate
    from moelora.continual.features import ExternalEncoder as ExternalEncoder
    from moelora.continual.features import HiddenStates as HiddenStates
    from moelora.continual.gate import Gate as Gate
    from moelora.continual.o3_stack import O3Stack as O3Stack
    from moelora.continual.objectives import NPO as NPO
    from moelora.continual.objectives import RMU as RMU
    from moelora.continual.objectives import GradientAscent as GradientAscent
    from moelora.continual.objectives import Objective as Objective
    from moelora.continual.objectives import RandomOption as RandomOption
    from moelora.continual.objectives import Refusal as Refusal
    from moelora.continual.objectives import SimNPO as SimNPO
    from moelora.continual.objectives import Supervised as Supervised
    from moelora.continual.objectives import UniformOptions as UniformOptions
    from moelora.continual.orthogonality import Orthogonality as Orthogonality
    from moelora.continual.training import Training as Training
    from moelora.continual.unlearning_stack import Request as Request
    from moelora.continual.unlearning_stack import UnlearningStack as UnlearningStack

_HOMES = {
    "Certificate": "certificate",
    "Collate": "examples",
    "ContinualStack": "continual_stack",
    "ExternalEncoder": "features",
    "Gate": "gate",
    "GradientAscent": "objectives",
    "HiddenStates": "features",
    "LayerGaussians": "detectors",
    "Mahalanobis": "detectors",
    "NPO": "objectives",
    "Nearest": "detectors",
    "O3Stack": "o3_stack",
    "Objective": "objectives",
    "Orthogonality": "orthogonality",
    "RMU": "objectives",
    "RandomOption": "objectives",
    "Refusal": "objectives",
    "RelativeMahalanobis": "detectors",
    "RelativeNearest": "detectors",
    "Request": "unlearning_stack",
    "SimNPO": "objectives",
    "SumOf": "detectors",
    "Supervised": "objectives",
    "Task": "continual_stack",
    "Training": "training",
    "UniformOptions": "objectives",
    "UnlearningStack": "unlearning_stack",
}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'moelora.continual' has no attribute {name!r}")
    value = getattr(_import_module(f"moelora.continual.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
