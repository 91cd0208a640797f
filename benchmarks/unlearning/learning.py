"""Ten domains of CLINC150 learned one after the other by every method. Begin with main.

    python -m benchmarks.unlearning learning --model FOLDER --clinc FOLDER --seeds 0 1 2

The encoder is pretrained and frozen. Its head is never trained: a class's row is the encoder's own embedding of the
intent's name, so nothing is known of a task before its turn. Each method gets the same 600 utterances of a domain, the
same steps and the same loss, cross-entropy among the domain's 15 intents, and a learning rate tuned on other seeds'
validation utterances. Measured is the accuracy among all 150 intents after each task, nobody naming the domain.

"joint" sees all domains at once and as many steps as all tasks together: what one would have without the sequence.
"""

import argparse
import csv
import gzip
import itertools
import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import moelora
from benchmarks.origin import read_rows, revision_here, today
from benchmarks.unlearning.classifier import load_encoder
from moelora.continual import ContinualStack, Objective, Orthogonality, Training
from moelora.continual.examples import Collate, batches, model_inputs
from moelora.continual.training import train_expert
from moelora.metrics.continual import average_accuracy, backward_transfer, final_accuracy, forgetting

RESULTS = Path(__file__).parents[1] / "results" / "unlearning" / "learning.csv"
RATES = (1e-3, 3e-3, 1e-2)
TUNING_SEED = 100
RANK, TRAINED, TESTED, HELD = 8, 40, 10, 10
"""Rank of an expert; utterances of each intent for training, for the test, and for the choice of learning rates."""

EPOCHS, BATCH = 5, 32
SHARPNESS = 20.0
"""What cosines are multiplied by to be logits."""

Texts = dict[str, list[dict[str, Any]]]
"""Tokenized utterances of each domain, with the intent's number as label."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a sequence is learned. `rank` counts all experts together where there is one only."""

    routing: str = ""
    orthogonality: str = "none"
    rank: int = RANK


METHODS = {
    "sequential LoRA": Method(),
    "sequential LoRA, rank 80": Method(rank=10 * RANK),
    "O-LoRA": Method(routing="sum", orthogonality="o_lora"),
    "summed, null space": Method(routing="sum", orthogonality="nullspace"),
    "gates, no orthogonality": Method(routing="gates"),
    "gates, penalty": Method(routing="gates", orthogonality="penalty"),
    "gates, null space": Method(routing="gates", orthogonality="nullspace"),
    "joint, rank 80": Method(rank=10 * RANK),
}
"""Sequences of ten experts of rank 8, and single LoRAs of that rank and of the rank of all ten."""


class Run(NamedTuple):
    """One method, seed and learning rate."""

    method: str
    seed: int
    rate: float


class AmongOwn(Objective):
    """Cross-entropy among an item's own options, which are the classes of its task (as in InfLoRA's protocol)."""

    def loss(self, model: nn.Module, batch: Any, generator: torch.Generator) -> Tensor:
        """The mean over the batch."""
        inputs = {name: values for name, values in model_inputs(on(batch, model)).items() if name != "labels"}
        logits_BC = model(**inputs).logits
        own_BC = torch.full_like(logits_BC, -torch.inf)
        option_BC = batch["options"].to(logits_BC.device)
        own_BC = own_BC.scatter(1, option_BC, logits_BC.gather(1, option_BC))
        return F.cross_entropy(own_BC, batch["labels"].to(logits_BC.device))


def on(batch: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The batch where the model is."""
    device = next(model.parameters()).device
    return {name: values.to(device) for name, values in batch.items()}


class Learner:
    """The encoder under a head of intents' names, and what it is to learn."""

    def __init__(self, model: str, clinc: Path, device: str) -> None:
        data = json.loads(gzip.decompress((clinc / "data_full.json.gz").read_bytes()))
        self.domains: dict[str, list[str]] = json.loads((clinc / "domains.json").read_text(encoding="utf-8"))
        self.names = [name for domain in self.domains.values() for name in domain]
        self.model, self.tokenizer = load_encoder(model, len(self.names))
        self.model.to(torch.device(device))  # pyright: ignore[reportArgumentType] - transformers' wrapper
        self.collate = Collate(self.model)
        self.data = {split: self._tokens(data[split]) for split in ("train", "val", "test")}
        self._name_head()

    @torch.no_grad()
    def _name_head(self) -> None:
        """Each class is what the encoder says of its name; the forward's features have unit length."""
        texts = [name.replace("_", " ") for name in self.names]
        inputs = self.tokenizer(texts, padding=True, return_tensors="pt")
        inputs = {name: values.to(self.model.device) for name, values in inputs.items() if name != "token_type_ids"}
        states_BLD = self.model.bert(**inputs).last_hidden_state
        mask_BL1 = inputs["attention_mask"].unsqueeze(-1)
        mean_BD = (states_BLD * mask_BL1).sum(1) / mask_BL1.sum(1)
        self.model.head.weight.copy_(SHARPNESS * F.normalize(mean_BD, dim=-1))
        self.model.head.bias.zero_()
        self.model.requires_grad_(False)

    def _tokens(self, pairs: Sequence[tuple[str, str]]) -> dict[str, list[list[int]]]:
        """Token ids of all utterances, by intent."""
        ids = self.tokenizer([text for text, _ in pairs], truncation=True, max_length=64)["input_ids"]
        found: dict[str, list[list[int]]] = {name: [] for name in self.names}
        for (_, name), tokens in zip(pairs, ids, strict=True):
            if name in found:
                found[name].append(tokens)
        return found

    def texts(self, split: str, count: int, seed: int) -> Texts:
        """Utterances of each domain, `count` of each intent, drawn by the seed."""
        generator = torch.Generator().manual_seed(seed)
        found: Texts = {}
        for domain, names in self.domains.items():
            classes = [self.names.index(name) for name in names]
            found[domain] = [
                {"input_ids": self.data[split][name][place], "labels": number, "options": classes}
                for name, number in zip(names, classes, strict=True)
                for place in torch.randperm(len(self.data[split][name]), generator=generator)[:count].tolist()
            ]
        return found

    @torch.no_grad()
    def accuracy(self, texts: Texts) -> list[float]:
        """Of each domain, among all 150 intents."""
        shares = []
        for examples in texts.values():
            right = 0
            for batch in batches(examples, self.collate, 256):
                inputs = on(batch, self.model)
                logits_BC = self.model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
                right += int((logits_BC.argmax(1) == inputs["labels"]).sum())
            shares.append(right / len(examples))
        return shares

    def carry_out(self, run: Run) -> list[list[float]]:
        """The accuracies before the first task and after each, (11, 10); of "joint" before and after."""
        tuning = run.seed == TUNING_SEED
        train = self.texts("train", TRAINED, run.seed)
        test = self.texts("val", HELD, 0) if tuning else self.texts("test", TESTED, run.seed)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(run.seed)).tolist()
        domains = [list(train)[place] for place in order]
        test = {domain: test[domain] for domain in domains}
        training = Training(epochs=EPOCHS, batch_size=BATCH, learning_rate=run.rate, seed=run.seed)

        rows = [self.accuracy(test)]
        for _ in self._steps(METHODS[run.method], run, [train[domain] for domain in domains], training):
            rows.append(self.accuracy(test))
        moelora.unpatch_model(self.model)
        return rows

    def _steps(self, method: Method, run: Run, tasks: list[list[Any]], training: Training) -> Iterator[None]:
        """Learn task by task; after each the model stands as it would be used."""
        if method.routing:
            stack = ContinualStack(
                self.model,
                rank=method.rank,
                routing=method.routing,
                orthogonality=Orthogonality(mode=method.orthogonality),
                seed=run.seed,
            )
            for task in tasks:
                stack.learn(task, objective=AmongOwn(), training=training)
                yield
            return

        config = moelora.MoELoRAConfig(router=moelora.Given(), seed=run.seed)
        moelora.patch_model(self.model, num_experts=1, rank=method.rank, config=config)
        with moelora.given_experts(self.model, 0):
            for task in [list(itertools.chain(*tasks))] if "joint" in run.method else tasks:
                moelora.set_trainable(self.model, routers=False, experts=True)
                train_expert(self.model, "expert0", task, AmongOwn(), collate=self.collate, training=training)
                yield


# --- results ----------------------------------------------------------------------------------------------------------

FIELDS = ("method", "seed", "rate", "metric", "value", "device", "torch", "revision", "date")


def metrics_of(rows: list[list[float]]) -> dict[str, float]:
    """What is reported of a run's accuracies."""
    found = {"before": sum(rows[0]) / len(rows[0]), "final": sum(rows[-1]) / len(rows[-1])}
    if len(rows) > 2:
        matrix_JJ = torch.tensor(rows[1:])
        found |= {
            "final": final_accuracy(matrix_JJ),
            "average": average_accuracy(matrix_JJ),
            "backward transfer": backward_transfer(matrix_JJ),
            "forgetting": forgetting(matrix_JJ),
        }
    return found


def best_rates(rows: list[dict[str, str]]) -> dict[str, float]:
    """The learning rate of the best final accuracy in tuning, by method, where all were tried."""
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        if int(row["seed"]) == TUNING_SEED and row["metric"] == "final":
            found.setdefault(row["method"], {})[float(row["rate"])] = float(row["value"])
    return {
        method: max(values, key=values.__getitem__) for method, values in found.items() if set(values) >= set(RATES)
    }


WORKERS: list[Learner] = []


def _begin(model: str, clinc: Path, device: str, threads: int) -> None:
    torch.set_num_threads(threads)
    transformers.logging.disable_progress_bar()
    WORKERS[:] = [Learner(model, clinc, device)]


def _work(run: Run) -> tuple[Run, list[list[float]], float]:
    start = time.perf_counter()
    rows = WORKERS[0].carry_out(run)
    return run, rows, time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> None:
    """Tune, then measure; what stands in the file is not done again."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.unlearning learning", description=__doc__)
    parser.add_argument("--model", required=True, help="folder or id of the encoder, all-MiniLM-L6-v2")
    parser.add_argument("--clinc", type=Path, required=True, help="folder with data_full.json.gz and domains.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the device")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--revision", default="")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    revision = options.revision or revision_here()
    card = torch.cuda.get_device_name() if options.device == "cuda" else options.device

    context = multiprocessing.get_context("spawn")
    start = (options.model, options.clinc, options.device, options.threads)
    with context.Pool(options.workers, initializer=_begin, initargs=start) as pool:
        for tuning in (True, False):
            rates = best_rates(read_rows(options.output))
            runs = [
                Run(method, seed, rate)
                for seed in ([TUNING_SEED] if tuning else options.seeds)
                for method in options.methods
                for rate in (RATES if tuning else [rates[method]])
            ]
            done = {Run(row["method"], int(row["seed"]), float(row["rate"])) for row in read_rows(options.output)}
            for run, rows, seconds in pool.imap_unordered(_work, [run for run in runs if run not in done]):
                about = (card, torch.__version__, revision, today())
                _write(
                    options.output, [(*run, name, round(value, 5), *about) for name, value in metrics_of(rows).items()]
                )
                print(
                    f"{run.method}, seed {run.seed}, rate {run.rate:g}: {metrics_of(rows)} ({seconds:.0f} s)",
                    flush=True,
                )
    print(f"complete: {options.output}")


def _write(path: Path, lines: list[tuple[Any, ...]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.is_file()
    with open(path, "a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([FIELDS, *lines] if new else lines)
