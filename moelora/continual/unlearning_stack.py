"""Requests to forget, one after the other, each an expert behind a gate of its own. Begin with UnlearningStack."""

from collections.abc import Mapping
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moelora.continual.certificate import Certificate
from moelora.continual.detectors import Detector
from moelora.continual.examples import listed, prompts_of
from moelora.continual.features import Windows
from moelora.continual.gate import UNIONS, Gate, Promise, recalibrate
from moelora.continual.objectives import Objective, default_objective
from moelora.continual.orthogonality import Orthogonality
from moelora.continual.stack import Stack
from moelora.continual.stack_gates import Features
from moelora.continual.training import Training
from moelora.routers.gated import Gated


@final
class Request:
    """One request to forget that a stack has carried out.

    Attributes:
        name: of its expert.
        gate: says where the expert acts; its thresholds may move when further requests come.
        losses: mean training loss of each epoch.
        overlap: of its expert with those before it (`moelora.continual.orthogonal`), in [0, 1].
    """

    name: str
    gate: Gate
    losses: tuple[float, ...]
    overlap: float

    def __init__(self, name: str, gate: Gate, losses: tuple[float, ...], overlap: float) -> None:
        self.name, self.gate, self.losses, self.overlap = name, gate, losses, overlap

    @property
    def certificate(self) -> Certificate:
        """What the gate promises, and what not; `print` it."""
        assert self.gate.calibration is not None
        return self.gate.calibration.certificate

    def __repr__(self) -> str:
        return f"Request({self.name!r})"


@final
class UnlearningStack(Stack):
    """A model that forgets on request: an expert for each request, which acts only on prompts like the request's.

        stack = UnlearningStack(model, rank=8)
        request = stack.forget(dataset, calibration=benign, max_miss=0.05, max_fire=0.05)
        print(request.certificate)
        model.generate(**inputs)

        y = W x + sum_t g_t(prompt) * Delta_t x,     g_t = 0 exactly beyond the thresholds of request t

    The model is changed in place and used as before. A prompt that no gate opens for gets the base model's output, bit
    for bit. Earlier requests stay frozen. It is the design of O3 (Gao et al. 2025, https://arxiv.org/abs/2407.10223)
    with an expert for each request, one-sided calibrated gates and an exact zero; `O3Stack` is the paper's own.

    This is access control, not erasure: the base's weights still hold what is hidden, for whoever has the weights,
    takes the experts out, or trains the model further. docs/unlearning.md says what it protects against.

    Args:
        model: a Hugging Face model that reads text, not patched yet.
        rank: of each expert.
        alpha: of each expert, whose scale is alpha / rank; None means 2 * rank.
        targets: which projections, as in `moelora.patch_model`.
        orthogonality: how a new expert is kept apart from earlier ones: `Orthogonality(...)`, or its mode.
        detector: a detector that each request fits a copy of.
        features: what detectors look at: by default the model's own hidden states, `HiddenStates(model)`.
        combine: of several open gates: "sum" or "max_single", see `moelora.routers.gated.Gated`.
        union: how requests share one rate of false fire: "max_statistic" or "spending", see `moelora.continual.union`.
        seed: of the experts' first values and of what is held out.

    Raises:
        ValueError: for an option that is out of range, or a model that is patched already.
    """

    union: str

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: int = 8,
        alpha: float | None = None,
        targets: Any = "auto",
        orthogonality: "str | Orthogonality" = "penalty",
        detector: Detector | None = None,
        features: Features | None = None,
        combine: str = "sum",
        union: str = "max_statistic",
        seed: int = 0,
    ) -> None:
        if union not in UNIONS:
            raise ValueError(f"unknown union {union!r}; expected one of {UNIONS}")
        super().__init__(
            model,
            router=Gated(combine=combine, mergeable=False),
            rank=rank,
            alpha=alpha,
            targets=targets,
            orthogonality=orthogonality,
            detector=detector,
            features=features,
            seed=seed,
        )
        self.union = union
        self._requests: list[Request] = []

    @property
    def requests(self) -> tuple[Request, ...]:
        """In the order in which they came; those that were revoked are gone."""
        return tuple(self._requests)

    def forget(
        self,
        dataset: Any,
        *,
        calibration: Any,
        max_miss: float = 0.05,
        max_fire: float = 0.05,
        confidence: float = 0.95,
        guarantee: str = "pac",
        on_conflict: str = "raise",
        nan_policy: str = "open",
        name: str | None = None,
        objective: Objective | None = None,
        training: Training | None = None,
        held_out: Any = 0.3,
        avoid: Any = None,
    ) -> Request:
        """Carry out a request: fit and calibrate its gate, then train its expert, and freeze it.

        The gates come first, so what the samples do not support is refused before the model is changed. With
        union="max_statistic" earlier requests are calibrated anew, on these benign texts: their promised miss rates go
        on to hold, and their thresholds move no further than the fire rate of all asks.

        Args:
            dataset: what to forget; see `moelora.continual.examples`. The gate reads prompts alone, the expert is
                trained on all of it.
            calibration: benign texts, from the traffic that the model will see, in the same form; labels are not read.
            max_miss: of prompts like the request's, how many may meet a closed gate.
            max_fire: of benign prompts, how many may meet any open gate.
            confidence, guarantee, on_conflict: as in `moelora.continual.calibration.calibrate`.
            nan_policy: the gate where a score is not finite: "open", so that nothing gets out, or "closed".
            name: of the request.
            objective: what forgetting means; by default `UniformOptions` for classes and options, `NPO` for texts.
            training: how the expert is trained.
            held_out: which prompts of the request the miss rate is measured on, and the detector is not fitted to: a
                share of the dataset, drawn at random, or a dataset of their own.
            avoid: benign texts whose directions the expert's A must not read, so that it does little even where its
                gate errs (`moelora.continual.orthogonality.hold`).

        Returns:
            The request; `print(request.certificate)`.

        Raises:
            ValueError: if the promises cannot be kept together, or not certified from so few samples; for datasets that
                do not fit; if training fails. Model and stack are as they were then.
        """
        promise = Promise(
            max_miss=max_miss,
            max_fire=max_fire,
            confidence=confidence,
            guarantee=guarantee,
            on_conflict=on_conflict,
            nan_policy=nan_policy,
        )
        name = self._experts.new_name(name, "request")
        examples = listed(dataset)
        objective = default_objective(self.model, examples) if objective is None else objective
        gate = self._new_gate(examples, held_out, promise, number=len(self._requests))
        gates = recalibrate(
            [*(request.gate for request in self._requests), gate], self._read(calibration), union=self.union
        )

        made = self._experts.make(name, examples, objective, training=training or Training(), avoid=avoid)
        for request, calibrated in zip(self._requests, gates[:-1], strict=True):
            request.gate = calibrated
        self._requests.append(Request(name, gates[-1], made.losses, made.overlap))
        self._hand_over_gates()
        return self._requests[-1]

    def revoke(self, request: "Request | str") -> None:
        """Undo a request: its expert and its gate are gone. Without any request the model is the base again.

        What the other certificates say stays true: fewer gates fire less.

        Raises:
            ValueError: for a request that is not in the stack.
        """
        name = request if isinstance(request, str) else request.name
        found = [index for index, other in enumerate(self._requests) if name == other.name or request is other]
        if not found:
            raise ValueError(f"there is no request {name!r}; there are {[other.name for other in self._requests]}")
        self._experts.take_out(name)
        del self._requests[found[0]]
        if self._requests:
            self._hand_over_gates()

    def distances(self, batch: Mapping[str, Tensor]) -> Float[Tensor, "B E"]:
        """How far each prompt is from each request, each on its own scale; larger is farther.

        Args:
            batch: `input_ids` (B, L) and what else a gate reads; labels for each token mark what is no prompt.
        """
        self._need_requests()
        windows = self.features(prompts_of(batch))
        return torch.stack([request.gate.distances(windows) for request in self._requests], dim=1)

    def weights(self, batch: Mapping[str, Tensor]) -> Float[Tensor, "B E"]:
        """How far each prompt opens each request's gate, in a call of its own; exactly 0 is closed."""
        self._need_requests()
        return self._decide(self.features(prompts_of(batch)))

    # --- inside ---------------------------------------------------------------------------------------------------

    @property
    def _entries(self) -> tuple[Request, ...]:
        return self.requests

    def _own_settings(self) -> dict[str, str]:
        router: Any = self._experts.config.router
        return {"combine": router.combine, "union": self.union}

    def _decide(self, windows: Windows) -> Tensor:
        return torch.stack([request.gate.weights(request.gate.distances(windows)) for request in self._requests], dim=1)

    def _need_requests(self) -> None:
        if not self._requests:
            raise ValueError("this stack has no requests yet; call forget(...) first")
