"""Ten adapters, one model: mix ten LoRA adapters in a sentence encoder, train only the routers, and measure.

    python examples/ten_skills.py            under four minutes on two cores

Ten adapters of all-MiniLM-L6-v2 wait in `examples/skills`, each trained alone on one domain of CLINC150 with a head
over its own 15 intents (`train_skills.py`). Here they are downloaded through the hub client, from a small hub on this
machine, and become frozen experts of one model. A router at each of its 24 projections learns from 2,000 mixed
utterances which of them act on each token.

What is measured: an utterance of any domain is encoded, the ten heads stand one after the other as 150 logits, and the
largest of them is the answer; nobody says which domain it is. Heads and adapters are as they were trained, alone:
neither has ever seen another domain, and only the routers learn here. Begin with main.
"""

import argparse
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers.utils import logging

import moelora
from clinc import DOMAINS, HERE, PER_DOMAIN, SKILLS, Batch, Utterance, batches, features, load_base, read, sample
from moelora.testing.hub_server import HubServer
from skill_routes import Routes, draw_heat_map

Mixing = Callable[[Batch], AbstractContextManager[None]]
"""How the mixture is fixed for a batch, in place of the routers."""


class Heads(NamedTuple):
    """The ten heads, one after the other, as one linear map to 150 logits."""

    weight_CD: Tensor
    bias_C: Tensor

    def __call__(self, features_BD: Tensor) -> Tensor:
        """Logits of all 150 intents."""
        return F.linear(features_BD, self.weight_CD, self.bias_C)


class Answers(NamedTuple):
    """Predicted and true intents of all utterances, and what it took."""

    predicted_N: Tensor
    label_N: Tensor
    seconds: float

    @property
    def accuracy(self) -> float:
        """Share of utterances whose intent is right, among all 150."""
        return (self.predicted_N == self.label_N).double().mean().item()

    @property
    def domain_accuracy(self) -> float:
        """Share of utterances for which a head of the right domain has the largest logit."""
        return (self.predicted_N // PER_DOMAIN == self.label_N // PER_DOMAIN).double().mean().item()


class Row(NamedTuple):
    """One line of the table."""

    name: str
    answers: Answers
    routes: Routes | None = None


def fetch_heads(hub: HubServer, cache: Path) -> Heads:
    """The ten heads, downloaded from where the adapters are."""
    paths = [
        hf_hub_download(f"skills/{domain}", "head.safetensors", endpoint=hub.endpoint, cache_dir=cache)
        for domain in DOMAINS
    ]
    heads = [load_file(path) for path in paths]
    return Heads(torch.cat([head["weight"] for head in heads]), torch.cat([head["bias"] for head in heads]))


def mix_skills(hub: HubServer, cache: Path, **options: Any) -> tuple[Any, Any]:
    """The base model with the ten adapters as frozen experts, and its tokenizer."""
    model, tokenizer = load_base()
    sources = {domain: f"skills/{domain}" for domain in DOMAINS}
    moelora.patch_model(model, sources, endpoint=hub.endpoint, cache_dir=cache, progress=False, **options)
    return model, tokenizer


def train_routers(
    model: Any, tokenizer: Any, heads: Heads, utterances: Sequence[Utterance], options: argparse.Namespace, name: str
) -> None:
    """Train the routers on the 150-way cross-entropy of the frozen heads and the balance loss."""
    routers = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(routers, lr=options.lr)
    steps = options.epochs * math.ceil(len(utterances) / options.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 10) * (1 - step / steps))
    generator = torch.Generator().manual_seed(options.seed)

    model.train()
    with tqdm(total=steps, desc=name) as bar:
        for _ in range(options.epochs):
            for batch in batches(tokenizer, utterances, options.batch, generator=generator):
                logits_BC = heads(features(model, batch))
                loss = F.cross_entropy(logits_BC, batch.label_B) + moelora.aux_loss(model)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.set_postfix(loss=f"{loss.item():.3f}")
                bar.update()
    model.eval()


@torch.inference_mode()
def answer(
    model: Any,
    tokenizer: Any,
    heads: Heads,
    utterances: Sequence[Utterance],
    name: str,
    *,
    mixing: Mixing | None = None,
    routes: Routes | None = None,
) -> Row:
    """Answer all utterances: with a mixture that is fixed for each batch, or by the routers, whose routes are kept."""
    predicted, labels = [], []
    start = time.perf_counter()
    for batch in tqdm(list(batches(tokenizer, utterances, 64)), desc=name, leave=False):
        if mixing is not None:
            with mixing(batch):
                logits_BC = heads(features(model, batch))
        elif routes is not None:
            with moelora.record(model) as recording:
                logits_BC = heads(features(model, batch))
            routes.add(recording, batch)
        else:
            logits_BC = heads(features(model, batch))
        predicted.append(logits_BC.argmax(-1))
        labels.append(batch.label_B)
    return Row(name, Answers(torch.cat(predicted), torch.cat(labels), time.perf_counter() - start), routes)


def fixed_rows(model: Any, tokenizer: Any, heads: Heads, test: Sequence[Utterance]) -> list[Row]:
    """Every mixture that needs no router: the base, each adapter alone, their average, and the oracle's choice."""
    average = {domain: 1 / len(DOMAINS) for domain in DOMAINS}

    def fixed(name: str, experts: Callable[[Batch], Any]) -> Row:
        return answer(
            model, tokenizer, heads, test, name, mixing=lambda batch: moelora.use_experts(model, experts(batch))
        )

    return [
        fixed("base, ten heads", lambda batch: None),
        *(fixed(f"{domain} alone", lambda batch, own=domain: own) for domain in DOMAINS),
        fixed("all ten averaged", lambda batch: average),
        fixed("oracle domain", lambda batch: [DOMAINS[domain] for domain in batch.domain_B.tolist()]),
    ]


def random_row(hub: HubServer, cache: Path, heads: Heads, test: Sequence[Utterance], seed: int) -> Row:
    """A random expert for each token."""
    model, tokenizer = mix_skills(hub, cache, router="given")
    generator = torch.Generator().manual_seed(seed)

    def draw(batch: Batch) -> AbstractContextManager[None]:
        shape = batch.inputs["input_ids"].shape
        return moelora.given_experts(model, torch.randint(len(DOMAINS), shape, generator=generator))

    return answer(model, tokenizer, heads, test, "random routing", mixing=draw)


def new_head_row(model: Any, tokenizer: Any, mixed: Sequence[Utterance], test: Sequence[Utterance], name: str) -> Row:
    """For comparison: one new 150-way head on the base model's features, trained on the same mixed utterances."""

    @torch.inference_mode()
    def encode(utterances: Sequence[Utterance]) -> tuple[Tensor, Tensor]:
        with moelora.disabled(model):
            found = [(features(model, batch), batch.label_B) for batch in batches(tokenizer, utterances, 64)]
        features_ND, label_N = (torch.cat(part) for part in zip(*found, strict=True))
        return F.normalize(features_ND, dim=-1), label_N

    start = time.perf_counter()
    x_ND, label_N = (tensor.clone() for tensor in encode(mixed))
    head = torch.nn.Linear(x_ND.shape[1], len(DOMAINS) * PER_DOMAIN)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        # the penalty of scikit-learn's logistic regression with C = 30
        penalty = head.weight.square().sum() / (2 * 30 * len(x_ND))
        loss = F.cross_entropy(head(x_ND), label_N) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    test_ND, truth_N = encode(test)
    with torch.inference_mode():
        predicted_N = head(test_ND).argmax(-1)
    return Row(name, Answers(predicted_N, truth_N, time.perf_counter() - start))


def print_table(rows: Sequence[Row]) -> None:
    """All rows under one head."""
    print(f"\n{'who acts':<34}{'accuracy':>9}{'domain':>9}{'tokens':>9}{'votes':>9}{'seconds':>9}")
    for row in rows:
        agreement = ("", "") if row.routes is None else (row.routes.token_agreement, row.routes.vote_agreement)
        tokens, votes = (f"{100 * value:.1f} %" if value != "" else "" for value in agreement)
        measured = f"{100 * row.answers.accuracy:>7.1f} %{100 * row.answers.domain_accuracy:>7.1f} %"
        print(f"{row.name:<34}{measured}{tokens:>9}{votes:>9}{row.answers.seconds:>9.1f}")


def main() -> None:
    """Load, mix, train, measure, draw, save, reload, compare."""
    parser = argparse.ArgumentParser(description="Ten adapters, one model.")
    parser.add_argument("--out", type=Path, default=HERE / "out" / "ten_skills")
    parser.add_argument("--mixed", type=int, default=2000, help="utterances that the routers learn from")
    parser.add_argument("--test", type=int, default=1500, help="utterances of the test stream, at most 4500")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    logging.disable_progress_bar()
    start = time.perf_counter()

    # the adapters saw "train"; the routers learn from "val"
    mixed = sample(read("val"), options.mixed, seed=options.seed)
    test = sample(read("test"), options.test, seed=options.seed)
    repos = {f"skills/{domain}": SKILLS / domain for domain in DOMAINS}
    with HubServer(repos) as hub, tempfile.TemporaryDirectory() as cache_name:
        cache = Path(cache_name)
        heads = fetch_heads(hub, cache)

        routed = []
        for top_k in (1, 2):
            model, tokenizer = mix_skills(hub, cache, router="learned", top_k=top_k)
            train_routers(model, tokenizer, heads, mixed, options, f"training routers, top-{top_k}")
            row = answer(model, tokenizer, heads, test, f"routed top-{top_k}", routes=Routes(model))
            routed.append(row)
        moelora.print_trainable_parameters(model)

        *fixed, oracle = fixed_rows(model, tokenizer, heads, test)
        rows = [*fixed, random_row(hub, cache, heads, test, options.seed), *routed, oracle]
        rows.append(new_head_row(model, tokenizer, mixed, test, "(base, a new 150-way head)"))

        shutil.rmtree(options.out, ignore_errors=True)
        moelora.save(model, options.out / "mixture", include_experts=True)
        save_file({"weight": heads.weight_CD, "bias": heads.bias_C}, options.out / "heads.safetensors")
    draw_heat_map(routed[-1].routes, options.out / "heat_map.png")
    print_table(rows)

    # the hub and its cache are gone: the folder is all that is needed
    loaded, tokenizer = load_base()
    moelora.load(loaded, options.out / "mixture", progress=False)
    again = answer(loaded, tokenizer, heads, test, "reloaded").answers
    same = torch.equal(again.predicted_N, routed[-1].answers.predicted_N)
    verdict = "identical" if same else "NOT identical"
    print(f"\nreloaded from {options.out / 'mixture'}: {len(test)} predictions, {verdict}")
    print(f"heat map: {options.out / 'heat_map.png'}\nall of it: {time.perf_counter() - start:.0f} s")
    if not same:
        raise SystemExit("the reloaded mixture answers otherwise than the saved one")


if __name__ == "__main__":
    main()
