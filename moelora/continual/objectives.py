"""What an expert is trained for: to learn, or to make a model unlearn. Begin with Objective; default_objective chooses.

    UniformOptions()                 # a choice between options becomes one at chance
    NPO(), SimNPO(), Refusal(...)    # a text becomes unlikely, or is refused
    Supervised()                     # the other way: to learn

The losses are in `moelora.losses`, where their sources are too. Axes: B rows, L tokens, D width, C options.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moelora.continual.answers import answer_nll, choices, keeping, moved, own_loss_of, run, without_labels
from moelora.continual.examples import IGNORED, REFERENCE, Collate, Example, batches, row_of
from moelora.hooks import predicts_next
from moelora.losses.options import option_uniform, random_own_option
from moelora.losses.rmu import control_vector, rmu
from moelora.losses.sequences import gradient_ascent, npo, simnpo
from moelora.mixture import disabled, find_mixture, root_of
from moelora.site_inputs import evaluating


class Objective(ABC):
    """A loss for one expert, and what it is computed on. The two methods behind `loss` may stay as they are."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], generator: torch.Generator) -> Float[Tensor, ""]:
        """Of a batch, to be minimised.

        Args:
            model: a patched model in which the one new expert is open, at weight 1.
            batch: as `Collate` makes it. On the CPU its labels are looked at without waiting for the model's device.
            generator: for what is drawn.

        Raises:
            ValueError: for a batch or a model that it does not fit.
        """

    def examples(self, examples: list[Example], generator: torch.Generator) -> list[Example]:
        """What is trained on in place of these examples; made once, before training."""
        return examples

    def with_reference(
        self, model: nn.Module, examples: list[Example], collate: Collate, batch_size: int
    ) -> list[Example]:
        """The examples with what the base model says of them, if the loss looks at that; made once, before training."""
        return examples


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Supervised(Objective):
    """The model's own loss of the labels: for learning."""

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], generator: torch.Generator) -> Float[Tensor, ""]:
        loss = own_loss_of(model, batch)
        if loss is None:
            raise ValueError(
                f"{type(find_mixture(model)[0]).__name__} returned no loss for a batch of {sorted(batch)}; expected "
                "labels, and a model with a head that has a loss"
            )
        return loss


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class UniformOptions(Objective):
    """All of an item's own options become equally likely (`option_uniform`): the best answer is a guess.

    Of a classifier these are its classes, or those in `options`; of a language model the tokens in `options`, where the
    first labelled token is predicted.
    """

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], generator: torch.Generator) -> Float[Tensor, ""]:
        choice = choices(model, batch)
        return option_uniform(choice.logits_BC, choice.valid_BC)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class RandomOption(Objective):
    """An option drawn anew in each step becomes the answer (`random_own_option`), as in O3 for multiple choice.

    Gao et al. (2025), eq. 4, https://arxiv.org/abs/2407.10223. Options are those of `UniformOptions`, whose optimum it
    shares; drawing only makes the way there noisy.

    Attributes:
        exclude_truth: draws among the wrong options only. That leaks the answer: it is the one which the model avoids.
    """

    exclude_truth: bool = False

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], generator: torch.Generator) -> Float[Tensor, ""]:
        choice = choices(model, batch)
        if self.exclude_truth and bool((choice.truth_B < 0).any()):
            raise ValueError("exclude_truth needs labels, which say what the truth is; this batch has none")
        excluded_B = choice.truth_B.to(choice.logits_BC.device) if self.exclude_truth else None
        return random_own_option(choice.logits_BC, choice.valid_BC, generator, excluded_B)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal(Objective):
    """A refusal takes the place of an example's answer, and is learned: cross-entropy, mean over rows.

    Each example gets one of the refusals, drawn once; its tokens from the first labelled one on are left out. O3's
    target for free text (Gao et al. 2025, table 8, https://arxiv.org/abs/2407.10223).

    Attributes:
        answers: token ids of each refusal, with the token that ends an answer.
    """

    answers: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        if not len(self.answers) or not all(len(answer) for answer in self.answers):
            raise ValueError("expected a refusal at least, each a list of token ids that is not empty")

    def examples(self, examples: list[Example], generator: torch.Generator) -> list[Example]:
        drawn_N = torch.randint(len(self.answers), (len(examples),), generator=generator, device=generator.device)
        return [_answered(example, self.answers[drawn]) for example, drawn in zip(examples, drawn_N.tolist())]

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], generator: torch.Generator) -> Float[Tensor, ""]:
        return answer_nll(model, batch).mean_B.mean()


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class GradientAscent(Objective):
    """The answers become unlikely, without end (`gradient_ascent`): a baseline. Of a row's answer the mean a token."""

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], generator: torch.Generator) -> Float[Tensor, ""]:
        return gradient_ascent(answer_nll(model, batch).mean_B)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class NPO(Objective):
    """The answers become unlikely, against what the base model says of them (`npo`).

    The base is asked once, before training, in evaluation mode; in each call where `batch` does not bring `REFERENCE`.

    Attributes:
        beta: how soon an answer counts as forgotten.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        _check_beta(self.beta)

    def with_reference(
        self, model: nn.Module, examples: list[Example], collate: Collate, batch_size: int
    ) -> list[Example]:
        parts = [_base_total_nll(model, batch) for batch in batches(examples, collate, batch_size)]
        return [{**example, REFERENCE: nll} for example, nll in zip(examples, torch.cat(parts).tolist(), strict=True)]

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], generator: torch.Generator) -> Float[Tensor, ""]:
        total_B = answer_nll(model, batch).total_B
        reference_B = batch[REFERENCE] if REFERENCE in batch else _base_total_nll(model, batch)
        return npo(total_B, moved(reference_B, total_B.device), self.beta)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class SimNPO(Objective):
    """The answers become unlikely, each by its length and without a reference (`simnpo`).

    Attributes:
        beta: how soon an answer counts as forgotten.
        gamma: how much more than even unlikely an answer must be.
    """

    beta: float = 2.5
    gamma: float = 0.0

    def __post_init__(self) -> None:
        _check_beta(self.beta)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], generator: torch.Generator) -> Float[Tensor, ""]:
        return simnpo(answer_nll(model, batch).mean_B, self.beta, self.gamma)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class RMU(Objective):
    """The hidden states of one layer move to a random direction, at all tokens, prompt and answer (`rmu`).

    Without the term that holds other texts: those do not meet the expert. Sites behind the layer are not trained.

    Attributes:
        layer: whose hidden states, as in `output_hidden_states`: 1 is the first block's output.
        scale: length of the target; a model's own matter.
    """

    layer: int
    scale: float = 20.0

    def __post_init__(self) -> None:
        if self.layer < 1 or not 0 < self.scale < float("inf"):
            raise ValueError(f"layer must be at least 1 and scale positive, got {self.layer} and {self.scale}")

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], generator: torch.Generator) -> Float[Tensor, ""]:
        states = run(model, without_labels(batch), output_hidden_states=True, **keeping(model, 1)).hidden_states
        if self.layer >= len(states):
            raise ValueError(
                f"layer must lie between 1 and {len(states) - 1}, the last of this model; got {self.layer}"
            )
        hidden_BLD = states[self.layer]

        # the same direction in every step
        fixed = torch.Generator().manual_seed(generator.initial_seed())
        control_D = control_vector(hidden_BLD.shape[-1], scale=self.scale, generator=fixed)
        valid_BL = moved(batch["attention_mask"] != 0, hidden_BLD.device)
        return rmu(hidden_BLD, moved(control_D, hidden_BLD.device), valid_BL)


def default_objective(model: nn.Module, examples: Sequence[Example]) -> Objective:
    """What unlearns such examples: `UniformOptions` of classes and options, `NPO` of other texts of a language model.

    Raises:
        ValueError: for no examples, one without labels, or classes where the model predicts tokens.
    """
    if not examples:
        raise ValueError("there is no example to choose an objective by")
    row = row_of(examples[0])
    if "labels" not in row:
        raise ValueError(
            f"examples to be forgotten need labels, got {sorted(examples[0])}: a class, or the tokens of the answer "
            "with -100 on the prompt; without labels, choose an objective that needs none, such as RMU"
        )
    if not row["labels"].ndim and predicts_next(root_of(model)):
        raise ValueError(
            f"the model predicts tokens, but the label is the class {int(row['labels'])}; expected a label for each "
            "token, -100 on the prompt"
        )
    return UniformOptions() if "options" in row or not row["labels"].ndim else NPO()


# --- inside -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _base_total_nll(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    with disabled(model), evaluating(find_mixture(model)[0]):
        return answer_nll(model, batch).total_B


def _answered(example: Example, answer: Sequence[int]) -> Example:
    """The example with another answer."""
    row = row_of(example)
    labels = row.get("labels")
    prompt = 0 if labels is None or not labels.ndim else int((labels != IGNORED).int().argmax())
    if not prompt:
        raise ValueError(
            f"a refusal takes the place of an answer behind a prompt; got an example of {sorted(example)} whose labels "
            "are not -100 on a prompt and tokens behind it"
        )
    answer_A = row["input_ids"].new_tensor(list(answer))
    made = {
        "input_ids": torch.cat([row["input_ids"][:prompt], answer_A]),
        "attention_mask": torch.cat([row["attention_mask"][:prompt], torch.ones_like(answer_A)]),
        "labels": torch.cat([row["labels"][:prompt], answer_A]),
    }
    if "token_type_ids" in row:
        types = row["token_type_ids"]
        made["token_type_ids"] = torch.cat([types[:prompt], types[prompt].expand_as(answer_A)])
    return made


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
