"""Measure which configuration of each kernel is fastest on this GPU, and write the table.

    python -m moelora.kernels.tune                      # all kernels, all sizes; writes the table of this GPU
    python -m moelora.kernels.tune --kernels expand gram --output table.json

Every candidate is compiled first, in parallel processes; then the candidates of one size run in turns, and the median
of the rounds decides. Sizes in between take the table's nearest.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product as combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from triton.runtime.errors import OutOfResources

from moelora.kernels.gpu.tile import Tile


class Case(NamedTuple):
    """A kernel at one size: tokens, length of its wide axis, and rank rows (or the columns of a compact rank)."""

    kernel: str
    tokens: int
    width: int
    rows: int


LARGE = [(8192, 4096), (8192, 1024), (4096, 2048), (1024, 4096)]

CASES = [
    *(Case("shrink", *size, 128) for size in LARGE),
    Case("shrink", 8192, 4096, 384),
    Case("shrink", 4096, 2048, 384),
    Case("shrink", 256, 4096, 128),
    *(Case("expand", *size, 128) for size in [*LARGE, (4096, 256)]),
    Case("expand", 8192, 4096, 384),
    Case("expand", 4096, 2048, 384),
    *(Case("expand_add", *size, 128) for size in [*LARGE, (4096, 256)]),
    *(Case("gram", *size, 128) for size in [*LARGE, (4096, 256)]),
    Case("gram", 8192, 4096, 16),
    Case("gram", 4096, 2048, 384),
    *(Case(f"grouped_{part}", 8192, 4096, rank) for part in ("shrink", "expand", "gram") for rank in (16, 64)),
    *(Case("router_logits", tokens, 4096, experts) for tokens in (1, 16, 64) for experts in (8, 256, 1024)),
    *(Case("picked_shrink", tokens, 4096, 16) for tokens in (1, 16, 64)),
    *(Case("picked_expand", tokens, 4096, 16) for tokens in (1, 16, 64)),
]

DELTA_FIRST = [
    (8192, 4096, 4096),
    (8192, 4096, 1024),
    (8192, 4096, 14336),
    (8192, 14336, 4096),
    (4096, 2048, 2048),
    (4096, 2048, 256),
    (1024, 4096, 4096),
]

SPACE: dict[str, dict[str, tuple[int, ...]]] = {
    "shrink": {"rows": (64, 128), "columns": (128,), "inner": (64, 128), "split": (1, 2, 4), "stages": (3, 4)},
    "expand": {
        "rows": (64, 128),
        "columns": (64, 128, 256),
        "inner": (64, 128),
        "split": (1, 2, 4, 8),
        "stages": (2, 3),
    },
    "gram": {"rows": (64, 128), "columns": (128,), "inner": (64, 128), "split": (1, 2, 4, 8), "stages": (3, 4)},
    "grouped_shrink": {"rows": (64, 128), "columns": (64,), "inner": (64, 128), "stages": (3, 4)},
    "grouped_expand": {"rows": (64, 128), "columns": (64, 128, 256), "inner": (64,), "stages": (2, 3)},
    "grouped_gram": {"rows": (64, 128), "columns": (64,), "inner": (32, 64), "split": (1, 2, 4), "stages": (3, 4)},
    "router_logits": {
        "rows": (4, 16, 64),
        "columns": (4, 16, 32),
        "inner": (64, 128, 256),
        "split": (4, 8, 16, 32),
        "warps": (4,),
    },
    "picked_shrink": {"rows": (16,), "inner": (128, 256), "split": (4, 8, 16, 32), "warps": (2, 4)},
    "picked_expand": {"rows": (32,), "columns": (32, 64, 128), "warps": (1, 2, 4)},
}
SPACE["expand_add"] = SPACE["expand"]

EXPERTS = 8
TOP_K = 2


def candidates(case: Case) -> Iterator[Tile]:
    """The configurations that are tried for a case: those of its kernel's space that fit together."""
    space = SPACE[case.kernel]
    if case.kernel == "expand":
        yield Tile(rows=0)  # cuBLAS
    for values in combinations(*space.values()):
        tile = Tile(**dict(zip(space, values)))
        if "warps" not in space:
            tile = tile._replace(warps=8 if tile.rows * tile.columns > 64 * 128 else 4)
        if case.kernel in ("expand", "expand_add") and case.rows <= 128 and tile.inner != 128:
            continue
        if case.kernel == "router_logits" and not fits_router(case, tile):
            continue
        yield tile


def fits_router(case: Case, tile: Tile) -> bool:
    """Whether few tokens take the branch without tensor cores, and many a block that has registers for them."""
    if case.tokens <= 4:
        return tile.rows == 4
    return tile.rows in (16, min(64, case.tokens)) and tile.columns >= 16 and tile.columns * tile.inner <= 16 * 128


def launcher(case: Case, device: str, dtype: torch.dtype = torch.bfloat16) -> Callable[[Tile], object]:
    """What runs the case's kernel with a configuration, on random data (or on shapes alone, on the device "meta")."""
    from moelora.kernels.gpu.choose import choose_experts
    from moelora.kernels.gpu.expand import expand
    from moelora.kernels.gpu.gram import gram
    from moelora.kernels.gpu.picked import picked_expand, picked_shrink, router_logits
    from moelora.kernels.gpu.product import product

    kernel, tokens, width, count = case

    def random(*shape: int, as_dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, dtype=as_dtype, device=device)

    def integers(*shape: int, below: int = EXPERTS) -> torch.Tensor:
        return torch.randint(below, shape, dtype=torch.int32, device=device)

    x, weights, scale = (
        random(tokens, width),
        random(tokens, TOP_K, as_dtype=torch.float32),
        torch.ones(EXPERTS, device=device),
    )
    if kernel == "shrink":
        projections = 3 if count > 256 else 1
        rows = random(projections, count // projections, width)
        tails = random(1, 32, width)
        return lambda tile: product(x, rows, tails, tile)
    if kernel in ("expand", "expand_add"):
        left, right = random(tokens, count), random(count, width)
        out, base = torch.empty_like(x), x if kernel == "expand_add" else None
        return lambda tile: expand(left, right, out, tile, base_TO=base)
    if kernel == "gram":
        left, tail = random(tokens, count), random(tokens, 16) if count > 16 else None
        return lambda tile: gram(left, tail, x, tile)
    if kernel == "router_logits":
        gate_ED = random(count, width, as_dtype=torch.float32)
        # the choice reads the parts, so their number is its matter too
        return lambda tile: choose_experts(router_logits(x, gate_ED, tile), 1.0, TOP_K, "renormalized")

    # experts of one rank, one after the other
    ranks = torch.full((EXPERTS,), count, dtype=torch.int32, device=device)
    starts = torch.arange(EXPERTS, dtype=torch.int32, device=device) * count
    factors = random(EXPERTS * count, width)
    ids = torch.rand(tokens, EXPERTS, device=device).argsort(-1)[:, :TOP_K].contiguous()
    if kernel == "picked_shrink":
        return lambda tile: picked_shrink(x, factors, ids, starts, ranks, count, tile)
    if kernel == "picked_expand":
        parts = random(8, tokens, TOP_K, count, as_dtype=torch.float32)
        return lambda tile: picked_expand(parts, ids, weights, scale, factors, starts, ranks, x, x, tile)
    return _grouped(case, x, factors, ids, weights, scale, starts, ranks)


def _grouped(case: Case, x, factors, ids, weights, scale, starts, ranks) -> Callable[[Tile], object]:
    from moelora.kernels.gpu.grouped_expand import grouped_expand
    from moelora.kernels.gpu.grouped_gram import grouped_gram
    from moelora.kernels.gpu.grouped_shrink import grouped_shrink, padded_rank
    from moelora.kernels.gpu.order import sort_by_expert

    s = torch.randn(case.tokens, TOP_K, padded_rank(case.rows), dtype=x.dtype, device=x.device)
    out = torch.empty_like(x)
    orders = {rows: sort_by_expert(ids, None, EXPERTS, rows) for rows in (64, 128)}
    if case.kernel == "grouped_shrink":
        return lambda tile: grouped_shrink(x, factors, orders[tile.rows], starts, ranks, case.rows, tile)
    if case.kernel == "grouped_expand":
        return lambda tile: grouped_expand(
            s, weights, scale, factors, out, orders[tile.rows], starts, ranks, accumulate=False, tile=tile
        )
    return lambda tile: grouped_gram(s, weights, scale, x, orders[64], starts, ranks, factors.shape[0], tile)


def compile_all(cases: list[Case], processes: int) -> None:
    """Fill Triton's cache with every candidate of every case."""
    jobs = [(case, tile) for case in cases for tile in candidates(case)]
    chunks = [jobs[first::processes] for first in range(processes)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile, chunks))


def _compile(jobs: list[tuple[Case, Tile]]) -> None:
    from moelora.testing.offline import compile_only

    with compile_only():
        for case, tile in jobs:
            launcher(case, "meta")(tile)


def in_turns(runs: dict[Any, Callable[[], object]], rounds: int, calls: int) -> dict[Any, float]:
    """Microseconds of each, as CUDA graphs of several calls: the median over rounds in which each has its turn."""
    graphs = {name: _graph(run, calls) for name, run in runs.items()}
    times: dict[Any, list[float]] = {name: [] for name in graphs}
    for round_number in range(rounds + 1):
        for name, graph in graphs.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            if round_number:
                times[name].append(1000 * start.elapsed_time(stop) / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def _graph(run: Callable[[], object], calls: int) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph


def tune(case: Case, rounds: int) -> dict[str, Any]:
    """The table's entry for a case."""
    run = launcher(case, "cuda")
    runs: dict[Tile, Callable[[], object]] = {}
    for tile in candidates(case):
        try:
            run(tile)
            runs[tile] = lambda tile=tile: run(tile)
        except OutOfResources:
            pass  # a configuration that does not fit the chip is no candidate
    times = in_turns(runs, rounds, calls=20 if case.tokens <= 256 else 4)
    best = min(times, key=lambda tile: times[tile])
    ranking = sorted(times.values())
    figures = f"{ranking[0]:8.1f} us, median {statistics.median(ranking):8.1f}"
    print(f"{case.kernel:<15}{case[1:]!s:<20}{figures}  {tuple(best)}", flush=True)
    return {"key": list(case[1:]), "tile": best._asdict(), "microseconds": round(ranking[0], 1)}


def tune_delta_first(size: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    """Whether writing the mixture first pays, for a linear of this size and 128 rank rows."""
    from moelora.kernels.gpu.expand import expand
    from moelora.kernels.gpu.tiles import tile_for

    tokens, in_features, out_features = size

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda")

    x, weight = random(tokens, in_features), random(out_features, in_features)
    left, right = random(tokens, 128), random(128, out_features)
    first_tile = tile_for("expand", (tokens, out_features), 128, torch.bfloat16)
    add_tile = tile_for("expand_add", (tokens, out_features), 128, torch.bfloat16)

    def delta_first() -> None:
        out = x.new_empty(tokens, out_features)
        expand(left, right, out, first_tile)
        out.addmm_(x, weight.t())

    def base_first() -> None:
        out = F.linear(x, weight)
        expand(left, right, out, add_tile, base_TO=out)

    times = in_turns({"first": delta_first, "last": base_first, "base": lambda: F.linear(x, weight)}, rounds, 4)
    print(f"delta first {size}: {times}", flush=True)
    return {"key": list(size), "pays": times["first"] < times["last"], **{k: round(v, 1) for k, v in times.items()}}


def written(table: dict[str, Any]) -> str:
    """A table as JSON, an entry a line, so that a diff shows which entries changed."""

    def entries(rows: list[Any], indent: str) -> str:
        return ",\n".join(indent + json.dumps(row) for row in rows)

    tiles = ",\n".join(
        f'  "{kernel}": [\n{entries(rows, "   ")}\n  ]' for kernel, rows in sorted(table["tiles"].items())
    )
    return (
        f'{{\n "device": {json.dumps(table["device"])},\n "rules": {json.dumps(table["rules"])},\n'
        f' "delta_first": [\n{entries(table["delta_first"], "  ")}\n ],\n "tiles": {{\n{tiles}\n }}\n}}\n'
    )


def main() -> None:
    """Tune and write."""
    from moelora.kernels.gpu import tiles

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=sorted({case.kernel for case in CASES}), default=None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tune: this needs a CUDA device")
    cases = [case for case in CASES if options.kernels is None or case.kernel in options.kernels]
    compile_all(cases, options.processes)

    # sizes that are not measured now keep what they have
    name = torch.cuda.get_device_name().lower().replace(" ", "_")
    table = json.loads(json.dumps(tiles.table(tiles.device_name())))
    for kernel in {case.kernel for case in cases}:
        table["tiles"][kernel] = [tune(case, options.rounds) for case in cases if case.kernel == kernel]
    if options.kernels is None or "expand" in options.kernels:
        table["delta_first"] = [tune_delta_first(size, 3 * options.rounds) for size in DELTA_FIRST]
    table["device"] = {"name": torch.cuda.get_device_name(), "torch": torch.__version__}
    output = options.output or tiles.FOLDER / f"{name}.json"
    output.write_text(written(table))
    print(f"written: {output}")


if __name__ == "__main__":
    main()
