"""The losses on one call's routings, weighed and averaged over routers. Begin with weigh."""

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from moelora import losses
from moelora.config import AuxLosses
from moelora.routing import dense_weights
from moelora.tape import Record


def weigh(records: Mapping[str, list[Record]], weights: AuxLosses) -> Float[Tensor, ""] | None:
    """Weighted sum of the active losses, each computed for every router's answer and averaged.

    Returns:
        None if no router computed any scores.
    """
    scored = list(distinct(records))
    if not scored:
        return None
    total = torch.stack([loss_of(record, weights) for record in scored])
    return total.mean()


def loss_of(record: Record, weights: AuxLosses) -> Float[Tensor, ""]:
    """Weighted sum of the active losses of one routing."""
    routing, valid_T = record.routing, record.valid_T
    logits_TE = routing.logits_TE
    assert logits_TE is not None
    total = logits_TE.new_zeros(())
    for name, weight in weights.active().items():
        if name == "load_balance":
            value = losses.load_balance(logits_TE, routing.experts_TK, valid_T)
        elif name == "importance":
            available_E = logits_TE.detach().amax(0) > -torch.inf if logits_TE.shape[0] else None
            value = losses.importance(dense_weights(routing, logits_TE.shape[1]), valid_T, available_E)
        elif name == "gate_cross_entropy":
            assert record.target_T is not None
            value = losses.gate_cross_entropy(logits_TE, record.target_T, valid_T)
        else:
            value = getattr(losses, name)(logits_TE, valid_T)
        total = total + weight * value
    return total


def distinct(records: Mapping[str, list[Record]]) -> Iterable[Record]:
    """Every scored routing once, also where a router answers for several sites."""
    for site_records in records.values():
        for record in site_records:
            if record.routing.logits_TE is not None and not record.repeated:
                yield record
