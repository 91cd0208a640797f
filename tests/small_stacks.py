"""Small stacks on tiny models, and whether two are the same. Begin with made."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moelora.continual import ContinualStack, Training, UnlearningStack
from moelora.testing import tiny

TRAINING = Training(epochs=1, batch_size=16, learning_rate=1e-2)


def texts(seed: int, low: int, high: int, rows: int = 30) -> list[dict[str, list[int]]]:
    """Prompts of four tokens, from a range of their own, with answers of two."""
    ids_NL = torch.randint(low, high, (rows, 6), generator=torch.Generator().manual_seed(seed)).tolist()
    return [{"input_ids": ids_L, "labels": [-100] * 4 + ids_L[4:]} for ids_L in ids_NL]


REQUESTS = [texts(0, 5, 20), texts(1, 20, 35), texts(2, 35, 50)]
PROMPTS = {
    "input_ids": torch.tensor(
        [text["input_ids"][:4] for part in (*REQUESTS, texts(3, 60, 99)) for text in part[:3]],
    )
}
FORGETTING: dict[str, Any] = {
    "calibration": texts(9, 60, 99, 70),
    "max_miss": 0.4,
    "max_fire": 0.3,
    "held_out": 0.4,
    "on_conflict": "protect_utility",
    "training": TRAINING,
}


def made(requests: int = 1, **options: Any) -> UnlearningStack:
    """A stack on a tiny decoder that has carried out the first of the requests."""
    stack = UnlearningStack(tiny.model("llama"), **{"rank": 2, "targets": ["q_proj", "v_proj"], **options})
    for dataset in REQUESTS[:requests]:
        stack.forget(dataset, **FORGETTING)
    return stack


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    """What a model says to the prompts."""
    return model(**PROMPTS).logits


def state(stack: UnlearningStack | ContinualStack) -> list[Any]:
    """Everything that can be asked of a stack's entries but tensors."""
    entries = stack.requests if isinstance(stack, UnlearningStack) else stack.tasks
    return [(entry.name, entry.certificate, entry.losses, entry.overlap) for entry in entries]


def assert_same(one: UnlearningStack | ContinualStack, other: UnlearningStack | ContinualStack) -> None:
    """Bit for bit: outputs, weights, distances, certificates, losses, overlaps."""
    assert state(one) == state(other)
    assert torch.equal(outputs(one.model), outputs(other.model))
    assert torch.equal(one.weights(PROMPTS), other.weights(PROMPTS))
    assert torch.equal(one.distances(PROMPTS), other.distances(PROMPTS))


def files_of(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
