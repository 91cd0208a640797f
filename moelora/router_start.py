"""Where a router begins: at the prototypes of its experts instead of at random. Begin with warm_start."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moelora.bank import ExpertBank
from moelora.layer import MoELoRALinear
from moelora.mixture import Mixture, find_mixture, use_experts
from moelora.routers.base import AbstractRouter
from moelora.routers.linear import LinearRouter
from moelora.routers.prototype_router import PrototypeRouter
from moelora.routers.prototypes import shared_prototype
from moelora.site_inputs import evaluating, listen


def warm_start(
    model: nn.Module,
    prototypes: "str | Mapping[str, Tensor]" = "arrow",
    *,
    scale: float = 1.0,
    experts: "str | Iterable[str] | None" = None,
    batches: "Mapping[str, Iterable[Mapping[str, Any]]] | None" = None,
) -> None:
    """Start the routers of a patched model at prototypes: each expert's row points where its prototype does.

    The rows get the length `scale`, so that inputs of mean square 1, as norms make them, get scores with a standard
    deviation of about `scale`. An expert without a prototype, such as a fresh one, gets a row of zeros. Weights are
    written in place: an optimiser that holds them stays valid.

    A prototype has no sign of its own, and a linear router's row has one. It is chosen by data, where there are
    `batches` of an expert: the mean score of its own inputs is positive then. Otherwise it is a convention (the entry
    of largest magnitude is positive), and the row may as well turn the expert's inputs away until it is trained.

    On a mixture with `Arrow` this takes the prototypes anew, for experts that have been trained.

    Args:
        model: a patched model whose router scores experts by one row each: `Learned` and other linear routers, `Arrow`,
            `Phatgoose`.
        prototypes: "arrow", from the experts' factors (`moelora.routers.prototypes`); or rows for each site, (E, D), by
            its path, such as stacked gates of `moelora.train_phatgoose`. Sites that share a router need one entry.
        scale: the length of the rows.
        experts: only these experts' rows; by default all.
        batches: for "arrow", keyword arguments of the model's forward from the data that an expert was trained on, by
            expert; the expert acts alone on them.

    Raises:
        ValueError: for a router without rows, unknown names and sites, rows that do not fit. Nothing is changed then.
    """
    _, mixture = find_mixture(model)
    if not scale > 0 or scale == math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}")
    names = mixture.names if experts is None else [experts] if isinstance(experts, str) else list(experts)
    ids = [mixture.index(name) for name in names]
    owned = [(_rows_of(router), layers) for router, layers in mixture.by_router()]

    if not isinstance(prototypes, str):
        if batches is not None:
            raise ValueError("rows that are given have signs of their own; batches= chooses those of 'arrow'")
        found = _given(mixture, prototypes, ids)
    elif prototypes == "arrow":
        found = [_arrow(layers, ids) for _, layers in owned]
        for name, data in (batches or {}).items():
            if name not in names:
                raise ValueError(f"there are batches of {name!r}, but the rows to start are those of {names}")
            _turn(model, mixture, name, data, [rows_ND[names.index(name)] for rows_ND in found])
    else:
        raise ValueError(f"unknown prototypes {prototypes!r}; expected 'arrow' or rows (E, D) for each site")

    with torch.no_grad():
        for (rows_ED, _), rows_ND in zip(owned, found, strict=True):
            length_N1 = rows_ND.norm(dim=-1, keepdim=True)
            unit_ND = torch.where(length_N1 > 0, rows_ND / length_N1.clamp(min=1e-300), 0.0)
            for expert, unit_D in zip(ids, unit_ND, strict=True):
                rows_ED[expert].copy_(scale * unit_D)


@torch.no_grad()
def start_at_prototype(router: AbstractRouter, banks: Sequence[ExpertBank], expert: int) -> None:
    """Start a new expert of a linear router at its prototype, as long as the other rows are on average.

    Zeros where it has none, or the other rows are. Routers of other kinds start as they do.
    """
    if isinstance(router, LinearRouter):
        known_E = router.available_E.clone()
        known_E[expert] = False
        lengths_N = router.weight_ED[known_E].norm(dim=-1)
        if len(lengths_N):
            row_D = shared_prototype([bank.expert(expert) for bank in banks])
            router.weight_ED[expert].copy_(float(lengths_N.mean()) * row_D)


# --- inside -----------------------------------------------------------------------------------------------------------


def _rows_of(router: AbstractRouter) -> Tensor:
    if isinstance(router, LinearRouter):
        return router.weight_ED
    if isinstance(router, PrototypeRouter):
        return router.prototype_ED
    raise ValueError(
        f"a {type(router).__name__} has no row for each expert to start at a prototype; "
        "patch with router='learned' or another router that scores experts by one linear map"
    )


def _arrow(layers: Sequence[MoELoRALinear], ids: Sequence[int]) -> Tensor:
    """The prototypes of some experts for one router, (n, D)."""
    prototypes = [shared_prototype([layer.bank.expert(expert) for layer in layers]) for expert in ids]
    return torch.stack(prototypes).cpu()


def _given(mixture: Mixture, prototypes: Mapping[str, Tensor], ids: Sequence[int]) -> list[Tensor]:
    """The same from what the caller hands in."""
    if unknown := sorted(set(prototypes) - set(mixture.layers)):
        raise ValueError(f"there are no patched sites {unknown[:3]}; this model has {list(mixture.layers)[:3]} ...")
    found = []
    for _, layers in mixture.by_router():
        sites = [layer.site for layer in layers]
        site = next((site for site in sites if site in prototypes), None)
        if site is None:
            raise ValueError(f"there are no rows for {sites[0]!r}; give rows (E, D) for each site")
        rows_ED, shape = prototypes[site], (len(mixture.names), layers[0].in_features)
        if tuple(rows_ED.shape) != shape or not bool(torch.isfinite(rows_ED).all()):
            raise ValueError(f"the rows for {site!r} must be finite and of shape {shape}, got {tuple(rows_ED.shape)}")
        found.append(rows_ED.detach().to("cpu", torch.float64)[list(ids)])
    return found


def _turn(
    model: nn.Module, mixture: Mixture, name: str, batches: Iterable[Mapping[str, Any]], rows: Sequence[Tensor]
) -> None:
    """Turn an expert's prototypes, in place, to where its own inputs lie."""
    owners = {layers[0].site: number for number, (_, layers) in enumerate(mixture.by_router())}
    sums: dict[str, Tensor] = {}

    def hear(site: str, x_TD: Tensor) -> None:
        if site in owners:
            sum_D = x_TD.sum(0, dtype=torch.float64).cpu()
            sums[site] = sums[site] + sum_D if site in sums else sum_D

    with evaluating(model), torch.no_grad(), use_experts(model, name), listen(model, hear):
        for batch in batches:
            model(**batch)
    if not sums:
        raise ValueError(f"the batches of {name!r} are empty; expected keyword arguments of the model's forward")
    for site, sum_D in sums.items():
        row_D = rows[owners[site]]
        if torch.dot(row_D, sum_D) < 0:
            row_D.neg_()
