"""What is run: a forward pass, a training step, and what one keeps for the other. Begin with forward_of and step_of."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def forward_of(module: nn.Module, x: Tensor) -> Callable[[], object]:
    """The module on x, without gradients."""

    def run() -> None:
        with torch.no_grad():
            module(x)

    return run


def step_of(module: nn.Module, x: Tensor) -> Callable[[], object]:
    """Forward and backward: gradients of x and of every parameter that is trained."""
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        grads = [torch.randn_like(output) for output in outputs_of(module(x))]

    def run() -> None:
        leaf.grad = None
        module.zero_grad(set_to_none=True)
        torch.autograd.backward(outputs_of(module(leaf)), grads)

    return run


def outputs_of(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One output or several, as a tuple."""
    return (output,) if isinstance(output, Tensor) else output


def saved_megabytes(module: nn.Module, x: Tensor) -> float:
    """What a forward pass leaves allocated for the backward pass, in units of 10^6 bytes.

    Allocated memory after the forward less that before, less the output: whatever is kept counts, in whichever way.
    x and the parameters are there before and do not count; ids, gates and 16-bit copies of fp32 factors do.
    """
    leaf = x.clone().requires_grad_()
    outputs = outputs_of(module(leaf))
    del outputs
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    outputs = outputs_of(module(leaf))
    return (torch.cuda.memory_allocated() - before - sum(output.nbytes for output in outputs)) / 1e6


def relative_error(module: nn.Module, x_TD: Tensor, expected_TO: Tensor) -> float:
    """Distance of the module's first rows from what is expected there, by the Frobenius norm."""
    with torch.no_grad():
        output_TO = module(x_TD)[: expected_TO.shape[0]].float()
    return float((output_TO - expected_TO).norm() / expected_TO.norm())
