"""What all stacks of gated experts are: a model, its experts, and what gates look at. Begin with Stack."""

import copy
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from moelora.config import RouterConfig
from moelora.continual.detectors import Detector, Mahalanobis
from moelora.continual.examples import Example
from moelora.continual.experts import Experts
from moelora.continual.features import HiddenStates, Windows
from moelora.continual.gate import Gate, Promise, fit_gate
from moelora.continual.orthogonality import Orthogonality
from moelora.continual.reading import read, split
from moelora.continual.stack_gates import Features, gates_of
from moelora.gating import set_gates
from moelora.patch import refuse_patched

This = TypeVar("This", bound="Stack")


class Stack(ABC):
    """Experts that come one after the other, on a model that is changed in place and used as before.

    Attributes:
        model: under its experts.
        features: what detectors look at.
        detector: what each gate fits a copy of.
        seed: of the experts' first values and of what is held out.
    """

    model: nn.Module
    features: Features
    detector: Detector
    seed: int
    _experts: Experts

    def __init__(
        self,
        model: nn.Module,
        *,
        router: RouterConfig,
        rank: int,
        alpha: float | None,
        targets: Any,
        orthogonality: "str | Orthogonality",
        detector: Detector | None,
        features: Features | None,
        seed: int,
    ) -> None:
        refuse_patched(model)
        self.model, self.seed = model, seed
        self.detector = Mahalanobis() if detector is None else detector
        self.features = HiddenStates(model) if features is None else features
        self._experts = Experts(
            model,
            router=router,
            rank=rank,
            alpha=alpha,
            targets=targets,
            orthogonality=Orthogonality(mode=orthogonality) if isinstance(orthogonality, str) else orthogonality,
            seed=seed,
        )

    def save(self, folder: "str | Path", *, include_features: bool = False) -> None:
        """Write the mixture with all experts, the gates and the certificates to a folder; `load` reads it.

        The folder holds statistics of the texts that gates were fitted to: keep it as carefully as these.

        Args:
            folder: made if it does not exist. A stack that lies there is replaced.
            include_features: whether detectors may be written that keep features of single texts, such as `Nearest`.

        Raises:
            ValueError: without experts, with features that are not the model's own hidden states, or a detector that
                keeps features of single texts without `include_features`. Nothing is written then.
        """
        from moelora.continual.stack_folder import save_stack

        save_stack(self, Path(folder), include_features=include_features)

    @classmethod
    def load(cls: type[This], model: nn.Module, folder_or_repo_id: "str | Path", **hub: Any) -> This:
        """Put a saved stack on its base model: the same outputs, gates and certificates, bit for bit.

        Args:
            model: the base model that the stack was made on.
            folder_or_repo_id: what `save` or `push_to_hub` wrote.
            hub: `revision`, `token`, `endpoint`, `cache_dir`, `local_files_only`, as in `moelora.load`.

        Raises:
            ValueError: if it is no stack of this class, or does not fit the model. The model is as it was then.
        """
        from moelora.continual.stack_folder import load_stack

        return load_stack(cls, model, folder_or_repo_id, **hub)

    def push_to_hub(self, repo_id: str, *, include_features: bool = False, **options: Any) -> str:
        """Save the stack with a model card and upload it. A new repository is private unless `private=False`.

        Args:
            repo_id: on the hub.
            include_features: as in `save`; whoever may read the repository reads them.
            options: `private`, `token`, `endpoint`, `commit_message`, `metrics`, as in `moelora.push_to_hub`.

        Returns:
            The address of the commit.

        Raises:
            ValueError: as `save`, and if the hub refuses.
        """
        from moelora.continual.stack_folder import push_stack

        return push_stack(self, repo_id, include_features=include_features, **options)

    # --- inside ---------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def _entries(self) -> tuple[Any, ...]:
        """What belongs to each expert, in order: its name, gate, losses and overlap."""

    @abstractmethod
    def _own_settings(self) -> dict[str, str]:
        """The constructor's arguments that not all stacks have, as JSON values."""

    @abstractmethod
    def _decide(self, windows: Windows) -> Tensor:
        """How far each prompt opens each expert's gate, (B, E)."""

    def _read(self, dataset: Any) -> Windows:
        return read(self.features, self._experts.collate, dataset)

    def _new_gate(self, examples: list[Example], held_out: Any, promise: Promise, *, number: int) -> Gate:
        """A gate without thresholds; which examples are held out depends on how many gates came before."""
        fitted, held = split(examples, held_out, self.seed + number)
        return fit_gate(copy.deepcopy(self.detector), self._read(fitted), self._read(held), promise)

    def _hand_over_gates(self) -> None:
        """Let the model ask the gates that the stack has now."""
        set_gates(self.model, gates_of(self.model, self.features, self._decide))
