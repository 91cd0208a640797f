"""Work beside the main stream: small kernels while a large product runs. Begin with SideStream."""

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, final

import torch
from torch import Tensor


@lru_cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@final
class SideStream:
    """A second stream that begins where the current one stands, and that it joins again.

    Args:
        device: of the work.
        wanted: False for work in the current stream, one thing after the other. So it is without CUDA, too.
    """

    def __init__(self, device: torch.device, *, wanted: bool) -> None:
        self.main = self.side = None
        if wanted and device.type == "cuda":
            self.main, self.side = torch.cuda.current_stream(device), _stream_of(device)
            self.side.wait_stream(self.main)

    def run(self, work: Callable[[], Any]) -> Any:
        """Do the work, beside what the current stream does until `join`."""
        if self.side is None:
            return work()
        with torch.cuda.stream(self.side):
            return work()

    def join(self, made: Iterable[Tensor]) -> None:
        """Let the current stream wait for the work; `made` are the tensors of it that are used later."""
        if self.main is None or self.side is None:
            return
        self.main.wait_stream(self.side)
        for tensor in made:
            # their memory is the side stream's; nobody may have it again before the main stream is done with it
            tensor.record_stream(self.main)
