"""The door to the kernels: validate, choose a way, compute. Begin with mix."""

import torch
from jaxtyping import Float
from torch import Tensor

from moelora.kernels import reference, torch_paths
from moelora.kernels.factors import Factors
from moelora.kernels.fused import mix_fused, runs
from moelora.routing import Routing

BACKENDS = ("auto", "reference", "dense", "gathered", "triton")


def mix(
    base_TO: Float[Tensor, "T O"],
    x_TD: Float[Tensor, "T D"],
    factors: Factors,
    routing: Routing,
    *,
    every_token: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "T O"]:
    """Base output plus the routed mixture; `reference.mix` says what that is.

    Args:
        base_TO: output of the frozen base.
        x_TD: its input, in the dtype to compute in.
        factors: all experts of the site.
        routing: which experts act on which token. Ids of one token must be distinct.
        every_token: the caller's promise that every token has an expert, which saves a pass over the output.
        backend: "auto" chooses from the device and shapes alone; any other of `BACKENDS` is what runs.

    Raises:
        ValueError: for an unknown backend.
        RuntimeError: if Triton was asked for where it cannot run.
    """
    if runs(x_TD, backend, routing.experts_TK.shape[1]):
        (mixed_TO,), _ = mix_fused(x_TD, [base_TO], [factors], routing, every_token=every_token)
        return mixed_TO
    if backend == "auto":
        if x_TD.shape[0] == 1 and is_decode_step(base_TO, x_TD, factors):
            return torch_paths.sliced(base_TO, x_TD, factors, routing)
        backend = choose(routing.experts_TK.shape, factors)
    if backend == "dense":
        return torch_paths.dense(base_TO, x_TD, factors, routing, every_token=every_token)
    if backend == "gathered":
        return torch_paths.gathered(base_TO, x_TD, factors, routing, every_token=every_token)
    if backend == "reference":
        return reference.mix(base_TO, x_TD, factors, routing)
    raise ValueError(f"unknown backend {backend!r}; expected one of {BACKENDS}")


def choose(shape_TK: tuple[int, ...], factors: Factors) -> str:
    """Gather where all tokens together copy no more rows than there are, else go over all of them."""
    tokens, chosen = shape_TK
    rows, widest = factors.A_RD.shape[0], factors.rows_FP.shape[1]
    return "gathered" if tokens * chosen * widest <= rows else "dense"


def is_decode_step(base_TO: Tensor, x_TD: Tensor, factors: Factors) -> bool:
    """Whether one token is on a CPU, in fp32, without gradients and not under a compiler: what `sliced` is for.

    In 16 bits the sum over experts would be rounded once for each of them.
    """
    return (
        len(factors.slices) > 0
        and x_TD.dtype is base_TO.dtype is factors.A_RD.dtype is torch.float32
        and not torch.is_grad_enabled()
        and x_TD.device.type == "cpu"
        and not torch.compiler.is_compiling()
    )
