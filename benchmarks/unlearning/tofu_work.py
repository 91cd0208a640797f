"""What one run does: serves the requests and measures after each. Begin with Worker.carry_out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.unlearning.tofu_data import (
    REQUESTS,
    Benign,
    Question,
    Request,
    Tofu,
    benign_of,
    examples_of,
    load,
    requests_of,
)
from benchmarks.unlearning.tofu_methods import ROWS, Method, reading
from benchmarks.unlearning.tofu_metrics import Figures, Measured, forgetting, joined, knowledge, measure, utility
from benchmarks.unlearning.tofu_model import Recipe, load_model, load_tokenizer, moved, prepare
from benchmarks.unlearning.tofu_study import CHOICE, DETECTORS, KNOWS, METHODS, NEVER_SAW, TUNING_SEED, Run
from moelora.continual import HiddenStates
from moelora.continual.detectors import (
    Detector,
    LayerGaussians,
    Mahalanobis,
    Nearest,
    RelativeMahalanobis,
    RelativeNearest,
    SumOf,
)
from moelora.continual.examples import Collate, batches, prompts_of
from moelora.metrics import auroc, benign_fire_rate_at_forget_recall, forget_miss_rate_at_benign, persistence_loss

Step = tuple[int, Figures]
OTHERS = ("retained", "retain set", "real authors", "world facts")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where a worker finds things, and how much of the work to do.

    Attributes:
        model: folder of the pretrained decoder.
        data: folder with TOFU's files.
        cache: where models and what references said are kept.
        device: "cuda" or "cpu".
        blocks, questions: fewer than nine blocks of 400 only try the logic.
        epochs: of a round of fine-tuning.
        promise: the miss rate that gates promise, and twice the rate of false fire; more where samples are few.
    """

    model: str
    data: Path
    cache: Path
    device: str
    blocks: int = 9
    questions: int = 400
    epochs: int = 24
    promise: float = 0.1

    @property
    def folder(self) -> Path:
        """The cache of this scale: what another one has left does not fit."""
        return self.cache / f"tofu-{self.blocks}-{self.questions}-{self.epochs}"

    def is_prepared(self, forgotten: int) -> bool:
        """Whether the model that never saw so many blocks, and what it said, lie in the cache."""
        return (self.folder / f"without-{forgotten}").is_dir() and (self.folder / f"said-{forgotten}.pt").exists()


class Worker:
    """One process's own model and texts."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.tokenizer: Any = load_tokenizer(options.model)
        self.tofu: Tofu = load(options.data, blocks=options.blocks, questions=options.questions)
        self.requests = requests_of(self.tofu)
        options.folder.mkdir(parents=True, exist_ok=True)

    def carry_out(self, run: Run) -> list[Step]:
        """The numbers of a run, by step."""
        torch.manual_seed(run.seed)
        if run.method == KNOWS:
            return [(step, self.figures(self.reference(0), step)) for step in range(1, REQUESTS + 1)]
        if run.method == NEVER_SAW:
            said = self.reference(run.steps)
            return [(run.steps, self.figures(said, run.steps) if run.steps else utility(self.sets(0), said))]
        if run.method == DETECTORS:
            return self.detectors(run)
        return self.serve(run)

    def serve(self, run: Run) -> list[Step]:
        """A method serves its requests, one after the other."""
        model = load_model(self.folder(0), self.options.device)
        method = METHODS[run.method].make(
            model, self.tokenizer, rate=run.rate, seed=run.seed, promise=self.options.promise
        )
        found: list[Step] = []
        for step in range(1, run.steps + 1):
            benign = benign_of(self.tofu, step, run.seed)
            own = method.forget(step, self.requests[step - 1].asked, benign, self.tofu.refusals)
            with method.acting():
                said = measure(model, self.tokenizer, self.sets(step))
            figures = self.figures(said, step) | own | self.gates(method, step, benign)
            if run.seed == TUNING_SEED:
                figures[CHOICE] = self.left_and_lost(figures, step)
            found.append((step, figures))
        if run.steps == REQUESTS:
            found[-1][1]["persistence loss"] = persistence(found)
        return found

    # --- what is asked of a model -------------------------------------------------------------------------------------

    def sets(self, step: int) -> dict[str, Sequence[Question]]:
        """The questions that a model is asked after a request; in other words, too, after the last."""
        sets: dict[str, Sequence[Question]] = {}
        for number, request in enumerate(self.requests[:step], 1):
            sets |= {f"asked {number}": request.asked, f"unseen {number}": request.unseen}
            if step == REQUESTS:
                sets[f"reworded {number}"] = reworded([*request.asked, *request.unseen])
        return sets | {
            # of people that gates may know, and nobody ever asks to forget
            "retained": benign_of(self.tofu, REQUESTS, 0).test["retained"],
            "retain set": self.tofu.retained,
            "real authors": self.tofu.real_authors,
            "world facts": self.tofu.world_facts,
        }

    def figures(self, said: dict[str, Measured], step: int) -> Figures:
        """All that is computed from what a model said."""
        sets = self.sets(step)
        figures: Figures = {}
        for kind in ("asked", "unseen", "reworded"):
            names = [name for name in sets if name.startswith(f"{kind} ")]
            if names:
                questions = [question for name in names for question in sets[name]]
                known = knowledge(questions, joined([said[name] for name in names]))
                figures |= {f"{kind}: {measure}": value for measure, value in known.items()}
        for number in range(1, step + 1):
            names = [f"asked {number}", f"unseen {number}"]
            known = knowledge([q for name in names for q in sets[name]], joined([said[name] for name in names]))
            figures |= {f"request {number}: {measure}": known[measure] for measure in ("probability", "rouge")}
        known = knowledge(sets["retained"], said["retained"])
        figures |= {f"retained: {measure}": value for measure, value in known.items()}
        figures |= utility(sets, said)

        blocks = [f"{kind} {number}" for number in range(1, step + 1) for kind in ("asked", "unseen")]
        never_saw = joined([self.reference(step)[name] for name in blocks])
        return figures | forgetting(joined([said[name] for name in blocks]).ratio_N, never_saw.ratio_N)

    def left_and_lost(self, figures: Figures, step: int) -> float:
        """What is still known of the request, beyond what a model that never saw it knows, and the utility lost."""
        never_saw = self.figures(self.reference(step), step)
        knew = self.figures(self.reference(0), step)
        left = sum(max(0.0, figures[name] - never_saw[name]) for name in ("asked: probability", "asked: rouge"))
        return left + max(0.0, knew["utility"] - figures["utility"])

    # --- references ---------------------------------------------------------------------------------------------------

    def folder(self, forgotten: int) -> Path:
        """The model that never saw so many blocks."""
        return prepare(
            self.options.folder,
            self.options.model,
            self.tofu,
            forgotten=forgotten,
            recipe=Recipe(epochs=self.options.epochs),
            device=self.options.device,
        )

    def reference(self, forgotten: int) -> dict[str, Measured]:
        """What that model says to all questions, kept on disk."""
        path = self.options.folder / f"said-{forgotten}.pt"
        if not self.options.is_prepared(forgotten):
            model = load_model(self.folder(forgotten), self.options.device)
            said = measure(model, self.tokenizer, self.sets(REQUESTS))
            partial = path.with_suffix(".part")
            torch.save({name: measured._asdict() for name, measured in said.items()}, partial)
            partial.rename(path)
        said = torch.load(path, weights_only=True)
        return {name: Measured(**parts) for name, parts in said.items()}

    # --- gates --------------------------------------------------------------------------------------------------------

    def gates(self, method: Method, step: int, benign: Benign) -> Figures:
        """How often gates err, and how well the newest request's distances tell it from the rest.

        A request's question is missed if no gate is at least half open; a benign one is fired on if any is not closed.
        "own" is the gate of the question's own request, for which the certificate speaks.
        """
        asked = {"retained": benign.test["retained"], "retain set": list(self.tofu.retained)}
        asked |= {name: benign.test[name] for name in ("real authors", "world facts")}
        figures: Figures = {}
        for name, questions in asked.items():
            weights_NE = method.weights(questions)
            if weights_NE is not None:
                widest_N = weights_NE.max(1).values
                figures[f"fire: {name}"] = (widest_N > 0).double().mean().item()
                figures[f"weight: {name}"] = widest_N.double().mean().item()
        for kind in ("asked", "unseen", "reworded"):
            missed, missed_own, weights = [], [], []
            for number, request in enumerate(self.requests[:step], 1):
                questions = request.unseen if kind == "unseen" else request.asked
                weights_NE = method.weights(reworded(questions) if kind == "reworded" else questions)
                if weights_NE is not None:
                    missed.append(weights_NE.max(1).values < 0.5)
                    weights.append(weights_NE.max(1).values)
                    missed_own.append(weights_NE[:, number - 1] < 0.5)
            if missed:
                figures[f"miss: {kind}"] = torch.cat(missed).double().mean().item()
                figures[f"miss own: {kind}"] = torch.cat(missed_own).double().mean().item()
                figures[f"weight: {kind}"] = torch.cat(weights).double().mean().item()

        near_NE = method.distances(self.requests[step - 1].unseen)
        if near_NE is not None:
            for name, questions in asked.items():
                far_NE = method.distances(questions)
                assert far_NE is not None
                figures[f"auroc: {name}"] = auroc(near_NE[:, -1], far_NE[:, -1])
        return figures

    def detectors(self, run: Run) -> list[Step]:
        """Detectors side by side on the base's features: a request's unseen questions against what is benign."""
        model = load_model(self.folder(0), self.options.device)
        found: list[Step] = []
        for step, request in enumerate(self.requests, 1):
            benign = benign_of(self.tofu, step, run.seed)
            figures: Figures = {}
            for layers, features in (("spread", HiddenStates(model, windows_at_once=ROWS)), ("lower", reading(model))):
                figures |= self.detectors_on(features, f"{layers} layers", model, request, benign)
            found.append((step, figures))
        return found

    def detectors_on(
        self, features: HiddenStates, layers: str, model: Any, request: Request, benign: Benign
    ) -> Figures:
        """Of one request, on some layers."""
        background_NSD = self.read(features, model, benign.background)
        kinds: dict[str, Detector] = {
            "mahalanobis": Mahalanobis(),
            "nearest": Nearest(),
            "mahalanobis + nearest": SumOf(Mahalanobis(), Nearest()),
            "relative mahalanobis": RelativeMahalanobis(LayerGaussians.fit(background_NSD)),
            "relative nearest": RelativeNearest(background_NSD),
        }
        asked = benign.test | {"retain set": list(self.tofu.retained)}
        far = {name: self.read(features, model, questions) for name, questions in asked.items()}
        fitted, near = (self.read(features, model, questions) for questions in request)
        figures: Figures = {}
        for kind, detector in ((f"{kind}, {layers}", detector) for kind, detector in kinds.items()):
            near_N = detector.fit(fitted).score(near)
            scores = {name: detector.score(features_NSD) for name, features_NSD in far.items()}
            figures |= {f"{kind}: auroc: {name}": auroc(near_N, scores_M) for name, scores_M in scores.items()}
            known = scores["retained"]
            figures[f"{kind}: fire at 95 % recall"] = benign_fire_rate_at_forget_recall(near_N, known)
            figures[f"{kind}: miss at 95 % left alone"] = forget_miss_rate_at_benign(near_N, known)
        return figures

    def read(self, features: HiddenStates, model: Any, questions: Sequence[Question]) -> Tensor:
        """Features of prompts, one row each."""
        return torch.cat([features(batch).features_WSD for batch in self.batches(model, questions)])

    def batches(self, model: Any, questions: Sequence[Question]) -> Any:
        """Batches of prompts, on the device."""
        device = torch.device(self.options.device)
        examples = examples_of(self.tokenizer, questions)
        return (moved(prompts_of(batch), device) for batch in batches(examples, Collate(model), ROWS))


def reworded(questions: Sequence[Question]) -> list[Question]:
    """The same questions, asked in other words."""
    return [question._replace(question=question.reworded) for question in questions]


def persistence(found: Sequence[Step]) -> float:
    """How much of the ROUGE-L recall that a request had taken is back after the last one."""
    residual_JJ = torch.full((REQUESTS, REQUESTS), torch.nan)
    for step, figures in found:
        for number in range(1, step + 1):
            residual_JJ[step - 1, number - 1] = figures[f"request {number}: rouge"]
    return persistence_loss(residual_JJ)
