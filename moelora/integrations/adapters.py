"""The door for adapters: from what a user names to checked factors per module. Begin with load_adapters.

The way of one adapter: sources.py (what is meant) -> hub.py (if remote) -> adapter_config.py (what it means) ->
adapter_file.py (header, bytes, digest) -> factors.py (pairs and shapes) -> here. Then matching.py finds its modules.
Well-formed but poisoned weights cannot be recognised by any of these checks.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moelora.integrations.adapter_config import interpret_config, read_config
from moelora.integrations.adapter_file import CONFIG_NAME, AdapterFile, read_file, tensor_is_finite, weights_path
from moelora.integrations.adapter_types import Adapter as Adapter
from moelora.integrations.adapter_types import AdapterError as AdapterError
from moelora.integrations.adapter_types import AdapterSource as AdapterSource
from moelora.integrations.adapter_types import Limits as Limits
from moelora.integrations.adapter_types import SiteFactors as SiteFactors
from moelora.integrations.adapter_types import listed, shown
from moelora.integrations.factors import SiteKeys, TensorShape, build_factors, factor_keys, lay_out, shapes_of
from moelora.integrations.live_peft import extract
from moelora.integrations.sources import (
    FolderSource,
    HubSource,
    PeftModelSource,
    Source,
    StateDictSource,
    check_revision,
    parse_sources,
)

# files are read and hashed side by side; both let other threads run
_READERS = min(4, os.cpu_count() or 1)


def load_adapters(
    experts: Mapping[str, Any] | Sequence[Any],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    strict: bool = True,
    progress: bool | None = None,
    limits: Limits = Limits(),  # noqa: B008  (frozen)
) -> list[Adapter]:
    """Load adapters as checked factors, in the order of their sources.

    Args:
        experts: a list of sources or a mapping name -> source. A source is a folder, a hub id (`org/name`,
            `org/name@revision`, `org/name:subfolder`, `org/name@revision:subfolder`), a pair (state_dict, config), a
            mapping with the keys "state_dict" and "config", or a live PeftModel, all of whose adapters are taken.
        revision: for hub ids that name none.
        strict: refuse an adapter that stores more than LoRA factors; otherwise that part is left out and noted.
        progress: a bar over the adapters; None shows it in a terminal unless the hub's bars are switched off.

    Raises:
        AdapterError: names the source, the field or key, what was expected and what to do.
    """
    sources = parse_sources(experts)
    if revision is not None:
        check_revision(revision)
    cache = None if cache_dir is None else Path(cache_dir)
    hub = {"token": token, "endpoint": endpoint, "cache_dir": cache, "local_files_only": local_files_only}

    def load(name: str, source: Source) -> Adapter:
        try:
            return _load(name, source, revision, hub, strict, limits)
        except (AdapterError, OSError) as error:
            raise AdapterError(f"adapter {name!r} ({describe(source)}): {error}") from error

    with ThreadPoolExecutor(_READERS) as pool:
        waiting = [pool.submit(load, name, source) for name, source in sources.items()]
        try:
            shown_progress = progress_shown() if progress is None else progress
            bar = tqdm(waiting, desc="loading adapters", unit="adapter", disable=not shown_progress)
            return [future.result() for future in bar]
        finally:
            pool.shutdown(cancel_futures=True)


def _load(
    name: str, source: Source, revision: str | None, hub: dict[str, Any], strict: bool, limits: Limits
) -> Adapter:
    if isinstance(source, FolderSource):
        found = AdapterSource(kind="folder", location=str(source.folder.resolve()))
        config_path, file_path = source.folder / CONFIG_NAME, weights_path(source.folder, "the folder")
        return _from_files(name, found, config_path, file_path, strict, limits)
    if isinstance(source, HubSource):
        from moelora.integrations.hub import HubError, download_adapter

        wanted = source.revision or revision
        try:
            files = download_adapter(
                source.repo_id, revision=wanted, subfolder=source.subfolder, max_bytes=limits.file_bytes, **hub
            )
        except HubError as error:
            raise AdapterError(str(error)) from error
        found = AdapterSource(
            kind="hub", location=source.repo_id, revision=wanted, subfolder=source.subfolder, commit=files.commit
        )
        return _from_files(name, found, files.config_path, files.weights_path, strict, limits)
    if isinstance(source, PeftModelSource):
        tensors, config, scales = extract(source.model, source.adapter)
        found = AdapterSource(kind="peft_model", location=f"adapter {source.adapter!r} of a PeftModel")
        return _from_tensors(name, found, tensors, config, scales, strict, limits)
    found = AdapterSource(kind="state_dict", location="a state dict in memory")
    return _from_tensors(name, found, source.state_dict, source.config, {}, strict, limits)


def _from_files(
    name: str, source: AdapterSource, config_path: Path, file_path: Path, strict: bool, limits: Limits
) -> Adapter:
    config = interpret_config(read_config(config_path, limits), strict=strict, limits=limits)
    file: AdapterFile = read_file(file_path, limits)
    shapes = {key: TensorShape(entry.dtype, entry.shape) for key, entry in file.entries.items()}
    layout = lay_out(shapes, config, limits)
    notes = config.notes + _judge(layout.problems, layout.left_out, strict)

    keys = factor_keys(layout.sites.values())
    if not file.is_finite(keys):
        _refuse_non_finite([key for key in keys if not tensor_is_finite(file.tensor(key))])
    return Adapter(
        name=name,
        source=replace(source, sha256=file.sha256),
        base_model=config.base_model,
        factors=build_factors(layout.sites, file.tensor),
        notes=notes,
    )


def _from_tensors(
    name: str,
    source: AdapterSource,
    state_dict: Mapping[str, Any],
    raw_config: Mapping[str, Any],
    scales: dict[str, float],
    strict: bool,
    limits: Limits,
) -> Adapter:
    config = interpret_config(raw_config, strict=strict, limits=limits)
    layout = lay_out(shapes_of(state_dict), config, limits)
    notes = config.notes + _judge(layout.problems, layout.left_out, strict)
    sites, changed = _with_live_scales(layout.sites, scales, limits)
    if changed:
        notes += (f"the live scale differs from the config's at {len(changed)} sites and was taken",)

    tensors = {key: state_dict[key].detach() for key in factor_keys(sites.values())}
    if broken := [key for key, value in tensors.items() if not tensor_is_finite(value)]:
        _refuse_non_finite(broken)
    return Adapter(
        name=name,
        source=source,
        base_model=config.base_model,
        factors=build_factors(sites, tensors.__getitem__),
        notes=notes,
    )


def _with_live_scales(
    sites: dict[str, SiteKeys], scales: dict[str, float], limits: Limits
) -> tuple[dict[str, SiteKeys], list[str]]:
    changed = [path for path, site in sites.items() if scales.get(path, site.scale) != site.scale]
    for path in changed:
        if not abs(scales[path]) <= limits.scale:
            raise AdapterError(f"{shown(path)}: scale {scales[path]:g}; expected at most {limits.scale:g}")
    return {path: site._replace(scale=scales.get(path, site.scale)) for path, site in sites.items()}, changed


def _judge(problems: list[str], left_out: list[str], strict: bool) -> tuple[str, ...]:
    """Refuse what cannot be loaded; what is no LoRA factor is refused too, or noted when not strict."""
    if problems:
        raise AdapterError(listed(problems, 5))
    if left_out and strict:
        raise AdapterError(
            f"the file holds more than LoRA factors: {listed(left_out, 5)}; pass strict=False to leave these out"
        )
    return tuple(f"left out: {what}" for what in left_out)


def _refuse_non_finite(keys: list[str]) -> None:
    raise AdapterError(f"{len(keys)} tensors hold NaN or Inf: {listed([shown(key) for key in keys], 3)}")


def describe(source: Source) -> str:
    """A source in few words, for messages."""
    if isinstance(source, FolderSource):
        return str(source.folder)
    if isinstance(source, HubSource):
        place = AdapterSource(kind="hub", location=source.repo_id, revision=source.revision, subfolder=source.subfolder)
        return str(place)
    if isinstance(source, StateDictSource):
        return "a state dict in memory"
    return f"adapter {shown(source.adapter)} of a PeftModel"


def progress_shown() -> bool:
    """Whether a progress bar should be shown when nobody said so: in a terminal, unless the hub's bars are off."""
    switched_off = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE")
    hub = sys.modules.get("huggingface_hub.utils")
    if hub is not None and hub.are_progress_bars_disabled():
        switched_off = True
    return sys.stderr.isatty() and not switched_off
