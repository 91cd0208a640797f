"""Training in stages under transformers' Trainer. Begin with StageCallback."""

from typing import Any, Protocol, final, runtime_checkable

from transformers import TrainerCallback


@runtime_checkable
class Schedule(Protocol):
    """What the callback needs of a schedule, such as `moelora.HardSoftSchedule`."""

    def go_to(self, steps: int) -> None:
        """Be where this many steps of the optimiser lead."""
        ...

    def release(self) -> None:
        """Make all trainable that any stage trains."""
        ...


@final
class StageCallback(TrainerCallback):
    """Keeps a schedule at `state.global_step`: exact under gradient accumulation, and in a run that is resumed.

    Under DDP each stage leaves some parameters without a gradient: pass `ddp_find_unused_parameters=True`.
    """

    schedule: Schedule

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimiser is made, and a checkpoint is read."""
        self.schedule.go_to(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step of the optimiser is done."""
        self.schedule.go_to(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Another `train()` makes another optimiser, which is to know all parameters again."""
        self.schedule.release()
