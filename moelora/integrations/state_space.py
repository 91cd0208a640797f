"""Fused shortcuts of state-space mixers, which read raw weights, forced off. Begin with `force_unfused`.

In `transformers` a Mamba-like mixer in training and without a cache hands `self.out_proj.weight` (and `x_proj`,
`dt_proj`) to one fused kernel (`mamba_inner_fn`, `mamba2_split_conv1d_scan_combined`), behind `if self.training and
cache_params is None`; the `mamba_ssm` package does the same behind `use_fast_path` or `use_mem_eff_path`. A patched
projection would then be passed by. Here the guard's flag is switched off on the instance, so that the mixer takes its
other branch, in which the convolution and scan kernels stay fast and the projections are called as modules. No class
and no module of another package is changed: two models in one process do not know of each other.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from torch import nn

# flags of a mixer whose only effect is the choice of the fused path
SWITCHES = ("training", "use_fast_path", "use_mem_eff_path")
METADATA = ("device", "dtype", "shape", "is_meta")
BUILDERS = ("__init__", "reset_parameters", "extra_repr")


@dataclass(frozen=True, kw_only=True)
class RawReads:
    """How the methods of a mixer's class read the weights of its children without calling them."""

    guards: dict[str, frozenset[str]] = field(default_factory=dict)
    """child -> the flags that guard its raw reads"""
    unguarded: frozenset[str] = frozenset()
    """children of which at least one raw read stands behind no flag of `SWITCHES`"""
    busy: frozenset[str] = frozenset()
    """flags that are also read for another purpose than choosing the fused path"""


def is_mixer(module: nn.Module) -> bool:
    """Whether a module is a state-space mixer: it holds a decay `A_log`, or a short convolution `conv1d`."""
    return hasattr(module, "A_log") or isinstance(getattr(module, "conv1d", None), nn.Module)


def bypassed(model: nn.Module, path: str) -> str | None:
    """Why a projection of a mixer cannot be patched, or None where it can (or is no mixer's projection at all)."""
    parent, child = _parent(model, path)
    if not is_mixer(parent):
        return None
    reads = raw_reads(type(parent))
    kind = type(parent).__name__
    if child in reads.unguarded:
        return f"{kind} reads {child}.weight directly instead of calling the module"
    busy = reads.guards.get(child, frozenset()) & reads.busy
    if busy:
        return (
            f"{kind} reads {child}.weight directly in a fused kernel, and its switch {', '.join(sorted(busy))} "
            "also serves another purpose, so it cannot be forced off"
        )
    return None


def force_unfused(model: nn.Module, paths: Collection[str]) -> Callable[[], None]:
    """Make every mixer that holds one of these projections call it as a module, in training too; returns the undo.

    Mixers of which only always-called projections are named (`in_proj`) keep their fused kernel. Works before and
    after the modules at these paths are replaced. Raises ValueError, with nothing changed, for a projection that
    cannot be freed.
    """
    # decide everything first
    switches: dict[nn.Module, set[str]] = {}
    for path in paths:
        reason = bypassed(model, path)
        if reason is not None:
            raise ValueError(f"cannot patch {path!r}: {reason}; leave it out of targets")
        parent, child = _parent(model, path)
        if is_mixer(parent):
            switches.setdefault(parent, set()).update(raw_reads(type(parent)).guards.get(child, ()))

    # then switch off
    undo: list[Callable[[], None]] = []
    for mixer, flags in switches.items():
        for flag in sorted(flags):
            undo.append(_without_training(mixer) if flag == "training" else _without_flag(mixer, flag))
    # partials, no closures: a copy of the model copies its undo along
    return partial(_restore, undo)


def _restore(undo: list[Callable[[], None]]) -> None:
    while undo:
        undo.pop()()


class _TrainingOff:
    """Hooks that show a mixer `training=False` while its own forward runs; its children keep theirs.

    `training` decides nothing else in these mixers (`RawReads.busy` is checked), and model.train() stays in charge of
    it.
    """

    def __init__(self) -> None:
        self.saved: list[bool] = []

    def enter(self, mixer: nn.Module, args: Any) -> None:
        self.saved.append(mixer.training)
        mixer.training = False

    def leave(self, mixer: nn.Module, args: Any, output: Any) -> None:
        # a pre-hook before ours may have raised: then there is nothing to put back
        if self.saved:
            mixer.training = self.saved.pop()


def _without_training(mixer: nn.Module) -> Callable[[], None]:
    off = _TrainingOff()
    # always_call: recomputation under activation checkpointing leaves a forward early, by an exception
    handles = [
        mixer.register_forward_pre_hook(off.enter),
        mixer.register_forward_hook(off.leave, always_call=True),
    ]
    return partial(_restore, [handle.remove for handle in handles])


def _without_flag(mixer: nn.Module, flag: str) -> Callable[[], None]:
    before = getattr(mixer, flag)
    setattr(mixer, flag, False)
    return partial(setattr, mixer, flag, before)


@cache
def raw_reads(kind: type[nn.Module]) -> RawReads:
    """Read the source of a mixer's class: which `self.<child>.weight` it uses, and behind which flag.

    A class without source (typed into a console) counts as one that reads nothing; the probe forward still judges it.
    """
    guards: dict[str, set[str]] = {}
    unguarded: set[str] = set()
    choosing: dict[str, int] = {}
    reading: dict[str, int] = {}
    for method in _methods(kind):
        for node, flags, is_test in _walk(method, frozenset()):
            flag = _flag(node)
            if flag is not None:
                reading[flag] = reading.get(flag, 0) + 1
                choosing[flag] = choosing.get(flag, 0) + is_test
            child = _raw_child(node)
            if child is None:
                continue
            if flags:
                guards.setdefault(child, set()).update(flags)
            else:
                unguarded.add(child)
    return RawReads(
        guards={child: frozenset(flags) for child, flags in guards.items()},
        unguarded=frozenset(unguarded),
        busy=frozenset(flag for flag, count in reading.items() if count > choosing[flag]),
    )


def _parent(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    prefix, _, child = path.rpartition(".")
    return model.get_submodule(prefix), child


def _methods(kind: type[nn.Module]) -> Iterator[ast.FunctionDef]:
    """The methods that a forward may run, each as the class resolves it, parsed from source."""
    seen: set[str] = set()
    for base in kind.__mro__:
        if base is nn.Module:
            return
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):
            continue
        tree = ast.parse(source).body[0]
        for method in getattr(tree, "body", ()):
            if isinstance(method, ast.FunctionDef) and method.name not in seen:
                seen.add(method.name)
                if method.name not in BUILDERS and not method.name.startswith(("init_", "_init_")):
                    yield method


def _walk(
    node: ast.AST, flags: frozenset[str], is_test: bool = False
) -> Iterator[tuple[ast.AST, frozenset[str], bool]]:
    """Every node below: the flags that must be on to reach it, and whether it is part of a guard of raw reads."""
    if isinstance(node, ast.Attribute) and node.attr in METADATA and isinstance(node.value, ast.Attribute):
        # self.x_proj.weight.device asks about the weight and does not use it
        return
    yield node, flags, is_test
    if isinstance(node, ast.If):
        own = frozenset(filter(None, map(_flag, _conjuncts(node.test))))
        guards_raw = any(_raw_child(inner) for statement in node.body for inner in ast.walk(statement))
        yield from _walk(node.test, flags, is_test=bool(own) and guards_raw)
        for statement in node.body:
            yield from _walk(statement, flags | own)
        for statement in node.orelse:
            yield from _walk(statement, flags)
        return
    for inner in ast.iter_child_nodes(node):
        yield from _walk(inner, flags, is_test)


def _conjuncts(test: ast.expr) -> list[ast.expr]:
    return test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]


def _flag(node: ast.AST) -> str | None:
    """The name of the switch, if the node is `self.<switch>`."""
    if isinstance(node, ast.Attribute) and node.attr in SWITCHES and _is_self(node.value):
        return node.attr
    return None


def _raw_child(node: ast.AST) -> str | None:
    """The name of the child, if the node is `self.<child>.weight`."""
    if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.value, ast.Attribute):
        return node.value.attr if _is_self(node.value.value) else None
    return None


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"
