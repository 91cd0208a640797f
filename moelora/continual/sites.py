"""Where a new expert is trained beside older ones. Begin with sites_of."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from moelora.bank import Expert
from moelora.mixture import find_mixture


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """One site where the new expert has rows.

    Attributes:
        path: of the module.
        A, B: the new expert's factors, `A_trainable_RD` and `B_trainable_RO` of its bank.
        olds: the older experts there, whose factors stay as they are.
    """

    path: str
    A: nn.Parameter
    B: nn.Parameter
    olds: tuple[Expert, ...]

    def new_rows(self, side: str) -> nn.Parameter:
        """The new expert's rows of side "in" or "out"."""
        return self.A if side == "in" else self.B

    def old_rows(self, side: str) -> list[Tensor]:
        """Those of the older experts."""
        return [old.A_RD if side == "in" else old.B_RO for old in self.olds]


def sites_of(model: nn.Module, name: str, olds: Sequence[str]) -> list[Site]:
    """The sites where the new expert has rows.

    Raises:
        ValueError: for unknown names, or unless it is what is trained there, and alone.
    """
    _, mixture = find_mixture(model)
    index, others = mixture.index(name), [mixture.index(old) for old in olds]
    if index in others or len(set(others)) != len(others):
        raise ValueError(f"expected older experts, each once and without {name!r} itself, got {list(olds)}")
    sites = []
    for path, layer in mixture.layers.items():
        bank = layer.bank
        if not bank.ranks[index]:
            continue
        A, B = bank.A_trainable_RD, bank.B_trainable_RO
        alone = bank.trainable[index] and sum(bank.trainable) == 1
        if not alone or A is None or B is None or not (A.requires_grad and B.requires_grad):
            trained = [mixture.names[other] for other, kind in enumerate(bank.trainable) if kind]
            raise ValueError(
                f"expected {name!r} to be the only expert that is trained, but at {path} that is {trained}; call "
                f"moelora.set_trainable(model, routers=False, experts=[{name!r}]) first"
            )
        sites.append(Site(path=path, A=A, B=B, olds=tuple(bank.expert(other) for other in others)))
    if not sites:
        raise ValueError(f"expert {name!r} has no rows at any site, so there is nothing to keep apart")
    return sites
