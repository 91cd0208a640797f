"""Which calls are open, and whether they still run. Begin with OpenCalls.

Hooks open and close a call, but torch closes it after an `Exception` alone: KeyboardInterrupt, SystemExit and their
like run no hook, and whatever begins next would take itself for a part of the call that they have ended. So Python's
frames of open calls are kept. A frame tells at any time, on any thread, whether its function has ended.
"""

import sys
from types import FrameType
from typing import final

from torch import nn

_TORCH = vars(sys.modules[nn.Module.__module__])


@final
class OpenCalls:
    """Python's frames of calls that are open. Not for compiled code, which has none."""

    def __init__(self) -> None:
        self._frames: list[FrameType] = []

    def begin(self) -> None:
        """The module's call begins whose hook this is asked in."""
        frame = _module_call()
        if frame is not None:
            self._frames.append(frame)

    def end(self) -> None:
        """It ends, and no longer is anything of it held; if an error has ended its frame, likewise."""
        ours = _module_call()
        self._frames = [frame for frame in self._frames if frame is not ours and _runs(frame)]

    def clear(self) -> None:
        """None is open."""
        self._frames.clear()

    @property
    def known(self) -> bool:
        """Whether a call has begun here that has not ended here."""
        return len(self._frames) > 0

    @property
    def interrupted(self) -> bool:
        """Whether there are such calls, and none of them runs any more."""
        for frame in self._frames:
            if _runs(frame):
                return False
        return len(self._frames) > 0


def _module_call() -> FrameType | None:
    """The frame of torch that runs the hook that asks; None outside of hooks."""
    frame = sys._getframe()
    while frame is not None and frame.f_globals is not _TORCH:
        frame = frame.f_back
    return frame


def _runs(frame: FrameType) -> bool:
    """Whether a function has not ended. If it has, its variables are let go."""
    try:
        # Python does not clear the frame of a function that runs
        frame.clear()
    except RuntimeError:
        return True
    return False
