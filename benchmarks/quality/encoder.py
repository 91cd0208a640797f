"""Runs on a sentence encoder: accuracy on utterances of ten domains, answered by ten frozen heads. Begin with Encoder.

The protocol of `examples/ten_skills.py`: adapters and heads of all-MiniLM-L6-v2 were each trained alone on one domain
of CLINC150; the ten heads stand one after the other as 150 logits, and nobody names the domain. Only routers learn, in
75 steps of 16 utterances, from `samples` utterances that are shown again and again; PHATGOOSE's gates each in 100 steps
on the utterances and the 15 intents of their own adapter. The adapters are the same for all seeds, so what trains
nothing has no spread.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import moelora
from benchmarks.quality.study import METHODS, TUNING_SEED, Method, Options, Run
from benchmarks.quality.training import train
from moelora import AuxLosses, MoELoRAConfig
from moelora.config import ROUTERS

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import clinc  # pyright: ignore[reportMissingImports]

STEPS = 75
GATE_STEPS = 100
BATCH = 16
TEST = 900
VALIDATION = 600
"""Utterances of CLINC150's validation split that choose learning rates; routers learn from the other 2,400."""


class Encoder:
    """A worker's own model and utterances; `carry_out` does one run and leaves the model as it was."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.model, self.tokenizer = clinc.load_base()
        self.model.to(options.device)
        heads = [load_file(clinc.SKILLS / domain / "head.safetensors") for domain in clinc.DOMAINS]
        self.weight_CD = torch.cat([head["weight"] for head in heads]).to(options.device)
        self.bias_C = torch.cat([head["bias"] for head in heads]).to(options.device)
        ranked = clinc.sample(clinc.read("val"), 3000, seed=0)
        self.validation, self.pool = ranked[:VALIDATION], ranked[VALIDATION:]
        self.test = clinc.sample(clinc.read("test"), TEST, seed=0)

    def carry_out(self, run: Run, rates: Mapping[str, float]) -> dict[str, float]:
        """Train what the run's method trains and measure its accuracy."""
        method = METHODS[run.method]
        router = ROUTERS[method.router](**method.router_options) if method.router else moelora.Given()
        weights: dict[str, Any] = {"load_balance": 0.0} | (method.losses if method.router else {})
        losses = AuxLosses(**weights)
        moelora.patch_model(
            self.model,
            {domain: clinc.SKILLS / domain for domain in clinc.DOMAINS},
            config=MoELoRAConfig(router=router, losses=losses, seed=run.seed),
            progress=False,
        )
        try:
            if method.router == "phatgoose":
                self.train_gates(run)
            elif run.rate:
                self.fit(run, method)
            split = "validation" if run.seed == TUNING_SEED else "test"
            return {split: self.accuracy(method, self.validation if split == "validation" else self.test)}
        finally:
            moelora.unpatch_model(self.model)

    def fit(self, run: Run, method: Method) -> None:
        """Train the routers."""
        if method.router == "hard_soft":
            moelora.set_stage(self.model, "router")
        reads_ids = bool(method.losses.get("gate_cross_entropy")) or method.router == "hard_soft"

        def loss_of(batch: Any) -> Tensor:
            if method.router == "rloo":
                inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
                answered = moelora.rloo_loss(
                    self.model, {**inputs}, samples=method.options["samples"], loss_fn=self.losses_by_row(batch)
                )
                return answered.total
            loss = F.cross_entropy(self.logits(batch, ids=reads_ids), batch["label"])
            return loss + moelora.aux_loss(self.model) if method.losses and any(method.losses.values()) else loss

        steps = max(2, round(STEPS * self.options.scale))
        train(self.model, steps, run.rate, self.batches(run), loss_of)

    def train_gates(self, run: Run) -> None:
        """Train each adapter's gate alone, on what the adapter was trained on."""
        known = clinc.read("train")
        steps = max(2, round(GATE_STEPS * self.options.scale))
        generator = torch.Generator().manual_seed(run.seed)
        for index, domain in enumerate(clinc.DOMAINS):
            own = [utterance for utterance in known if utterance.label // clinc.PER_DOMAIN == index]
            intents = slice(clinc.PER_DOMAIN * index, clinc.PER_DOMAIN * (index + 1))
            alone = OneHead(self.model, self.weight_CD[intents], self.bias_C[intents])
            batches = (
                {name: tensor.to(self.options.device) for name, tensor in batch.inputs.items()}
                | {"label": (batch.label_B - intents.start).to(self.options.device)}
                for batch in clinc.batches(self.tokenizer, own, BATCH, generator=generator)
            )
            moelora.train_phatgoose(alone, domain, batches, steps=steps)

    def losses_by_row(self, batch: dict[str, Tensor]) -> Any:
        """For RLOO: the loss of each row of a batch whose rows are repeated."""

        def losses(output: Any, repeated: Mapping[str, Tensor]) -> Tensor:
            # the batch, copy after copy
            label_B = batch["label"].repeat(repeated["input_ids"].shape[0] // len(batch["label"]))
            mask_BL1 = repeated["attention_mask"].unsqueeze(-1).to(output.last_hidden_state.dtype)
            mean_BD = (output.last_hidden_state * mask_BL1).sum(1) / mask_BL1.sum(1)
            return F.cross_entropy(F.linear(mean_BD, self.weight_CD, self.bias_C), label_B, reduction="none")

        return losses

    def batches(self, run: Run) -> Iterator[dict[str, Tensor]]:
        """Utterances in random order, the same few again and again."""
        known = self.pool[: run.samples]
        generator = torch.Generator().manual_seed(run.seed)
        while True:
            for batch in clinc.batches(self.tokenizer, known, BATCH, generator=generator):
                inputs = {name: tensor.to(self.options.device) for name, tensor in batch.inputs.items()}
                yield {**inputs, "label": batch.label_B.to(self.options.device)}

    def logits(self, batch: Mapping[str, Tensor], *, ids: bool = False) -> Tensor:
        """Of the 150 intents."""
        inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "attention_mask")}
        if ids:
            inputs["expert_ids"] = batch["label"] // clinc.PER_DOMAIN
        hidden_BLD = self.model(**inputs).last_hidden_state
        mask_BL1 = batch["attention_mask"].unsqueeze(-1).to(hidden_BLD.dtype)
        mean_BD = (hidden_BLD * mask_BL1).sum(1) / mask_BL1.sum(1)
        return F.linear(mean_BD, self.weight_CD, self.bias_C)

    @torch.no_grad()
    def accuracy(self, method: Method, utterances: Any) -> float:
        """Share of utterances whose intent is right among all 150."""
        self.model.eval()
        right = 0
        generator = torch.Generator().manual_seed(0)
        for batch in clinc.batches(self.tokenizer, utterances, 64):
            moved = {name: tensor.to(self.options.device) for name, tensor in batch.inputs.items()}
            with self.acting(method, batch, generator):
                predicted_B = self.logits(moved).argmax(-1).cpu()
            right += int((predicted_B == batch.label_B).sum())
        return right / len(utterances)

    def acting(self, method: Method, batch: Any, generator: torch.Generator) -> Any:
        """The mixture that a method fixes."""
        names = clinc.DOMAINS
        if method.fixed == "base":
            return moelora.disabled(self.model)
        if method.fixed == "uniform":
            return moelora.use_experts(self.model, {name: 1 / len(names) for name in names})
        if method.fixed == "oracle":
            return moelora.given_experts(self.model, batch.domain_B)
        if method.fixed == "random":
            shape = batch.inputs["input_ids"].shape
            return moelora.given_experts(self.model, torch.randint(len(names), shape, generator=generator))
        return nullcontext()


class OneHead(nn.Module):
    """An encoder with one skill's head; it is called `module`, as in torch's own wrappers, to be found in here."""

    def __init__(self, encoder: Any, weight_CD: Tensor, bias_C: Tensor) -> None:
        super().__init__()
        self.module, self.weight_CD, self.bias_C = encoder, weight_CD, bias_C

    def forward(self, input_ids: Tensor, attention_mask: Tensor, label: Tensor) -> dict[str, Tensor]:
        """The mean cross-entropy, under "loss"."""
        hidden_BLD = self.module(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask_BL1 = attention_mask.unsqueeze(-1).to(hidden_BLD.dtype)
        mean_BD = (hidden_BLD * mask_BL1).sum(1) / mask_BL1.sum(1)
        return {"loss": F.cross_entropy(F.linear(mean_BD, self.weight_CD, self.bias_C), label)}
