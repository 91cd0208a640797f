"""The experts of a stack on their model: put in one by one, trained, frozen, taken out. Begin with Experts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from moelora.config import AuxLosses, MoELoRAConfig, RouterConfig
from moelora.continual.covariance import InputCovariance
from moelora.continual.examples import Collate, batches
from moelora.continual.gathering import gather
from moelora.continual.objectives import Objective
from moelora.continual.orthogonality import Hold, Orthogonality, hold, overlap_at_sites
from moelora.continual.training import Training, train_expert
from moelora.integrations.sources import check_name
from moelora.lifecycle import add_expert, remove_expert, set_trainable
from moelora.mixture import find_mixture, is_patched
from moelora.patch import patch_model, unpatch_model

BATCH_SIZE = 64
"""How many texts are read at a time where nothing is trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """What came of an expert's training.

    Attributes:
        losses: mean loss of each epoch.
        overlap: with all experts before it, mean over sites, on the side that is kept apart.
    """

    losses: tuple[float, ...]
    overlap: float


def new_name(name: str | None, names: Sequence[str], *, kind: str) -> str:
    """A name beside others: the given one, or a number behind the kind.

    Raises:
        ValueError: if it is taken, or cannot be the name of an expert.
    """
    if name is None:
        number = len(names) + 1
        while f"{kind}-{number}" in names:
            number += 1
        return f"{kind}-{number}"
    check_name(name)
    if name in names:
        raise ValueError(f"there is a {kind} {name!r} already; pass another name=")
    return name


@final
class Experts:
    """Experts of one rank on one model, each trained once and frozen from then on.

    The model is patched with the first one, and as it was before without any.

    Args:
        model: not patched yet, or by a stack that is loaded.
        router: of the mixture.
        rank: of each expert.
        alpha: their scale is alpha / rank; None means 2 * rank.
        targets: as in `patch_model`.
        orthogonality: how each is kept apart from those before it.
        seed: of the experts' first values.
    """

    model: nn.Module
    collate: Collate
    rank: int
    targets: Any
    orthogonality: Orthogonality
    seed: int
    config: MoELoRAConfig

    def __init__(
        self,
        model: nn.Module,
        *,
        router: RouterConfig,
        rank: int,
        alpha: float | None,
        targets: Any,
        orthogonality: Orthogonality,
        seed: int,
    ) -> None:
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.model, self.collate = model, Collate(model)
        self.rank, self.targets, self.orthogonality, self.seed = rank, targets, orthogonality, seed
        losses = AuxLosses(load_balance=0.0)
        self.config = MoELoRAConfig(router=router, losses=losses, alpha=alpha, seed=seed)

    @property
    def names(self) -> list[str]:
        """In the order in which they came."""
        return list(find_mixture(self.model)[1].names) if is_patched(self.model) else []

    def new_name(self, name: str | None, kind: str) -> str:
        """A name for the next expert; see the function `new_name`."""
        return new_name(name, self.names, kind=kind)

    def make(
        self,
        name: str,
        dataset: Any,
        objective: Objective,
        *,
        training: Training,
        avoid: Any = None,
        beside: "tuple[str, ...]" = (),
    ) -> Made:
        """Put a fresh expert in, train it, and freeze it. On any error the experts are as they were.

        Args:
            name: of the expert.
            dataset: what it learns, or unlearns.
            objective: as in `train_expert`.
            training: as in `train_expert`.
            avoid: texts that its A must not read (`hold`); None for no such placement.
            beside: experts that act with it while it is trained.
        """
        olds = self.names
        with self._undone(name, olds):
            self._put_in(name)
            set_trainable(self.model, routers=False, experts=[name])
            losses = train_expert(
                self.model,
                name,
                dataset,
                objective,
                collate=self.collate,
                training=training,
                hold=self._hold(name, olds, dataset, avoid),
                beside=beside,
            )
            set_trainable(self.model, routers=False, experts=False)
            overlap = overlap_at_sites(self.model, name, olds, self.orthogonality.side)
        return Made(losses=tuple(losses), overlap=overlap)

    def take_out(self, name: str) -> None:
        """Remove an expert; without the last one the model is the base again."""
        if self.names == [name]:
            unpatch_model(self.model)
        else:
            remove_expert(self.model, name)

    # --- inside ---------------------------------------------------------------------------------------------------

    def _put_in(self, name: str) -> None:
        if is_patched(self.model):
            add_expert(self.model, name=name, rank=self.rank)
            return
        patch_model(self.model, num_experts=1, rank=self.rank, targets=self.targets, config=self.config)
        _, mixture = find_mixture(self.model)
        mixture.names[0], mixture.changed = name, {name}

    def _hold(self, name: str, olds: list[str], dataset: Any, avoid: Any) -> Hold:
        def moments(texts: Any) -> dict[str, InputCovariance] | None:
            return None if avoid is None else gather(self.model, batches(texts, self.collate, BATCH_SIZE))

        generator = torch.Generator().manual_seed(self.seed)
        return hold(
            self.model,
            name,
            olds,
            self.orthogonality,
            generator=generator,
            avoid=moments(avoid),
            forget=moments(dataset),
        )

    @contextmanager
    def _undone(self, name: str, olds: list[str]) -> Iterator[None]:
        try:
            yield
        except BaseException:
            if self.names != olds:
                self.take_out(name)
            raise
