"""What `moelora_config.json` says, checked before anything is believed. Begin with read_manifest.

A manifest may come from a stranger. Nothing in it is a path outside its own folder, and what it does not say in the
expected form is an error.
"""

import json
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelora.config import SCHEMA_VERSION, MoELoRAConfig
from moelora.integrations.adapters import AdapterSource

CONFIG_NAME = "moelora_config.json"

RELOADABLE = ("folder", "hub")
"""Kinds of sources that an expert can be read from again."""

_FOLDER = re.compile(r"experts/\d{3,6}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class ExpertEntry:
    """One expert of a manifest.

    Attributes:
        name: of the expert.
        source: where it came from.
        folder: where it lies in the mixture's own folder; None if it is read from its source.
        sha256: digest of the weight file that is to be read; None if it is unknown.
        trainable: whether its factors were parameters.
        ranks: rank at every site that it has rows for.
        scales: its trained scale there.
        shared_A: whether it is a head of the A that it shares with the others of the kind.
    """

    name: str
    source: AdapterSource
    folder: str | None
    sha256: str | None
    trainable: bool
    ranks: dict[str, int]
    scales: dict[str, float]
    shared_A: bool = False


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of `moelora_config.json`, checked."""

    config: MoELoRAConfig
    base_model: dict[str, Any]
    sites: dict[str, dict[str, Any]]
    experts: tuple[ExpertEntry, ...]


def read_manifest(folder: Path) -> Manifest:
    """Read and check `moelora_config.json`.

    Raises:
        ValueError: if it is missing, malformed, or written by a newer major version.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} holds no mixture: it has no {CONFIG_NAME}; moelora.save writes one")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = version_in(values)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise _malformed(folder, error) from error
    check_version(version, SCHEMA_VERSION, repr(str(folder)), stacklevel=4)
    try:
        return _manifest(values)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise _malformed(folder, error) from error


def version_in(values: Any) -> tuple[int, int]:
    """The major and minor version of a file, which is none if this raises one of Python's own errors."""
    major, minor = values["schema_version"]
    if isinstance(major, bool) or isinstance(minor, bool):
        raise TypeError(f"schema_version must be two integers, got {[major, minor]}")
    return int(major), int(minor)


def check_version(version: tuple[int, int], known: tuple[int, int], what: str, *, stacklevel: int) -> None:
    """Refuse a newer major version, and warn of a newer minor one.

    Raises:
        ValueError: for a newer major version.
    """
    written = f"{what} was written with schema version {version[0]}.{version[1]}"
    if version[0] > known[0]:
        raise ValueError(f"{written}, this moelora reads {known[0]}.x; upgrade moelora")
    if version > known:
        warnings.warn(
            f"{written}, newer than {known[0]}.{known[1]}; what this version does not know is an error",
            stacklevel=stacklevel,
        )


def _malformed(folder: Path, error: Exception) -> ValueError:
    what = f"no {error}" if isinstance(error, KeyError) else str(error)
    return ValueError(f"{CONFIG_NAME} in {str(folder)!r} is malformed: {what}; save the mixture again")


def _manifest(values: dict[str, Any]) -> Manifest:
    sites, base_model = values["sites"], values["base_model"]
    _expect(isinstance(sites, dict) and bool(sites), "sites", "a mapping from module paths", sites)
    for path, site in sites.items():
        _expect(isinstance(site, dict), f"site {path!r}", "a mapping", site)
        _expect(isinstance(site.get("fan_in_fan_out"), bool), f"fan_in_fan_out of {path!r}", "true or false", site)
    _expect(isinstance(base_model, dict), "base_model", "a mapping", base_model)
    _expect(isinstance(base_model.get("digests", {}), dict), "base_model.digests", "a mapping", base_model)
    _expect(isinstance(values["experts"], list) and len(values["experts"]) > 0, "experts", "a list", values["experts"])
    experts = tuple(_expert(entry, sites) for entry in values["experts"])
    names = [expert.name for expert in experts]
    _expect(len(set(names)) == len(names), "experts", "different names", names)
    return Manifest(
        config=MoELoRAConfig.from_dict(values["config"]), base_model=base_model, sites=sites, experts=experts
    )


def _expert(entry: dict[str, Any], sites: dict[str, Any]) -> ExpertEntry:
    name, folder, sha256 = entry["name"], entry["folder"], entry["sha256"]
    ranks, scales, trainable = entry["ranks"], entry["scales"], entry["trainable"]
    shared_A = entry.get("shared_A", False)
    source = AdapterSource.from_dict(entry["source"])
    _expect(isinstance(name, str), "the name of an expert", "text", name)
    _expect(folder is None or _matches(_FOLDER, folder), f"folder of {name!r}", "null or experts/NNN", folder)
    _expect(sha256 is None or _matches(_SHA256, sha256), f"sha256 of {name!r}", "64 hexadecimal digits", sha256)
    _expect(isinstance(trainable, bool), f"trainable of {name!r}", "true or false", trainable)
    _expect(isinstance(shared_A, bool), f"shared_A of {name!r}", "true or false", shared_A)
    for field in ("kind", "location"):
        _expect(isinstance(getattr(source, field), str), f"source.{field} of {name!r}", "text", entry["source"])
    if folder is None:
        _expect(source.kind in RELOADABLE, f"source.kind of {name!r}", f"one of {RELOADABLE}", source.kind)
        pinned = source.kind != "hub" or _matches(_COMMIT, source.commit)
        _expect(pinned, f"source.commit of {name!r}", "40 hexadecimal digits", source.commit)
    for what, numbers, kind in (("ranks", ranks, int), ("scales", scales, int | float)):
        _expect(isinstance(numbers, dict) and set(numbers) <= set(sites), f"{what} of {name!r}", "sites", numbers)
        fine = all(isinstance(n, kind) and not isinstance(n, bool) and math.isfinite(n) for n in numbers.values())
        _expect(fine, f"{what} of {name!r}", "finite numbers", numbers)
    _expect(set(ranks) == set(scales), f"ranks and scales of {name!r}", "the same sites", sorted(ranks))
    scales = {path: float(scale) for path, scale in scales.items()}
    return ExpertEntry(
        name=name,
        source=source,
        folder=folder,
        sha256=sha256,
        trainable=trainable,
        ranks=ranks,
        scales=scales,
        shared_A=shared_A,
    )


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _expect(holds: bool, what: str, expected: str, came: object) -> None:
    if not holds:
        raise ValueError(f"{what}: expected {expected}, got {repr(came)[:120]}")
