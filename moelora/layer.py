"""The drop-in layer: a frozen linear, a bank of experts, a router. Begin with MoELoRALinear."""

from typing import Any, final

from torch import Tensor, nn
from torch.nn import functional as F

from moelora.bank import ExpertBank
from moelora.call_settings import FixedMixture
from moelora.frozen_linear import frozen_linear
from moelora.kernels.api import mix
from moelora.kernels.fused import arithmetic_dtype, mix_fused, operators, runs
from moelora.routers.base import AbstractRouter
from moelora.routing import Routing
from moelora.siblings import Siblings, Together
from moelora.tape import Tape


@final
class MoELoRALinear(nn.Module):
    """base(x) plus what the routed experts add to it.

    Where no expert acts the output is `base(x)`, bit for bit. The base is a black box: any module that maps (..., D) to
    (..., O), such as `nn.Linear`, GPT-2's `Conv1D` or a quantised linear.

    Args:
        base: the frozen projection.
        bank: its experts.
        router: chooses among them.
        tape: the state shared with the other layers of the model.
        site: the name of the projection in its model.
        shared_router: True if other layers use the same router on the same input, which then decides once.
        reads_encoder: True for a projection of the encoder's states in a decoder.
        dropout: probability with which the experts (not the router) miss an input element in training.
        backend: which implementation of the kernels runs; "auto" takes Triton on a GPU, and else chooses by shapes.

    Attributes:
        siblings: the layers that read the same input, this one among them, if there are any.
    """

    base: nn.Module
    bank: ExpertBank
    router: AbstractRouter
    tape: Tape
    site: str
    shared_router: bool
    reads_encoder: bool
    dropout: float
    backend: str
    siblings: Siblings | None

    def __init__(
        self,
        base: nn.Module,
        bank: ExpertBank,
        router: AbstractRouter,
        tape: Tape,
        *,
        site: str,
        shared_router: bool = False,
        reads_encoder: bool = False,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.base, self.bank, self.router = base, bank, router
        self.tape, self.site = tape, site
        self.shared_router, self.reads_encoder = shared_router, reads_encoder
        self.dropout, self.backend = dropout, backend
        self.siblings = None
        operators()  # found now, not while a compiler looks on
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        # looked up once: a decode step comes through here hundreds of times, and does little else
        parts: dict[str, Any] = self._modules
        bank, router, tape = parts["bank"], parts["router"], self.tape
        settings = tape.current
        if settings.disabled or not bank.total_rank:
            return parts["base"](x)

        # add to the base what the experts know that act on each token
        tape.leading = x.shape[:-1]
        fixed = settings.fixed
        top_k = router.top_k if fixed is None else fixed.experts_NK.shape[1]
        way = self._mix_fused if runs(x, self.backend, top_k) else self._mix
        mixed, routing, repeated = way(x, fixed)

        if tape.collecting:
            tape.write(self.site, routing, reads_encoder=self.reads_encoder, repeated=repeated)
        if tape.leaves:
            mixed = tape.attach(self.site, mixed, routing)
        return mixed

    def _mix(self, x: Tensor, fixed: FixedMixture | None) -> tuple[Tensor, Routing, bool]:
        """The output by torch, the routing, and whether another layer has that already."""
        parts: dict[str, Any] = self._modules
        base = parts["base"](x)
        x_TD, base_TO = x.reshape(-1, x.shape[-1]), base.reshape(-1, base.shape[-1])
        routing, repeated = self._route(x, x_TD, fixed)
        if self.dropout and self.training:
            x_TD = F.dropout(x_TD, self.dropout)
        every_token = fixed is None and parts["router"].every_token
        factors = parts["bank"].factors()
        mixed_TO = mix(base_TO, x_TD, factors, routing, every_token=every_token, backend=self.backend)
        return mixed_TO.reshape(base.shape), routing, repeated

    def _mix_fused(self, x: Tensor, fixed: FixedMixture | None) -> tuple[Tensor, Routing, bool]:
        """The same by one operator, which also computes a plain base, and the layers that read the same input."""
        handed = self.tape.take(self.site, x)
        if handed is not None:
            return handed
        dtype, dropout = arithmetic_dtype(x), self.dropout if self.training else 0.0
        x_TD = x.reshape(-1, x.shape[-1]).to(dtype)
        gate = self.router.linear_gate() if fixed is None else None
        known = self.tape.shared(id(self.router), x) if self.shared_router else None

        together = self.siblings.together(dtype) if self.siblings and gate is not None and known is None else None
        if together is not None:
            return self._mix_together(x, x_TD, together, dropout)

        # this one alone; the base is only left to the operator where no row must be the base's own
        every_token = fixed is None and self.router.every_token
        base: Any = frozen_linear(self.base, dtype) if every_token else None
        if base is None:
            base = self.base(x)
            base = base.reshape(-1, base.shape[-1])
        if gate is not None and known is None:
            routing, repeated, who = None, False, [gate]
        else:
            routing, repeated = self._route(x, x_TD, fixed)
            who = routing
        (mixed_TO,), (made,) = mix_fused(
            x_TD, [base], [self.bank.factors()], who, every_token=every_token, dropout=dropout
        )
        if routing is None and self.shared_router:
            self.tape.share(id(self.router), x, made)
        return mixed_TO.view(*x.shape[:-1], mixed_TO.shape[-1]), made, repeated

    def _mix_together(self, x: Tensor, x_TD: Tensor, them: Together, dropout: float) -> tuple[Tensor, Routing, bool]:
        """The same of all layers that read this input; what is another's is handed on to it."""
        banks = [layer.bank.factors() for layer in them.layers]
        outputs, routings = mix_fused(x_TD, them.linears, banks, them.gates, every_token=True, dropout=dropout)
        shared = len(routings) == 1
        made = [
            (output.view(*x.shape[:-1], output.shape[-1]), routing, shared and layer is not self)
            for layer, output, routing in zip(
                them.layers, outputs, routings * (len(outputs) if shared else 1), strict=True
            )
        ]
        for layer, result in zip(them.layers, made, strict=True):
            if layer is not self:
                self.tape.hand_on(layer.site, x, result)
        return made[them.layers.index(self)]

    def _route(self, x: Tensor, x_TD: Tensor, fixed: FixedMixture | None) -> tuple[Routing, bool]:
        """Who acts on which token, and whether the router has told another layer already."""
        tape, router = self.tape, self._modules["router"]
        if fixed is not None:
            return fixed.routing(tape.leading, x.device, tape.batch), False
        # `forward` and not a module's call, whose checks for hooks take longer than a decode step's arithmetic
        if not self.shared_router:
            return router.forward(x_TD, tape), False  # pyright: ignore[reportOptionalMemberAccess]
        routing = tape.shared(id(router), x)
        if routing is not None:
            return routing, True
        routing = router.forward(x_TD, tape)  # pyright: ignore[reportOptionalMemberAccess]
        tape.share(id(router), x, routing)
        return routing, False

    # models look at the projection that they think they hold
    @property
    def weight(self) -> Tensor:
        """The base's weight."""
        return self.base.weight  # pyright: ignore[reportReturnType]

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias  # pyright: ignore[reportReturnType]

    @property
    def in_features(self) -> int:
        """Width of the input, D."""
        return self.bank.in_features

    @property
    def out_features(self) -> int:
        """Width of the output, O."""
        return self.bank.out_features

    def extra_repr(self) -> str:
        return f"site={self.site!r}"
