"""Module paths that changed their name between transformers releases.

transformers itself knows how checkpoints of earlier releases are named: its conversion mappings rename their keys when
it loads them. The same renamings, applied to an adapter's module paths, carry an adapter trained on transformers 4
over to the modules of transformers 5 (ViT's `attention.attention.query` is `attention.q_proj` now). They are the
library's regular expressions, never an adapter's. Begin with renamed_paths.
"""

from collections.abc import Iterator
from functools import lru_cache

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES


def renamings_for(model_type: str | None, model: nn.Module | None = None) -> list[WeightRenaming]:
    """The library's renamings for a model: those of all its sub-models where the model itself is at hand."""
    if isinstance(model, PreTrainedModel):
        return _stateless(get_model_conversion_mapping(model))
    return list(_renamings_of_type(model_type))


def renamed_paths(path: str, renamings: list[WeightRenaming]) -> Iterator[str]:
    """Names under which a later release may know this module path; the path itself is not among them."""
    key = f"{path}.weight"
    renamed = key
    for renaming in renamings:
        renamed, _ = renaming.rename_source_key(renamed)
    if renamed != key and renamed.endswith(".weight"):
        yield renamed.removesuffix(".weight")


@lru_cache(maxsize=256)
def _renamings_of_type(model_type: str | None) -> tuple[WeightRenaming, ...]:
    classes = MODEL_MAPPING_NAMES.get(model_type or "", ())
    # the inner model's names before the whole model's, which put a prefix in front of them
    names = [*([classes] if isinstance(classes, str) else classes), model_type or "", "legacy"]
    found: list[WeightRenaming] = []
    for name in names:
        found.extend(_stateless(get_checkpoint_conversion_mapping(name) or []))
    return tuple(found)


def _stateless(transforms: list) -> list[WeightRenaming]:
    # grouped renamings remember what they have seen, which suits one pass over a checkpoint only
    return [t for t in transforms if isinstance(t, WeightRenaming) and not hasattr(t, "_active")]
