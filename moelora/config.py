"""What a mixture is made of, as data: frozen, typed, JSON with a schema version. Begin with MoELoRAConfig."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from moelora.kernels.api import BACKENDS
from moelora.losses.specialization import EntropySign, entropy_weight
from moelora.routers.arrow import Arrow
from moelora.routers.base import RouterConfig
from moelora.routers.classifier import Classifier
from moelora.routers.gated import Gated
from moelora.routers.given import Given
from moelora.routers.hard_soft import HardSoft
from moelora.routers.learned import Learned
from moelora.routers.phatgoose import Phatgoose
from moelora.routers.rloo import RLOO
from moelora.routers.sparsegen import Sparsegen
from moelora.routers.task_embedding import TaskEmbedding

SCHEMA_VERSION = (1, 0)
"""Major and minor version of `moelora_config.json`. A newer minor is read with a warning, a newer major refused."""

ROUTERS: dict[str, type] = {
    "learned": Learned,
    "given": Given,
    "arrow": Arrow,
    "phatgoose": Phatgoose,
    "classifier": Classifier,
    "task_embedding": TaskEmbedding,
    "sparsegen": Sparsegen,
    "rloo": RLOO,
    "hard_soft": HardSoft,
    "gated": Gated,
}
"""Routers by the name that `patch_model(router=...)` and the JSON use."""


def register_router(name: str, kind: type) -> None:
    """Give the configuration of a router of your own a name, so that mixtures with it can be saved and loaded.

    Args:
        name: what `patch_model(router=name)` and the saved configuration call it.
        kind: a frozen dataclass of plain values with `build` (see `moelora.routers.base.RouterConfig`).

    Raises:
        ValueError: if the name is taken by another class, or the class is no such configuration.
    """
    if ROUTERS.get(name, kind) is not kind:
        raise ValueError(f"there is a router {name!r} already, {ROUTERS[name].__name__}; choose another name")
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind) and callable(getattr(kind, "build", None))):
        raise ValueError(f"a router's configuration is a frozen dataclass with a method `build`, got {kind!r}")
    ROUTERS[name] = kind


@dataclass(frozen=True, kw_only=True, slots=True)
class AuxLosses:
    """How much each loss on the routings weighs in `output.loss`; `moelora.losses` defines them.

    Each is computed for each router and averaged. All zero: no routing is kept in training.

    Attributes:
        token_entropy: the only weight with a sign. Positive for decided gates, negative for undecided ones.
        budget: how many experts `over_budget` lets act on a token. No weight.
    """

    load_balance: float = 1e-2
    z_loss: float = 0.0
    importance: float = 0.0
    mutual_information: float = 0.0
    uniform_cross_entropy: float = 0.0
    gate_cross_entropy: float = 0.0
    token_entropy: float = 0.0
    over_budget: float = 0.0
    budget: int = 2

    def __post_init__(self) -> None:
        for name, weight in self._weights().items():
            size = abs(weight) if name == "token_entropy" else weight
            if not 0 <= size < float("inf"):
                raise ValueError(f"the weight of the loss {name} must be finite and not negative, got {weight}")
        if self.budget < 1:
            raise ValueError(f"budget must be at least 1, since some expert acts on each token; got {self.budget}")

    @classmethod
    def lora_mixer(cls, *, alpha: float = 1e-2, lam: float = 1e-2, entropy: EntropySign = "as_printed") -> "AuxLosses":
        """LoRA-Mixer's routing specialization loss, alpha * balance -+ lam * entropy, and nothing else.

        Args:
            alpha: weight of the balance.
            lam: weight of the entropy of each token's gate. The paper's values of both are not known.
            entropy: "as_printed" makes gates undecided, as the paper's formula does; "specialize" decided, as its text
                says. See `losses.routing_specialization`.

        Raises:
            ValueError: for an unknown `entropy`.
        """
        return cls(load_balance=alpha, token_entropy=entropy_weight(entropy, lam))

    def active(self) -> dict[str, float]:
        """The losses that weigh anything."""
        return {name: weight for name, weight in self._weights().items() if weight}

    def _weights(self) -> dict[str, float]:
        return {name: weight for name, weight in dataclasses.asdict(self).items() if name != "budget"}


@dataclass(frozen=True, kw_only=True, slots=True)
class MoELoRAConfig:
    """All options of a mixture.

    Attributes:
        router: options of the router; its class says which router.
        share_router: one router for all projections that read the same input (q, k and v), instead of one each.
        losses: weights of the losses on the routings.
        alpha: of fresh experts, whose scale is alpha / rank; None means alpha = 2 * rank.
        use_rslora: fresh experts take alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732).
        shared_A: fresh experts are heads B_e of one A at each projection (HydraLoRA, Tian et al. 2024,
            arXiv 2404.19245).
        dropout: LoRA dropout of the experts' input in training.
        backend: which implementation of the kernels runs: "auto", "reference", "dense",
            "gathered" or "triton".
        seed: of the first weights of routers and fresh experts.
    """

    router: RouterConfig = field(default_factory=Learned)
    share_router: bool = False
    losses: AuxLosses = field(default_factory=AuxLosses)
    alpha: float | None = None
    use_rslora: bool = False
    shared_A: bool = False
    dropout: float = 0.0
    backend: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.router, type) or not callable(getattr(self.router, "build", None)):
            raise ValueError(
                f"router must be a router's configuration, such as Learned(top_k=2) or Given(), got {self.router!r}"
            )
        if self.backend not in BACKENDS:
            raise ValueError(f"unknown backend {self.backend!r}; expected one of {BACKENDS}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")
        if self.share_router and isinstance(self.router, Given | Classifier | Gated):
            raise ValueError("share_router has no meaning for a router of given ids or gates; leave it off")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        values = dataclasses.asdict(self)
        values["router"] = {"kind": router_kind(self.router), **dataclasses.asdict(self.router)}  # pyright: ignore
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MoELoRAConfig":
        """The inverse of `to_dict`.

        Raises:
            ValueError: for an unknown router or option.
        """
        values = dict(values)
        router = dict(values.pop("router"))
        kind = router.pop("kind", None)
        if kind not in ROUTERS:
            raise ValueError(f"unknown router {kind!r}; expected one of {sorted(ROUTERS)}")
        losses = values.pop("losses", {})
        try:
            return cls(router=ROUTERS[kind](**router), losses=AuxLosses(**losses), **values)
        except TypeError as error:
            raise ValueError(f"the configuration has an option that this version does not know: {error}") from error


def router_kind(router: RouterConfig) -> str:
    """The name of a router's class in `ROUTERS`."""
    for name, kind in ROUTERS.items():
        if type(router) is kind:
            return name
    raise ValueError(
        f"a {type(router).__name__} has no name in a saved configuration; give it one with "
        f"moelora.register_router(name, {type(router).__name__}), where it is loaded too"
    )


def resolve_router(router: "str | RouterConfig", *, top_k: int) -> RouterConfig:
    """A router from the name that a user gave.

    "learned" with one expert per token takes straight-through unit weights, since a single renormalized weight is
    always 1 and would teach the router nothing.

    Raises:
        ValueError: for an unknown name.
    """
    if not isinstance(router, str):
        return router
    if router not in ROUTERS:
        raise ValueError(f"unknown router {router!r}; expected one of {sorted(ROUTERS)} or a router's configuration")
    if router == "learned":
        return Learned(top_k=top_k, combine="unit" if top_k == 1 else "renormalized")
    kind = ROUTERS[router]
    if top_k != 2:
        raise ValueError(
            f"top_k={top_k} is an option of router='learned'; pass the router's configuration, {kind.__name__}(...)"
        )
    needed = [
        option.name
        for option in dataclasses.fields(kind)
        if option.default is option.default_factory is dataclasses.MISSING
    ]
    if needed:
        raise ValueError(
            f"router={router!r} has options without a default, {needed}; "
            f"pass its configuration, {kind.__name__}({needed[0]}=...)"
        )
    return kind()
