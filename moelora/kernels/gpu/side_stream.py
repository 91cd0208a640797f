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

    Only while a CUDA graph is captured. Otherwise the work is done in the current stream, one thing after the other:
    launching a kernel takes Python longer than the device, and events between streams would only add to it.

    Args:
        device: of the work.
        wanted: False for work in the current stream in any case.
    """

    main: torch.cuda.Stream | None
    side: torch.cuda.Stream | None

    def __init__(self, device: torch.device, *, wanted: bool = True) -> None:
        self.main, self.side = None, None
        if wanted and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
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
