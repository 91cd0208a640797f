"""Tasks learned one after the other, each an expert of its own. Begin with ContinualStack."""

from collections.abc import Mapping
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moelora.continual.certificate import Certificate
from moelora.continual.detectors import Detector
from moelora.continual.examples import listed, prompts_of
from moelora.continual.features import Windows
from moelora.continual.gate import Gate, Promise, recalibrate
from moelora.continual.objectives import Objective, Supervised
from moelora.continual.orthogonality import Orthogonality
from moelora.continual.stack import Stack
from moelora.continual.stack_gates import Features
from moelora.continual.training import Training, train_router
from moelora.gating import set_gates
from moelora.routers.gated import Gated
from moelora.routers.learned import Learned

ROUTINGS = ("gates", "sum", "learned")
"""Who acts on a prompt; `ContinualStack` says what each means."""


@final
class Task:
    """One task that a stack has learned.

    Attributes:
        name: of its expert.
        gate: tells the task's prompts from others; None with routing "sum" and "learned".
        losses: mean training loss of each epoch.
        overlap: of its expert with those before it (`moelora.continual.orthogonal`), in [0, 1].
    """

    name: str
    gate: Gate | None
    losses: tuple[float, ...]
    overlap: float

    def __init__(self, name: str, gate: Gate | None, losses: tuple[float, ...], overlap: float) -> None:
        self.name, self.gate, self.losses, self.overlap = name, gate, losses, overlap

    @property
    def certificate(self) -> Certificate | None:
        """What the gate promises; None if nothing was calibrated."""
        calibration = None if self.gate is None else self.gate.calibration
        return None if calibration is None else calibration.certificate

    def __repr__(self) -> str:
        return f"Task({self.name!r})"


@final
class ContinualStack(Stack):
    """A model that learns one task after the other, each in an orthogonal expert of its own that is frozen afterwards.

        stack = ContinualStack(model, rank=8)
        stack.learn(first_task)
        stack.learn(second_task)
        model.generate(**inputs)

    What was learned stays: no later task changes an earlier expert. Who acts on a prompt is said by `routing`:

    - "gates": the expert whose task the prompt is nearest to, by detectors on the model's own hidden states; no task is
      to be named. With `calibration` in `learn`, prompts that are like no task get the base model, bit for bit.
    - "sum": all of them, each trained on top of those before it (O-LoRA, Wang et al. 2023,
      https://arxiv.org/abs/2310.14152).
    - "learned": a router picks one for each token. A new expert's row starts at its prototype; `train_router` trains it
      on texts of all tasks.

    The model is changed in place and used as before. Args are those of `UnlearningStack`, and

    Args:
        routing: see above.

    Raises:
        ValueError: for an option that is out of range, or a model that is patched already.
    """

    routing: str

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: int = 8,
        alpha: float | None = None,
        targets: Any = "auto",
        orthogonality: "str | Orthogonality" = "penalty",
        routing: str = "gates",
        detector: Detector | None = None,
        features: Features | None = None,
        seed: int = 0,
    ) -> None:
        if routing not in ROUTINGS:
            raise ValueError(f"unknown routing {routing!r}; expected one of {ROUTINGS}")
        super().__init__(
            model,
            router=Learned(top_k=1, combine="unit") if routing == "learned" else Gated(combine="sum"),
            rank=rank,
            alpha=alpha,
            targets=targets,
            orthogonality=orthogonality,
            detector=detector,
            features=features,
            seed=seed,
        )
        self.routing = routing
        self._tasks: list[Task] = []

    @property
    def tasks(self) -> tuple[Task, ...]:
        """In the order in which they were learned."""
        return tuple(self._tasks)

    def learn(
        self,
        dataset: Any,
        *,
        name: str | None = None,
        objective: Objective | None = None,
        training: Training | None = None,
        held_out: Any = 0.2,
        calibration: Any = None,
        promise: Promise | None = None,
        avoid: Any = None,
    ) -> Task:
        """Learn a task in a new expert.

        Args:
            dataset: of the task; see `moelora.continual.examples`.
            name: of the task.
            objective: what learning means; by default `Supervised`, the model's own loss.
            training: how the expert is trained.
            held_out: what the gate's scale is measured on, as in `UnlearningStack.forget`.
            calibration: texts of no task, which are to meet the base model; for all tasks of a stack or for none.
            promise: what the gate is to keep on them.
            avoid: texts whose directions the expert's A must not read, as in `UnlearningStack.forget`.

        Returns:
            The task.

        Raises:
            ValueError: as `UnlearningStack.forget`. Model and stack are as they were then.
        """
        name = self._experts.new_name(name, "task")
        examples = listed(dataset)
        gates = self._gates_with(examples, held_out, calibration, promise)
        beside = tuple(self._experts.names) if self.routing == "sum" else ()
        made = self._experts.make(
            name,
            examples,
            Supervised() if objective is None else objective,
            training=training or Training(),
            avoid=avoid,
            beside=beside,
        )
        self._tasks.append(Task(name, None, made.losses, made.overlap))
        self._set_gates(gates)
        return self._tasks[-1]

    def train_router(self, dataset: Any, *, training: Training | None = None) -> list[float]:
        """Train the routers of routing "learned" on texts of all tasks, with every expert frozen.

        Returns:
            Mean loss of each epoch.

        Raises:
            ValueError: for another routing, or before a task is learned.
        """
        if self.routing != "learned" or not self._tasks:
            raise ValueError(
                f"there is no router to train: routing is {self.routing!r} and {len(self._tasks)} tasks are learned; "
                "expected routing='learned' and a task at least"
            )
        return train_router(
            self.model, dataset, Supervised(), collate=self._experts.collate, training=training or Training()
        )

    def remove(self, task: "Task | str") -> None:
        """Take a task's expert out. Without any the model is the base again.

        Raises:
            ValueError: for a task that is not in the stack.
        """
        name = task if isinstance(task, str) else task.name
        left = [other for other in self._tasks if name != other.name]
        if len(left) == len(self._tasks):
            raise ValueError(f"there is no task {name!r}; there are {[other.name for other in self._tasks]}")
        self._experts.take_out(name)
        self._tasks = left
        if left:
            self._set_gates([task.gate for task in left if task.gate is not None])

    def distances(self, batch: Mapping[str, Tensor]) -> Float[Tensor, "B E"]:
        """How far each prompt is from each task, each on its own scale; larger is farther.

        Raises:
            ValueError: for a stack without gates.
        """
        gates = [task.gate for task in self._tasks if task.gate is not None]
        if not gates:
            raise ValueError(f"there are no gates: routing is {self.routing!r}, {len(self._tasks)} tasks are learned")
        windows = self.features(prompts_of(batch))
        return torch.stack([gate.distances(windows) for gate in gates], dim=1)

    def weights(self, batch: Mapping[str, Tensor]) -> Float[Tensor, "B E"]:
        """Which experts act on each prompt; all zero is the base model.

        Raises:
            ValueError: for routing "learned", which chooses for each token, and before a task is learned.
        """
        if self.routing == "learned" or not self._tasks:
            raise ValueError(f"no gates decide: routing is {self.routing!r}, {len(self._tasks)} tasks are learned")
        return self._decide(self.features(prompts_of(batch)))

    # --- inside ---------------------------------------------------------------------------------------------------

    def _gates_with(self, examples: list[Any], held_out: Any, calibration: Any, promise: Promise | None) -> list[Gate]:
        """The gates of all tasks and of a new one; none where nobody asks them."""
        if self.routing != "gates":
            if calibration is not None:
                raise ValueError(f"calibration is for routing='gates'; this stack has routing={self.routing!r}")
            return []
        olds = [task.gate for task in self._tasks if task.gate is not None]
        if calibration is None and any(gate.calibration is not None for gate in olds):
            raise ValueError("earlier tasks of this stack are calibrated, so pass calibration= for this one too")
        gates = [*olds, self._new_gate(examples, held_out, promise or Promise(), number=len(olds))]
        return gates if calibration is None else recalibrate(gates, self._read(calibration), union="max_statistic")

    @property
    def _entries(self) -> tuple[Task, ...]:
        return self.tasks

    def _own_settings(self) -> dict[str, str]:
        return {"routing": self.routing}

    def _set_gates(self, gates: list[Gate]) -> None:
        for task, gate in zip(self._tasks, gates, strict=False):
            task.gate = gate
        if self.routing == "gates":
            self._hand_over_gates()
        elif self.routing == "sum":
            set_gates(self.model, lambda inputs: torch.ones(_rows_of(inputs), len(self._tasks)))

    def _decide(self, windows: Windows) -> Tensor:
        if self.routing == "sum":
            return torch.ones(windows.num_rows, len(self._tasks))
        gates = [task.gate for task in self._tasks if task.gate is not None]
        distance_BE = torch.stack([gate.distances(windows) for gate in gates], dim=1)
        nearest_BE = nn.functional.one_hot(distance_BE.nan_to_num(torch.inf).argmin(1), len(gates)).to(distance_BE)
        open_BE = torch.stack(
            [
                torch.where(distance_B.isfinite(), 1.0, 0.0) if gate.calibration is None else gate.weights(distance_B)
                for gate, distance_B in zip(gates, distance_BE.unbind(1), strict=True)
            ],
            dim=1,
        )
        return nearest_BE * open_BE


# --- inside -----------------------------------------------------------------------------------------------------------


def _rows_of(inputs: Mapping[str, Any]) -> int:
    return next(len(value) for value in inputs.values() if isinstance(value, Tensor) and value.ndim >= 2)
