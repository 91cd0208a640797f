"""Mixtures to compute in several ways: by the operator, and in plain torch. Begin with random_mixture.

Without a GPU the operator's kernels run in Triton's interpreter, which has no bf16.
"""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moelora.kernels.gpu import ops
from moelora.kernels.gpu.tile import Tile
from moelora.kernels.gpu.tiles import tile_for

# torch.use_deterministic_algorithms asks for it where there is a GPU
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
D = 44
RANKS = (3, 0, 17, 8)


CASES: dict[str, dict[str, Any]] = {
    "renormalized": {},
    "softmax": {"combine": "softmax", "linear": False, "low": True},
    "constant, K = E": {"combine": "constant", "top_k": 4, "bias": False},
    "renormalized, K = E": {"top_k": 4, "linear": False},
    "unit, K = 1": {"combine": "unit", "top_k": 1, "linear": False},
    "own routers": {"outs": (37, 16, 50), "routers": 3, "combine": "softmax"},
    "one router for three": {"outs": (37, 16, 50), "linear": False, "temperature": 1.0},
    "given": {"given": True, "top_k": 3, "low": True},
    "given, idle tokens": {"given": True, "every_token": False},
    "given twice, idle tokens": {"given": True, "every_token": False, "linear": False, "outs": (37, 20), "routers": 2},
    "one token": {"tokens": 1},
    "narrow": {"ranks": (1, 0), "top_k": 1, "combine": "softmax", "tokens": 33},
}
"""Arguments of `random_mixture`."""

SHORT = ("softmax", "unit, K = 1", "one router for three", "given, idle tokens")
"""What the interpreter, which is slow, sees in fp16, too."""

CASES_IN_DTYPES = [
    (case, dtype) for case in CASES for dtype in DTYPES if DEVICE == "cuda" or dtype.itemsize == 4 or case in SHORT
]


class Mixture(NamedTuple):
    """A call of the operator, and gradients for all that it returns."""

    lists: ops.Lists
    settings: ops.Settings
    grads: list[Tensor]
    grad_weights: Tensor
    grad_logits: Tensor

    @property
    def tokens(self) -> int:
        """T."""
        return self.lists.x.shape[0]

    def replace(self, **lists: object) -> "Mixture":
        """With other tensors in some of the lists."""
        return self._replace(lists=self.lists._replace(**lists))

    def with_settings(self, **settings: object) -> "Mixture":
        """With other settings."""
        return self._replace(settings=self.settings._replace(**settings))


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers on the device, drawn on the host so that they are the same everywhere."""
    return torch.randn(shape).to(DEVICE, dtype)


def random_mixture(
    *,
    tokens: int = 17,
    outs: tuple[int, ...] = (37,),
    ranks: tuple[int, ...] = RANKS,
    routers: int = 1,
    given: bool = False,
    top_k: int = 2,
    combine: str = "renormalized",
    temperature: float = 0.7,
    linear: bool = True,
    bias: bool = True,
    every_token: bool = True,
    dtype: torch.dtype = torch.float32,
    low: bool = False,
) -> Mixture:
    """A mixture of normal numbers; `low`: A and B in x's dtype, not fp32; `given`: no router, but ids and weights.

    Given ids have empty slots, and an expert twice, which then counts with both weights. Without `every_token` there
    are idle tokens, too: every third by its ids, others by their weights.
    """
    experts, rows, parameter = len(ranks), sum(ranks), dtype if low else torch.float32
    ids_QTK = torch.rand(routers, tokens, experts).argsort(-1)[..., :top_k]
    given_QTK = torch.randn(routers, tokens, top_k)
    if top_k > 1:
        ids_QTK[:, 1::4, 0] = -1
        ids_QTK[:, 2::4] = 2
    if not every_token:
        ids_QTK[:, ::3] = -1
        given_QTK[:, 1::5] = 0
    return Mixture(
        ops.Lists(
            random(tokens, D, dtype=dtype),
            [] if linear else [random(tokens, out, dtype=dtype) for out in outs],
            [random(rows, D, dtype=parameter) / D**0.5 for _ in outs],
            [random(rows, out, dtype=parameter) / max(rows, 1) ** 0.5 for out in outs],
            [] if given else [random(experts, D) / D**0.5 for _ in range(routers)],
            [ids_QTK.to(DEVICE).contiguous(), given_QTK.to(DEVICE)] if given else [],
            [random(out, D, dtype=dtype) / D**0.5 for out in outs] if linear else [],
            [random(out, dtype=dtype) for out in outs] if linear and bias else [],
            owners_of(ranks, len(outs)),
            [],
        ),
        ops.Settings(max(ranks), experts, top_k, temperature, combine, every_token, 0.0),
        [random(tokens, out, dtype=dtype) for out in outs],
        random(routers, tokens, top_k),
        random(routers, tokens, experts),
    )


def whole_numbers(dtype: torch.dtype) -> Mixture:
    """A mixture whose tokens are told apart, each one column of x, and all of whose sums are exact in any dtype."""
    mixture = random_mixture(tokens=40, outs=(37, 20), given=True, every_token=False, linear=False, dtype=dtype)
    ids_QTK, given_QTK = mixture.lists.routing

    def few(tensor: Tensor) -> Tensor:
        return torch.randint(-1, 2, tensor.shape).to(tensor)

    x_TD = torch.zeros_like(mixture.lists.x)
    x_TD[torch.arange(40), torch.randperm(D)[:40]] = (1 + torch.arange(40) % 2).to(x_TD)
    grads = [few(grad) * (torch.rand(grad.shape) < 0.1).to(grad) for grad in mixture.grads]
    weights_QTK = given_QTK.sign() * torch.randint(1, 3, given_QTK.shape).to(given_QTK)
    owner_PR, _, *rest = mixture.lists.owners
    owners = [owner_PR, torch.tensor([1.0, 2.0, 0.5, 2.0], device=DEVICE).expand(2, 4), *rest]
    lists = convert(mixture.lists, few)._replace(x=x_TD, routing=[ids_QTK, weights_QTK], owners=owners)
    return mixture._replace(lists=lists, grads=grads)


def chosen_by(mixture: Mixture) -> Tensor:
    """What was given, or the best by scores in fp64, of which no two are as close as fp32 is coarse."""
    if not mixture.lists.gates:
        return mixture.lists.routing[0]
    x_TD, top_k = mixture.lists.x.double(), mixture.settings.top_k
    return torch.stack([(x_TD @ gate_ED.double().T).topk(top_k).indices for gate_ED in mixture.lists.gates])


def mask_of(seed: Tensor, tokens: int, dropout: float) -> Tensor:
    """What dropout spares, seen through the operator: ones, times the identity, twice."""
    ones_TD, identity_DD = torch.ones(tokens, D, device=DEVICE), torch.eye(D, device=DEVICE)
    one_1T1, owners = torch.ones(1, tokens, 1, device=DEVICE), owners_of((D,), 1)
    owners[1] = torch.ones(1, 1, device=DEVICE)
    routing = [one_1T1.long() * 0, one_1T1]
    lists = ops.Lists(ones_TD, [0 * ones_TD], [identity_DD], [identity_DD], [], routing, [], [], owners, [seed])
    out_TD = ops.mixture(lists, ops.Settings(D, 1, 1, 1.0, "given", True, dropout), keeps=False).outputs[0]
    torch.testing.assert_close(out_TD, (out_TD != 0) / (1 - dropout))
    return out_TD != 0


def owners_of(ranks: tuple[int, ...], projections: int) -> list[Tensor]:
    """Whose the rows are, the same for every projection, with scales that differ."""
    ranks_E = torch.tensor(ranks, dtype=torch.int32)
    owner_R = torch.arange(len(ranks), dtype=torch.int32).repeat_interleave(ranks_E)
    starts_E = (ranks_E.cumsum(0) - ranks_E).int()
    parts = (owner_R, 0.5 + torch.arange(len(ranks)) / 2, starts_E, ranks_E)
    return [part.to(DEVICE).expand(projections, -1) for part in parts]


def convert(lists: ops.Lists, change: Callable[[Tensor], Tensor]) -> ops.Lists:
    """Other tensors instead of those that have a gradient."""
    routing = [lists.routing[0], change(lists.routing[1])] if lists.routing else []
    parts = {name: [change(each) for each in getattr(lists, name)] for name in ("bases", "A", "B", "gates")}
    return lists._replace(x=change(lists.x), routing=routing, **parts)


def leaves_of(lists: ops.Lists) -> dict[str, Tensor]:
    """The tensors that have a gradient, by name."""
    found = {"x": lists.x}
    for name in ("bases", "A", "B", "gates"):
        found |= {f"{name}[{place}]": each for place, each in enumerate(getattr(lists, name))}
    return found | ({"weights": lists.routing[1]} if lists.routing else {})


def as_leaf(tensor: Tensor) -> Tensor:
    """The same memory, strides included, as a leaf of its own."""
    return tensor.detach().requires_grad_()


def as_double_leaf(tensor: Tensor) -> Tensor:
    """The same numbers in fp64."""
    return tensor.detach().double().requires_grad_()


Mix = Callable[[ops.Lists, Mixture], ops.Answer]


def by_operator(lists: ops.Lists, mixture: Mixture) -> ops.Answer:
    """The operator itself."""
    return ops.mixture(lists, mixture.settings, keeps=True)


def results(mixture: Mixture, mix: Mix = by_operator) -> dict[str, Tensor]:
    """Everything that a way to compute the mixture returns, and every gradient, by name."""
    lists = convert(mixture.lists, as_leaf)
    answer = mix(lists, mixture)
    return made_by(answer) | gradients(lists, answer, mixture)


def made_by(answer: ops.Answer) -> dict[str, Tensor]:
    """The outputs, and the routers' answers if there are any, by name."""
    found = {f"output[{place}]": output.detach() for place, output in enumerate(answer.outputs)}
    if answer.weights_QTK is not None and answer.logits_QTE is not None:
        found |= {"weights": answer.weights_QTK.detach(), "logits": answer.logits_QTE.detach()}
    return found


def gradients(lists: ops.Lists, answer: ops.Answer, mixture: Mixture, *, again: bool = False) -> dict[str, Tensor]:
    """Gradients of the leaves, zeros where there is none; `again`: the graph is needed once more."""
    pairs = list(zip(answer.outputs, mixture.grads, strict=True))
    pairs += [(answer.weights_QTK, mixture.grad_weights), (answer.logits_QTE, mixture.grad_logits)]
    pairs = [(made, grad.to(made.dtype)) for made, grad in pairs if made is not None and made.requires_grad]
    torch.autograd.backward([made for made, _ in pairs], [grad for _, grad in pairs], retain_graph=again)
    return {
        f"grad {name}": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for name, leaf in leaves_of(lists).items()
    }


def exact(mixture: Mixture, kept_TD: Tensor | None = None) -> dict[str, Tensor]:
    """The results in fp64."""
    double = mixture._replace(lists=convert(mixture.lists, lambda tensor: tensor.double()))
    return results(double, partial(plain, kept_TD=kept_TD))


def eager(mixture: Mixture, kept_TD: Tensor | None = None) -> dict[str, Tensor]:
    """The results in the mixture's own dtypes, in plain torch."""
    return results(mixture, partial(plain, kept_TD=kept_TD))


def gradients_of(mixture: Mixture, loss: Callable[[ops.Answer], Tensor]) -> list[dict[str, Tensor]]:
    """Those gradients of a loss that are not zero: by the operator, in plain torch, and in fp64."""
    ways = []
    for mix, change in ((by_operator, as_leaf), (plain, as_leaf), (plain, as_double_leaf)):
        lists = convert(mixture.lists, change)
        loss(mix(lists, mixture)).backward()
        found = {f"grad {name}": leaf.grad for name, leaf in leaves_of(lists).items() if leaf.grad is not None}
        ways.append({name: grad for name, grad in found.items() if grad.any()})
    return ways


def plain(lists: ops.Lists, mixture: Mixture, kept_TD: Tensor | None = None) -> ops.Answer:
    """The definition: dense products over all rows; a router scores in fp32 (in fp64, if x is), and so is the gate.

    `kept_TD` is True for the elements of x that dropout spares.
    """
    x_TD, settings, dtype = lists.x, mixture.settings, lists.x.dtype
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    experts_QTK, weights_QTK, logits_QTE = chosen_by(mixture), None, None
    if lists.gates:
        answers = [_route(x_TD.to(wide), gate.to(wide), ids, settings) for gate, ids in zip(lists.gates, experts_QTK)]
        weights_QTK, logits_QTE = (torch.stack(part) for part in zip(*answers, strict=True))
    acting_QTK = lists.routing[1] if weights_QTK is None else weights_QTK
    dropped_TD = x_TD if kept_TD is None else x_TD * kept_TD / (1 - settings.dropout)

    outputs = []
    for place, (A_RD, B_RO) in enumerate(zip(lists.A, lists.B)):
        router = place if len(experts_QTK) > 1 else 0
        ids_TK, weights_TK = experts_QTK[router], acting_QTK[router]
        spread_TKE = F.one_hot(ids_TK + 1, settings.num_experts + 1)[..., 1:]
        owner_R, scale_E = lists.owners[0][place].long(), lists.owners[1][place]
        gate_TE = (spread_TKE * weights_TK[..., None]).sum(1) * scale_E

        hidden_TR = F.linear(dropped_TD, A_RD.to(dtype))
        gated_TR = (hidden_TR * gate_TE[:, owner_R]).to(dtype)
        base_TO = lists.bases[place] if lists.bases else _linear(lists, place)
        mixed_TO = base_TO + gated_TR @ B_RO.to(dtype)
        acts_T1 = ((ids_TK >= 0) & (weights_TK != 0)).any(-1, keepdim=True)
        outputs.append(mixed_TO if settings.every_token else torch.where(acts_T1, mixed_TO, base_TO))
    return ops.Answer(outputs, x_TD.new_empty(0), experts_QTK, weights_QTK, logits_QTE)


def _linear(lists: ops.Lists, place: int) -> Tensor:
    bias_O = lists.biases[place].to(lists.x.dtype) if lists.biases else None
    return F.linear(lists.x, lists.weights[place].to(lists.x.dtype), bias_O)


def _route(x_TD: Tensor, gate_ED: Tensor, ids_TK: Tensor, settings: ops.Settings) -> tuple[Tensor, Tensor]:
    """Weights of these experts and scores of all; `moelora.routers.learned.Learned` says what each combine is."""
    logits_TE = F.linear(x_TD, gate_ED) / settings.temperature
    chosen_TK = logits_TE.gather(1, ids_TK)
    if settings.combine == "renormalized":
        return chosen_TK.softmax(-1), logits_TE
    if settings.combine == "constant":
        return torch.full_like(chosen_TK, 1 / settings.top_k), logits_TE
    probability_TK = (chosen_TK - logits_TE.logsumexp(-1, keepdim=True)).exp()
    straight = settings.combine == "unit"
    return (1 + (probability_TK - probability_TK.detach()) if straight else probability_TK), logits_TE


def assert_no_worse(ours: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Against `exact`, the error is at most twice `eager`'s, and a unit of the dtype.

    A GPU's fp32 is three products of tf32, without that of their low parts: four times.
    """
    assert ours.keys() == eager.keys() == exact.keys()
    for name, value in ours.items():
        assert value.dtype == eager[name].dtype, name
        assert value.shape == exact[name].shape, name
        unit = torch.finfo(value.dtype).eps * exact[name].abs().max() if value.numel() else 0
        slack = 4 if DEVICE == "cuda" and eager["output[0]" if "output[0]" in eager else name].itemsize == 4 else 2
        error, allowed = (value - exact[name]).norm(), slack * (eager[name] - exact[name]).norm() + unit
        assert error <= allowed, (name, error.item(), allowed.item())


def assert_same_bits(some: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """Equal to the bit, name by name."""
    assert some.keys() == others.keys()
    for name, value in some.items():
        assert torch.equal(bits(value), bits(others[name])), name


def bits(tensor: Tensor) -> Tensor:
    """As integers, so that -0.0 is not 0.0 and NaN is itself."""
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def tile_of_few_programs(*asked: Any) -> Tile:
    """The tile; in the interpreter, which takes some milliseconds for each of a grid's programs, one of fewer."""
    tile = tile_for(*asked)
    return tile if DEVICE == "cuda" else tile._replace(split=1, rows=64)


def on_a_shallow_stack(test: Callable[..., None]) -> Callable[..., None]:
    """The test in a thread of its own, where the interpreter of kernels takes half the time.

    CPython 3.11 asks the system for memory whenever a call crosses the end of a 16 KiB chunk of its stack. Deep within
    pytest there is such an end on the way of every operation that is interpreted.
    """

    def in_a_thread(**fixtures: object) -> None:
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            pool.submit(test, **fixtures).result()

    return in_a_thread


def in_a_fresh_process(script: str) -> None:
    """Runs what torch traces without checks of annotations, which allow no symbolic sizes, as in test_compile.py."""
    here = Path(__file__).parent
    environment = os.environ | {"JAXTYPING_DISABLE": "1", "PYTHONPATH": f"{here.parent}:{here}", "OMP_NUM_THREADS": "1"}
    head = "import torch\nfrom mixture_problems import *\nfrom moelora.kernels.gpu import picks, tiles\n"
    command = [sys.executable, "-c", head + textwrap.dedent(script)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr[-4000:]
