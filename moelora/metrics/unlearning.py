"""What a model still answers after unlearning, beside what guessing would. Begin with choice_accuracy and Unlearned.

    after = Unlearned(sample=pooled(samples), distribution=..., nearest=..., utility={"openbookqa": ..., ...})
    print(after.sample.value, after.sample.chance, u2r(before, after).value)

Definitions of Gao et al. (2025), O3, https://arxiv.org/abs/2407.10223. The paper reports lower accuracy on the request
as better without end; below chance it is not, since what a model avoids it gives away.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from jaxtyping import Bool, Int
from torch import Tensor


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """A share of right answers, beside that of guessing.

    Attributes:
        value: the share, from 0 to 1.
        chance: what guessing evenly among each item's own options gets; 0 for free answers.
        items: over how many items.
    """

    value: float
    chance: float
    items: int

    def __post_init__(self) -> None:
        if not (0 <= self.value <= 1 and 0 <= self.chance <= 1 and self.items >= 1):
            raise ValueError(f"expected value and chance in [0, 1] over one item or more, got {self}")

    @property
    def above_chance(self) -> float:
        """value - chance: 0 where nothing is left, negative where the answer is avoided."""
        return self.value - self.chance


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Unlearned:
    """One model at one moment: what it knows of the requests so far, and of all else.

    Attributes:
        sample: S.U., on the items that were unlearned, of all requests so far pooled.
        distribution: D.U., on held-out items of the same distribution, pooled likewise.
        nearest: R.D., on the distribution nearest to the request, which is to be kept.
        utility: U.1, U.2 and more, by name: sets that have nothing to do with the request.
    """

    sample: Accuracy
    distribution: Accuracy
    nearest: Accuracy
    utility: Mapping[str, Accuracy]


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class U2R:
    """Unlearning bought per utility paid.

    Attributes:
        value: the ratio; None where it is not defined.
        value_to_chance: the same with accuracies on the request counted down to chance only; None likewise.
        drop: the numerator, how much accuracy on the request fell.
        cost: the denominator, how much utility fell.
        reason: why there is no value; empty if there is one.
    """

    value: float | None
    value_to_chance: float | None
    drop: float
    cost: float
    reason: str


def choice_accuracy(correct_N: Bool[Tensor, " N"], options_N: Int[Tensor, " N"]) -> Accuracy:
    """Share of right answers; chance is the mean of 1 / n over items with n options.

    Args:
        correct_N: which items were answered rightly.
        options_N: how many options each has.

    Raises:
        ValueError: if there is no item, or one without options.
    """
    if not len(correct_N) or not (options_N >= 1).all():
        raise ValueError(f"expected one item or more, each with options, got {options_N.tolist()[:8]}")
    chance = (1 / options_N.double()).mean().item()
    return Accuracy(value=correct_N.double().mean().item(), chance=chance, items=len(correct_N))


def pooled(parts: Sequence[Accuracy]) -> Accuracy:
    """Accuracy over the items of all parts together: how S.U. and D.U. are taken over the requests so far.

    Raises:
        ValueError: if there is no part.
    """
    if not parts:
        raise ValueError("there is nothing to pool; expected one accuracy or more")
    items = sum(part.items for part in parts)
    # rounding may not carry a mean of ones above one
    value = min(1.0, sum(part.value * part.items for part in parts) / items)
    chance = min(1.0, sum(part.chance * part.items for part in parts) / items)
    return Accuracy(value=value, chance=chance, items=items)


def u2r(before: Unlearned, after: Unlearned) -> U2R:
    """(S.U._0 + D.U._0 - S.U._T - D.U._T) / (R.D._0 + U_0 - R.D._T - U_T), U summed over the utility sets.

    Not defined where utility did not fall: a method that costs nothing has no ratio, and a smaller cost is no smaller
    number. Where the cost is small, its rounding decides the ratio, so read `drop` and `cost` as well.

    `value_to_chance` takes max(accuracy, chance) on the request, so that going below chance earns nothing.

    Raises:
        ValueError: if the two do not name the same utility sets.
    """
    if set(before.utility) != set(after.utility):
        raise ValueError(f"expected the same utility sets, got {sorted(before.utility)} and {sorted(after.utility)}")
    asked = [(before.sample, after.sample), (before.distribution, after.distribution)]
    kept = [(before.nearest, after.nearest), *((before.utility[name], after.utility[name]) for name in before.utility)]
    drop = sum(first.value - last.value for first, last in asked)
    drop_to_chance = sum(_down_to_chance(first) - _down_to_chance(last) for first, last in asked)
    cost = sum(first.value - last.value for first, last in kept)

    # accuracies are counts over items: a difference this small is rounding
    if cost < 1e-9:
        reason = f"utility did not fall (its sum changed by {-cost:+.4g}), so there is no cost to divide by"
        return U2R(value=None, value_to_chance=None, drop=drop, cost=cost, reason=reason)
    return U2R(value=drop / cost, value_to_chance=drop_to_chance / cost, drop=drop, cost=cost, reason="")


# --- inside -----------------------------------------------------------------------------------------------------------


def _down_to_chance(accuracy: Accuracy) -> float:
    return max(accuracy.value, accuracy.chance)
