"""Find the modules that an adapter's factors belong to. Begin with match_adapter.

A path is looked up as it is, then under the names of later transformers releases, then with a missing or an extra
prefix, and last as a part, or as the whole, of a fused projection. Every hit must have the factors' widths. What is
found nowhere is reported with the reason and the nearest names.
"""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from moelora.integrations.adapter_types import Adapter, AdapterError, SiteFactors, listed, shown
from moelora.integrations.fused import (
    FUSED_PARTS,
    INTERLEAVED_NAMES,
    QKV,
    fuse,
    fusing_refused,
    part_widths,
    split,
    splitting_refused,
)

_EXPERT = re.compile(r"(^|\.)experts(\.|$)")
# difflib is slow: neighbours are looked for on behalf of a few paths, among so many names
_MAX_NEAR = 4
_MAX_AMONG = 500


@dataclass(frozen=True, kw_only=True)
class Match:
    """An adapter's factors, by the paths of a model's modules.

    Attributes:
        factors: module path of the model -> factors of the module's widths.
        unmatched: (path in the adapter, reason) for every path that found no module.
        notes: what was renamed, fused or split, one sentence each.
    """

    name: str
    factors: dict[str, SiteFactors] = field(repr=False)
    unmatched: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def check(self, *, strict: bool = True) -> "Match":
        """The match itself, if it may be used.

        Raises:
            AdapterError: when nothing matched at all, and, when strict, when anything did not.
        """
        reasons = [f"{shown(path)}: {reason}" for path, reason in self.unmatched]
        if not self.factors:
            raise AdapterError(f"adapter {self.name!r} fits no module of this model: {listed(reasons, 4)}")
        if strict and reasons:
            raise AdapterError(
                f"adapter {self.name!r}: {len(reasons)} of its modules have no place in this model: "
                f"{listed(reasons, 4)}; pass strict=False to leave them out"
            )
        return self


def match_adapter(
    adapter: Adapter,
    linears: Mapping[str, tuple[int, int]],
    *,
    model_type: str | None = None,
    model: nn.Module | None = None,
) -> Match:
    """Place an adapter's factors on a model.

    Args:
        linears: module path -> (in, out) of every linear projection of the model.
        model_type: the transformers model type; decides renames and the layout of fused projections.
        model: the model itself, so that the renames of its sub-models are known too.
    """
    place = _Place(linears, model_type, model)
    found: dict[str, tuple[str, SiteFactors]] = {}  # module path -> where its factors came from
    waiting: dict[str, dict[str, str]] = {}  # fused module -> part -> path in the adapter
    unmatched: dict[str, str] = {}
    renamed = 0
    notes: list[str] = []

    def put(path: str, target: str, factors: SiteFactors) -> None:
        if target in found:
            unmatched[path] = f"{shown(found[target][0])} belongs to {target} too; the file names one module twice"
        else:
            found[target] = (path, factors)

    # one to one, under whatever name
    for path, factors in adapter.factors.items():
        exact = linears.get(path)
        if exact is not None and exact == _widths(factors):
            put(path, path, factors)
            continue
        target = place.find(path, _widths(factors))
        if target is not None:
            renamed += target != path
            put(path, target, factors)
            continue

        # parts of a fused projection wait for each other; a fused whole is cut at once
        fused = place.find_fused(path)
        if fused is not None:
            waiting.setdefault(fused[0], {})[fused[1]] = path
            continue
        parts = place.find_parts(path)
        if parts:
            reason = _split_onto(path, factors, parts, linears, model_type, put)
            if reason is None:
                notes.append(f"{path} was split onto {', '.join(parts)}")
            else:
                unmatched[path] = reason
            continue
        unmatched[path] = ""

    for target, parts in waiting.items():
        reason = _fuse_onto(target, parts, adapter.factors, linears, model_type, put)
        if reason is None:
            notes.append(f"{', '.join(parts.values())} were fused onto {target}")
        else:
            unmatched |= dict.fromkeys(parts.values(), reason)

    # reasons last: near names are looked for only where nothing better is known
    for index, path in enumerate(path for path, reason in unmatched.items() if not reason):
        unmatched[path] = place.reason(path, _widths(adapter.factors[path]), near=index < _MAX_NEAR)
    if renamed:
        notes.insert(0, f"{renamed} module paths were matched under another name or prefix")
    experts = sum(2 for path in unmatched if _EXPERT.search(path))
    if experts:
        notes.append(f"{experts} expert tensors were not placed: experts of a mixture-of-experts base are not routed")
    return Match(
        name=adapter.name,
        factors={target: factors for target, (_, factors) in found.items()},
        unmatched=tuple(unmatched.items()),
        notes=tuple(notes),
    )


class _Place:
    """The modules of a model, ready to be looked up by names that differ a little."""

    def __init__(self, linears: Mapping[str, tuple[int, int]], model_type: str | None, model: nn.Module | None) -> None:
        self._linears = linears
        self._model_type = model_type
        self._model = model

    @cached_property
    def _by_tail(self) -> dict[str, list[str]]:
        """Every tail of every module path, so that a missing prefix costs one lookup."""
        tails: dict[str, list[str]] = {}
        for path in self._linears:
            for tail in _tails(path):
                tails.setdefault(tail, []).append(path)
        return tails

    @cached_property
    def _renamings(self) -> list:
        if self._model_type is None and self._model is None:
            return []
        from moelora.integrations.renames import renamings_for  # transformers is needed only here

        return renamings_for(self._model_type, self._model)

    def _names(self, path: str) -> Iterator[str]:
        yield path
        if self._renamings:
            from moelora.integrations.renames import renamed_paths

            yield from renamed_paths(path, self._renamings)

    def candidates(self, path: str) -> list[str]:
        """Modules that this path may mean: by the best of exact name, missing prefix, extra prefix."""
        for name in self._names(path):
            if name in self._linears:
                return [name]
            if name in self._by_tail:
                return self._by_tail[name]
            for depth, tail in enumerate(_tails(name)):
                # deep cuts only down to a name that still says where it is
                if tail in self._linears and (depth == 0 or "." in tail):
                    return [tail]
        return []

    def find(self, path: str, widths: tuple[int, int]) -> str | None:
        """The one module that this path means and that has these widths."""
        fitting = [target for target in self.candidates(path) if self._linears[target] == widths]
        return fitting[0] if len(fitting) == 1 else None

    def find_fused(self, path: str) -> tuple[str, str] | None:
        """The fused projection that this path is a part of, and which part."""
        for name in self._names(path):
            parent, _, leaf = name.rpartition(".")
            fused_names = [fused for fused, parts in FUSED_PARTS.items() if leaf in parts]
            fused_names += sorted(INTERLEAVED_NAMES) if leaf in QKV else []
            for fused in fused_names:
                targets = self.candidates(f"{parent}.{fused}")
                if len(targets) == 1:
                    return targets[0], leaf
        return None

    def find_parts(self, path: str) -> list[str]:
        """The split projections that this fused path covers, in the order of its rows."""
        for name in self._names(path):
            parent, _, leaf = name.rpartition(".")
            parts = QKV if leaf in INTERLEAVED_NAMES else FUSED_PARTS.get(leaf, ())
            targets = [self.candidates(f"{parent}.{part}") for part in parts]
            if targets and all(len(target) == 1 for target in targets):
                return [target[0] for target in targets]
        return []

    def reason(self, path: str, widths: tuple[int, int], *, near: bool) -> str:
        """Why this path found no module."""
        candidates = self.candidates(path)
        if len(candidates) == 1:
            have, want = widths, self._linears[candidates[0]]
            return (
                f"the adapter is {have[0]} to {have[1]} wide, {candidates[0]} is {want[0]} to {want[1]}; "
                "was it trained on another base?"
            )
        if candidates:
            return f"may mean any of {listed(candidates, 4)}"
        if _EXPERT.search(path):
            return "a projection inside stacked experts of a mixture-of-experts base, which is not a linear module"
        names = self._near(path) if near else []
        return f"no such linear module; nearest are {listed(names, 3)}" if names else "no such linear module"

    def _near(self, path: str) -> list[str]:
        leaf = path.rpartition(".")[2]
        same_leaf = [name for name in self._linears if name.rpartition(".")[2] == leaf]
        among = (same_leaf or list(self._linears))[:_MAX_AMONG]
        return difflib.get_close_matches(path, among, n=3, cutoff=0.4)


def _split_onto(
    path: str,
    factors: SiteFactors,
    parts: list[str],
    linears: Mapping[str, tuple[int, int]],
    model_type: str | None,
    put: Callable[[str, str, SiteFactors], None],
) -> str | None:
    """Cut fused factors for their parts; the reason when that is not possible."""
    reason = splitting_refused(path.rpartition(".")[2], model_type)
    widths = [linears[part][1] for part in parts]
    in_features, out_features = _widths(factors)
    if reason is None and (out_features != sum(widths) or any(linears[part][0] != in_features for part in parts)):
        reason = (
            f"the adapter is {in_features} to {out_features} wide, the model's {', '.join(parts)} together are "
            f"{linears[parts[0]][0]} to {sum(widths)}"
        )
    if reason is not None:
        return reason
    for part, piece in zip(parts, split(factors, widths), strict=True):
        put(path, part, piece)
    return None


def _fuse_onto(
    target: str,
    parts: dict[str, str],
    factors: dict[str, SiteFactors],
    linears: Mapping[str, tuple[int, int]],
    model_type: str | None,
    put: Callable[[str, str, SiteFactors], None],
) -> str | None:
    """Join the factors of parts on one fused projection; the reason when that is not possible."""
    fused = target.rpartition(".")[2]
    reason = fusing_refused(fused, model_type)
    if reason is not None:
        return reason
    in_features, total = linears[target]
    names = FUSED_PARTS[fused]
    known = {part: _widths(factors[path])[1] for part, path in parts.items()}
    widths = part_widths(names, known, total)
    if widths is None or any(_widths(factors[path])[0] != in_features for path in parts.values()):
        wide = ", ".join(f"{part} {_widths(factors[path])}" for part, path in parts.items())
        return f"the adapter's widths (in, out) {wide} do not make up {target} {linears[target]}"
    blocks = [factors[parts[name]] if name in parts else None for name in names]
    put(next(iter(parts.values())), target, fuse(blocks, widths))
    return None


def _widths(factors: SiteFactors) -> tuple[int, int]:
    return factors.A_RD.shape[1], factors.B_RO.shape[1]


def _tails(path: str) -> Iterator[str]:
    """What remains of a path when its first segments are cut off, longest first."""
    _, dot, tail = path.partition(".")
    while dot:
        yield tail
        _, dot, tail = tail.partition(".")
