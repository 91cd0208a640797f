"""How moelora's time grows: with the number of tokens at fixed experts, and with that of experts at fixed tokens.

    python -m benchmarks.gpu.growth
    python -m benchmarks.gpu.growth --cases tokens-e8 experts-t1

4096 to 4096, bf16, rank 16, 2 active, the router included, all in CUDA graphs: the device's time alone. "tokens" and
"experts-t8192" train fp32 experts; "experts-t1" and "experts-t64" are what `decode.py` measures: frozen experts, eight
layers.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.gpu import decode
from benchmarks.gpu.command import Session, parser_of
from benchmarks.gpu.passes import forward_of, step_of
from benchmarks.gpu.peers import builders, draw_weights
from benchmarks.gpu.providers import BASE, MOELORA
from benchmarks.gpu.timing import Failure, attempt, attempt_graph

TOKENS = (512, 2048, 8192, 32768, 65536)
EXPERTS = (8, 16, 64, 256, 1000)
WIDTH, RANK, TOP_K = 4096, 16, 2


class Point(NamedTuple):
    """One place on a curve."""

    tokens: int
    experts: int

    @property
    def name(self) -> str:
        """The case's name in the results."""
        return f"t{self.tokens}-e{self.experts}"


CASES = {
    "tokens-e8": [Point(tokens, 8) for tokens in TOKENS],
    "tokens-e64": [Point(tokens, 64) for tokens in TOKENS],
    "experts-t8192": [Point(8192, experts) for experts in EXPERTS],
    "experts-t1": [Point(1, experts) for experts in EXPERTS],
    "experts-t64": [Point(64, experts) for experts in EXPERTS],
}


def measure(session: Session, point: Point, backend: str, *, width: int) -> None:
    """Forward, and forward with backward, of many tokens."""
    weights = draw_weights(
        width,
        width,
        num_experts=point.experts,
        rank=RANK,
        top_k=TOP_K,
        dtype=torch.bfloat16,
        device=session.device,
    )
    generator = torch.Generator(session.device).manual_seed(1)
    x_TD = torch.randn(point.tokens, width, generator=generator, device=session.device).to(torch.bfloat16)
    made_by = builders(backend)
    modules = {provider: attempt(partial(made_by[provider], weights)) for provider in (BASE, MOELORA)}
    for mode, pass_of in (("forward", forward_of), ("forward + backward", step_of)):
        runs = {
            provider: module if isinstance(module, Failure) else attempt(partial(pass_of, module, x_TD))
            for provider, module in modules.items()
        }
        graphs = {provider: attempt_graph(run, session.device) for provider, run in runs.items()}
        session.measure(point.name, mode, graphs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the curves, print a table and save it."""
    options = parser_of("growth", __doc__, CASES, rounds=15).parse_args(arguments)
    session = Session("growth", options)
    done: set[Point] = set()
    for curve in options.cases:
        for point in (point for point in CASES[curve] if point not in done):
            done.add(point)
            with session.case(point.name):
                if point.tokens <= 64:
                    case = decode.Case(point.tokens, point.experts, RANK, WIDTH)
                    made_by = {provider: builders(options.backend)[provider] for provider in (BASE, MOELORA)}
                    decode.measure(session, point.name, case.shrunk() if options.tiny else case, made_by)
                elif options.tiny:
                    measure(session, point._replace(tokens=32, experts=4), options.backend, width=64)
                else:
                    measure(session, point, options.backend, width=WIDTH)
    session.close()


if __name__ == "__main__":
    main()
