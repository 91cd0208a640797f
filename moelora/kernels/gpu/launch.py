"""Launch a kernel with little work for Python. Begin with launch.

`kernel[grid](...)` binds, writes out a key and makes metadata for hooks at every call, longer than many of our kernels
run. Here Triton does so once for each kind of arguments; from then on the kernel that it chose is started directly.
"""

from itertools import repeat
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton._C import libtriton
from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. `triton.cdiv` is wrapped for use in kernels too, and takes microseconds."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two, from 1 on, that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Tensor, *tuple[Tensor | int | float | None, ...]],
    constants: dict[str, Any],
    *,
    warps: int,
    stages: int,
) -> None:
    """`kernel[grid](*args, **constants, num_warps=warps, num_stages=stages)`, on the device of the first argument.

    The kernel takes its constexprs last, and `constants` are these. The grid has one to three sizes.
    """
    if type(kernel) is not JITFunction or not _is_undisturbed(kernel):
        _launch_plainly(kernel, grid, args, constants, warps, stages)
        return

    # go where the tensors are: a model may be spread over several devices, and only one of them is current
    active: Any = driver.active
    device, home = active.get_current_device(), args[0].get_device()
    if home != device and home >= 0:
        with torch.cuda.device(home):
            launch(kernel, grid, args, constants, warps=warps, stages=stages)
        return

    # Triton's own words for what it compiles in; without do_not_specialize, so kinds are at worst too fine
    _, _, _, backend, _ = caches = kernel.device_caches[device]
    kinds = tuple(map(_specialize, repeat(backend), args, repeat(False), repeat(True), repeat(True)))
    # the caches are those of this kernel on this device
    key = (id(caches), warps, stages, kinds, tuple(constants), tuple(constants.values()))

    # let Triton choose the first time, and complain should a global have changed
    choice = _choices.get(key)
    if choice is None or any(names.get(name) is not value for names, name, value in choice.globals):
        compiled = _launch_plainly(kernel, grid, args, constants, warps, stages)
        if type(compiled) is CompiledKernel and _fit(kernel, len(args), constants):
            _choices[key] = _remember(kernel, caches, compiled, len(args), constants)
        return

    x, y, z = (*grid, 1, 1)[:3]
    run, function, packed, values, _, _ = choice
    # no metadata and no hooks: nobody waits for a launch
    run(x, y, z, active.get_current_stream(device), function, packed, None, None, None, *args, *values)


class _Choice(NamedTuple):
    """A loaded kernel; all constexprs, which it skips; the globals compiled in; the caches, which so keep their id."""

    run: Any
    function: Any
    packed: Any
    constants: tuple[Any, ...]
    globals: tuple[tuple[dict[str, Any], str, Any], ...]
    caches: Any


_choices: dict[tuple[Any, ...], _Choice] = {}

# What is private to Triton is in this file alone, as read in the sources of 3.6 and 3.7: the caches of a kernel; that a
# compiled kernel's `run` takes grid, stream, function, packed metadata, launch metadata, two hooks, all arguments; and
# that a choice depends on what native_specialize_impl says of each argument, on options, and on _is_undisturbed. Under
# other versions all launches are plain.
_run = JITFunction.run
_specialize: Any = getattr(libtriton, "native_specialize_impl", None)
# the module: within compile_only, which may be where this file is imported, `run` is not Triton's
_is_known = triton.__version__.startswith(("3.6.", "3.7.")) and _specialize and _run.__module__ == "triton.runtime.jit"


def _is_undisturbed(kernel: Any) -> bool:
    """Whether launches are Triton's own, nobody waits for one, and nothing asks for another kind of code."""
    runtime = knobs.runtime
    return (
        bool(_is_known)
        and JITFunction.run is _run
        and not (kernel.pre_run_hooks or kernel.debug or runtime.debug or runtime.add_stages_inspection_hook)
        and not knobs.compilation.instrumentation_mode
        and _is_empty(runtime.launch_enter_hook)
        and _is_empty(runtime.launch_exit_hook)
    )


def _is_empty(hook: Any) -> bool:
    return hook is None or (type(hook) is knobs.HookChain and not hook.calls)


def _launch_plainly(kernel: Any, grid: Any, args: Any, constants: dict[str, Any], warps: int, stages: int) -> Any:
    # tensors that are on no GPU, for kernels that are interpreted or only compiled, have device -1: no change
    with torch.cuda.device(args[0].get_device()):
        return kernel[grid](*args, **constants, num_warps=warps, num_stages=stages)


def _fit(kernel: Any, count: int, constants: dict[str, Any]) -> bool:
    """Whether the first `count` parameters are no constexprs, and the others are, where the constants belong."""
    apart = [p.is_constexpr for p in kernel.params] == [i >= count for i in range(len(kernel.params))]
    return apart and constants.keys() <= {*kernel.arg_names[count:]}


def _remember(kernel: Any, caches: Any, compiled: CompiledKernel, count: int, constants: dict[str, Any]) -> _Choice:
    values = tuple(constants.get(p.name, p.default) for p in kernel.params[count:])
    used = tuple((names, name, names.get(name)) for (name, _), (_, names) in kernel.used_global_vals.items())
    return _Choice(compiled.run, compiled.function, compiled.packed_metadata, values, used, caches)
