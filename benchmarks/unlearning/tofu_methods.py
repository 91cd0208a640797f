"""The ways to forget, each on a model that knows TOFU. Begin with Method, then METHODS.

All see the same: the questions that a request hands over, with their answers. What is benign only calibrates gates.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

import moelora
from benchmarks.unlearning.tofu_data import Benign, Question, encode_answers, examples_of
from benchmarks.unlearning.tofu_model import answer_nll, moved, train_whole
from moelora.continual import NPO as ByNPO
from moelora.continual import HiddenStates, O3Stack, Refusal, Training, UnlearningStack
from moelora.continual.detectors import LayerGaussians, O3Code, O3Paper, RelativeMahalanobis
from moelora.continual.examples import Collate, batches, prompts_of
from moelora.losses import gradient_ascent, npo, sequence_nll, sequence_total_nll

BETA = 0.1
"""Of NPO, as in its paper."""

RANK = 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""Where adapters are, those of O3's code."""

ADAPTER_EPOCHS, ADAPTER_BATCH = 20, 32
WHOLE_EPOCHS = {"ascent": 5, "npo": 10}
"""Epochs of the benchmark's own unlearning, and of NPO's paper."""

ROWS = 256
"""Prompts that are read at once."""

Figures = dict[str, float]


class Method(ABC):
    """Serves requests on one model.

    Attributes:
        model: changed in place.
        tokenizer: the model's.
        rate: the learning rate.
        seed: of all that is drawn.
    """

    model: Any
    tokenizer: Any
    rate: float
    seed: int

    def __init__(self, model: Any, tokenizer: Any, *, rate: float, seed: int) -> None:
        self.model, self.tokenizer, self.rate, self.seed = model, tokenizer, rate, seed

    @abstractmethod
    def forget(self, step: int, asked: Sequence[Question], benign: Benign, refusals: Sequence[str]) -> Figures:
        """Serve request `step`, counted from 1; returns what the method itself says of it, such as certificates."""

    def acting(self) -> AbstractContextManager[object]:
        """Within it the model is as it is to be measured."""
        return nullcontext()

    def weights(self, questions: Sequence[Question]) -> "Float[Tensor, 'N E'] | None":
        """How far each question opens each gate; None for a method without gates."""
        return None

    def distances(self, questions: Sequence[Question]) -> "Float[Tensor, 'N E'] | None":
        """How far each question is from each request; None for a method whose detector has no direction, or none."""
        return None

    def training(self) -> Training:
        """How its adapters are trained."""
        return Training(epochs=ADAPTER_EPOCHS, batch_size=ADAPTER_BATCH, learning_rate=self.rate, seed=self.seed)

    def refusal(self, refusals: Sequence[str]) -> Refusal:
        """The objective of those who refuse."""
        return Refusal(answers=encode_answers(self.tokenizer, refusals))

    def prompts(self, questions: Sequence[Question]) -> Iterator[dict[str, Tensor]]:
        """Batches of prompts, on the model's device."""
        device = next(self.model.parameters()).device
        for batch in batches(examples_of(self.tokenizer, questions), Collate(self.model), ROWS):
            yield moved(prompts_of(batch), device)


@final
class Whole(Method):
    """All parameters unlearn, by gradient ascent or NPO: the usual way, which has no gate."""

    def __init__(self, model: Any, tokenizer: Any, *, loss: str, rate: float, seed: int) -> None:
        super().__init__(model, tokenizer, rate=rate, seed=seed)
        self.loss = loss

    def forget(self, step: int, asked: Sequence[Question], benign: Benign, refusals: Sequence[str]) -> Figures:
        examples = examples_of(self.tokenizer, asked)
        # NPO's reference is the model as this request finds it
        known_N = answer_nll(self.model, examples, nll=sequence_total_nll)

        def ascent(logits_BLV: Tensor, labels_BL: Tensor, number_B: Tensor) -> Tensor:
            return gradient_ascent(sequence_nll(logits_BLV, labels_BL))

        def preference(logits_BLV: Tensor, labels_BL: Tensor, number_B: Tensor) -> Tensor:
            return npo(sequence_total_nll(logits_BLV, labels_BL), known_N.to(number_B.device)[number_B], BETA)

        train_whole(
            self.model,
            examples,
            {"ascent": ascent, "npo": preference}[self.loss],
            epochs=WHOLE_EPOCHS[self.loss],
            batch_size=ADAPTER_BATCH,
            rate=self.rate,
            seed=self.seed + step,
        )
        return {}


@final
class Stack(Method):
    """moelora's: an expert for each request behind a calibrated gate. Ungated, the same experts act on everything.

    The detector measures the distance from the request less that from benign questions, since all of TOFU is about
    authors: RelativeMahalanobis with a background, on the lower layers, which tell people by their names. Gates that
    cannot keep both promises protect the forgetting.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, objective: str, gated: bool, promise: float, rate: float, seed: int
    ) -> None:
        super().__init__(model, tokenizer, rate=rate, seed=seed)
        self.objective, self.gated, self.promise = objective, gated, promise
        self.stack = UnlearningStack(
            model,
            rank=RANK,
            targets=TARGETS,
            orthogonality="penalty",
            features=reading(model),
            union="spending",
            seed=seed,
        )

    def forget(self, step: int, asked: Sequence[Question], benign: Benign, refusals: Sequence[str]) -> Figures:
        features = reading(self.model)
        background_NSD = torch.cat([features(batch).features_WSD for batch in self.prompts(benign.background)])
        self.stack.detector = RelativeMahalanobis(LayerGaussians.fit(background_NSD))
        request = self.stack.forget(
            examples_of(self.tokenizer, asked),
            calibration=examples_of(self.tokenizer, benign.calibration),
            max_miss=self.promise,
            max_fire=self.promise / 2,
            on_conflict="protect_forget",
            objective=self.refusal(refusals) if self.objective == "refusal" else ByNPO(beta=BETA),
            training=self.training(),
        )
        figures = {"overlap": request.overlap, "training loss": request.losses[-1]}
        return figures | (certified(request.certificate) if self.gated else {})

    @contextmanager
    def acting(self) -> Iterator[None]:
        names = [request.name for request in self.stack.requests]
        with nullcontext() if self.gated else moelora.use_experts(self.model, dict.fromkeys(names, 1.0)):
            yield

    def weights(self, questions: Sequence[Question]) -> "Float[Tensor, 'N E'] | None":
        if not self.gated:
            return None
        return torch.cat([self.stack.weights(batch).cpu() for batch in self.prompts(questions)])

    def distances(self, questions: Sequence[Question]) -> "Float[Tensor, 'N E'] | None":
        if not self.gated:
            return None
        return torch.cat([self.stack.distances(batch).cpu() for batch in self.prompts(questions)])


@final
class O3(Method):
    """O3's two presets: one adapter that goes on from request to request, behind the weights of its detectors.

    Refusals are its target for TOFU, and "tofu" the code's variant. It trains as our adapters do, at a rate of its own.
    """

    def __init__(self, model: Any, tokenizer: Any, *, variant: str, rate: float, seed: int) -> None:
        super().__init__(model, tokenizer, rate=rate, seed=seed)
        detector = O3Code("tofu", seed=seed) if variant == "code" else O3Paper(seed=seed)
        self.stack = O3Stack(model, variant, rank=RANK, targets=TARGETS, detector=detector, seed=seed)

    def forget(self, step: int, asked: Sequence[Question], benign: Benign, refusals: Sequence[str]) -> Figures:
        request = self.stack.forget(
            examples_of(self.tokenizer, asked), objective=self.refusal(refusals), training=self.training()
        )
        return {"overlap": request.overlap, "training loss": request.losses[-1]}

    def weights(self, questions: Sequence[Question]) -> "Float[Tensor, 'N E'] | None":
        return torch.cat([self.stack.request_weights(batch).cpu() for batch in self.prompts(questions)])


def reading(model: Any) -> HiddenStates:
    """What our gates read: the lower layers. They were chosen with figures in view like those that are reported."""
    return HiddenStates(model, range(1, max(2, model.config.num_hidden_layers // 2)), windows_at_once=ROWS)


def certified(certificate: Any) -> Figures:
    """A certificate as numbers."""
    return {
        "certified miss": certificate.miss.bound,
        "certified fire": certificate.fire.bound,
        "certified fire of all": certificate.union_fire_bound,
        "miss kept": float(certificate.miss.kept),
        "fire kept": float(certificate.fire.kept),
        "held out": float(certificate.miss.samples),
        "calibration": float(certificate.fire.samples),
    }
