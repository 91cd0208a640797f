"""Which projections of a model are patched, each proven to be called. Begin with `resolve_sites`.

Paths get roles from the table of families, or from the structure where the table does not know the model; a selection
picks among them; a probe forward in eval and in train mode proves that each of them is called as a module.
"""

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from moelora.integrations.families import (
    DEFAULT_ROLES,
    LAYOUTS,
    MODEL_TYPES,
    ROLES,
    aliases,
    ends_with,
    linear_sizes,
    linears,
    role_in_layout,
)
from moelora.integrations.probe import MODES, ProbeReport, probe
from moelora.integrations.sites import Refused, Resolution, Site, TargetError
from moelora.integrations.state_space import bypassed, force_unfused
from moelora.integrations.structure import block, containers, structural_roles

Targets = str | Sequence[str] | Callable[[str, nn.Module], bool]


def resolve_sites(
    model: nn.Module,
    *,
    targets: Any = "auto",
    roles: Collection[str] | None = None,
    adapter_paths: Collection[str] | None = None,
    probe_inputs: Any = None,
    strict: bool = True,
) -> Resolution:
    """Decide which linears of a model are patched; the model is left exactly as it was.

    `targets`: "auto", a list of module paths or endings of them (`"q_proj"`, `"attn.c_proj"`), or a predicate
    `(path, module) -> bool`. "auto" takes the roles `DEFAULT_ROLES`, or, if `adapter_paths` are given, every path among
    them. `roles` narrows either. `probe_inputs` feed the probe forward; they are made from the config of a
    `transformers` model, and needed for any other.

    Raises `TargetError` (a ValueError) for an entry that matches nothing, with near names; for an unknown role; if
    nothing is left; and for a linear that was asked for by name, predicate or adapter but cannot be patched, with the
    reason (`strict=False` lists those under `refused` instead). Raises `ProbeError` if the probe forward cannot be
    run.
    """
    found = linears(model)
    if not found:
        raise TargetError(f"{type(model).__name__} has no linear projection: nothing to patch")
    narrowed = _checked_roles(roles)
    shared = aliases(model, found)
    asked = _asked(found, shared, targets, adapter_paths)

    # prove what is called, with the fused shortcuts of state-space mixers off as they will be
    kinds = containers(model)
    reasons = {path: reason for path in found if (reason := bypassed(model, path)) is not None}
    watched = dict.fromkeys((*found, *kinds, *(_parent(path) for path in found)))
    undo = force_unfused(model, [path for path in found if path not in reasons])
    try:
        report = probe(model, [path for path in watched if path], probe_inputs)
    finally:
        undo()
    reasons |= {
        path: reason for path in found if path not in reasons and (reason := _uncalled(found[path], path, report))
    }

    # pick
    known = _roles(model, found, report, kinds)
    selected = list(asked) if asked is not None else [path for path in found if known[path][0] in DEFAULT_ROLES]
    if narrowed is not None:
        pool = found if asked is None else selected
        selected = [path for path in pool if known[path][0] in narrowed]
    refused = [Refused(path=path, reason=reasons[path]) for path in selected if path in reasons]
    if asked is not None and refused and strict:
        raise TargetError(_refusal(refused), tuple(refused))
    sites = tuple(_site(path, found[path], known[path], shared[path]) for path in selected if path not in reasons)
    if not sites:
        raise TargetError(_nothing(model, known, narrowed, refused, reasons), tuple(refused))

    # neighbours that one may miss in the table: Mamba's dt_proj
    if asked is None:
        around = {_parent(site.path) for site in sites}
        neighbours = [path for path in reasons if _parent(path) in around and path not in selected]
        refused += [Refused(path=path, reason=reasons[path]) for path in neighbours]
    return Resolution(sites=sites, refused=tuple(refused), groups=_groups(sites, report))


def _checked_roles(roles: Collection[str] | None) -> frozenset[str] | None:
    if roles is None:
        return None
    names = (roles,) if isinstance(roles, str) else tuple(roles)
    unknown = [name for name in names if name not in ROLES]
    if unknown or not names:
        raise TargetError(f"unknown roles {unknown!r}; expected one or more of {', '.join(ROLES)}")
    return frozenset(names)


def _asked(
    found: Mapping[str, nn.Module],
    shared: Mapping[str, tuple[str, ...]],
    targets: Any,
    adapter_paths: Collection[str] | None,
) -> list[str] | None:
    """The paths that were asked for one by one, in model order; None if roles decide."""
    if isinstance(targets, str) and targets == "auto":
        if adapter_paths is None:
            return None
        wanted: set[str] = set()
        for name in adapter_paths:
            exact = [path for path in found if name == path or name in shared[path]]
            if not exact:
                raise TargetError(f"no linear at {name!r}, which an adapter has factors for{_near(name, found)}")
            wanted.update(exact)
        return [path for path in found if path in wanted]
    if isinstance(targets, str):
        raise TargetError(
            f'targets={targets!r} is neither "auto", a list of module names nor a predicate; '
            f"write targets=[{targets!r}] for all modules whose path ends with it"
        )
    if callable(targets):
        chosen = [path for path in found if any(targets(name, found[path]) for name in (path, *shared[path]))]
        if not chosen:
            raise TargetError(f"the predicate chose none of the {len(found)} linears; for example {_examples(found)}")
        return chosen
    entries = list(targets)
    if not entries or not all(isinstance(entry, str) and entry for entry in entries):
        raise TargetError(f"targets must name modules, got {targets!r}; for example {_examples(found)}")
    matches = {
        entry: [path for path in found if any(ends_with(name, entry) for name in (path, *shared[path]))]
        for entry in entries
    }
    missed = [entry for entry, paths in matches.items() if not paths]
    if missed:
        raise TargetError(
            "; ".join(f"targets entry {entry!r} matches no linear{_near(entry, found)}" for entry in missed)
        )
    wanted = {path for paths in matches.values() for path in paths}
    return [path for path in found if path in wanted]


def _near(name: str, found: Iterable[str]) -> str:
    """Near names: endings of the same number of parts, and whole paths; or what there is."""
    parts = name.count(".") + 1
    endings = dict.fromkeys(".".join(path.split(".")[-parts:]) for path in found)
    near = difflib.get_close_matches(name, endings, n=4, cutoff=0.5)
    return f"; near names: {', '.join(near)}" if near else f"; this model has {_examples(found)}"


def _examples(found: Iterable[str]) -> str:
    return ", ".join(list(dict.fromkeys(path.rpartition(".")[2] for path in found))[:12])


def _roles(
    model: nn.Module, found: Mapping[str, nn.Module], report: ProbeReport, kinds: Mapping[str, str]
) -> dict[str, tuple[str, bool]]:
    """Role of every linear: by the table where the nearest config above it is in it, by structure elsewhere."""
    types = {
        path: kind
        for path, module in model.named_modules()
        if isinstance(kind := getattr(getattr(module, "config", None), "model_type", None), str)
    }
    known: dict[str, tuple[str, bool]] = {}
    unknown: list[str] = []
    for path in found:
        layout = MODEL_TYPES.get(_nearest(path, types))
        if layout is None:
            unknown.append(path)
        else:
            known[path] = role_in_layout(path, LAYOUTS[layout])
    by_structure = structural_roles(model, unknown, report, kinds) if unknown else {}
    return {path: known.get(path) or by_structure.get(path, ("other", False)) for path in found}


def _nearest(path: str, types: Mapping[str, str]) -> str:
    while path:
        path = _parent(path)
        if path in types:
            return types[path]
    return ""


def _uncalled(module: nn.Module, path: str, report: ProbeReport) -> str | None:
    """Why the probe does not vouch for a linear, or None if it does."""
    silent = [mode for mode in MODES if not report.of(path, mode)]
    if len(silent) == 1:
        return f"not called as a module in {silent[0]} mode (a fused path reads its weight there)"
    if silent:
        parent = _parent(path)
        if parent and not report.of(parent):
            return "the probe forward did not reach it (pass probe_inputs= that do)"
        return "never called as a module: its weight is read directly, or it is not used"
    sizes = linear_sizes(module)
    for mode in MODES:
        for call in report.of(path, mode):
            if (call.width_in, call.width_out) != sizes:
                return f"called with width {call.width_in} -> {call.width_out}, but its attributes say {sizes}"
    return None


def _site(path: str, module: nn.Module, role: tuple[str, bool], others: tuple[str, ...]) -> Site:
    sizes = linear_sizes(module)
    assert sizes is not None, path
    return Site(
        path=path,
        role=role[0],
        in_features=sizes[0],
        out_features=sizes[1],
        reads_encoder=role[1],
        aliases=others,
    )


def _groups(sites: Sequence[Site], report: ProbeReport) -> tuple[tuple[str, ...], ...]:
    groups: dict[Any, list[str]] = {}
    for site in sites:
        groups.setdefault((block(site.path), report.reads(site.path)), []).append(site.path)
    return tuple(tuple(paths) for paths in groups.values())


def _refusal(refused: Sequence[Refused]) -> str:
    shown = "; ".join(f"{item.path!r}: {item.reason}" for item in refused[:5])
    more = f"; and {len(refused) - 5} more" if len(refused) > 5 else ""
    return f"{len(refused)} of the linears asked for cannot be patched: {shown}{more}. Leave them out of targets"


def _nothing(
    model: nn.Module,
    known: Mapping[str, tuple[str, bool]],
    narrowed: frozenset[str] | None,
    refused: Sequence[Refused],
    reasons: Mapping[str, str],
) -> str:
    if refused:
        return _refusal(refused)
    there = list(dict.fromkeys(role for path, (role, _) in known.items() if path not in reasons))
    wanted = ", ".join(sorted(narrowed or DEFAULT_ROLES))
    return (
        f"{type(model).__name__} has no linear with role {wanted}; "
        f"its linears have the roles {', '.join(there) or 'none'}; "
        f"name modules instead: targets=[...], for example {_examples(known)}"
    )


def _parent(path: str) -> str:
    return path.rpartition(".")[0]
