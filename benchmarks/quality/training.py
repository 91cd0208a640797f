"""One training loop for all methods. Begin with train."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]
WARM_UPS = 3


def train(
    model: Any,
    steps: int,
    rate: float,
    batches: Iterator[Batch],
    loss_of: Callable[[Batch], Tensor],
    *,
    before: Callable[[int], bool] = lambda number: False,
    capture: bool = True,
) -> None:
    """AdamW without weight decay, a short warm-up, then linearly to zero; clipping at 1, of routers apart.

    A router that is trained by reinforcement has gradients of another size than the factors beside it. On a GPU the
    forward and backward pass is captured as a CUDA graph: such a small model leaves the device waiting otherwise.

    Args:
        model: everything in it that requires a gradient at the start is trained, as long as it gets one.
        steps: of the optimiser.
        rate: the peak learning rate.
        batches: tensors on the model's device, all of one shape.
        loss_of: the loss of a batch.
        capture: False calls the model anew for each step, also on a GPU.
        before: called with the number of each step, ahead of it; True says that what is computed has changed.
    """
    model.train()
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    routers = [parameter for name, parameter in named.items() if ".router." in name]
    others = [parameter for name, parameter in named.items() if ".router." not in name]
    on_gpu = next(iter(named.values())).is_cuda
    optimizer = torch.optim.AdamW([*routers, *others], lr=rate, weight_decay=0.0, fused=on_gpu)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm) * (1 - step / steps)
    )
    captured: Captured | None = None
    for number in range(steps):
        changed, batch = before(number), next(batches)
        if not (on_gpu and capture):
            optimizer.zero_grad(set_to_none=True)
            loss_of(batch).backward()
        else:
            if captured is None or changed:
                captured = None  # its memory goes first
                optimizer.zero_grad(set_to_none=True)
                captured = Captured(batch, loss_of, optimizer)
            captured.replay(batch)
        for group in (routers, others):
            if gradients := [parameter for parameter in group if parameter.grad is not None]:
                torch.nn.utils.clip_grad_norm_(gradients, 1.0)
        optimizer.step()
        schedule.step()
    optimizer.zero_grad(set_to_none=True)
    model.eval()


class Captured:
    """A forward and backward pass as a CUDA graph; gradients are written anew by each replay."""

    def __init__(self, batch: Batch, loss_of: Callable[[Batch], Tensor], optimizer: Any) -> None:
        self.batch = {name: tensor.clone() for name, tensor in batch.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                optimizer.zero_grad(set_to_none=True)
                loss_of(self.batch).backward()
        torch.cuda.current_stream().wait_stream(stream)
        optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            loss_of(self.batch).backward()

    def replay(self, batch: Batch) -> None:
        """The same for another batch."""
        for name, tensor in batch.items():
            self.batch[name].copy_(tensor)
        self.graph.replay()
