"""Keeping a new expert orthogonal to older ones while it is trained, over all sites of a model. Begin with hold.

    moelora.set_trainable(model, routers=False, experts=["new"])
    held = hold(model, "new", ["old"], Orthogonality(mode="nullspace"), generator=torch.Generator().manual_seed(0))
    held.attach(optimizer)
    ...                                               # loss + held.penalty()
    held.remove()
    overlap_at_sites(model, "new", ["old"], "in")

`moelora.continual.orthogonal` says what overlap is, `nullspace` and `basis` how one site is kept free of it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moelora.continual.covariance import InputCovariance
from moelora.continual.nullspace import NullspaceConstraint
from moelora.continual.orthogonal import SIDES, expert_overlap
from moelora.continual.penalties import site_penalty
from moelora.continual.placing import next_rows, paired_moments, placed_rows
from moelora.continual.sites import Site, sites_of
from moelora.continual.subspace import row_basis
from moelora.mixture import find_mixture

MODES = ("none", "penalty", "nullspace", "basis", "o_lora", "o3")
"""`Orthogonality` says what each does."""

WEIGHTS = {"penalty": 100.0, "o_lora": 0.5, "o3": 0.1}
"""Of a penalty in the loss, where none is given: ours is measured, the others are those of their papers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Orthogonality:
    """How a new expert is kept apart from its predecessors.

    Attributes:
        mode: "none". "penalty": a loss, the mean overlap over sites and predecessors (`expert_overlap`), which does not
            depend on the factors' scale. "nullspace": no overlap, by projection (`NullspaceConstraint`). "basis": the
            rows of A are taken from one orthonormal basis a site, and only B is trained (`next_rows`). "o_lora":
            O-LoRA's loss (`o_lora_penalty`), summed over the sites. "o3": O3's loss (`o3_penalty`) against the last
            predecessor only, summed over the sites and divided by the number of blocks that they are in, as in its
            code; its paper has side="out".
        side: which factors: "in", the rows of A; "out", those of B; "both", of a loss the mean of the two.
        weight: of the loss; None is `WEIGHTS` of the mode.
    """

    mode: str = "penalty"
    side: str = "in"
    weight: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"unknown mode {self.mode!r}; expected one of {MODES}")
        if self.side not in SIDES:
            raise ValueError(f"unknown side {self.side!r}; expected one of {SIDES}")
        if self.mode == "basis" and self.side != "in":
            raise ValueError(f"mode 'basis' fixes the rows of A, which are on side 'in'; got side={self.side!r}")
        if self.weight is not None and self.mode not in WEIGHTS:
            raise ValueError(f"mode {self.mode!r} adds no loss that could be weighed; leave weight out")
        if self.weight is not None and not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight must be finite and not negative, got {self.weight}")

    @property
    def weight_or_default(self) -> float:
        """Of the loss; 0 for a mode that has none."""
        return WEIGHTS.get(self.mode, 0.0) if self.weight is None else self.weight

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides that are compared, "in" or "out"."""
        return ("in", "out") if self.side == "both" else (self.side,)


@final
class Hold:
    """What keeps one expert apart from others while it is trained; `hold` makes it.

    Take it away when training is over, whatever the outcome: until then it has hooks on the expert's factors.
    """

    def __init__(
        self,
        losses: Sequence[Callable[[], Tensor]] = (),
        weight: float = 0.0,
        constraints: Sequence[NullspaceConstraint] = (),
        placed: Sequence[nn.Parameter] = (),
    ) -> None:
        self._losses, self._weight = list(losses), weight
        self._constraints, self._placed = list(constraints), list(placed)

    def penalty(self) -> Float[Tensor, ""]:
        """To be added to the training loss, weighed already; 0 where nothing is penalised."""
        if not self._losses:
            return torch.zeros(())
        return self._weight * torch.stack([loss() for loss in self._losses]).mean()

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the constraints through this optimiser's steps.

        Raises:
            ValueError: if it does not hold a factor that is constrained.
        """
        for constraint in self._constraints:
            constraint.attach(optimizer)

    def remove(self) -> None:
        """Let the factors go, at their present values: no hook, no penalty, and a placed A may be trained again."""
        for constraint in self._constraints:
            constraint.remove()
        for parameter in self._placed:
            parameter.requires_grad_(True)
        self._losses, self._constraints, self._placed = [], [], []


def hold(
    model: nn.Module,
    name: str,
    olds: Sequence[str],
    orthogonality: Orthogonality,
    *,
    generator: torch.Generator,
    avoid: "Mapping[str, InputCovariance] | None" = None,
    forget: "Mapping[str, InputCovariance] | None" = None,
    energy: float = 0.99,
) -> Hold:
    """Keep the one expert that is trained apart from others, at every site where it has rows.

    Older experts without rows at a site share nothing there. Without older experts only `avoid` and mode "basis" do
    anything.

    With `avoid` and `forget`, A is placed and no longer trained: it reads what the forget inputs have outside of the
    benign inputs' subspace (`designed_rows`), so A x is close to 0 for benign x even where a gate errs. What the mode
    asks of side "in" is then met by the placement, which avoids the older rows too.

    Args:
        model: a patched model, whose only trainable expert is `name` (`moelora.set_trainable`).
        name: of the new expert.
        olds: of the experts to keep apart from, the oldest first.
        orthogonality: how.
        generator: only its initial seed is read, in mode "basis": all experts of a model need the same one.
        avoid, forget: second moments of benign inputs and of the request's, for each site (`gather`); both or neither.
        energy: share of the benign inputs' energy that is avoided.

    Raises:
        ValueError: for unknown names, an expert that is not trainable or not alone, a site that has no directions left,
            sites without moments. The factors are as they were then.
    """
    sites = sites_of(model, name, olds[-1:] if orthogonality.mode == "o3" else olds)
    moments = paired_moments([site.path for site in sites], avoid, forget)
    placing = bool(moments) or orthogonality.mode == "basis"
    sides = [side for side in orthogonality.sides if side == "out" or not placing]

    with _undone_on_error(sites) as constraints:
        for site in sites:
            try:
                if placing:
                    _place(site, _rows(site, orthogonality, moments, energy, generator.initial_seed()))
                if orthogonality.mode == "nullspace":
                    constraints += [_constrained(site, side) for side in sides if any(map(len, site.old_rows(side)))]
            except ValueError as error:
                raise ValueError(f"at {site.path}: {error}") from error
        weight = orthogonality.weight_or_default
        losses = [site_penalty(orthogonality.mode, sites, side) for side in sides] if weight else []
    if placing:
        for site in sites:
            site.A.grad = None
            site.A.requires_grad_(False)
    return Hold(losses, weight, constraints, [site.A for site in sites] if placing else [])


def overlap_at_sites(model: nn.Module, name: str, olds: Sequence[str], side: str) -> float:
    """Mean over sites of `expert_overlap` of one expert with others, over the sites where it has rows. 0 for none.

    Raises:
        ValueError: for an unknown side or name.
    """
    _, mixture = find_mixture(model)
    index, others = mixture.index(name), [mixture.index(old) for old in olds]
    banks = [layer.bank for layer in mixture.layers.values() if layer.bank.ranks[index]]
    values = [
        float(expert_overlap(bank.expert(index), [bank.expert(other) for other in others], side)) for bank in banks
    ]
    return sum(values) / len(values) if values else 0.0


# --- inside -----------------------------------------------------------------------------------------------------------


def _rows(
    site: Site,
    orthogonality: Orthogonality,
    moments: Mapping[str, tuple[InputCovariance, InputCovariance]],
    energy: float,
    seed: int,
) -> Float[Tensor, "R D"]:
    """Where the new expert's A is to stand."""
    rank, width = site.A.shape
    if not moments:
        return next_rows(site.old_rows("in"), rank=rank, width=width, seed=seed, site=site.path)
    forget, avoid = moments[site.path]
    apart = orthogonality.mode != "none" and "in" in orthogonality.sides
    return placed_rows(forget, avoid, site.old_rows("in") if apart else [], rank=rank, energy=energy)


@torch.no_grad()
def _place(site: Site, rows_RD: Tensor) -> None:
    site.A.copy_(rows_RD)


def _constrained(site: Site, side: str) -> NullspaceConstraint:
    new, basis_SD = site.new_rows(side), row_basis(torch.cat(site.old_rows(side)))
    taken, width = basis_SD.shape
    if taken + len(new) > width:
        raise ValueError(
            f"the older experts take {taken} of {width} directions on side {side!r}, so {width - taken} are left, but "
            f"rank is {len(new)}; lower the rank, or keep fewer experts apart"
        )
    return NullspaceConstraint(new, basis_SD)


@contextmanager
def _undone_on_error(sites: Sequence[Site]) -> Iterator[list[NullspaceConstraint]]:
    """A list for constraints; if something fails, these are gone and the factors are as they were."""
    before = [(factor, factor.detach().clone()) for site in sites for factor in (site.A, site.B)]
    constraints: list[NullspaceConstraint] = []
    try:
        yield constraints
    except BaseException:
        for constraint in constraints:
            constraint.remove()
        with torch.no_grad():
            for factor, value in before:
                factor.copy_(value)
        raise
