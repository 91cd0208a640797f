"""The drop-in layer: a frozen linear, a bank of experts, a router. Begin with MoELoRALinear."""

from typing import Any, final

from torch import Tensor, nn
from torch.nn import functional as F

from moelora.bank import ExpertBank
from moelora.kernels.api import mix
from moelora.routers.base import AbstractRouter
from moelora.routing import Routing
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
        backend: which implementation of the kernels runs; "auto" chooses by shapes.
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
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        # looked up once: a decode step comes through here hundreds of times, and does little else
        parts: dict[str, Any] = self._modules
        bank, router, tape = parts["bank"], parts["router"], self.tape
        base, settings = parts["base"](x), tape.current
        if settings.disabled or not bank.total_rank:
            return base

        # who acts on which token
        shape = x.shape
        tape.leading = shape[:-1]
        x_TD = x.reshape(-1, shape[-1])
        if settings.fixed is not None:
            routing, every_token, repeated = settings.fixed.routing(tape.leading, x.device, tape.batch), False, False
        else:
            routing, repeated = self._route(router, x, x_TD)
            every_token = router.every_token
        if tape.collecting:
            tape.write(self.site, routing, reads_encoder=self.reads_encoder, repeated=repeated)

        # add what they know
        if self.dropout and self.training:
            x_TD = F.dropout(x_TD, self.dropout)
        base_TO = base.reshape(-1, base.shape[-1])
        mixed_TO = mix(base_TO, x_TD, bank.factors(), routing, every_token=every_token, backend=self.backend)
        if tape.leaves:
            mixed_TO = tape.attach(self.site, mixed_TO, routing)
        return mixed_TO.reshape(base.shape)

    def _route(self, router: AbstractRouter, x: Tensor, x_TD: Tensor) -> tuple[Routing, bool]:
        """The router's answer, and whether it has given it to another layer already."""
        # `forward` and not a module's call, whose checks for hooks take longer than a decode step's arithmetic
        if not self.shared_router:
            return router.forward(x_TD, self.tape), False
        routing = self.tape.shared(id(router), x)
        if routing is not None:
            return routing, True
        routing = router.forward(x_TD, self.tape)
        self.tape.share(id(router), x, routing)
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
