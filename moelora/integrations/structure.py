"""Roles of projections in an architecture that no table knows. Begin with `structural_roles`.

A container is a module whose class is named like attention or a state-space mixer. Within a container, what reads the
container's input (or the same tensor as the linear called first) leads in, and the last one called, if its output is
as wide as some container's input, leads out. The linears of a block outside its containers are its MLP, by the same
rule.
"""

import re
from collections.abc import Collection, Iterable, Mapping

from torch import nn

from moelora.integrations.families import linear_sizes, linears
from moelora.integrations.probe import ProbeReport

Role = tuple[str, bool]  # the role, and whether the linear reads the encoder's output

ATTENTION = re.compile(r"Attention|Attn")
STATE_SPACE = re.compile(r"Mamba|Mixer|DeltaNet|Recurrent|SSM|StateSpace|RWKV|Retention")
WHOLE_BLOCK = re.compile(r"(Layer|Block|Model|Encoder|Decoder|Stack)$")
NO_CONTAINER = re.compile(r"(Norm\w*|Embeddings?|MLP|Mlp|FFN|FeedForward|Experts|MoE|Moe)$")
CROSS = re.compile(r"cross|enc(oder)?_?dec|encoder_attn", re.IGNORECASE)
QUERY = re.compile(r"query|(^|_)w?q(_|$|\d)", re.IGNORECASE)
GATE = re.compile(r"^(router|gate|wg|\w+_gate|gating\w*)$")
MLP = re.compile(
    r"(^|\.)(mlp|ffn?|feed_?forward|experts?|fc\w*|w[123]|(up|down|gate|gate_up)_proj|lin(ear)?_?[12])(\.|$)",
    re.IGNORECASE,
)


def containers(model: nn.Module) -> dict[str, str]:
    """Path -> "attn", "cross" or "ssm" of every attention or state-space module: the outermost below whole blocks.

    Only modules inside a list of blocks count, if any of them stands in one; that leaves pooling heads out.
    """
    named = {
        path: type(module).__name__
        for path, module in model.named_modules()
        if path and (ATTENTION.search(type(module).__name__) or STATE_SPACE.search(type(module).__name__))
        if not NO_CONTAINER.search(type(module).__name__) and linears(module)
    }
    # a block that is named after its mixer (MambaDecoderLayer) holds a container and is none
    kept = {
        path: kind
        for path, kind in named.items()
        if not (WHOLE_BLOCK.search(kind) and any(inner.startswith(path + ".") for inner in named))
    }
    outermost = {path: kind for path, kind in kept.items() if not any(path.startswith(outer + ".") for outer in kept)}
    in_lists = {path: kind for path, kind in outermost.items() if block(path) is not None}
    return {path: _kind(path, kind) for path, kind in (in_lists or outermost).items()}


def block(path: str) -> str | None:
    """The path of the block that a module stands in: up to the first number in it. None outside of all lists."""
    parts = path.split(".")
    place = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return None if place is None else ".".join(parts[: place + 1])


def structural_roles(
    model: nn.Module, paths: Collection[str], report: ProbeReport, kinds: Mapping[str, str]
) -> dict[str, Role]:
    """Role of each of the linears at `paths` that has one; `kinds` are the `containers`, probed in the same `report`.

    Left without a role: what was not called, gates and routers, output heads, embeddings' projections.
    """
    roles: dict[str, Role] = {}
    rest: dict[str, list[str]] = {}
    inside: dict[str, list[str]] = {}
    for path in paths:
        if not report.of(path) or GATE.match(path.rpartition(".")[2]):
            continue
        home = next((container for container in kinds if path.startswith(container + ".")), None)
        if home is not None and not MLP.search(path[len(home) + 1 :]):
            inside.setdefault(home, []).append(path)
        elif block(path) is not None:
            rest.setdefault(path.rpartition(".")[0], []).append(path)

    for home, found in inside.items():
        roles |= _leading_in(home, kinds[home], found, report)
    hidden = {_sizes(model, path)[0] for path in roles}
    for home, found in inside.items():
        roles |= _leading_out(model, kinds[home], [path for path in found if path not in roles], hidden, report)
    widths = {block(path): _sizes(model, path)[0] for path, (role, _) in roles.items() if role.endswith("_in")}
    # a block that holds nothing but an MLP has the width of the others, if these agree
    common = next(iter(set(widths.values()))) if len(set(widths.values())) == 1 else None
    for found in rest.values():
        roles |= _mlp_roles(model, found, report, widths.get(block(found[0]), common))
    return roles


def _leading_in(home: str, kind: str, found: Iterable[str], report: ProbeReport) -> dict[str, Role]:
    """What reads the container's input, or the same tensor as the first linear (in cross-attention, the query)."""
    order = sorted(found, key=lambda path: report.first(path).order)
    queries = [path for path in order if QUERY.search(path.rpartition(".")[2])] if kind == "cross" else []
    lead = report.first((queries or order)[0]).inputs[0]
    given = {number for call in report.of(home) for number in call.inputs} | {lead}
    read = {path: report.first(path).inputs[0] for path in order}
    return {
        path: (f"{kind}_in", kind == "cross" and number != lead) for path, number in read.items() if number in given
    }


def _leading_out(
    model: nn.Module, kind: str, found: Collection[str], hidden: Collection[int], report: ProbeReport
) -> dict[str, Role]:
    """The last one called, if it leads back to a hidden width of the model; what else a mixer has is "ssm_x"."""
    order = sorted(found, key=lambda path: report.first(path).order)
    roles: dict[str, Role] = {}
    if order and _sizes(model, order[-1])[1] in hidden:
        roles[order.pop()] = (f"{kind}_out", False)
    if kind == "ssm":
        roles |= dict.fromkeys(order, ("ssm_x", False))
    return roles


def _mlp_roles(model: nn.Module, found: Iterable[str], report: ProbeReport, hidden: int | None) -> dict[str, Role]:
    order = sorted(found, key=lambda path: report.first(path).order)
    if hidden is None:
        return {}
    lead = report.first(order[0]).inputs[0]
    roles: dict[str, Role] = {}
    for path in order:
        wide, narrow = _sizes(model, path)
        if wide == hidden and report.first(path).inputs[0] == lead:
            roles[path] = ("mlp_in", False)
        elif narrow == hidden:
            roles[path] = ("mlp_out", False)
    return roles


def _kind(path: str, name: str) -> str:
    if CROSS.search(path.rpartition(".")[2]) or CROSS.search(name):
        return "cross"
    return "ssm" if STATE_SPACE.search(name) and not ATTENTION.search(name) else "attn"


def _sizes(model: nn.Module, path: str) -> tuple[int, int]:
    sizes = linear_sizes(model.get_submodule(path))
    assert sizes is not None, path
    return sizes
