"""Describe an adapter without loading it. Begin with inspect_adapter.

Only the config and the header of the weight file are read, over the network by a range request, so nothing is known
about the numbers themselves: NaN and Inf are found when the adapter is loaded.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moelora.integrations.adapter_config import config_problems, interpret_config, read_config
from moelora.integrations.adapter_file import CONFIG_NAME, TensorEntry, parse_header, read_header, weights_path
from moelora.integrations.adapter_types import AdapterError, AdapterSource, Limits, listed, shown
from moelora.integrations.factors import Layout, TensorShape, factor_keys, lay_out, shapes_of
from moelora.integrations.live_peft import extract
from moelora.integrations.sources import (
    FolderSource,
    HubSource,
    PeftModelSource,
    StateDictSource,
    check_revision,
    parse_source,
)


@dataclass(frozen=True, kw_only=True)
class AdapterReport:
    """What an adapter is, and what keeps it from being loaded.

    Attributes:
        name: the name it would get.
        source: where it is; its digest is unknown, since the weights were not read.
        base_model: the base named in its config, unchecked.
        ranks: the ranks that occur, ascending.
        targets: the last parts of the module paths it has factors for.
        scales: the trained scales that occur, ascending.
        sites: number of modules it has factors for.
        parameters: numbers in its LoRA factors.
        bytes: size of the weight file, or of the tensors in memory.
        dtype: the kinds of numbers of its factors, comma-separated, in the words of safetensors.
        problems: why it would be refused with strict=True; empty when it can be loaded.
        notes: oddities that do no harm.
    """

    name: str
    source: AdapterSource
    base_model: str | None = None
    ranks: tuple[int, ...] = ()
    targets: tuple[str, ...] = ()
    scales: tuple[float, ...] = ()
    sites: int = 0
    parameters: int = 0
    bytes: int = 0
    dtype: str = ""
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether it would be loaded."""
        return not self.problems

    def __str__(self) -> str:
        lines = [
            f"{self.name}: {self.source}",
            f"  base model  {self.base_model or 'not named'}",
            f"  targets     {', '.join(self.targets) or 'none'} ({self.sites} modules)",
            f"  rank        {', '.join(map(str, self.ranks)) or 'unknown'}",
            f"  scale       {', '.join(f'{scale:g}' for scale in self.scales) or 'unknown'}",
            f"  size        {self.parameters:,} parameters, {self.bytes:,} bytes, {self.dtype or 'unknown'}",
        ]
        if self.source.commit:
            lines.append(f"  commit      {self.source.commit}")
        lines += [f"  note        {note}" for note in self.notes]
        lines += [f"  PROBLEM     {problem}" for problem in self.problems]
        return "\n".join(lines if self.problems else [*lines, "  loads       yes (by config and header)"])


def inspect_adapter(
    source: Any,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    limits: Limits = Limits(),  # noqa: B008  (frozen)
) -> AdapterReport:
    """A report on one adapter; a bad adapter, or one that cannot be reached, is reported with its problems.

    Of a PeftModel with several adapters the first one is described, and a note names the others.
    """
    name = "adapter"
    findings = _Findings(source=AdapterSource(kind="unknown", location=shown(source)))
    try:
        adapters = parse_source(source)
        derived, first = next(iter(adapters.items()))
        name = derived or name
        if len(adapters) > 1:
            findings.notes += (
                f"the PeftModel holds {len(adapters)} adapters, this is the first: {listed([*adapters])}",
            )
        if revision is not None:
            check_revision(revision)
        if isinstance(first, HubSource):
            cache = None if cache_dir is None else Path(cache_dir)
            _look_at_hub(findings, first, revision, token, endpoint, cache, local_files_only, limits)
        elif isinstance(first, FolderSource):
            findings.source = AdapterSource(kind="folder", location=str(first.folder))
            findings.config = read_config(first.folder / CONFIG_NAME, limits)
            _look_at_file(findings, weights_path(first.folder, "the folder"), limits)
        else:
            _look_at_tensors(findings, first)
    except (ValueError, OSError) as error:  # AdapterError and HubError are ValueErrors
        findings.problems += (str(error),)
    return _report(name, findings, limits)


@dataclass(kw_only=True)
class _Findings:
    """What has been seen so far; a problem on the way keeps what came before it."""

    source: AdapterSource
    config: Mapping[str, Any] | None = None
    shapes: dict[str, TensorShape] | None = None
    bytes: int = 0
    scales: dict[str, float] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def _look_at_hub(
    findings: _Findings,
    source: HubSource,
    revision: str | None,
    token: str | bool | None,
    endpoint: str | None,
    cache: Path | None,
    local_files_only: bool,
    limits: Limits,
) -> None:
    from moelora.integrations.hub import download_adapter, remote_header

    wanted, subfolder = source.revision or revision, source.subfolder
    findings.source = AdapterSource(kind="hub", location=source.repo_id, revision=wanted, subfolder=subfolder)
    if local_files_only:
        files = download_adapter(
            source.repo_id,
            revision=wanted,
            subfolder=subfolder,
            token=token,
            endpoint=endpoint,
            cache_dir=cache,
            local_files_only=True,
        )
        findings.source = replace(findings.source, commit=files.commit)
        findings.config = read_config(files.config_path, limits)
        _look_at_file(findings, files.weights_path, limits)
        return
    remote = remote_header(source.repo_id, revision=wanted, subfolder=subfolder, token=token, endpoint=endpoint)
    findings.source = replace(findings.source, commit=remote.commit)
    findings.config, findings.bytes = remote.config, remote.weights_bytes
    if remote.weights_bytes > limits.file_bytes:
        raise AdapterError(f"the weight file has {remote.weights_bytes} bytes; expected at most {limits.file_bytes}")
    findings.shapes = _shapes(parse_header(remote.header, limits))


def _look_at_file(findings: _Findings, path: Path, limits: Limits) -> None:
    findings.bytes = path.stat().st_size
    entries, _ = read_header(path, limits)
    findings.shapes = _shapes(entries)


def _look_at_tensors(findings: _Findings, source: StateDictSource | PeftModelSource) -> None:
    if isinstance(source, PeftModelSource):
        findings.source = AdapterSource(kind="peft_model", location=f"adapter {source.adapter!r} of a PeftModel")
        tensors, findings.config, findings.scales = extract(source.model, source.adapter)
    else:
        findings.source = AdapterSource(kind="state_dict", location="a state dict in memory")
        tensors, findings.config = source.state_dict, source.config
    findings.shapes = shapes_of(tensors)
    findings.bytes = sum(tensor.nbytes for tensor in tensors.values())


def _shapes(entries: dict[str, TensorEntry]) -> dict[str, TensorShape]:
    return {key: TensorShape(entry.dtype, entry.shape) for key, entry in entries.items()}


def _report(name: str, findings: _Findings, limits: Limits) -> AdapterReport:
    problems, notes, base_model = findings.problems, findings.notes, None
    layout = Layout({}, [], [])
    if findings.config is not None:
        base = findings.config.get("base_model_name_or_path")
        base_model = base if isinstance(base, str) and base else None
        refused = config_problems(findings.config, limits=limits)
        problems = (*refused, *problems)
        # what strict=False would leave out hides nothing else
        if not config_problems(findings.config, strict=False, limits=limits) and findings.shapes is not None:
            config = interpret_config(findings.config, strict=False, limits=limits)
            layout = lay_out(findings.shapes, config, limits)
            notes += interpret_config(findings.config, limits=limits).notes if not refused else ()
            problems += tuple(layout.problems)
            problems += tuple(
                f"more than LoRA factors (strict=False leaves it out): {what}" for what in layout.left_out
            )
    return _summary(name, findings, layout, base_model, problems, notes)


def _summary(
    name: str,
    findings: _Findings,
    layout: Layout,
    base_model: str | None,
    problems: tuple[str, ...],
    notes: tuple[str, ...],
) -> AdapterReport:
    shapes = findings.shapes or {}
    keys = factor_keys(layout.sites.values())
    scales = {findings.scales.get(path, site.scale) for path, site in layout.sites.items()}
    return AdapterReport(
        name=name,
        source=findings.source,
        base_model=base_model,
        ranks=tuple(sorted({site.rank for site in layout.sites.values()})),
        targets=tuple(sorted({path.rpartition(".")[2] for path in layout.sites})),
        scales=tuple(sorted(scales)),
        sites=len(layout.sites),
        parameters=sum(math.prod(shapes[key].shape) for key in keys),
        bytes=findings.bytes,
        dtype=", ".join(sorted({shapes[key].dtype for key in keys})),
        problems=problems,
        notes=notes,
    )
