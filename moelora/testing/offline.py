"""Compile Triton kernels for a GPU that is not there, through the functions that launch them. Begin with compile_only.

    with compile_only(arch=90) as builds:
        product(torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta"), rows_PRD, None, Tile())
    assert not [problem for build in builds for problem in problems(build, wants_wgmma=True)]

No kernel runs, so tensors may be on "meta": Triton takes their dtype, and from their address whether it is aligned. A
storage on meta begins at address 0, so that a view is aligned exactly if it is on a GPU. Call the launcher itself: an
operator of torch.library answers for meta tensors with its fake implementation, and launches nothing. A launcher that
asks torch.cuda for a property of the device finds no device here.

What is compiled here is in Triton's cache for a GPU, too, according to the sources of Triton 3.6.0 and 3.7.1. The name
of an entry is a hash of Triton's own files, the version of ptxas, the kernel's source (with that of the functions that
it calls, and the number of its first line), the types and specialisations of the arguments, the options, and the
target: ("cuda", 90, 32) for H100 and H200, there as here. Whether there is a GPU, which of several it is, and whether
the launch was only a warm-up do not enter. So processes that each launch some of the configurations within compile_only
fill the cache, side by side, for the process that will run them all: an entry counts once it is whole. It is found if

- TRITON_CACHE_DIR is the same, under the same path (the entries' indices hold absolute paths);
- Triton, and the environment variables and launch options that change code (TRITON_DEBUG, say), are the same;
- the arguments specialise alike: an integer is 1, or a multiple of 16, or beyond 32 bits, in both launches or in
  neither; an address is a multiple of 16 bytes in both or in neither; what is None is None in both.

Left for the first real launch are loading the binary and, in Triton 3.6 alone, a C compiler's run for each signature.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import triton.language
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


class Build(NamedTuple):
    """One kernel, compiled for one configuration.

    Attributes:
        name: of the kernel's function.
        constants: what Triton compiled in, by parameter: the constexprs, and of the other arguments None and 1.
        warps, stages: as compiled, which is more warps than asked for where Triton specialised some.
        registers: of one thread.
        spills: bytes of stack and local memory of one thread. In a kernel without device_assert or print, these are
            registers that did not fit.
        shared: bytes of shared memory that a launch asks for.
        uses_wgmma, uses_mma: whether the PTX has Hopper's asynchronous tensor-core products, and those of older GPUs.
    """

    name: str
    constants: dict[str, Any]
    warps: int
    stages: int
    registers: int
    spills: int
    shared: int
    uses_wgmma: bool
    uses_mma: bool


@contextmanager
def compile_only(arch: int = 90) -> Iterator[list[Build]]:
    """Every launch within compiles its kernel for CUDA architecture `arch` and runs nothing.

    Gives the list of builds, which grows as kernels are launched, one entry for each key of Triton's cache. Outputs of
    a launcher stay as they were allocated. Holds for all threads of the process; afterwards, also after an error,
    launches are what they were before. Errors of the compiler come out of the launch.

    Raises:
        RuntimeError: kernels are interpreted here, and cannot be compiled.
    """
    # jit decides for good when a kernel is defined; tl.zeros, defined on Triton's import, shows what it decided then
    if knobs.runtime.interpret or not isinstance(triton.language.zeros, JITFunction):
        raise RuntimeError(
            "compile_only needs kernels that compile, but TRITON_INTERPRET is on, or was when triton was imported, and "
            "jit made interpreted ones; use a process of its own whose environment has no TRITON_INTERPRET"
        )
    builds: list[Build] = []
    known: set[str] = set()
    launch = JITFunction.run

    def compile_instead(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = launch(kernel, *args, grid=grid, warmup=True, **options)
        assert compiled is not None, "a jit_cache_hook keeps Triton from compiling"
        if compiled.hash not in known:
            builds.append(_read(kernel, compiled))
            known.add(compiled.hash)
        return compiled

    # reset_active, Triton's own way back, looks for a GPU; so the attribute itself is put back
    with patch.object(driver, "_active", _AbsentGPU(arch)), patch.object(JITFunction, "run", compile_instead):
        yield builds


def problems(build: Build, *, shared_limit: int = 232448, wants_wgmma: bool = False) -> list[str]:
    """What is wrong with a build, a sentence for each; nothing if it is fit for a GPU.

    `shared_limit` is what one block may have: 227 KiB on compute capability 9.0, according to table "Technical
    Specifications per Compute Capability" of the CUDA C++ Programming Guide. `wants_wgmma` says that at least one of
    the kernel's products is meant for wgmma, which takes 64 rows, 16 columns and four warps, or more of each.
    """
    name = f"{build.name} ({build.warps} warps, {build.stages} stages, {build.constants})"
    found = []
    if build.spills:
        found.append(
            f"{name} spills {build.spills} bytes a thread, at {build.registers} registers; "
            "take a smaller tile or more warps"
        )
    if build.shared > shared_limit:
        found.append(
            f"{name} asks for {build.shared} bytes of shared memory, and a block may have {shared_limit}; "
            "take a smaller tile or fewer stages"
        )
    if wants_wgmma and not build.uses_wgmma:
        instead = "mma.sync" if build.uses_mma else "no tensor cores"
        found.append(f"{name} should use wgmma and uses {instead}; give a product 64 rows, 16 columns and 4 warps")
    return found


class _AbsentGPU:
    """What compiling asks of Triton's active driver."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        # kernels keep what they compiled by device: a name that no device has keeps it from real launches
        return f"compile_only for {self._target}"

    def get_current_stream(self, device: str) -> int:
        return 0

    def __getattr__(self, name: str) -> Any:
        # an AttributeError, as hasattr wants it
        raise AttributeError(
            f"something asks the GPU driver for {name!r}, but within compile_only there is no GPU and nothing runs; "
            "launch kernels with a given configuration, not through autotune"
        )


def _read(kernel: Any, compiled: Any) -> Build:
    """A build out of Triton's compiled kernel, which need not be loaded on a device."""
    registers, spills = _resources(compiled.asm["cubin"], compiled.metadata.name)
    # a constant's path is the number of its parameter, and below that its place in a tuple
    constants = {
        ".".join([kernel.arg_names[path[0]], *map(str, path[1:])]): value
        for path, value in compiled.src.constants.items()
    }
    return Build(
        name=kernel.__name__,
        constants=constants,
        warps=compiled.metadata.num_warps,
        stages=compiled.metadata.num_stages,
        registers=registers,
        spills=spills,
        shared=compiled.metadata.shared,
        uses_wgmma="wgmma.mma_async" in compiled.asm["ptx"],
        uses_mma="mma.sync" in compiled.asm["ptx"],
    )


def _resources(cubin: bytes, entry: str) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack and local memory, read by the cuobjdump that comes with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    line = re.search(rf"Function {re.escape(entry)}:\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    assert line is not None, usage
    registers, stack, local = map(int, line.groups())
    return registers, stack + local
