"""Train ten LoRA adapters, one for each domain of CLINC150, each alone on its own domain.

    python examples/train_skills.py                      all ten, about ten minutes on two cores
    python examples/train_skills.py --domains travel     one of them

An adapter never sees another domain. It learns together with a linear head over its 15 intents, on the mean of the
encoder's last layer. Both go to `examples/skills/<domain>/`: a plain PEFT folder, and the head beside it. What is in
the repository was made by this script with its defaults; `examples/ten_skills.py` mixes the ten.
"""

import argparse
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm import tqdm

import moelora
from clinc import DOMAINS, INTENTS, LABELS, PER_DOMAIN, SKILLS, Utterance, batches, features, load_base, read, sample


def train_skill(domain: str, utterances: list[Utterance], folder: Path, *, options: argparse.Namespace) -> float:
    """Train the adapter of one domain and write it; returns the training accuracy of the last epoch."""
    generator = torch.Generator().manual_seed(DOMAINS.index(domain))
    first = LABELS[INTENTS[domain][0]]

    # one fresh expert, which always acts, on the four projections of every attention
    model, tokenizer = load_base()
    moelora.patch_model(model, num_experts=1, rank=options.rank, top_k=1)
    moelora.set_trainable(model, routers=False, experts=True)
    (name,) = moelora.expert_names(model)
    head = torch.nn.Linear(model.config.hidden_size, PER_DOMAIN)
    torch.nn.init.normal_(head.weight, std=0.05, generator=generator)
    torch.nn.init.zeros_(head.bias)

    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": adapter, "lr": options.lr}, {"params": head.parameters(), "lr": 2 * options.lr}], weight_decay=0.01
    )
    steps = options.epochs * math.ceil(len(utterances) / options.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps))

    right = 0
    with tqdm(total=steps, desc=domain) as bar, moelora.use_experts(model, name):
        for _ in range(options.epochs):
            right = 0
            for batch in batches(tokenizer, utterances, options.batch, generator=generator):
                logits_BC = head(features(model, batch))
                loss = F.cross_entropy(logits_BC, batch.label_B - first)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()

                right += int((logits_BC.argmax(-1) == batch.label_B - first).sum())
                bar.set_postfix(loss=f"{loss.item():.3f}")
                bar.update()

    moelora.export_adapter(model, folder, weights=name)
    tensors = {"weight": head.weight.detach(), "bias": head.bias.detach()}
    save_file(tensors, folder / "head.safetensors", metadata={"intents": ",".join(INTENTS[domain])})
    return right / len(utterances)


def main() -> None:
    """Train the adapters that were asked for, one after the other."""
    parser = argparse.ArgumentParser(description="Train ten LoRA adapters, each alone on its own domain of CLINC150.")
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=DOMAINS, metavar="DOMAIN")
    parser.add_argument("--out", type=Path, default=SKILLS, help="where the folders go (default: examples/skills)")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--per-intent", type=int, default=100, help="training utterances for each intent, at most 100")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3, help="of the adapter; the head learns at twice that")
    options = parser.parse_args()

    train = read("train")
    for domain in options.domains:
        own = [utterance for utterance in train if utterance.label // PER_DOMAIN == DOMAINS.index(domain)]
        own = sample(own, options.per_intent * PER_DOMAIN, seed=0)
        accuracy = train_skill(domain, own, options.out / domain, options=options)
        print(f"{domain}: {len(own)} utterances, {100 * accuracy:.1f} % of them right in the last epoch")


if __name__ == "__main__":
    main()
