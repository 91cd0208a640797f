"""Runs on a pretrained decoder: loss on seven domains, and on texts that switch between two. Begin with Decoder.

All parameters are fp32. A step is 16 windows of 256 tokens; adapters have rank 8. An adapter of the pool takes 150
steps on its own domain; joint and single methods take 300 on all domains; a router on the pool one pass over its
samples.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import moelora
import moelora.mixture
from benchmarks.quality import peers, texts
from benchmarks.quality.study import METHODS, TUNING_SEED, Method, Options, Run
from benchmarks.quality.training import Batch, train
from moelora import AuxLosses, MoELoRAConfig
from moelora.config import ROUTERS
from moelora.hooks import reads_ids as reads_ids_of
from moelora.metrics import effective_support

RANK = 8
GATE_STEPS = 100
ACTIVE = 2
"""Experts of which a single adapter of equal active size has the rank."""

BATCH = 16
ROUTER_BATCH = 32
ADAPTER_STEPS = 150
JOINT_STEPS = 300
TARGETS = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
BUCKETS = 16
"""Into how many parts the positions of a composite text are cut, for its curve."""

Metrics = dict[str, float]


class Decoder:
    """A worker's own model and texts; `carry_out` does one run and leaves the model as it was."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
        self.model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        self.model.to(options.device).eval()
        self.domains = texts.load(options.data, self.tokenizer)
        self.names = [domain.name for domain in self.domains]
        composite_NL, label_NL = texts.composites(self.domains, 64, seed=0)
        self.composite_NL, self.label_NL = composite_NL.to(options.device), label_NL.to(options.device)

    def carry_out(self, run: Run, rates: Mapping[str, float]) -> Metrics:
        """Train what the run's method trains and measure it.

        Args:
            run: what to do.
            rates: the adapters' own learning rate, by placement.
        """
        method = METHODS[run.method]
        torch.manual_seed(run.seed)
        if method.kind == "adapters":
            return self.train_adapters(run)
        if method.kind == "peft":
            return self.mix_by_peft(run, method, rates)
        self.patch(run, method, rates)
        try:
            history = self.train_method(run, method)
            found = self.evaluate(run, method)
            return found | history | self.sizes(method)
        finally:
            moelora.unpatch_model(self.model)

    # --- the pool -------------------------------------------------------------------------------------------------

    def pool(self, seed: int, placement: str, rate: float) -> dict[str, Path]:
        """Folders of the adapters of one seed."""
        run = Run(suite="decoder", method="adapters", seed=seed, rate=rate, placement=placement)
        root = self.options.cache / "adapters" / run.pool
        return {name: root / name for name in self.names}

    def train_adapters(self, run: Run) -> Metrics:
        """Each domain's own adapter; the loss is that of each on its own domain."""
        found: Metrics = {}
        for index, (name, folder) in enumerate(self.pool(run.seed, run.placement, run.rate).items()):
            self.fresh(run, Method(kind="single", rank_times="1"))
            try:
                self.fit(run, self.steps(ADAPTER_STEPS), self.batches(run.seed, only=index))
                with moelora.use_experts(self.model, "expert0"):
                    found[f"validation {name}"] = self.loss_of(self.domains[index].validation_NL)
                    found[f"test {name}"] = self.loss_of(self.domains[index].test_NL)
                folder.mkdir(parents=True, exist_ok=True)
                moelora.export_adapter(self.model, folder, weights="expert0")
            finally:
                moelora.unpatch_model(self.model)
        for split in ("validation", "test"):
            found[split] = sum(found[f"{split} {name}"] for name in self.names) / len(self.names)
        return found

    # --- models ---------------------------------------------------------------------------------------------------

    def patch(self, run: Run, method: Method, rates: Mapping[str, float]) -> None:
        """The method's mixture in the model."""
        if method.kind == "pool":
            adapters = self.pool(run.seed, run.placement, rates[run.placement])
            moelora.patch_model(
                self.model, adapters, config=self.config(run, method), targets=TARGETS[run.placement], progress=False
            )
        else:
            self.fresh(run, method)

    def fresh(self, run: Run, method: Method) -> None:
        """Experts to be trained: one of several times the rank, or one for each domain."""
        times = {"": 1, "1": 1, "k": ACTIVE, "E": len(self.names)}[method.rank_times]
        moelora.patch_model(
            self.model,
            num_experts=1 if method.kind == "single" else len(self.names),
            rank=RANK * times,
            config=self.config(run, method),
            targets=TARGETS[run.placement],
        )
        moelora.set_trainable(self.model, routers=method.kind != "single", experts=True)

    def config(self, run: Run, method: Method) -> MoELoRAConfig:
        """The mixture's options; what is fixed takes ids."""
        router = ROUTERS[method.router](**method.router_options) if method.router else moelora.Given()
        weights: dict[str, Any] = {"load_balance": 0.0} | (method.losses if method.router else {})
        return MoELoRAConfig(router=router, losses=AuxLosses(**weights), backend="dense", seed=run.seed)

    # --- training -------------------------------------------------------------------------------------------------

    def train_method(self, run: Run, method: Method) -> Metrics:
        """Train what there is to train; returns what was seen on the way."""
        if method.router == "phatgoose":
            for index, name in enumerate(self.names):
                batches = itertools.islice(self.batches(run.seed, only=index), self.steps(GATE_STEPS))
                moelora.train_phatgoose(self.model, name, batches, steps=self.steps(GATE_STEPS))
            return {}
        if not run.rate:
            return {}
        if method.kind == "single":
            return self.fit(run, self.steps(JOINT_STEPS), self.batches(run.seed))
        if method.kind == "joint":
            return self.fit(run, self.steps(JOINT_STEPS), self.batches(run.seed), method)
        steps = self.steps(math.ceil(run.samples / ROUTER_BATCH))
        return self.fit(run, steps, self.batches(run.seed, size=ROUTER_BATCH), method)

    def steps(self, wanted: int) -> int:
        """So many steps, or fewer to try the logic."""
        return max(2, round(wanted * self.options.scale))

    def fit(self, run: Run, steps: int, batches: Iterator[Batch], method: Method | None = None) -> Metrics:
        """Train all that requires a gradient; returns the effective support on the way, where experts are trained."""
        begins = self.stages(steps, method)
        supports: Metrics = {}

        def before(number: int) -> bool:
            if method is not None and method.kind == "joint" and number % max(1, steps // 6) == 0:
                supports.update(self.supports(number))
            if not begins:
                return False
            begin = max(at for at in begins if at <= number)
            if begins[begin] != "joint":
                if number == begin:
                    moelora.set_stage(self.model, begins[begin])
                return number == begin
            # the ramp goes up in eight steps
            length = min([at for at in begins if at > number], default=steps) - begin
            eighth = 8 * (number - begin) // length
            if number > begin and eighth == 8 * (number - 1 - begin) // length:
                return False
            moelora.set_stage(self.model, "joint", ramp=eighth / 8)
            return True

        loss = self.rloo_loss(method) if method is not None and method.router == "rloo" else self.plain_loss
        train(self.model, steps, run.rate, batches, loss, before=before)
        if method is not None and method.kind == "joint":
            supports.update(self.supports(steps))
        return supports

    def stages(self, steps: int, method: Method | None) -> dict[int, str]:
        """The steps at which LoRA-Mixer's stages begin."""
        if method is None or method.router != "hard_soft":
            return {}
        begins, at = {}, 0.0
        for stage, share in method.options["stages"].items():
            begins[round(at * steps)] = stage
            at += share
        return begins

    def plain_loss(self, batch: Batch) -> Tensor:
        """The language model's loss and those on the routing."""
        return self.model(**batch).loss

    def rloo_loss(self, method: Method) -> Callable[[Batch], Tensor]:
        """ReMix's loss."""
        return lambda batch: moelora.rloo_loss(self.model, batch, samples=method.options["samples"]).total

    def batches(self, seed: int, only: int | None = None, *, size: int = BATCH) -> Iterator[Batch]:
        """Training batches as the model takes them; with domains only where the mixture reads them."""
        mixture = moelora.mixture.find_mixture(self.model)[1]
        reads_ids, experts = reads_ids_of(mixture.config), len(mixture.names)
        for window_BL, label_B in self.windows(seed, only, size=size):
            ids_BL = window_BL.to(self.options.device)
            batch = {"input_ids": ids_BL, "labels": ids_BL}
            if reads_ids:
                # a single adapter is the only one, whatever the domain
                batch["expert_ids"] = (label_B if experts > 1 else label_B * 0).to(self.options.device)
            yield batch

    def windows(self, seed: int, only: int | None = None, *, size: int = BATCH) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of training windows and their domains: of all domains alike, or of one."""
        generator = torch.Generator().manual_seed(seed)
        orders: dict[int, list[int]] = {}
        while True:
            rows, labels = [], []
            for _ in range(size):
                label = only if only is not None else int(torch.randint(len(self.domains), (), generator=generator))
                train_NL = self.domains[label].train_NL
                if not orders.get(label):
                    orders[label] = torch.randperm(len(train_NL), generator=generator).tolist()
                rows.append(train_NL[orders[label].pop()])
                labels.append(label)
            yield torch.stack(rows), torch.tensor(labels)

    # --- measuring ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, run: Run, method: Method) -> Metrics:
        """Losses in nats per token on each domain and on composites, and where tokens go."""
        self.model.eval()
        found: Metrics = {}
        splits = ("validation",) if run.seed == TUNING_SEED else ("validation", "test")
        for split in splits:
            for index, domain in enumerate(self.domains):
                windows_NL = domain.validation_NL if split == "validation" else domain.test_NL
                with self.acting(method, torch.full(windows_NL.shape, index)):
                    found[f"{split} {domain.name}"] = self.loss_of(windows_NL)
            found[split] = sum(found[f"{split} {name}"] for name in self.names) / len(self.names)
        if "test" in splits:
            routed = method.kind == "pool" and method.router
            recording = moelora.record(self.model) if routed else nullcontext()
            with self.acting(method, self.label_NL.cpu()), recording as kept:
                found["composite"] = self.loss_of(self.composite_NL)
            if routed:
                found |= self.agreement(kept)
        return found

    def acting(self, method: Method, label_NL: Tensor) -> Any:
        """The mixture that a method fixes."""
        names = self.names
        if method.kind == "single":
            return moelora.use_experts(self.model, "expert0")
        if method.fixed == "base":
            return moelora.disabled(self.model)
        if method.fixed == "uniform":
            return moelora.use_experts(self.model, {name: 1 / len(names) for name in names})
        if method.fixed == "random":
            generator = torch.Generator().manual_seed(0)
            label_NL = torch.randint(len(names), label_NL.shape, generator=generator)
        if method.fixed in ("random", "oracle"):
            return moelora.given_experts(self.model, label_NL)
        return nullcontext()

    def loss_of(self, windows_NL: Tensor) -> float:
        """Mean loss over all tokens, in one batch so that ids given for its tokens fit."""
        ids_NL = windows_NL.to(self.options.device)
        logits_NLV = self.model(input_ids=ids_NL).logits[:, :-1].float()
        return F.cross_entropy(logits_NLV.flatten(0, 1), ids_NL[:, 1:].flatten()).item()

    def supports(self, number: int) -> Metrics:
        """Effective support (ReMix, eq. 3) of the whole softmax and of the applied weights, a mean over all sites."""
        training = self.model.training
        self.model.eval()
        with torch.no_grad(), moelora.record(self.model) as recording:
            self.model(input_ids=self.composite_NL[:8])
        self.model.train(training)
        whole, applied = [], []
        for routing in recording.values():
            if routing.logits_TE is not None:
                whole.append(effective_support(routing.logits_TE.softmax(-1)).mean().item())
                applied.append(effective_support(routing.weights_TK).mean().item())
        if not whole:
            return {}
        return {
            f"support, softmax @{number}": sum(whole) / len(whole),
            f"support, applied @{number}": sum(applied) / len(applied),
        }

    def agreement(self, recording: Any) -> Metrics:
        """Share of a composite's tokens, by position, whose strongest expert is their own domain's, over all sites."""
        right = []
        for routing in recording.values():
            best_T = routing.experts_TK.gather(1, routing.weights_TK.argmax(-1, keepdim=True))[:, 0]
            right.append((best_T == self.label_NL.flatten()).float().view(self.label_NL.shape))
        share_L = torch.stack(right).mean(dim=(0, 1))
        parts = share_L.view(BUCKETS, -1).mean(-1)
        return {"agreement": share_L.mean().item()} | {
            f"agreement @{number}": value for number, value in enumerate(parts.tolist())
        }

    def sizes(self, method: Method) -> Metrics:
        """Parameters that act on a token, and all that were added: factors and routers."""
        layers = moelora.mixture.find_mixture(self.model)[1].layers.values()
        routers = sum(p.numel() for layer in layers for p in layer.router.parameters())
        total = active = 0.0
        for layer in layers:
            width = layer.bank.in_features + layer.bank.out_features
            total += layer.bank.total_rank * width
            slots: float = {"base": 0, "uniform": len(layer.bank), "random": 1, "oracle": 1}.get(
                method.fixed, layer.router.top_k
            )
            slots = 1 if method.kind == "single" else slots
            active += max(layer.bank.ranks) * slots * width
        return {"active parameters": active + routers, "total parameters": total + routers}

    # --- PEFT's own -----------------------------------------------------------------------------------------------

    def mix_by_peft(self, run: Run, method: Method, rates: Mapping[str, float]) -> Metrics:
        """PEFT's Arrow and X-LoRA on the same adapters, in a model of their own."""
        base: Any = AutoModelForCausalLM.from_pretrained(self.options.model, dtype=torch.float32)
        folders = self.pool(run.seed, run.placement, rates[run.placement])
        own = self.model
        self.model = peers.mixture(base.to(self.options.device), folders, method)
        try:
            if run.rate:
                windows = (ids_BL.to(self.options.device) for ids_BL, _ in self.windows(run.seed, size=ROUTER_BATCH))
                batches = ({"input_ids": ids_BL, "labels": ids_BL} for ids_BL in windows)
                steps = self.steps(math.ceil(run.samples / ROUTER_BATCH))
                # X-LoRA's hooks keep state from call to call, which a captured graph would not
                train(self.model, steps, run.rate, batches, self.plain_loss, capture=False)
            return self.evaluate(run, method)
        finally:
            self.model = own
