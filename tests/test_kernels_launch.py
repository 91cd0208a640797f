"""A quick launch starts the kernel that Triton's own would start, with the same arguments, or leaves it to Triton.

There is no GPU here: a driver that records takes the place of CUDA's, so kernels compile and their launches are lists.
The tests around these may interpret kernels, which is decided once for a process; so each test is a script in a process
of its own. They share one cache of Triton's.
"""

from pathlib import Path

import pytest
import triton
from hypothesis import given
from hypothesis import strategies as st
from without_gpu import run, write_kernels

from moelora.kernels.gpu.launch import cdiv, power_of_two

# Triton reads the source of a kernel from its file.
KERNELS = """
import itertools
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from moelora.kernels.gpu.launch import launch
from moelora.testing.offline import compile_only

TWO = tl.constexpr(2)


@triton.jit
def add(x_ptr, rest_ptr, count, scale, N: tl.constexpr, WORD: tl.constexpr = "none"):
    n = tl.arange(0, N)
    x = tl.load(x_ptr + n, mask=n < count, other=0.0) * scale
    if rest_ptr is not None:
        x += tl.load(rest_ptr + n, mask=n < count, other=0.0)
    tl.store(x_ptr + n, x, mask=n < count)


@triton.jit(do_not_specialize=["count"])
def double(x_ptr, count, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(x_ptr + n, tl.load(x_ptr + n, mask=n < count, other=0.0) * TWO, mask=n < count)


launches, functions = [], itertools.count(1)


def record(source, metadata):
    return lambda *args: launches.append((metadata.hash, args))


gpu = SimpleNamespace(
    device=0,
    get_current_device=lambda: gpu.device,
    get_current_stream=lambda device: 100 * device + 7,
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    launcher_cls=record,
    utils=SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232448},
        load_binary=lambda *args: (next(functions), next(functions), 32, 0, 1024),
    ),
)
driver.set_active(gpu)


def plain(kernel, grid, args, constants, *, warps=4, stages=1):
    kernel[grid](*args, **constants, num_warps=warps, num_stages=stages)
    return launches.pop()


def quick(kernel, grid, args, constants, *, warps=4, stages=1):
    launch(kernel, grid, args, constants, warps=warps, stages=stages)
    return launches.pop()


def is_direct(recorded):
    # Triton's own launch hands over metadata and (empty) hooks
    metadata, enter, exit = recorded[1][6:9]
    return metadata is None and enter is None and exit is None


def assert_same(one, other):
    assert one[0] == other[0] and one[1][:6] == other[1][:6]
    assert len(one[1]) == len(other[1]) and all(a is b for a, b in zip(one[1][9:], other[1][9:]))


x = torch.empty(256)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the kernels' file and Triton's cache are."""
    return write_kernels(tmp_path_factory.mktemp("launch"), KERNELS)


@given(st.integers(0, 2**40), st.integers(1, 2**20))
def test_sizes_are_triton_s(a: int, b: int):
    """Plain integers give what Triton's functions give; of nothing, too, there is a power of two."""
    assert cdiv(a, b) == triton.cdiv(a, b)
    assert power_of_two(b) == triton.next_power_of_2(b)
    assert power_of_two(0) == 1


def test_each_kind_of_arguments_has_triton_s_kernel(folder: Path):
    """Whatever changes what Triton compiles changes what is started, in any order, and the same launch is direct."""
    run(
        folder,
        """
        sizes = [1, 16, 17, 0, -16, -1, 2**31 - 1, 2**31, 2**31 + 1, -(2**31), -(2**31) - 16, 2**63, True]
        cases = [
            *[((x, None, size, 0.5), dict(N=128, WORD="a")) for size in sizes],
            ((x, x, 17, 0.5), dict(N=128, WORD="a")),
            ((x[1:], None, 17, 0.5), dict(N=128, WORD="a")),
            ((x[4:], None, 17, 0.5), dict(N=128, WORD="a")),
            ((x, x[1:], 17, 0.5), dict(N=128, WORD="a")),
            ((torch.nn.Parameter(x), None, 17, 0.5), dict(N=128, WORD="a")),
            ((x.bfloat16(), None, 17, 0.5), dict(N=128, WORD="a")),
            ((x, x.half(), 17, 0.5), dict(N=128, WORD="a")),
            ((x, None, 17, 1), dict(N=128, WORD="a")),
            ((x, None, 17, 1.0), dict(N=128, WORD="a")),
            ((x, None, 17, True), dict(N=128, WORD="a")),
            ((x, None, 17, 0.5), dict(N=64, WORD="a")),
            ((x, None, 17, 0.5), dict(N=128, WORD="b")),
            ((x, None, 17, 0.5), dict(WORD="a", N=128)),
            ((x, None, 17, 0.5), dict(N=64, WORD=128)),
            ((x, None, 17, 0.5), dict(WORD=64, N=128)),
            ((x, None, 17, 0.5), dict(N=128)),
        ]
        expected = [plain(add, (3, 2), *case) for case in cases]
        assert len({recorded[1][4] for recorded in expected}) == 19

        for round in range(3):
            for case, its_own in reversed(list(zip(cases, expected))):
                recorded = quick(add, (3, 2), *case)
                assert_same(recorded, its_own)
                assert is_direct(recorded) or round == 0

        # options, and another kernel
        for kernel, args, options in [
            (add, (x, None, 17, 0.5), dict(warps=8)),
            (add, (x, None, 17, 0.5), dict(stages=2)),
            (double, (x, 17), {}),
            (double, (x, 1), {}),
        ]:
            its_own = plain(kernel, (1,), args, dict(N=128), **options)
            for round in range(3):
                recorded = quick(kernel, (1,), args, dict(N=128), **options)
                assert_same(recorded, its_own)
            assert is_direct(recorded)

        # the grid is filled up with ones
        grids = [(5,), (5, 4), (5, 4, 3), (0,)]
        assert [quick(double, grid, (x, 17), dict(N=128))[1][:3] for grid in grids] == [
            (5, 1, 1), (5, 4, 1), (5, 4, 3), (0, 1, 1)
        ]
        """,
    )


def test_devices_keep_their_kernels_and_streams(folder: Path):
    """A launch goes to the tensors' device, to its current stream, with the function that is loaded there."""
    run(
        folder,
        """
        class There(torch.Tensor):
            def get_device(self):
                return 1

        @contextmanager
        def on(device):
            before, gpu.device = gpu.device, device if device >= 0 else gpu.device
            yield
            gpu.device = before

        there = x.as_subclass(There)
        with patch.object(torch.cuda, "device", on):
            for round in range(3):
                near, far = (quick(double, (1,), (tensor, 17), dict(N=128))[1] for tensor in (x, there))
                assert (near[3], far[3], near[4] != far[4]) == (7, 107, True)
                assert gpu.device == 0
        assert near[6] is None and far[6] is None

        # a stream of the moment
        gpu.get_current_stream = lambda device: 8
        assert quick(double, (1,), (x, 17), dict(N=128))[1][3] == 8
        """,
    )


def test_what_disturbs_launches_is_heard(folder: Path):
    """Hooks are called, debug code is compiled, a changed global is an error, odd arguments are Triton's to judge."""
    run(
        folder,
        """
        def go():
            return quick(double, (1,), (x, 17), dict(N=128))

        go()
        calm = go()
        assert is_direct(calm)

        heard = []
        for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
            chain.add(heard.append)
            recorded = go()
            assert_same(recorded, calm)
            assert recorded[1][6].get()["name"] == "double" and chain in recorded[1][7:9]
            chain.remove(heard.append)
            assert is_direct(go())
        with knobs.runtime.scope():
            knobs.runtime.launch_enter_hook = heard.append
            assert go()[1][7] == heard.append

        double.add_pre_run_hook(lambda *args, **options: heard.append(args))
        go()
        assert len(heard) == 1 and heard[0][1] == 17
        double.pre_run_hooks.clear()

        with knobs.runtime.scope():
            knobs.runtime.debug = True
            assert go()[0] != calm[0]
        assert_same(go(), calm)

        # compiled anew, as Triton itself would
        double.device_caches.clear()
        assert go()[1][4] != calm[1][4]
        assert is_direct(go())

        # a constexpr among the arguments, an argument among the constants: not remembered, so always right
        for round in range(3):
            for n in (64, 128):
                expected = plain(double, (1,), (x, 17, n), {})
                assert_same(quick(double, (1,), (x, 17, n), {}), expected)
            for count in (17, 18):
                assert quick(double, (1,), (x,), dict(count=count, N=128))[1][10] == count
        with pytest.raises(TypeError):
            launch(double, (1,), (x,), dict(N=128), warps=4, stages=1)

        go()
        kernels_here.TWO = tl.constexpr(3)
        with pytest.raises(RuntimeError, match="TWO has changed"):
            go()
        """,
    )


def test_compile_only_sees_launches(folder: Path):
    """Within compile_only nothing starts, though it is where the launcher was imported, or was in use before."""
    run(
        folder,
        """
        import sys

        def go():
            launch(double, (1,), (torch.empty(256, device="meta"), 17), dict(N=128), warps=4, stages=1)

        quick(double, (1,), (x, 17), dict(N=128))
        quick(double, (1,), (x, 17), dict(N=128))
        with compile_only() as builds:
            go()
            go()
        assert [build.name for build in builds] == ["double"] and not launches

        del sys.modules["moelora.kernels.gpu.launch"]
        with compile_only() as builds:
            from moelora.kernels.gpu.launch import launch
            go()
            go()
        assert len(builds) == 1 and not launches
        assert_same(quick(double, (1,), (x, 17), dict(N=128)), plain(double, (1,), (x, 17), dict(N=128)))
        """,
    )


def test_interpreted_kernels_run(folder: Path):
    """Under TRITON_INTERPRET the kernel computes, on the CPU."""
    run(
        folder,
        """
        from triton.runtime.interpreter import InterpretedFunction

        assert isinstance(double, InterpretedFunction)
        x.fill_(3)
        launch(double, (1,), (x, 100), dict(N=128), warps=4, stages=1)
        assert x[:100].eq(6).all() and x[100:].eq(3).all()
        """,
        TRITON_INTERPRET="1",
    )
