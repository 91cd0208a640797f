"""What one patched projection costs for a few tokens: CUDA graphs, moelora beside the frozen linear and its peers.

    python -m benchmarks.gpu.decode
    python -m benchmarks.gpu.decode --cases t1-e8 t64-e1000 --providers moelora

4096 to 4096, bf16, frozen experts of rank 16, 2 active, the router included. Every graph holds eight layers, one behind
the other, each with weights in memory of its own: 268 MB of base weights, five times the L2, so that each layer finds
its weights in device memory, as in a model. They all read the same few tokens. Times are for one layer.
"""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.gpu.command import Session, parser_of
from benchmarks.gpu.peers import Weights, builders, draw_weights
from benchmarks.gpu.providers import BASE, BASE_AGAIN, DENSE, MOELORA, PEFT
from benchmarks.gpu.timing import attempt, graph_of

LAYERS = 8
PROVIDERS = (BASE, PEFT, DENSE, MOELORA, BASE_AGAIN)


class Case(NamedTuple):
    """One line of the table."""

    tokens: int
    experts: int
    rank: int = 16
    width: int = 4096

    def shrunk(self) -> "Case":
        """The case at a size for a CPU."""
        return self._replace(width=64, experts=min(self.experts, 16), rank=8)


CASES = {f"t{tokens}-e{experts}": Case(tokens, experts) for experts in (8, 256, 1000) for tokens in (1, 16, 64)}


class Stack(nn.Module):
    """Copies of one layer, called one behind the other on the same input."""

    def __init__(self, layer: nn.Module, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer, *(copy.deepcopy(layer) for _ in range(count - 1))])

    def forward(self, x: Tensor) -> None:
        """All of them; what they answer is let go."""
        for layer in self.layers:
            layer(x)


def measure(
    session: Session, name: str, case: Case, made_by: dict[str, Callable[[Weights], nn.Module]], mode: str = "graph"
) -> None:
    """All providers of one case."""
    weights = draw_weights(
        case.width,
        case.width,
        num_experts=case.experts,
        rank=case.rank,
        top_k=2,
        dtype=torch.bfloat16,
        device=session.device,
        train_experts=False,
    )
    generator = torch.Generator(session.device).manual_seed(1)
    x_TD = torch.randn(case.tokens, case.width, generator=generator, device=session.device).to(torch.bfloat16)

    def captured(provider: str) -> Callable[[], object]:
        stack = Stack(made_by[provider](weights), LAYERS)
        return graph_of(torch.no_grad()(lambda: stack(x_TD)), session.device)

    wanted = [provider for provider in made_by if session.wants(provider)]
    runs = {provider: attempt(lambda provider=provider: captured(provider)) for provider in wanted}
    session.measure(name, mode, runs, per=LAYERS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the cases, print a table and save it."""
    options = parser_of("decode", __doc__, CASES, rounds=40).parse_args(arguments)
    session = Session("decode", options)
    known = builders(options.backend)
    made_by = {provider: known[BASE if provider == BASE_AGAIN else provider] for provider in PROVIDERS}
    for name in options.cases:
        case = CASES[name].shrunk() if options.tiny else CASES[name]
        with session.case(name):
            measure(session, name, case, made_by)
    session.close()


if __name__ == "__main__":
    main()
