"""A small case of every path of the Triton operator, forward and backward, to be run under a checker.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m benchmarks.gpu.small
    compute-sanitizer --tool racecheck python -m benchmarks.gpu.small

Sizes are no multiples of the kernels' blocks, so that every mask has something to hide.
"""

from typing import Any

import torch
from torch import nn

import moelora
from moelora import Learned, MoELoRAConfig


class Projections(nn.Module):
    """q and k of one input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(width, width, bias=False), nn.Linear(width, 72, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Both, summed up."""
        return self.q(x).sum() + self.k(x).sum()


def run(tokens: int, experts: int, rank: int, *, dropout: float = 0.0) -> float:
    """A training step and a call without gradients; the outputs' sum."""
    torch.manual_seed(0)
    width = 136
    model: Any = Projections(width).to("cuda", torch.bfloat16)
    config = MoELoRAConfig(router=Learned(top_k=2, init_std=0.5), backend="triton", dropout=dropout)
    x_TD = torch.randn(tokens, width, device="cuda").to(torch.bfloat16)
    moelora.patch_model(
        model, num_experts=experts, rank=rank, targets=["q", "k"], config=config, probe_inputs=(x_TD[:1],)
    )
    nn.init.normal_(model.q.bank.B_trainable_RO)
    x_TD.requires_grad_()
    model.train()(x_TD).backward()
    with torch.no_grad():
        value = model.eval()(x_TD[:5]) + model(x_TD)
        with moelora.use_experts(model, {"expert1": 0.5}):
            value += model(x_TD)
    torch.cuda.synchronize()
    return value.item()


def main() -> None:
    """Every path: dense, with dropout, and sorted; each also picks, for few tokens."""
    for arguments in ({"tokens": 77, "experts": 5, "rank": 7}, {"tokens": 77, "experts": 40, "rank": 20}):
        print(arguments, run(**arguments))
    print("dropout", run(77, 5, 7, dropout=0.3))


if __name__ == "__main__":
    main()
