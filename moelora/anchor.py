"""Hold experts where they are while others, or the router, are trained. Begin with Anchor."""

from collections.abc import Iterable
from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from moelora.bank import ExpertBank
from moelora.losses.preservation import preservation
from moelora.mixture import find_mixture


@final
class Anchor:
    """Remembers the factors of some experts, and measures how far they have moved.

        anchor = moelora.Anchor(model, ["law"])
        ...
        loss = model(**batch).loss + 0.1 * anchor.penalty()

    The penalty of LoRA-Mixer, Li et al. (2025), eq. 11, https://arxiv.org/abs/2507.00029, over A, B and bias as they
    are stored. Factors are not unique: a rotation between A and B costs something and changes no output.

    Args:
        model: a patched model.
        experts: names of the protected experts; None for all that are parameters.

    Raises:
        ValueError: for an unknown name, an expert that is frozen (nothing can move it), or if there is none.
    """

    model: nn.Module
    names: tuple[str, ...]

    def __init__(self, model: nn.Module, experts: "str | Iterable[str] | None" = None) -> None:
        _, mixture = find_mixture(model)
        movable = {
            index for layer in mixture.layers.values() for index, kind in enumerate(layer.bank.trainable) if kind
        }
        if experts is None:
            names = [mixture.names[index] for index in sorted(movable)]
        else:
            names = [experts] if isinstance(experts, str) else list(experts)
        frozen = [name for name in names if mixture.index(name) not in movable]
        if frozen or not names:
            raise ValueError(
                f"the experts {frozen or list(mixture.names)} are frozen, so nothing can move them; "
                "name experts that are trained (moelora.set_trainable makes them so)"
            )
        self.model, self.names = model, tuple(names)
        self._anchors: dict[tuple[str, str], list[Tensor]] = {
            key: [factor.detach().clone() for factor in factors] for key, factors in self._factors().items()
        }

    def penalty(self) -> Float[Tensor, ""]:
        """sum ||theta - theta^0||^2 over all factors of the protected experts, unweighted and differentiable.

        Raises:
            ValueError: if an expert is gone, or has another rank now.
        """
        current = self._factors()
        if current.keys() != self._anchors.keys():
            raise ValueError("the protected experts have changed since they were anchored; make a new Anchor")
        parameters, anchors = [], []
        for key, factors in current.items():
            # the model may have moved to another device since
            self._anchors[key] = [anchor.to(factors[0].device) for anchor in self._anchors[key]]
            parameters += factors
            anchors += self._anchors[key]
        return preservation(parameters, anchors)

    def _factors(self) -> dict[tuple[str, str], list[Tensor]]:
        """The factors of the protected experts as they are, at every site where they are parameters."""
        _, mixture = find_mixture(self.model)
        return {
            (site, name): factors_of(layer.bank, index)
            for site, layer in mixture.layers.items()
            for name in self.names
            if layer.bank.trainable[index := mixture.index(name)]
        }


def factors_of(bank: ExpertBank, index: int) -> list[Tensor]:
    """A, B and, if there is one, bias of one expert, as autograd sees them."""
    factors, rows_P = bank.factors(), bank.rows_FP[index, : bank.ranks[index]]
    found = [factors.A_RD[rows_P], factors.B_RO[rows_P]]
    return found if factors.bias_EO is None else [*found, factors.bias_EO[index]]
