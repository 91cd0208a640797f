"""Every kernel of the operator compiles for H100 and H200, in every configuration, without spills and for wgmma.

Interpreting kernels or compiling them is decided once for a process, and the tests around these interpret: so one
script, in a process of its own, compiles all that CALLS says, and each test looks at one call. Tensors are on "meta",
and nothing runs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moelora.kernels.gpu import tiles

SCRIPT = """
import json
import sys
import traceback

import torch
from moelora.kernels.gpu import ops, paths, tiles
from moelora.kernels.gpu.dense import Needs
from moelora.kernels.gpu.tile import Tile
from moelora.kernels.tune import Case, launcher
from moelora.testing.offline import compile_only, problems

torch.set_num_threads(1)
PRODUCTS = {"_product", "_expand", "_gram", "_shrink", "_shrink_backward"}
names, found = [], []


def check(builds, dtype):
    names.extend(build.name for build in builds)
    for build in builds:
        # a product in 16 bits, of blocks of 64 tokens or wide columns at least, is wgmma's
        wants = build.name in PRODUCTS and build.constants["ROWS"] >= 64 and dtype.itemsize == 2
        found.extend(problems(build, wants_wgmma=wants))


def tensor(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def compile_paths(dtype, tokens, ranks, top_k, outs=(4096,), width=4096, routers=1, combine="softmax", dropout=0.0):
    # the calls of a training step and of evaluation; without routers, ids are given, and tokens may be idle
    experts, rows, fp32 = len(ranks), sum(ranks), torch.float32
    given = tensor(1, tokens, top_k, dtype=torch.int64), tensor(1, tokens, top_k, dtype=fp32)
    owners = [tensor(len(outs), n, dtype=torch.int32) for n in (rows, experts, experts, experts)]
    owners[1] = owners[1].float()
    lists = ops.Lists(
        tensor(tokens, width, dtype=dtype),
        [] if routers else [tensor(tokens, out, dtype=dtype) for out in outs],
        [tensor(rows, width, dtype=fp32) for _ in outs],
        [tensor(rows, out, dtype=fp32) for out in outs],
        [tensor(experts, width, dtype=fp32) for _ in range(routers)],
        [] if routers else list(given),
        [tensor(out, width, dtype=dtype) for out in outs] if routers else [],
        [tensor(out, dtype=dtype) for out in outs] if routers else [],
        owners,
        [tensor(1, dtype=torch.int64)] if dropout else [],
    )
    settings = ops.Settings(max(ranks), experts, top_k, 0.7, combine, bool(routers), dropout)
    problem = ops.problem_of(lists, settings)
    with compile_only() as builds:
        outputs, chosen, S = paths.forward(problem, keeps=True)
        paths.backward(problem, chosen, S, outputs, (None, None), Needs(True, True, True, True))
        paths.forward(problem, keeps=False)
    check(builds, dtype)


def compile_table(name):
    for kernel, entries in tiles.table(name)["tiles"].items():
        # a tile of no rows stands for cuBLAS
        for key, tile in ((entry["key"], Tile(**entry["tile"])) for entry in entries if entry["tile"]["rows"]):
            with compile_only() as builds:
                launcher(Case(kernel, *key), "meta")(tile)
            check(builds, torch.bfloat16)


answers = {}
for call in json.loads(sys.argv[1]):
    names, found = [], []
    try:
        eval(call)
    except Exception:
        found.append(traceback.format_exc())
    answers[call] = {"names": sorted(set(names)), "found": sorted(set(found))}
print(json.dumps(answers))
"""

DTYPES = ("bfloat16", "float16", "float32")

TABLES = [f"compile_table({path.stem!r})" for path in sorted(tiles.FOLDER.glob("*.json"))]

DENSE = [f"compile_paths(torch.{dtype}, 8192, (16,) * 8, 2, combine='renormalized')" for dtype in DTYPES]

SORTED = [f"compile_paths(torch.{dtype}, 8192, (64,) * 28, 2)" for dtype in DTYPES]

# ids are given and tokens may be idle; and the width is no multiple of 16
GIVEN = [f"compile_paths(torch.{dtype}, 17, (3, 0, 17, 8, 40), 2, outs=(1000,), routers=0)" for dtype in DTYPES]

PICKED = ["compile_paths(torch.bfloat16, 1, (16,) * 8, 2)", "compile_paths(torch.bfloat16, 64, (16,) * 256, 2)"]

OTHERS = [
    "compile_paths(torch.bfloat16, 8192, (16,) * 8, 2, outs=(4096, 1024, 1024), routers=3, combine='constant')",
    "compile_paths(torch.bfloat16, 17, (5,) * 6, 1, outs=(1001, 250, 250), width=1001, combine='unit')",
    "compile_paths(torch.bfloat16, 512, (16,) * 8, 2, dropout=0.1)",
    "compile_paths(torch.bfloat16, 512, (16,) * 8, 8)",
]

CALLS = {
    call: kernel
    for calls, kernel in (
        (TABLES, "_gram"),
        (DENSE, "_product"),
        (SORTED, "_shrink_backward"),
        (GIVEN, "_finish_backward"),
        (PICKED, "_picked_shrink"),
        (OTHERS, "_expand"),
    )
    for call in calls
}
"""What is compiled, and a kernel that must be among it."""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By call: the names of the kernels that it compiled, and what is wrong with them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "JAXTYPING_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        # empty, so that everything is compiled by the ptxas at hand
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    command = [sys.executable, "-c", SCRIPT, json.dumps(list(CALLS))]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(finished.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_kernels_fit_the_gpu(call, answers):
    """No registers spill, shared memory is enough, and products in 16 bits are wgmma's."""
    assert CALLS[call] in answers[call]["names"]
    assert not answers[call]["found"], "\n".join(answers[call]["found"])
