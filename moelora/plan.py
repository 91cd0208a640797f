"""What patching a model would do, worked out and checked before anything is changed. Begin with make_plan."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moelora.bank import Expert, absent_expert
from moelora.config import MoELoRAConfig
from moelora.integrations.adapters import Adapter, AdapterError, AdapterSource, SiteFactors
from moelora.integrations.card import looks_like_hub_id
from moelora.integrations.families import linear_sizes, linears
from moelora.integrations.matching import match_adapter
from moelora.integrations.targets import Resolution, Site, resolve_sites

logger: logging.Logger = logging.getLogger("moelora")


@dataclass(frozen=True, kw_only=True)
class ExpertPlan:
    """One expert to be: its name, its source, and its factors at each site (None: fresh, of this rank).

    `shared_A`: it is a head of the A that it shares with the others of the kind.
    """

    name: str
    source: AdapterSource
    factors: Mapping[str, SiteFactors] | None
    rank: int = 0
    trainable: bool = False
    shared_A: bool = False

    def at(self, site: Site) -> Expert | None:
        """The expert's factors at a site; None where they have to be made."""
        if self.factors is None:
            return None
        known = self.factors.get(site.path)
        if known is None:
            return absent_expert(site.in_features, site.out_features)
        return Expert(known.A_RD, known.B_RO, known.scale, known.bias_O)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `patch_model` is about to do. `str(plan)` is the table that `dry_run=True` is asked for.

    Attributes:
        config: options of the mixture.
        experts: in the order of their ids.
        resolution: which projections are patched, and which were refused.
        notes: what was left out, one sentence each.
    """

    config: MoELoRAConfig
    experts: tuple[ExpertPlan, ...]
    resolution: Resolution
    notes: tuple[str, ...] = ()

    @property
    def sites(self) -> tuple[Site, ...]:
        """The projections that are patched."""
        return self.resolution.sites

    def ranks(self, path: str) -> tuple[int, ...]:
        """Rank of each expert at a site."""
        return tuple(
            expert.rank if expert.factors is None else known.A_RD.shape[0] if (known := expert.factors.get(path)) else 0
            for expert in self.experts
        )

    def __str__(self) -> str:
        lines = [str(self.resolution), ""]
        for number, expert in enumerate(self.experts):
            ranks = sorted({self.ranks(site.path)[number] for site in self.sites} - {0})
            count = sum(self.ranks(site.path)[number] > 0 for site in self.sites)
            kind = "trained" if expert.trainable else "frozen"
            lines.append(f"expert {number}: {expert.name} ({kind}, rank {ranks}, {count} sites) from {expert.source}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def make_plan(
    model: nn.Module,
    adapters: Sequence[Adapter],
    *,
    config: MoELoRAConfig,
    targets: Any = "auto",
    roles: Any = None,
    num_experts: int = 0,
    rank: int = 0,
    freeze_experts: bool = True,
    strict: bool = True,
    probe_inputs: Any = None,
) -> Plan:
    """Resolve the sites, place every adapter's factors on them, and check that nothing is lost.

    Raises:
        ValueError: for sites that cannot be patched, factors that fit nowhere, or a configuration that fits no site.
    """
    known = {path: sizes for path, module in linears(model).items() if (sizes := linear_sizes(module))}
    model_type = getattr(getattr(model, "config", None), "model_type", None)

    # where does each adapter's every factor go?
    experts, notes = [], []
    for adapter in adapters:
        match = match_adapter(adapter, known, model_type=model_type, model=model)
        if match.unmatched:
            shown = "; ".join(f"{key}: {reason}" for key, reason in match.unmatched[:5])
            message = (
                f"{len(match.unmatched)} factors of adapter {adapter.name!r} ({adapter.source}) fit nowhere in this "
                f"model: {shown}"
            )
            if strict or not match.factors:
                raise AdapterError(f"{message}; is it an adapter of another base model? (strict=False leaves them out)")
            notes.append(message)
        notes += [f"{adapter.name}: {note}" for note in (*adapter.notes, *match.notes)]
        notes += doubts(adapter, model)
        experts.append(
            ExpertPlan(name=adapter.name, source=adapter.source, factors=match.factors, trainable=not freeze_experts)
        )

    # which projections are patched?
    adapter_paths = None
    if adapters and num_experts == 0:
        adapter_paths = {path for expert in experts for path in expert.factors}
    resolution = resolve_sites(
        model, targets=targets, roles=roles, adapter_paths=adapter_paths, probe_inputs=probe_inputs
    )
    experts = [check_placed(expert, resolution, strict=strict, notes=notes) for expert in experts]
    if not resolution.sites:
        raise ValueError(f"nothing is left to patch:\n{resolution}")

    for number in range(num_experts):
        source = AdapterSource(kind="fresh", location=f"rank {rank}")
        name = f"expert{number}"
        experts.append(
            ExpertPlan(name=name, source=source, factors=None, rank=rank, trainable=True, shared_A=config.shared_A)
        )
    names = [expert.name for expert in experts]
    if len(set(names)) < len(names):
        raise ValueError(f"experts need different names, got {names}; pass a mapping of names to sources")
    if (top_k := getattr(config.router, "top_k", 1)) > len(experts):
        raise ValueError(f"top_k={top_k} experts per token, but there are {len(experts)}; lower top_k")
    for note in notes:
        logger.warning(note)
    return Plan(config=config, experts=tuple(experts), resolution=resolution, notes=tuple(notes))


def check_placed(expert: ExpertPlan, resolution: Resolution, *, strict: bool, notes: list[str]) -> ExpertPlan:
    """The expert with the factors that the sites take; factors outside are an error, or a note if not strict."""
    assert expert.factors is not None
    paths = {site.path for site in resolution.sites}
    dropped = sorted(set(expert.factors) - paths)
    if dropped:
        message = (
            f"{len(dropped)} of {len(expert.factors)} projections of adapter {expert.name!r} "
            f"lie outside the targets, such as {dropped[:4]}"
        )
        if strict:
            raise ValueError(
                f"{message}; a part of an adapter is another adapter: widen targets or roles (targets='auto' takes "
                "every projection that an adapter has factors for), or accept the loss with strict=False"
            )
        notes.append(f"dropped: {message}")
    if len(dropped) == len(expert.factors):
        raise ValueError(f"adapter {expert.name!r} has no factors at any of the targets; it would do nothing")
    kept = {path: factors for path, factors in expert.factors.items() if path in paths}
    return ExpertPlan(name=expert.name, source=expert.source, factors=kept, trainable=expert.trainable)


def doubts(adapter: Adapter, model: nn.Module) -> list[str]:
    """What may be wrong with an adapter though it fits: another base by name, a revision that moves.

    Names are no proof, neither way: keys and shapes have been checked already.
    """
    found = []
    own = str(getattr(model, "name_or_path", "") or "")
    names = [name for name in (adapter.base_model, own) if name and looks_like_hub_id(name)]
    if len(names) == 2 and len({name.split("/")[-1].lower() for name in names}) == 2:
        found.append(f"{adapter.name}: trained on {adapter.base_model!r}, it says; this model is {own!r}")
    source = adapter.source
    if source.kind == "hub" and source.commit is not None and source.revision != source.commit:
        pinned = f"{source.location}@{source.commit}"
        found.append(f"{adapter.name}: {source.revision or 'main'!r} may move; {pinned!r} is what was loaded")
    return found


def base_dtype(module: nn.Module, model: nn.Module) -> torch.dtype:
    """The floating dtype that a projection works in; a quantised one's is that of its model."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point() and tensor.dtype.itemsize >= 2:
            return tensor.dtype
    return getattr(model, "dtype", torch.float32)
