"""What a user may call an adapter, and what we call it. Begin with parse_sources.

A source is a folder, a hub id (`org/name`, `org/name@revision`, `org/name:subfolder`, `org/name@revision:subfolder`),
a state dict with its config, or a live PeftModel, which may hold several adapters.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from moelora.integrations.adapter_file import CONFIG_NAME, WEIGHTS_NAME
from moelora.integrations.adapter_types import AdapterError, listed, shown

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_REPO = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,95})?")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/+-]{0,199}")
_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._ +=-]{0,199}")
_FORMS = "a folder, 'org/name', 'org/name@revision', 'org/name:subfolder', a (state_dict, config) pair or a PeftModel"


@dataclass(frozen=True, kw_only=True)
class FolderSource:
    """A PEFT folder on disk."""

    folder: Path


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """A repository on a hub, perhaps at a revision and in a sub-folder."""

    repo_id: str
    revision: str | None = None
    subfolder: str | None = None


@dataclass(frozen=True, kw_only=True)
class StateDictSource:
    """Tensors in memory with the config that explains them."""

    state_dict: Mapping[str, Any]
    config: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class PeftModelSource:
    """One adapter of a live PeftModel."""

    model: nn.Module
    adapter: str


Source = FolderSource | HubSource | StateDictSource | PeftModelSource


def parse_sources(experts: Any) -> dict[str, Source]:
    """Names and sources from a list of sources or a mapping name -> source, in their order.

    Names are derived where none are given (folder, repository, adapter) and made unique by a number.

    Raises:
        AdapterError: for anything that is no source, and for names with other characters than letters, digits, -, _, .
    """
    if isinstance(experts, str | Path | nn.Module) or (isinstance(experts, Mapping) and _is_state_dict_form(experts)):
        raise AdapterError(f"experts is one source, {shown(experts)}; expected a list of sources or name -> source")
    if not isinstance(experts, Mapping | Sequence):
        raise AdapterError(f"experts is {type(experts).__name__}; expected a list of sources or name -> source")
    if not experts:
        raise AdapterError(f"experts is empty; expected at least one of: {_FORMS}")

    found: dict[str, Source] = {}
    if isinstance(experts, Mapping):
        for name, value in experts.items():
            sources = parse_source(value)
            for adapter, source in sources.items():
                full = name if len(sources) == 1 else f"{name}-{adapter}"
                if check_name(full) in found:
                    raise AdapterError(f"two experts are called {full!r}; give the source {name!r} another name")
                found[full] = source
        return found
    for index, value in enumerate(experts):
        for derived, source in parse_source(value).items():
            found[_unique(derived or f"expert-{index}", found)] = source
    return found


def parse_source(value: Any) -> dict[str, Source]:
    """Derived name to source; one entry, except for a PeftModel with several adapters. The name may be empty."""
    if isinstance(value, Path):
        return {_tidy(value.resolve().name): FolderSource(folder=check_folder(value))}
    if isinstance(value, str):
        return _parse_text(value)
    if isinstance(value, nn.Module):
        return {_tidy(name): PeftModelSource(model=value, adapter=name) for name in _adapters_of(value)}
    if isinstance(value, Mapping) and _is_state_dict_form(value):
        return {"": _in_memory(value["state_dict"], value["config"])}
    if isinstance(value, tuple | list) and len(value) == 2:
        return {"": _in_memory(*value)}
    raise AdapterError(f"{shown(value)} is no adapter source; expected {_FORMS}")


def check_name(name: object) -> str:
    """The name, if it may name an expert."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name:
        raise AdapterError(
            f"{shown(name)} cannot name an expert; expected letters, digits, '-', '_' and '.', not beginning with '-' "
            "or '.', without '..', at most 128 characters"
        )
    return name


def check_revision(revision: str) -> str:
    """The revision, if it looks like a branch, a tag, a commit or refs/pr/N."""
    if not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision:
        raise AdapterError(f"revision {shown(revision)}: expected a branch, a tag, a commit or refs/pr/N")
    return revision


def check_subfolder(subfolder: str) -> str:
    """The sub-folder, if it stays inside its repository."""
    if not all(_SEGMENT.fullmatch(segment) and ".." not in segment for segment in subfolder.split("/")):
        raise AdapterError(
            f"subfolder {shown(subfolder)}: expected a relative path inside the repository, without '..'"
        )
    return subfolder


def check_folder(folder: Path) -> Path:
    """The folder, if it holds one adapter."""
    folder = folder.expanduser()
    if folder.is_file():
        raise AdapterError(f"{shown(str(folder))} is a file; pass its folder, with {CONFIG_NAME} and {WEIGHTS_NAME}")
    if not folder.is_dir():
        raise AdapterError(f"no folder {shown(str(folder))}; expected {_FORMS}")
    if not (folder / CONFIG_NAME).is_file():
        # PEFT saves every adapter but "default" in a sub-folder of its name
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
        hint = f"; it holds the adapters {listed(inside)} in sub-folders, pass one of these" if inside else ""
        raise AdapterError(f"{shown(str(folder))} has no {CONFIG_NAME}; expected a PEFT LoRA folder{hint}")
    return folder


def _parse_text(text: str) -> dict[str, Source]:
    # a folder that exists wins over a hub id of the same name, as in transformers and PEFT
    looks_local = text.startswith(("/", "./", "../", "~", ".\\", "..\\")) or text in (".", "..")
    if looks_local or _exists(text):
        return {_tidy(Path(text).expanduser().resolve().name): FolderSource(folder=check_folder(Path(text)))}
    left, colon, subfolder = text.partition(":")
    repo_id, at, revision = left.partition("@")
    if not _REPO.fullmatch(repo_id) or ".." in repo_id or "--" in repo_id or repo_id.endswith(".git"):
        raise AdapterError(f"{shown(text)} is neither an existing folder nor a hub id; expected {_FORMS}")
    source = HubSource(
        repo_id=repo_id,
        revision=check_revision(revision) if at else None,
        subfolder=check_subfolder(subfolder) if colon else None,
    )
    return {_tidy((subfolder or repo_id).rpartition("/")[2]): source}


def _exists(text: str) -> bool:
    try:
        return bool(text) and Path(text).exists()
    except (OSError, ValueError):  # a name too long for a path, or with a null character
        return False


def _is_state_dict_form(value: Mapping[Any, Any]) -> bool:
    return set(value) == {"state_dict", "config"} and isinstance(value["state_dict"], Mapping)


def _in_memory(state_dict: Any, config: Any) -> StateDictSource:
    if hasattr(config, "to_dict"):  # a LoraConfig
        config = config.to_dict()
    if not isinstance(state_dict, Mapping) or not isinstance(config, Mapping):
        raise AdapterError(
            f"a pair of {type(state_dict).__name__} and {type(config).__name__}; expected (state_dict, config), "
            "both mappings, config as in adapter_config.json"
        )
    return StateDictSource(state_dict=state_dict, config=config)


def _adapters_of(model: nn.Module) -> list[str]:
    peft = sys.modules.get("peft")  # a live PeftModel exists only where peft is already imported
    if peft is None or not isinstance(model, peft.PeftModel):
        raise AdapterError(f"a {type(model).__name__} is no adapter source; expected {_FORMS}")
    adapters: Any = model.peft_config
    return list(adapters)


def _tidy(name: str) -> str:
    """A valid name made from a folder's or repository's name; empty if nothing is left."""
    tidied = re.sub(r"\.{2,}", ".", re.sub(r"[^A-Za-z0-9._-]+", "-", name)).strip("-.")[:100]
    return tidied


def _unique(name: str, taken: Mapping[str, Source]) -> str:
    candidate, number = name, 2
    while candidate in taken:
        candidate, number = f"{name}-{number}", number + 1
    return check_name(candidate)
