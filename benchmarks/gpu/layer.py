"""What one patched projection costs: moelora beside the frozen linear and its peers, in one run.

    python -m benchmarks.gpu.layer                              # all cases, ScatterMoE listed as missing
    python -m benchmarks.gpu.layer --scattermoe PATH            # with it; `scatter.py` says where PATH comes from
    python -m benchmarks.gpu.layer --cases r16-e8 --providers moelora   # one case, moelora and the base alone

8192 tokens, bf16, random data, routers included. "forward" is without gradients; "forward + backward" gives gradients
of x, of the router and, unless they are frozen, of the factors. Experts are trained, and so fp32 in moelora, in all
cases but "frozen". "graph" is the same in a CUDA graph. "qkv" is q, k and v of one input, against the three frozen
linears. "saved MB" is what forward keeps for backward beyond x (allocated memory, so ids and gates count: 0.2 MB for
each projection); "relative error" is the distance from the mixture in fp32.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.gpu import shared_input
from benchmarks.gpu.command import Session, parser_of
from benchmarks.gpu.passes import forward_of, relative_error, saved_megabytes, step_of
from benchmarks.gpu.peers import Weights, builders, draw_weights, expected_output
from benchmarks.gpu.providers import (
    BASE,
    BASE_AGAIN,
    COMPILED,
    DENSE,
    GRAPHABLE,
    GROUPED,
    LOOP,
    MIXTURES,
    MOELORA,
    PEFT,
    PEFT_FP32,
    SCATTER,
)
from benchmarks.gpu.results import ERROR, SAVED, TIME
from benchmarks.gpu.scatter import scatter_builder
from benchmarks.gpu.timing import Failure, attempt, attempt_graph

FORWARD, BOTH = "forward", "forward + backward"
QKV = "qkv-r16-e8"

FEW = (BASE, PEFT, DENSE, MOELORA)
ALL = (BASE, PEFT_FP32, PEFT, LOOP, GROUPED, SCATTER, DENSE, COMPILED, MOELORA)


class Case(NamedTuple):
    """One line of the table."""

    rank: int
    experts: int
    providers: Sequence[str] = FEW
    out_features: int = 4096
    train_experts: bool = True
    tokens: int = 8192
    in_features: int = 4096
    top_k: int = 2

    def shrunk(self) -> "Case":
        """The case at a size for a CPU."""
        return self._replace(tokens=32, in_features=64, out_features=self.out_features // 64, rank=8)


CASES = {
    "r16-e8": Case(16, 8, ALL),
    "r64-e28": Case(64, 28, ALL),
    "r16-e64": Case(16, 64, ALL),
    "frozen-r16-e8": Case(16, 8, train_experts=False),
    "narrow-r16-e8": Case(16, 8, out_features=1024),
    QKV: Case(16, 8),
}


def measure(session: Session, name: str, case: Case, made_by: dict[str, Callable[[Weights], nn.Module]]) -> None:
    """One projection: all providers that this case compares."""
    weights = draw_weights(
        case.in_features,
        case.out_features,
        num_experts=case.experts,
        rank=case.rank,
        top_k=case.top_k,
        dtype=torch.bfloat16,
        device=session.device,
        train_experts=case.train_experts,
    )
    x_TD = draw_input(session, case.tokens, case.in_features)
    expected_TO = expected_output(weights, x_TD[:256])

    modules = build(session, name, {provider: partial(made_by[provider], weights) for provider in case.providers})
    for provider in (provider for provider in modules if provider in MIXTURES):
        error = attempt(partial(relative_error, modules[provider], x_TD, expected_TO))
        session.results.add(name, FORWARD, provider, ERROR, error)
    measure_modules(session, name, modules, x_TD)


def measure_shared_input(session: Session, name: str, case: Case, backend: str) -> None:
    """Three projections of one input."""
    base_of = partial(shared_input.Projections, case.in_features, case.in_features // 4, session.device)
    made_by = shared_input.builders(base_of, rank=case.rank, experts=case.experts, top_k=case.top_k, backend=backend)
    x_BLD = draw_input(session, 4, case.tokens // 4, case.in_features)
    measure_modules(session, name, build(session, name, made_by), x_BLD)


def draw_input(session: Session, *shape: int) -> Tensor:
    """Random numbers, always the same ones."""
    generator = torch.Generator(session.device).manual_seed(1)
    return torch.randn(shape, generator=generator, device=session.device).to(torch.bfloat16)


def build(session: Session, name: str, made_by: dict[str, Callable[[], nn.Module]]) -> dict[str, nn.Module]:
    """The modules of all providers that this run wants and that can be made."""
    modules = {}
    for provider, make in made_by.items():
        if session.wants(provider):
            module = attempt(make)
            if isinstance(module, Failure):
                for mode in (FORWARD, BOTH):
                    session.results.add(name, mode, provider, TIME, module)
            else:
                modules[provider] = module
    return modules


def measure_modules(session: Session, name: str, modules: dict[str, nn.Module], x: Tensor) -> None:
    """Forward, forward with backward, both again in CUDA graphs, and the memory between them."""
    modules = {**modules, BASE_AGAIN: modules[BASE]}
    for mode, pass_of in ((FORWARD, forward_of), (BOTH, step_of)):
        runs = {provider: attempt(partial(pass_of, module, x)) for provider, module in modules.items()}
        session.measure(name, mode, runs)
        graphs = {
            provider: attempt_graph(run, session.device) for provider, run in runs.items() if provider in GRAPHABLE
        }
        session.measure(name, f"{mode}, graph", graphs)

    for provider, module in modules.items():
        if session.device.type == "cuda" and provider != BASE_AGAIN:
            session.results.add(name, BOTH, provider, SAVED, attempt(partial(saved_megabytes, module, x)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the cases, print a table and save it."""
    parser = parser_of("layer", __doc__, CASES, rounds=30)
    parser.add_argument("--scattermoe", type=Path, help="a checkout of github.com/shawntan/scattermoe")
    options = parser.parse_args(arguments)
    session = Session("layer", options)

    made_by = {**builders(options.backend), SCATTER: scatter_builder(options.scattermoe)}
    for name in options.cases:
        case = CASES[name].shrunk() if options.tiny else CASES[name]
        with session.case(name):
            if name == QKV:
                measure_shared_input(session, name, case, options.backend)
            else:
                measure(session, name, case, made_by)
    session.close()


if __name__ == "__main__":
    main()
