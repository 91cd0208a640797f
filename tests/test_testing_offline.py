"""Kernels compile for a GPU that is not there: what a build says is true, and nothing else changes.

The tests around these may interpret kernels, and jit decides that once for a process; so each test is a script in a
process of its own, without TRITON_INTERPRET. They share one cache of Triton's.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from without_gpu import run, write_kernels

# Triton reads the source of a kernel from its file.
KERNELS = """
from typing import no_type_check

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from moelora.testing.offline import Build, compile_only, problems


@triton.jit
@no_type_check
def _product(x_ptr, w_ptr, out_ptr, x_stride, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(x_ptr + m.to(tl.int64)[:, None] * x_stride + k[None, :])
    w = tl.load(w_ptr + k[:, None] * N + n[None, :])
    tl.store(out_ptr + m[:, None] * N + n[None, :], tl.dot(x, w))


def product(x, w, **options):
    (M, K), N = x.shape, w.shape[1]
    out = torch.empty(M, N, device=x.device)
    _product[lambda sizes: (triton.cdiv(M, sizes["M"]),)](x, w, out, x.stride(0), M=M, N=N, K=K, **options)
    return out


@triton.jit
def _double(x_ptr, rest_ptr, count):
    n = tl.arange(0, 128)
    tl.store(x_ptr + n, 2 * tl.load(x_ptr + n, mask=n < count, other=0.0), mask=n < count)


def double(x):
    _double[(1,)](x, None, x.numel())
    return x


def on_meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the kernels' file and Triton's cache are."""
    return write_kernels(tmp_path_factory.mktemp("offline"), KERNELS)


def test_tensor_cores_are_told_apart(folder: Path):
    """64 rows take wgmma, 16 rows mma.sync, a sum neither, under each way to decorate a kernel."""
    run(
        folder,
        """
        with compile_only(arch=90) as builds:
            product(on_meta(64, 64), on_meta(64, 64), num_warps=8, num_stages=2)
            product(on_meta(16, 64), on_meta(64, 64))
            double(on_meta(100, dtype=torch.float32))
        wide, narrow, doubled = builds

        assert (wide.name, wide.warps, wide.stages) == ("_product", 8, 2)
        assert wide.constants == {"M": 64, "N": 64, "K": 64}
        assert (wide.uses_wgmma, wide.uses_mma) == (True, False)
        # both operands are in shared memory, in bf16
        assert wide.shared >= 2 * 64 * 64 * 2 and wide.spills == 0 and 16 <= wide.registers <= 255
        assert problems(wide, wants_wgmma=True) == []

        assert (narrow.warps, narrow.uses_wgmma, narrow.uses_mma) == (4, False, True)
        assert problems(narrow) == []
        assert "mma.sync" in problems(narrow, wants_wgmma=True)[0]

        assert (doubled.name, doubled.constants) == ("_double", {"rest_ptr": None})
        assert (doubled.uses_wgmma, doubled.uses_mma, doubled.shared) == (False, False, 0)
        assert "no tensor cores" in problems(doubled, wants_wgmma=True)[0]
        """,
    )


def test_older_gpus_have_no_wgmma(folder: Path):
    """The architecture is the one asked for."""
    run(
        folder,
        """
        with compile_only(arch=80) as builds:
            product(on_meta(64, 64), on_meta(64, 64))
        assert (builds[0].uses_wgmma, builds[0].uses_mma) == (False, True)
        """,
    )


def test_spills_and_shared_memory_are_problems(folder: Path):
    """A tile that one warp cannot hold spills; a block that asks for more than the limit is too large, not at it."""
    run(
        folder,
        """
        with compile_only() as builds:
            product(on_meta(32, 64), on_meta(64, 256), num_warps=1)
        build = builds[0]
        assert build.spills > 0 and build.registers == 255

        assert len(problems(build)) == 1 and f"spills {build.spills} bytes" in problems(build)[0]
        assert problems(build, shared_limit=build.shared) == problems(build)
        assert f"asks for {build.shared} bytes" in problems(build, shared_limit=build.shared - 1)[1]
        assert problems(build._replace(spills=0, shared=232448)) == []
        """,
    )


def test_meta_tensors_stand_for_real_ones(folder: Path):
    """Tensors that no memory could hold compile to the build of small aligned ones, and a shifted view to its own."""
    run(
        folder,
        """
        def rows(device, first, width):
            storage = torch.empty_strided((64, width), (width, 1), dtype=torch.bfloat16, device=device)
            return storage[:, first : first + 64]

        with compile_only() as builds:
            product(rows("cpu", 0, 128), torch.empty(64, 64, dtype=torch.bfloat16))
            product(rows("meta", 0, 128), on_meta(64, 64))
            product(rows("meta", 64, 2**30), on_meta(64, 64))
            assert len(builds) == 1

            # two bytes off, on either device
            product(rows("meta", 1, 128), on_meta(64, 64))
            product(rows("cpu", 1, 128), torch.empty(64, 64, dtype=torch.bfloat16))
            assert len(builds) == 2

            # a stride that is no multiple of 16, and one beyond 32 bits
            product(rows("meta", 0, 129), on_meta(64, 64))
            product(rows("meta", 0, 2**40), on_meta(64, 64))
            assert len(builds) == 4
        """,
    )


def test_nothing_runs_and_nothing_is_built_twice(folder: Path):
    """A launch leaves its tensors alone; each context lists its builds once, whether or not an earlier one had them."""
    run(
        folder,
        """
        x = torch.ones(100)
        for _ in range(2):
            with compile_only() as builds:
                double(double(x))
                assert len(builds) == 1
        assert torch.equal(x, torch.ones(100))
        """,
    )


def test_launches_are_themselves_again(folder: Path):
    """After the context, and after an error of the launcher or the compiler in it, driver and launches are the old."""
    run(
        folder,
        """
        launch = JITFunction.run
        for before in (None, object()):
            driver.set_active(before)

            with compile_only():
                assert driver.active.get_current_target() == GPUTarget("cuda", 90, 32)
            assert driver._active is before and JITFunction.run is launch

            with pytest.raises(ZeroDivisionError):
                with compile_only():
                    1 / 0
            assert driver._active is before and JITFunction.run is launch

            # Triton's blocks have powers of two
            with pytest.raises(triton.CompilationError):
                with compile_only():
                    product(on_meta(64, 48), on_meta(48, 64))
            assert driver._active is before and JITFunction.run is launch
        """,
    )


def test_what_needs_a_gpu_says_so(folder: Path):
    """Autotuning would time kernels: it fails with what to do instead, and no choice is kept."""
    run(
        folder,
        """
        configs = [triton.Config({}, num_warps=warps) for warps in (1, 2)]
        tuned = triton.autotune(configs, key=[])(kernels_here._double)
        with pytest.raises(AttributeError, match="not through autotune"):
            with compile_only():
                tuned[(1,)](on_meta(100), None, 100)
        assert not tuned.cache
        """,
    )


@pytest.mark.parametrize(("first", "later"), [("1", "0"), ("0", "1")])
def test_interpreted_kernels_are_refused(folder: Path, first: str, later: str):
    """TRITON_INTERPRET may be on when triton is imported or only afterwards: the error says what to do."""
    run(
        folder,
        f"""
        import os

        os.environ["TRITON_INTERPRET"] = "{later}"
        with pytest.raises(RuntimeError, match="a process of its own"):
            with compile_only():
                pass
        """,
        TRITON_INTERPRET=first,
    )


def test_a_real_launch_finds_the_build_in_the_cache(folder: Path):
    """Triton's own launch on device 0 compiles nothing that was compiled for its target before."""
    run(
        folder,
        """
        from pathlib import Path
        from types import SimpleNamespace

        launches, hits = [], []
        gpu = SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            launcher_cls=lambda source, metadata: lambda *args: launches.append(args),
            utils=SimpleNamespace(
                get_device_properties=lambda device: {"max_shared_mem": 232448},
                load_binary=lambda *args: (None, None, 32, 0, 1024),
            ),
        )
        inputs = torch.empty(64, 64, dtype=torch.bfloat16), torch.empty(64, 64, dtype=torch.bfloat16)
        with compile_only(arch=90):
            product(*(on_meta(*x.shape) for x in inputs))
        entries = sorted(Path(triton.knobs.cache.dir).rglob("*"))

        driver.set_active(gpu)
        triton.knobs.compilation.listener = lambda *, cache_hit, **rest: hits.append(cache_hit)
        product(*inputs)

        assert len(launches) == 1 and hits == [True]
        assert sorted(Path(triton.knobs.cache.dir).rglob("*")) == entries
        """,
        TRITON_CACHE_DIR=str(folder / "cold"),
    )


def test_triton_is_imported_by_those_who_compile():
    """`import moelora.testing` loads no triton, so that machines without it have the rest of the room."""
    code = "import sys, moelora.testing; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
