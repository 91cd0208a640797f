"""O3's adapter: one for all requests, trained on from one to the next. Begin with O3Adapter."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from moelora.bank import Expert
from moelora.continual.examples import Collate
from moelora.continual.experts import Experts, Made
from moelora.continual.objectives import Objective
from moelora.continual.orthogonal import expert_overlap
from moelora.continual.orthogonality import WEIGHTS, Hold, Orthogonality
from moelora.continual.penalties import Products, num_blocks
from moelora.continual.sites import sites_of
from moelora.continual.training import Training, train_expert
from moelora.lifecycle import set_trainable
from moelora.mixture import find_mixture
from moelora.routers.gated import Gated

EXPERT = "o3"
"""The name of the one expert."""


@final
class O3Adapter:
    """One expert on a model; each training begins with what the last one left, and is pushed away from it.

    The loss of O3 (Gao et al. 2025, eq. 5 and 6, https://arxiv.org/abs/2407.10223), `o3_penalty` times 0.1, summed over
    the sites and divided by the number of blocks that they are in, as in its code; the paper does not say how sites add
    up. The first training has none.

    Args:
        model: not patched yet.
        side: of the factor that is pushed away, "in" or "out".
        all_values: from what it was after every training, or only after the last.
        rank, alpha, targets, seed: as in `Experts`.
    """

    model: nn.Module
    collate: Collate
    side: str
    all_values: bool

    def __init__(
        self,
        model: nn.Module,
        *,
        side: str,
        all_values: bool,
        rank: int,
        alpha: float | None,
        targets: Any,
        seed: int,
    ) -> None:
        self._experts = Experts(
            model,
            router=Gated(mergeable=False),
            rank=rank,
            alpha=alpha,
            targets=targets,
            orthogonality=Orthogonality(mode="none"),
            seed=seed,
        )
        self.model, self.collate = model, self._experts.collate
        self.side, self.all_values = side, all_values
        self._values: list[dict[str, Expert]] = []

    def train(self, examples: list[Any], objective: Objective, training: Training) -> Made:
        """Train it on. On any error it is as it was.

        Returns:
            The losses, and the overlap with what it was before; 0 in the first training.
        """
        if self._values:
            before = self._values[-1]
            with self._restored_on_error(before):
                losses = self._train_on(examples, objective, training)
            now = self._value()
            overlaps = [float(expert_overlap(now[path], [before[path]], self.side)) for path in now]
            made = Made(losses=tuple(losses), overlap=sum(overlaps) / len(overlaps))
        else:
            made = self._experts.make(EXPERT, examples, objective, training=training)
        self._values = [*(self._values if self.all_values else []), self._value()]
        return made

    # --- inside ---------------------------------------------------------------------------------------------------

    def _train_on(self, examples: list[Any], objective: Objective, training: Training) -> list[float]:
        set_trainable(self.model, routers=False, experts=[EXPERT])
        hold = Hold([self._penalty()], WEIGHTS["o3"])
        losses = train_expert(
            self.model, EXPERT, examples, objective, collate=self.collate, training=training, hold=hold
        )
        set_trainable(self.model, routers=False, experts=False)
        return losses

    def _penalty(self) -> Products:
        sites = sites_of(self.model, EXPERT, [])
        pairs = [(site.new_rows(self.side), [self._rows(value[site.path]) for value in self._values]) for site in sites]
        return Products("o3", pairs, blocks=num_blocks([site.path for site in sites]))

    def _rows(self, expert: Expert) -> Tensor:
        return expert.B_RO if self.side == "out" else expert.A_RD

    def _value(self) -> dict[str, Expert]:
        """The factors as they are, copied."""
        experts = {path: layer.bank.expert(0) for path, layer in find_mixture(self.model)[1].layers.items()}
        return {
            path: expert._replace(A_RD=expert.A_RD.clone(), B_RO=expert.B_RO.clone())
            for path, expert in experts.items()
        }

    @contextmanager
    def _restored_on_error(self, value: Mapping[str, Expert]) -> Iterator[None]:
        try:
            yield
        except BaseException:
            set_trainable(self.model, routers=False, experts=False)
            with torch.no_grad():
                for path, layer in find_mixture(self.model)[1].layers.items():
                    expert = layer.bank.expert(0)
                    expert.A_RD.copy_(value[path].A_RD)
                    expert.B_RO.copy_(value[path].B_RO)
            raise
