"""O3 as published, to trace its tables with. Begin with O3Stack; use UnlearningStack for anything else."""

import copy
import warnings
from collections.abc import Mapping
from typing import Any, Literal, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moelora.continual.detectors.o3 import O3Code, O3Paper, check_share
from moelora.continual.examples import listed, prompts_of, row_of
from moelora.continual.experts import new_name
from moelora.continual.features import HiddenStates, Windows
from moelora.continual.o3_adapter import O3Adapter
from moelora.continual.objectives import Objective, RandomOption
from moelora.continual.reading import read
from moelora.continual.stack_gates import Features, gates_of
from moelora.continual.training import Training
from moelora.gating import set_gates
from moelora.patch import refuse_patched

Variant = Literal["paper", "code"]

CODE_LAYERS = 12
"""The code scores 12 of its 24 layers, the first ones."""

WINDOW = 512
"""Tokens that a detector sees at once; O3's sees no more than these of a prompt."""

TRAINING = Training(epochs=10, batch_size=128, learning_rate=3e-4)
"""O3's for question answering; the warm-up is ours, the paper prints none."""


@final
class O3Request:
    """One request that an `O3Stack` has carried out.

    Attributes:
        name: of the request.
        detector: says how much an input is like the request.
        losses: mean training loss of each epoch, without the penalty.
        overlap: of the shared adapter with what it was before (`moelora.continual.orthogonal`), on the side that is
            penalised, mean over sites; 0 for the first request.
    """

    name: str
    detector: O3Paper | O3Code
    losses: tuple[float, ...]
    overlap: float

    def __init__(self, name: str, detector: O3Paper | O3Code, losses: tuple[float, ...], overlap: float) -> None:
        self.name, self.detector, self.losses, self.overlap = name, detector, losses, overlap

    def __repr__(self) -> str:
        return f"O3Request({self.name!r})"


@final
class O3Stack:
    """One adapter for all requests, trained on from one to the next, behind the weights of O3's detectors.

        h' = W h + w(x) B A h,     w(x) = max_t w_t(x)

    O3, Gao et al. (2025), eq. 3 to 13, https://arxiv.org/abs/2407.10223. The paper and the released code disagree:

    - "paper": `O3Paper` on all layers, whose weight is **at least 0.5 for every input**, so the adapter always acts.
      The penalty is on the output-side factor, against what it was one request before.
    - "code": `O3Code` on the first 12 layers, with hand-set cut-offs and weights from 0 to 1.2. The penalty is on the
      input-side factor, against what it was after every earlier request.

    The penalty pushes the adapter away from what it knows, so earlier requests may come undone; and with one adapter
    for all, no request can be revoked. `O3Adapter` says how it is weighed.

    What is not O3's: features are the host model's own, where theirs are those of a RoBERTa trained on the request with
    `losses.contrastive_entropy_with_mlm` (hand over `features` for that); padding does not count in the mean over
    tokens, as it does in the code; of a prompt longer than the window, the window counts that weighs most, where theirs
    is cut off; random answers are drawn among an item's own options, which the code does not look at.

    Args:
        model: a Hugging Face model that reads text, not patched yet.
        variant: "paper" or "code".
        rank: of the adapter.
        alpha: its scale is alpha / rank; None means 2 * rank, as in O3.
        targets: which projections, as in `moelora.patch_model`.
        detector: of the variant, not fitted, to choose its options; each request fits a copy.
        features: of prompts, not normalised: of a `HiddenStates` the `means`, or any function that returns `Windows`.
        seed: of the adapter's first values.

    Raises:
        ValueError: for an unknown variant, another variant's detector, or a model that is patched already.

    Warns:
        UserWarning: for "paper", that its gate does not close.
    """

    model: nn.Module
    variant: str
    features: Features

    def __init__(
        self,
        model: nn.Module,
        variant: str = "paper",
        *,
        rank: int = 8,
        alpha: float | None = None,
        targets: Any = "auto",
        detector: O3Paper | O3Code | None = None,
        features: "HiddenStates | Features | None" = None,
        seed: int = 0,
    ) -> None:
        refuse_patched(model)
        if variant not in get_args(Variant):
            raise ValueError(f"unknown variant {variant!r}; expected one of {get_args(Variant)}")
        kind = O3Paper if variant == "paper" else O3Code
        if detector is not None and not isinstance(detector, kind):
            raise ValueError(f"variant {variant!r} has an {kind.__name__}, got a {type(detector).__name__}")
        if features is None:
            depth = HiddenStates(model).layers[-1]
            layers = range(1, (depth if variant == "paper" else min(CODE_LAYERS, depth)) + 1)
            features = HiddenStates(model, layers, window=WINDOW, stride=WINDOW // 2)
        self.model, self.variant = model, variant
        self.features = features.means if isinstance(features, HiddenStates) else features
        self._detector = _unfitted(kind) if detector is None else detector
        self._requests: list[O3Request] = []
        self._adapter = O3Adapter(
            model,
            side="out" if variant == "paper" else "in",
            all_values=variant == "code",
            rank=rank,
            alpha=alpha,
            targets=targets,
            seed=seed,
        )
        if variant == "paper":
            warnings.warn(
                "O3Stack(variant='paper') is O3 as printed: its weight is never below 0.5, so the adapter acts on "
                "every input, however far from all requests. It is here to trace published tables; use "
                "UnlearningStack, whose gates close",
                stacklevel=2,
            )

    @property
    def requests(self) -> tuple[O3Request, ...]:
        """In the order in which they came."""
        return tuple(self._requests)

    def forget(
        self,
        dataset: Any,
        *,
        objective: Objective | None = None,
        training: Training | None = None,
        held_out: float | None = None,
        name: str | None = None,
    ) -> O3Request:
        """Carry out a request: fit its detector, then train the shared adapter on, from where the last request left it.

        Args:
            dataset: what to forget; see `moelora.continual.examples`.
            objective: by default `RandomOption` for classes and options. O3's for texts is a `Refusal`, which needs its
                answers.
            training: by default `TRAINING`.
            held_out: share of the request that is D_rest, for the paper; by default 0.2. The code's is fixed.
            name: of the request.

        Raises:
            ValueError: for too few prompts, datasets that do not fit, a name that is taken; if training fails. Model
                and stack are as they were then.
        """
        name = new_name(name, [request.name for request in self._requests], kind="request")
        examples = listed(dataset)
        objective = _o3_objective(examples) if objective is None else objective
        detector = self._new_detector(held_out)
        windows = read(self.features, self._adapter.collate, examples)
        detector.fit(windows.features_WSD, windows.row_W)

        made = self._adapter.train(examples, objective, TRAINING if training is None else training)
        self._requests.append(O3Request(name, detector, made.losses, made.overlap))
        set_gates(
            self.model, gates_of(self.model, self.features, lambda windows: self._decide(windows).amax(1, keepdim=True))
        )
        return self._requests[-1]

    def request_weights(self, batch: Mapping[str, Tensor]) -> Float[Tensor, "B _"]:
        """w_t of each prompt, a column for each request."""
        if not self._requests:
            raise ValueError("this stack has no requests yet; call forget(...) first")
        return self._decide(self.features(prompts_of(batch)))

    def weights(self, batch: Mapping[str, Tensor]) -> Float[Tensor, "B 1"]:
        """w of each prompt, the weight of the one adapter: the largest of `request_weights`."""
        return self.request_weights(batch).amax(1, keepdim=True)

    # --- inside ---------------------------------------------------------------------------------------------------

    def _decide(self, windows: Windows) -> Tensor:
        columns = [request.detector.weight(windows.features_WSD) for request in self._requests]
        return torch.stack([-windows.lowest(-weights_W) for weights_W in columns], dim=1)

    def _new_detector(self, held_out: float | None) -> O3Paper | O3Code:
        detector = copy.deepcopy(self._detector)
        if held_out is not None:
            if not isinstance(detector, O3Paper):
                raise ValueError("the share that the code holds out is its variant's, 0.2 or 0.3; leave held_out away")
            check_share(1 - held_out)
            detector.used = 1 - held_out
        return detector


# --- inside -----------------------------------------------------------------------------------------------------------


def _unfitted(kind: "type[O3Paper] | type[O3Code]") -> O3Paper | O3Code:
    """A detector of default options; the stack itself says what is wrong with the paper's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return kind()


def _o3_objective(examples: list[Any]) -> Objective:
    row = row_of(examples[0])
    if "labels" in row and ("options" in row or not row["labels"].ndim):
        return RandomOption()
    raise ValueError(
        "O3 replaces the answer of a text by a refusal; pass objective=Refusal(answers=[token ids of a refusal, ...]), "
        "or give the examples their options"
    )
