"""Which adapters of a pool are worth mixing for some data. Begin with select_experts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moelora.hooks import loss_in
from moelora.integrations.sources import parse_sources
from moelora.mixture import disabled, find_mixture, use_experts
from moelora.patch import patch_model, unpatch_model
from moelora.routers.prototypes import arrow_prototype
from moelora.site_inputs import evaluating, listen

METHODS = ("perplexity", "prototype", "random")


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Adapters of a pool, the preferred ones first.

    Attributes:
        names: as `patch_model` would name them.
        scores: what each was preferred by; empty where nothing was measured.
    """

    names: tuple[str, ...]
    scores: tuple[float, ...] = ()


def select_experts(
    pool: "Sequence[Any] | Mapping[str, Any]",
    method: "str | Sequence[str]" = "perplexity",
    *,
    k: int | None = None,
    model: nn.Module | None = None,
    batches: "Iterable[Mapping[str, Any]] | None" = None,
    generator: torch.Generator | None = None,
    revision: str | None = None,
    token: "str | bool | None" = None,
    endpoint: str | None = None,
    cache_dir: Any = None,
    local_files_only: bool = False,
) -> Selection:
    """Choose k adapters of a pool.

    The model is patched with the pool while it is measured, in evaluation mode and without gradients, and is then as it
    was, bit for bit.

    Args:
        pool: adapters, as `patch_model` takes them.
        method: how they are preferred.

            - "perplexity": by the model's mean loss on the batches (the logarithm of a perplexity, for language
              models) with that adapter alone, at the scale it was trained at. The score is that loss; less is better.
            - "prototype": by the mean of |x . v| over all tokens of the batches, padding left out, and all projections
              that the adapter has factors for, where x is what the base model's projection reads and v the adapter's
              prototype there (`moelora.routers.prototypes`). More is better. Needs no labels and one pass over the
              data, but prefers adapters of projections with long inputs: compare adapters of the same projections.
            - "random": a draw without replacement, by `generator`.
            - names: these, in this order.
        k: how many; by default all, ranked.
        model: the base model, for methods that measure.
        batches: keyword arguments of its forward, for methods that measure; with labels for "perplexity". Each batch
            weighs the same there.
        generator: for "random".
        revision, token, endpoint, cache_dir, local_files_only: for the hub, as in `patch_model`.

    Raises:
        ValueError: for an unknown method or name, a k that is larger than the pool, and for what a method lacks; also
            where `patch_model` would refuse the pool.
    """
    names = list(parse_sources(pool))
    if isinstance(method, str) and method not in METHODS:
        raise ValueError(f"unknown method {method!r}; expected one of {METHODS}, or a list of names")
    if not isinstance(method, str):
        return Selection(names=_named(names, list(method), k))
    _check_count(k, len(names), "the pool holds")
    if method == "random":
        if generator is None:
            raise ValueError("method='random' needs generator=, such as torch.Generator().manual_seed(0)")
        order = torch.randperm(len(names), generator=generator).tolist()
        return Selection(names=tuple(names[index] for index in order[:k]))
    if model is None or batches is None:
        raise ValueError(f"method={method!r} needs model= and batches= to measure on")

    hub = {"token": token, "endpoint": endpoint, "cache_dir": cache_dir, "local_files_only": local_files_only}
    # given ids: no router is needed where the mixture is fixed
    patch_model(model, pool, router="given", revision=revision, **hub)
    try:
        with evaluating(model), torch.no_grad():
            scores = _losses(model, names, batches) if method == "perplexity" else _fits(model, names, batches)
    finally:
        unpatch_model(model)
    sign = -1 if method == "prototype" else 1
    order = sorted(range(len(names)), key=lambda index: sign * scores[index])[:k]
    return Selection(names=tuple(names[index] for index in order), scores=tuple(scores[index] for index in order))


# --- inside -----------------------------------------------------------------------------------------------------------


def _named(names: Sequence[str], wanted: list[str], k: int | None) -> tuple[str, ...]:
    if unknown := [name for name in wanted if name not in names]:
        raise ValueError(f"the pool has no adapters {unknown}; it has {list(names)}")
    if not wanted or len(set(wanted)) < len(wanted):
        raise ValueError(f"name different adapters, one at least, got {wanted}")
    _check_count(k, len(wanted), "the list has")
    return tuple(wanted[:k])


def _check_count(k: int | None, most: int, what: str) -> None:
    if k is not None and not 1 <= k <= most:
        raise ValueError(f"k must lie between 1 and {most}, since {what} {most} adapters; got {k}")


def _losses(model: nn.Module, names: Sequence[str], batches: Iterable[Mapping[str, Any]]) -> list[float]:
    """The mean loss with each adapter alone."""
    losses: list[list[float]] = []
    for batch in batches:
        losses.append([])
        for name in names:
            with use_experts(model, name):
                loss = loss_in(model(**batch), batch)
            if loss is None:
                raise ValueError("the model returned no loss; method='perplexity' needs labels in each batch")
            # a loss that is no number is the worst there is
            losses[-1].append(float(loss.nan_to_num(nan=float("inf"))))
    _check_any(losses)
    return torch.tensor(losses, dtype=torch.float64).mean(0).tolist()


def _fits(model: nn.Module, names: Sequence[str], batches: Iterable[Mapping[str, Any]]) -> list[float]:
    """The mean of |x . v| over tokens and sites."""
    layers = find_mixture(model)[1].layers
    prototypes = {
        site: torch.stack([arrow_prototype(A_RD, B_RO) for A_RD, B_RO, _, _ in layer.bank.split()]).float()
        for site, layer in layers.items()
    }
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}

    def hear(site: str, x_TD: Tensor) -> None:
        prototype_ED = prototypes[site].to(x_TD.device)
        sum_E = (x_TD.float() @ prototype_ED.T).abs().sum(0, dtype=torch.float64).cpu()
        sums[site], tokens[site] = sums.get(site, 0) + sum_E, tokens.get(site, 0) + x_TD.shape[0]

    with disabled(model), listen(model, hear):
        for batch in batches:
            model(**batch)
    _check_any(list(sums))
    scores = []
    for index in range(len(names)):
        own = [site for site in sums if layers[site].bank.ranks[index] and tokens[site]]
        scores.append(sum(float(sums[site][index]) / tokens[site] for site in own) / max(len(own), 1))
    return scores


def _check_any(measured: Sequence[object]) -> None:
    if not measured:
        raise ValueError("batches is empty; expected keyword arguments of the model's forward")
