"""Change a mixture that is in place: add and remove experts, choose what is trained. Begin with add_expert."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from moelora.bank import Expert, absent_expert, fresh_expert
from moelora.config import MoELoRAConfig
from moelora.integrations.adapters import AdapterSource, load_adapters
from moelora.integrations.families import linear_sizes
from moelora.integrations.matching import match_adapter
from moelora.integrations.sources import check_name
from moelora.mixture import Mixture, find_mixture
from moelora.patch import fresh_scale
from moelora.router_start import start_at_prototype

ROUTER_STARTS = ("prototype", "zero")


def add_expert(
    model: nn.Module,
    source: Any = None,
    *,
    name: str | None = None,
    rank: int | None = None,
    trainable: bool | None = None,
    router_start: str = "prototype",
    revision: str | None = None,
    token: "str | bool | None" = None,
    endpoint: str | None = None,
    cache_dir: Any = None,
    local_files_only: bool = False,
) -> None:
    """Append an expert to a patched model: an adapter, or with `rank` and no source a fresh one.

    Routers keep what they know of the others, bit for bit. Parameters change their identity, so make the optimiser
    afterwards.

    Args:
        model: a patched model.
        source: one adapter, named as in `patch_model`.
        name: of the expert; by default it is derived from the source.
        rank: of a fresh expert.
        trainable: by default adapters are frozen and fresh experts trained.
        router_start: where linear routers start the new expert. "prototype": at the direction of inputs that its
            factors lengthen most (as `Arrow`), as long as the other rows are on average; a fresh expert, whose B is
            zero, has none and starts at a score of 0. The direction's sign is a convention, and may turn the expert's
            inputs away at first: `moelora.warm_start` chooses it by data. "zero": at a score of 0.
        revision, token, endpoint, cache_dir, local_files_only: for the hub.

    Raises:
        ValueError: for a name that is taken, an adapter with factors outside the patched sites, or several adapters.
            The model is as it was then.
    """
    _, mixture = find_mixture(model)
    if router_start not in ROUTER_STARTS:
        raise ValueError(f"unknown router_start {router_start!r}; expected one of {ROUTER_STARTS}")
    if (source is None) == (rank is None):
        raise ValueError("pass either an adapter as source, or rank= for a fresh expert")
    if rank is not None:
        if rank < 1 or name is None:
            raise ValueError(f"a fresh expert needs a name and a rank of at least 1, got name={name!r}, rank={rank}")
        check_name(name)
        experts, origin = _fresh(mixture, rank), AdapterSource(kind="fresh", location=f"rank {rank}")
    else:
        hub = {"token": token, "endpoint": endpoint, "cache_dir": cache_dir, "local_files_only": local_files_only}
        wanted = [source] if name is None else {name: source}
        adapters = load_adapters(wanted, revision=revision, **hub)
        if len(adapters) != 1:
            raise ValueError(f"the source holds {len(adapters)} adapters; add them one by one")
        experts, origin, name = _placed(model, mixture, adapters[0]), adapters[0].source, name or adapters[0].name
    if name in mixture.names:
        raise ValueError(f"there is an expert {name!r} already; pass another name=")

    for path, layer in mixture.layers.items():
        expert = experts[path]
        wanted = bool(expert.rank) and (source is None if trainable is None else trainable)
        layer.bank.add(expert, trainable=wanted, shared=source is None and mixture.config.shared_A)
    grown = []
    try:
        for router, layers in mixture.by_router():
            router.add_experts([any(layer.bank.ranks[-1] for layer in layers)])
            grown.append(router)
            banks = [layer.bank for layer in layers]
            router.start_from(banks, [len(mixture.names)])
            if router_start == "prototype":
                start_at_prototype(router, banks, len(mixture.names))
    except ValueError:
        # a router may refuse an expert
        for layer in mixture.layers.values():
            layer.bank.drop(len(mixture.names))
        for router in grown:
            router.keep_experts(range(len(mixture.names)))
        raise
    mixture.names.append(name)
    mixture.sources.append(origin.to_dict())
    if any(layer.bank.trainable[-1] for layer in mixture.layers.values()):
        mixture.changed.add(name)
    _forget_last_call(mixture)


def remove_expert(model: nn.Module, name: str) -> None:
    """Take an expert out; those behind it move up by one id.

    Raises:
        ValueError: for an unknown name, for the last expert, or if fewer experts would be left than act on a token.
    """
    _, mixture = find_mixture(model)
    index = mixture.index(name)
    left = len(mixture.names) - 1
    top_k = getattr(mixture.config.router, "top_k", 1)
    if left < top_k:
        raise ValueError(f"{left} experts would be left, but {top_k} act on each token; unpatch the model instead")
    for layer in mixture.layers.values():
        layer.bank.drop(index)
    for router, _ in mixture.by_router():
        router.keep_experts([other for other in range(left + 1) if other != index])
    del mixture.names[index], mixture.sources[index]
    mixture.changed.discard(name)
    _forget_last_call(mixture)


def set_trainable(model: nn.Module, *, routers: bool = True, experts: "bool | Iterable[str]" = False) -> None:
    """Choose what is trained. Everything else of the mixture is frozen; the base model's flags stay as they are.

    Experts that become trainable are parameters from then on, in fp32, so make the optimiser afterwards. Those that
    are frozen go back to the base model's dtype.

    Args:
        model: a patched model.
        routers: whether routers are trained.
        experts: True for all, False for none, or their names.

    Raises:
        ValueError: for an unknown name, or if only some heads of one A are named.
    """
    _, mixture = find_mixture(model)
    if isinstance(experts, bool):
        ids = list(range(len(mixture.names))) if experts else []
    else:
        ids = [mixture.index(name) for name in ([experts] if isinstance(experts, str) else experts)]
    for layer in mixture.layers.values():
        layer.bank.set_trainable(ids)
        # somebody may have frozen the whole model by hand
        layer.bank.requires_grad_(True)
    for router in mixture.routers().values():
        router.requires_grad_(routers)
    mixture.changed |= {mixture.names[index] for index in ids}
    mixture.hooks.watch_anew()


def _fresh(mixture: Mixture, rank: int) -> dict[str, Expert]:
    """A fresh expert for every site; in a mixture of heads, another head."""
    config: MoELoRAConfig = mixture.config
    generator = torch.Generator().manual_seed(config.seed + len(mixture.names))
    made = {}
    for path, layer in mixture.layers.items():
        scale = fresh_scale(config, rank)
        expert = fresh_expert(layer.in_features, layer.out_features, rank, scale=scale, generator=generator)
        if config.shared_A and any(layer.bank.shared):
            A_RD = layer.bank.expert(layer.bank.shared.index(True)).A_RD
            if A_RD.shape[0] != rank:
                raise ValueError(f"a fresh expert shares the A of the others, of rank {A_RD.shape[0]}; got rank={rank}")
            expert = expert._replace(A_RD=A_RD)
        made[path] = expert
    return made


def _placed(model: nn.Module, mixture: Mixture, adapter: Any) -> dict[str, Expert]:
    """An adapter's factors at each patched site."""
    sizes = {path: (layer.in_features, layer.out_features) for path, layer in mixture.layers.items()}
    root, _ = find_mixture(model)
    inside = tuple(f"{site}." for site in sizes)
    others = {
        path: found
        for path, module in root.named_modules()
        if path not in sizes and not path.startswith(inside) and (found := linear_sizes(module)) is not None
    }
    match = match_adapter(adapter, sizes | others, model_type=mixture.base_model.get("model_type"), model=root)
    outside = [*(key for key, _ in match.unmatched), *(path for path in match.factors if path not in sizes)]
    if outside:
        raise ValueError(
            f"{len(outside)} projections of adapter {adapter.name!r} are not patched, such as {outside[:3]}; "
            "patch the model anew with all adapters"
        )
    return {
        path: Expert(found.A_RD, found.B_RO, found.scale, found.bias_O)
        if (found := match.factors.get(path)) is not None
        else absent_expert(*sizes[path])
        for path in mixture.layers
    }


def _forget_last_call(mixture: Mixture) -> None:
    """What was kept of the last call speaks of ids and tensors that are no more."""
    mixture.tape.records.clear()
    mixture.tape.leaves.clear()
    mixture.hooks.watch_anew()
