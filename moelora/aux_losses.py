"""The losses on one call's routings, weighed and averaged over routers. Begin with weigh."""

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from moelora import losses
from moelora.config import AuxLosses
from moelora.routing import Routing, dense_weights
from moelora.tape import Record


def weigh(records: Mapping[str, list[Record]], weights: AuxLosses) -> Float[Tensor, ""] | None:
    """Weighted sum of the active losses, each computed for every router's answer and averaged.

    Answers of one form are stacked and computed as one, since each loss is some twenty small operations, and a model
    has a hundred routers.

    Returns:
        None if no router computed any scores.
    """
    groups: list[list[Record]] = []
    for record in distinct(records):
        alike = next((group for group in groups if _alike(group[0], record)), None)
        if alike is None:
            groups.append([record])
        else:
            alike.append(record)
    return torch.cat([losses_of(group, weights) for group in groups]).mean() if groups else None


def losses_of(records: list[Record], weights: AuxLosses) -> Float[Tensor, " N"]:
    """`loss_of` each of N routings of one form, computed together."""
    if len(records) == 1:
        return loss_of(records[0], weights)[None]
    parts = [_parts(record) for record in records]
    stacked = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    return torch.vmap(partial(_loss_of_parts, weights=weights))(stacked)


def loss_of(record: Record, weights: AuxLosses) -> Float[Tensor, ""]:
    """Weighted sum of the active losses of one routing."""
    routing, valid_T = record.routing, record.valid_T
    logits_TE = routing.logits_TE
    assert logits_TE is not None
    total = logits_TE.new_zeros(())
    for name, weight in weights.active().items():
        if name == "load_balance":
            value = losses.load_balance(logits_TE, _chosen(routing, logits_TE), valid_T)
        elif name == "importance":
            available_E = logits_TE.detach().amax(0) > -torch.inf if logits_TE.shape[0] else None
            value = losses.importance(dense_weights(routing, logits_TE.shape[1]), valid_T, available_E)
        elif name == "gate_cross_entropy":
            assert record.target_T is not None
            value = losses.gate_cross_entropy(logits_TE, record.target_T, valid_T)
        elif name == "over_budget":
            weights_TE = dense_weights(routing, logits_TE.shape[1])
            value = losses.over_budget(weights_TE, valid_T, budget=weights.budget)
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


# --- inside -----------------------------------------------------------------------------------------------------------


def _chosen(routing: Routing, logits_TE: Tensor) -> Tensor:
    """Whom a token counts for in the balance: those it chose; where all experts act on all tokens, its best one.

    The share of a choice of all would be 1/E for everybody, and the loss a constant. Top-1 is the frequency of
    LoRA-Mixer's eq. 3 and of Switch.
    """
    everybody = routing.experts_TK.shape[1] == logits_TE.shape[1] > 1
    return logits_TE.detach().argmax(-1, keepdim=True) if everybody else routing.experts_TK


def _parts(record: Record) -> dict[str, Tensor]:
    """The tensors of a scored routing that losses read, by name."""
    routing = record.routing
    parts = {
        "experts_TK": routing.experts_TK,
        "weights_TK": routing.weights_TK,
        "logits_TE": routing.logits_TE,
        "valid_T": record.valid_T,
        "target_T": record.target_T,
    }
    return {name: tensor for name, tensor in parts.items() if tensor is not None}


def _alike(one: Record, other: Record) -> bool:
    """Whether two routings can be stacked: the same tensors, of the same shapes, dtypes and devices."""
    left, right = _parts(one), _parts(other)
    return left.keys() == right.keys() and all(
        (part.shape, part.dtype, part.device) == (right[name].shape, right[name].dtype, right[name].device)
        for name, part in left.items()
    )


def _loss_of_parts(parts: dict[str, Tensor], weights: AuxLosses) -> Tensor:
    routing = Routing(parts["experts_TK"], parts["weights_TK"], parts["logits_TE"])
    return loss_of(Record(routing, parts.get("valid_T"), target_T=parts.get("target_T")), weights)
