"""Experts on a tiny model, to be kept apart while they are trained. Begin with patched and train."""

import torch
from torch import nn

import moelora
from moelora import Gated, MoELoRAConfig
from moelora.bank import Expert
from moelora.continual.orthogonality import Hold
from moelora.mixture import find_mixture
from moelora.testing import tiny

RANK = 4
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(seed: int = 0) -> torch.Generator:
    """A generator."""
    return torch.Generator().manual_seed(seed)


def patched(experts: int = 2, *, rank: int = RANK) -> nn.Module:
    """A tiny Llama with experts e0, e1 ... at its attention; the last one is fresh and trainable, the others random."""
    config = MoELoRAConfig(router=Gated())
    model = moelora.patch_model(tiny.model("llama"), num_experts=1, rank=rank, targets=ATTENTION, config=config)
    find_mixture(model)[1].names[0] = "e0"
    for number in range(1, experts):
        randomise(model, f"e{number - 1}", seed=number)
        moelora.add_expert(model, name=f"e{number}", rank=rank)
    moelora.set_trainable(model, routers=False, experts=[f"e{experts - 1}"])
    return model


def randomise(model: nn.Module, name: str, *, seed: int) -> None:
    """Random factors for an expert."""
    for number, layer in enumerate(find_mixture(model)[1].layers.values()):
        expert = layer.bank.expert(find_mixture(model)[1].index(name))
        expert.A_RD.copy_(gaussian(*expert.A_RD.shape, seed=100 * seed + number) / 6)
        expert.B_RO.copy_(gaussian(*expert.B_RO.shape, seed=100 * seed + number + 50) / 6)


def experts_at(model: nn.Module, name: str) -> dict[str, Expert]:
    """An expert's factors at each site, copied."""
    _, mixture = find_mixture(model)
    found = {path: layer.bank.expert(mixture.index(name)) for path, layer in mixture.layers.items()}
    return {path: expert._replace(A_RD=expert.A_RD.clone(), B_RO=expert.B_RO.clone()) for path, expert in found.items()}


def train(model: nn.Module, name: str, held: Hold, *, steps: int, weight_decay: float = 0.1, seed: int = 0) -> None:
    """AdamW on random texts, with what the hold adds."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=weight_decay)
    held.attach(optimizer)
    ids_BL = torch.randint(3, 99, (8, 6), generator=seeded(seed))
    with moelora.use_experts(model, name):
        for _ in range(steps):
            loss = model(input_ids=ids_BL, labels=ids_BL).loss + held.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def trained_hooks(model: nn.Module) -> int:
    """How many gradient hooks the factors have."""
    banks = [layer.bank for layer in find_mixture(model)[1].layers.values()]
    return sum(len(factor._backward_hooks or {}) for bank in banks for factor in bank.parameters())
