"""A patched model's own record of itself, and what one can ask of it or tell it for a while.

Begin with Mixture, which `patch_model` hangs on the model; the functions below it are public verbs that take the model.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moelora.aux_losses import weigh
from moelora.call_settings import FixedMixture, GivenIds, Settings, checked_ids
from moelora.config import MoELoRAConfig
from moelora.hooks import RootHooks, reads_ids
from moelora.layer import MoELoRALinear
from moelora.routers.base import AbstractRouter
from moelora.routing import NO_EXPERT, Routing, join
from moelora.surgery import Place
from moelora.tape import Record, Tape

ATTRIBUTE = "_moelora"

RowMixture = str | Mapping[str, float] | None
"""One row's mixture: an expert's name (weight 1), names with weights, or None for the base model."""


@dataclass(kw_only=True, eq=False)
class Mixture:
    """What `patch_model` did to a model and needs for undoing, saving and steering it.

    Attributes:
        config: the options it was made with.
        tape: the state of the running call.
        names: of the experts; the position of a name is the expert's id.
        sources: where each expert came from, as JSON values (see `integrations.adapters.AdapterSource`).
        sites: what is known of each patched site, as JSON values, by module path.
        layers: the layer at each site.
        hooks: around the model's forward.
        places: the modules that were replaced.
        undo: what else has to be undone, last first.
        trainable_before: `requires_grad` of every parameter of the model before it was patched.
        base_model: id or description of the base, for the manifest.
        changed: names of experts that their sources no longer hold as they are here: they have been trained, or were
            read from a saved mixture's own folder.
    """

    config: MoELoRAConfig
    tape: Tape
    names: list[str]
    sources: list[dict[str, Any]]
    sites: dict[str, dict[str, Any]]
    layers: dict[str, MoELoRALinear]
    hooks: RootHooks
    places: list[Place] = field(default_factory=list)
    undo: list[Any] = field(default_factory=list)
    trainable_before: dict[str, bool] = field(default_factory=dict)
    base_model: dict[str, Any] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)

    def index(self, name: str) -> int:
        """The id of an expert.

        Raises:
            ValueError: for a name that is none of its experts', with the nearest ones.
        """
        return _index(name, self.names, "expert")

    def routers(self) -> dict[int, AbstractRouter]:
        """Every router once, by its object id."""
        return {id(layer.router): layer.router for layer in self.layers.values()}

    def by_router(self) -> list[tuple[AbstractRouter, list[MoELoRALinear]]]:
        """Each router once, with the layers that it answers for."""
        layers: dict[int, list[MoELoRALinear]] = {}
        for layer in self.layers.values():
            layers.setdefault(id(layer.router), []).append(layer)
        return [(found[0].router, found) for found in layers.values()]

    @property
    def given_names(self) -> Sequence[str]:
        """What ids that are given from outside stand for: the experts, or the tasks of a router that knows tasks."""
        return getattr(self.config.router, "tasks", None) or self.names


def find_mixture(model: nn.Module) -> tuple[nn.Module, Mixture]:
    """The patched model inside this one, through DDP's and torch.compile's wrappers, and its mixture.

    Raises:
        ValueError: if there is none.
    """
    inner: Any = model
    while inner is not None:
        if ATTRIBUTE in vars(inner):
            return inner, vars(inner)[ATTRIBUTE]
        modules = inner._modules
        inner = modules.get("_orig_mod") or modules.get("module")
    raise ValueError(
        f"this {type(model).__name__} is no patched model; call moelora.patch_model(model, experts=[...]) first"
    )


def is_patched(model: nn.Module) -> bool:
    """True if `patch_model` has patched this model (or the one inside its DDP or compile wrapper)."""
    try:
        find_mixture(model)
    except ValueError:
        return False
    return True


def root_of(model: nn.Module) -> nn.Module:
    """The module that was patched, which a wrapper may hide; of a model that is not patched, the model."""
    return find_mixture(model)[0] if is_patched(model) else model


def expert_names(model: nn.Module) -> list[str]:
    """Names of the experts; a name's position is the expert's id in a `Routing`."""
    return list(find_mixture(model)[1].names)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within this context the model is its base model, bit for bit."""
    with _settings(model, disabled=True, fixed=None):
        yield


@contextmanager
def use_experts(model: nn.Module, experts: RowMixture | Sequence[RowMixture], *, repeats: int = 1) -> Iterator[None]:
    """Fix the mixture to named experts, in place of the router.

    Args:
        model: a patched model.
        experts: for all rows: a name (weight 1) or a mapping from names to weights. Or one entry for each row of the
            batch, as a list: a name, a mapping, or None for the base model. A weight multiplies the scale that the
            expert was trained at.
        repeats: how often the model repeats each row of the batch one after the other, as beam search and
            `num_return_sequences` do; only for a list.

    Raises:
        ValueError: for an unknown name or a weight that is not finite; in the call, if the list does not fit the batch.
    """
    _, mixture = find_mixture(model)
    if experts is None or isinstance(experts, str | Mapping):
        rows: list[RowMixture] = [experts]
        if repeats != 1:
            raise ValueError("repeats belongs to a list of rows; one mixture for all rows fits any batch")
    else:
        rows = [row for row in experts for _ in range(repeats)]
        if not rows:
            raise ValueError("experts is an empty list; give one entry for each row of the batch")
    with _settings(model, fixed=fixed_mixture(mixture, rows, repeats), disabled=False):
        yield


@contextmanager
def given_experts(
    model: nn.Module, ids: "str | int | Sequence[str | int] | Tensor", *, rest: "str | int | None" = None
) -> Iterator[None]:
    """Hand ids to a router that reads them: tasks, domains, modalities, for `router="given"` among others.

    In training they may also come with the batch, `model(**batch, expert_ids=ids)`.

    Args:
        model: a patched model.
        ids: a name or id for the whole call; one for each row of the batch (a list, or a (B,) tensor); one for each
            token, a (B, L) tensor; or several for each token, (B, L, K). -1 stands for the base model.
        rest: who takes the tokens behind the given ones, as in generation; without it such tokens are an error.

    Raises:
        ValueError: for names and ids that the model does not have, and for a model with another router; in the call,
            if the shape does not fit the input.
    """
    _, mixture = find_mixture(model)
    _check_reads_ids(mixture)
    names, what = mixture.given_names, "expert" if mixture.given_names is mixture.names else "task"
    tensor = given_tensor(names, ids, what)
    last = None if rest is None else int(given_tensor(names, rest, what))
    with _settings(model, given=GivenIds(ids=tensor, rest=last)):
        yield


def aux_loss(model: nn.Module) -> Float[Tensor, ""]:
    """The weighted losses on the routings of the last training call, for loops that compute their loss themselves.

    The same is in `output.loss` already, if the model returned a loss of its own.

    Raises:
        ValueError: if no routing was kept: the last call was not in training mode with gradients, or all weights of
            `config.losses` are zero.
    """
    _, mixture = find_mixture(model)
    value = weigh(mixture.tape.routings_with_gradient(), mixture.config.losses)
    if value is None:
        raise ValueError(
            "no routing was kept in the last call; call the model in training mode with gradients enabled, "
            f"with a router that computes scores, and with losses that weigh something (now {mixture.config.losses})"
        )
    return value


class Recording(Mapping[str, Routing]):
    """The routings of all sites: `recording[site]` is one `Routing` of all tokens seen, in the order of the calls."""

    def __init__(self) -> None:
        self._records: dict[str, list[Record]] = {}

    def __getitem__(self, site: str) -> Routing:
        return join([record.routing for record in self._records[site]])

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def calls(self, site: str) -> list[Routing]:
        """One routing for each time that the site was called."""
        return [record.routing for record in self._records[site]]

    def valid(self, site: str) -> Tensor:
        """Which of the site's tokens are no padding."""
        masks = [
            torch.ones(record.routing.experts_TK.shape[0], dtype=torch.bool, device=record.routing.experts_TK.device)
            if record.valid_T is None
            else record.valid_T
            for record in self._records[site]
        ]
        return torch.cat(masks)


@contextmanager
def record(model: nn.Module) -> Iterator[Recording]:
    """Keep each site's routings, detached, while this context lasts."""
    _, mixture = find_mixture(model)
    recording = Recording()
    mixture.tape.recordings.append(recording._records)
    try:
        yield recording
    finally:
        # by identity: two recordings may hold equal contents
        mixture.tape.recordings[:] = [kept for kept in mixture.tape.recordings if kept is not recording._records]


@contextmanager
def own_loss(model: nn.Module, *, labels_BL: Tensor | None = None) -> Iterator[None]:
    """Keep the routings of training calls for a loss of the caller's own, and add none to `output.loss`.

    Args:
        model: a patched model.
        labels_BL: of that loss, for routers that decide by prompts, where the model does not get them.
    """
    with _settings(model, own_loss=True, labels_BL=labels_BL):
        yield


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many parameters are trained, of routers and of experts, in PEFT's format with a line for each."""
    root, mixture = find_mixture(model)
    parameters = list(root.parameters())
    frozen_rows = {id(layer.bank): layer.bank for layer in mixture.layers.values()}
    frozen = sum(bank.A_frozen_RD.numel() + bank.B_frozen_RO.numel() for bank in frozen_rows.values())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in parameters) + frozen
    print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / max(total, 1):.4f}")

    routers = [p for router in mixture.routers().values() for p in router.parameters()]
    experts = [p for bank in frozen_rows.values() for p in bank.parameters()]
    for name, part in (("routers", routers), ("experts", experts)):
        count = sum(parameter.numel() for parameter in part if parameter.requires_grad)
        known = sum(parameter.numel() for parameter in part) + (frozen if name == "experts" else 0)
        print(f"  {name}: {count:,} trainable of {known:,}")


# --- inside -----------------------------------------------------------------------------------------------------------


@contextmanager
def _settings(model: nn.Module, **values: Any) -> Iterator[None]:
    tape = find_mixture(model)[1].tape
    before: Settings = tape.settings
    tape.settings = replace(before, **values)
    try:
        yield
    finally:
        tape.settings = before


def fixed_mixture(mixture: Mixture, rows: Sequence[RowMixture], repeats: int = 1) -> FixedMixture:
    """The mixture of each row as ids and weights, filled up with "no expert"."""
    parsed = [_row(mixture, row) for row in rows]
    width = max(1, *(len(row) for row in parsed))
    experts_NK = torch.full((len(rows), width), NO_EXPERT, dtype=torch.long)
    weights_NK = torch.zeros(len(rows), width)
    for number, row in enumerate(parsed):
        for slot, (expert, weight) in enumerate(row):
            experts_NK[number, slot], weights_NK[number, slot] = expert, weight
    # where the layers are: each would copy them for itself otherwise, and wait for the device
    device = next((layer.bank.A_frozen_RD.device for layer in mixture.layers.values()), torch.device("cpu"))
    return FixedMixture(experts_NK=experts_NK.to(device), weights_NK=weights_NK.to(device), repeats=repeats)


def _index(name: str, names: Sequence[str], what: str) -> int:
    if name in names:
        return list(names).index(name)
    near = get_close_matches(str(name), names, n=3) or list(names[:5])
    raise ValueError(f"there is no {what} {name!r}; this model has {len(names)} {what}s, such as {near}")


def _row(mixture: Mixture, row: RowMixture) -> list[tuple[int, float]]:
    if row is None:
        return []
    if isinstance(row, str):
        return [(mixture.index(row), 1.0)]
    if not isinstance(row, Mapping):
        raise ValueError(f"a row's mixture is a name, a mapping from names to weights or None, got {row!r}")
    entries = [(mixture.index(name), float(weight)) for name, weight in row.items()]
    for expert, weight in entries:
        if not math.isfinite(weight):
            raise ValueError(f"the weight of expert {mixture.names[expert]!r} is {weight}; expected a finite number")
    return [(expert, weight) for expert, weight in entries if weight != 0]


def _check_reads_ids(mixture: Mixture) -> None:
    if not reads_ids(mixture.config):
        raise ValueError(
            f"this model's router would not look at given ids: it is {mixture.config.router}; "
            'patch with router="given", or fix experts with moelora.use_experts'
        )


def given_tensor(
    names: Sequence[str], ids: "str | int | Sequence[str | int] | Tensor", what: str = "expert"
) -> Int[Tensor, "..."]:
    """Names or ids as a tensor of ids, checked; `what` they name, for the errors."""
    if isinstance(ids, Tensor):
        tensor = ids
    elif isinstance(ids, str | int):
        tensor = torch.tensor(_index(ids, names, what) if isinstance(ids, str) else ids)
    else:
        rows = [_index(entry, names, what) if isinstance(entry, str) else entry for entry in ids]
        try:
            tensor = torch.tensor(rows)
        except (TypeError, ValueError) as error:
            raise ValueError(f"ids must be names or integers, as many in every row; got {ids!r}") from error
    return checked_ids(tensor, len(names))
