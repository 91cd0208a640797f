"""What gates cost: the prefill of prompts that they look at, and the tokens behind closed ones. Begin with main.

    python -m benchmarks.unlearning cost --model ID_OR_FOLDER
    python -m benchmarks.unlearning cost --model ID_OR_FOLDER --requests 1 4 --shapes 1x32 8x128 --device cuda

A stack forgets made-up requests, with its default detector on the model's own hidden states. Prompts are random token
ids, each topic's from some ids of its own, as long as the shapes say: what they are changes nothing but which gates
open, and that is looked up. Experts are trained for a step.

- "prefill": prompts of ROWSxTOKENS, with an empty cache, as far as the first new token's logits, as `generate`
  begins. "closed": no gate opens; the model runs once, and its hidden states are those that gates look at.
  "open": those of the first row's request do, and the model runs twice. That it runs so often is counted.
- "decode": one token for each row behind such a prompt, with its cache.

The base is the model itself, which shares its weights with the patched one. "disabled" is the patched model without
gates and experts (`moelora.disabled`): what its hooks take. Time is taken as `benchmarks/gpu/timing.py` says, in turns.
"""

import argparse
import copy
import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
import transformers
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

import moelora
from benchmarks.gpu.providers import BASE, BASE_AGAIN
from benchmarks.gpu.timing import Failure, Timing, Variant, interleaved
from benchmarks.origin import about_here, revision_here
from benchmarks.unlearning.results import FOLDER
from moelora.continual import Objective, Training, UnlearningStack
from moelora.continual.answers import answer_nll
from moelora.continual.examples import IGNORED, Example
from moelora.hooks import CACHES, argument_names

RESULTS = FOLDER / "cost.csv"
DISABLED, CLOSED, OPEN = "disabled", "closed", "open"
PREFILL, DECODE = "prefill", "decode"

TOPIC = 50
"""How many token ids a topic has, at most."""

ANSWER = 2
"""How many tokens of each example are no prompt."""

RATE = 0.2
"""Of misses and fires: what is promised says nothing of the cost, and takes few prompts."""

FIELDS = (
    "part",
    "shape",
    "requests",
    "prompts",
    "variant",
    "us",
    "p20",
    "p80",
    "ratio",
    "model",
    "dtype",
    "threads",
    "device",
    "torch",
    "revision",
    "date",
)


class Shape(NamedTuple):
    """Prompts that are read together."""

    rows: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.tokens}"

    @classmethod
    def read(cls, text: str) -> "Shape":
        """From "8x128"."""
        rows, _, tokens = text.partition("x")
        return cls(int(rows), int(tokens))


@final
class Topics:
    """Random prompts. Topic 0 is what no request is about, topic 1 the first request's, and so on."""

    first: int
    size: int
    generator: torch.Generator

    def __init__(self, vocabulary: int, count: int, seed: int = 0) -> None:
        # from the middle on: the first ids are special tokens, the last ones may never have been trained
        self.first = vocabulary // 2
        self.size = min(TOPIC, (vocabulary - self.first) // (count + 1))
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, topic: int, rows: int, tokens: int) -> Int[Tensor, "B L"]:
        """Prompts of one length."""
        first = self.first + topic * self.size
        return torch.randint(first, first + self.size, (rows, tokens), generator=self.generator)

    def examples(self, topic: int, count: int, lengths: Sequence[int]) -> list[dict[str, Tensor]]:
        """So many prompts, each with one of these lengths, with answers."""
        texts = [self.draw(topic, 1, lengths[number % len(lengths)] + ANSWER)[0] for number in range(count)]
        return [
            {"input_ids": ids_L, "labels": torch.cat([torch.full_like(ids_L[:-ANSWER], IGNORED), ids_L[-ANSWER:]])}
            for ids_L in texts
        ]


@final
class OneStep(Objective):
    """The answers of some of the examples become unlikely: what an expert has learned changes no time."""

    def __init__(self, count: int) -> None:
        self.count = count

    def examples(self, examples: list[Example], generator: torch.Generator) -> list[Example]:
        """So many of them."""
        return examples[: self.count]

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], generator: torch.Generator) -> Float[Tensor, ""]:
        """Less the mean over the rows."""
        return -answer_nll(model, batch).mean_B.mean()


@final
class Host:
    """A model as it is, and the same under a stack that grows; they share their weights."""

    base: Any
    stack: UnlearningStack

    def __init__(self, model: Any, topics: Topics, lengths: Sequence[int], prompts: int) -> None:
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.base = copy.deepcopy(model, shared)
        self.topics, self.lengths, self.prompts = topics, lengths, prompts
        self.stack = UnlearningStack(model)
        self.benign = topics.examples(0, prompts, lengths)

    def forget(self, requests: int) -> None:
        """Until there are so many."""
        for topic in range(len(self.stack.requests) + 1, requests + 1):
            self.stack.forget(
                self.topics.examples(topic, self.prompts, self.lengths),
                calibration=self.benign,
                max_miss=RATE,
                max_fire=RATE,
                on_conflict="protect_utility",
                objective=OneStep(8),
                training=Training(epochs=1, batch_size=8),
            )

    def prompts_of(self, shape: Shape, *, opened: bool) -> Int[Tensor, "B L"]:
        """Prompts that all gates are closed for, or the same with one in the first row that opens its request's.

        Raises:
            ValueError: if there are none among those that were drawn.
        """
        device = next(self.base.parameters()).device
        closed_BL = self._some(0, shape, shape.rows, lambda open_B: ~open_B)
        if opened:
            closed_BL[:1] = self._some(1, shape, 1, lambda open_B: open_B)
        return closed_BL.to(device)

    def _some(
        self, topic: int, shape: Shape, count: int, wanted: Callable[[Tensor], Bool[Tensor, " B"]]
    ) -> Int[Tensor, "B L"]:
        drawn_BL = self.topics.draw(topic, 4 * count + 16, shape.tokens)
        found_BL = drawn_BL[wanted((self.stack.weights({"input_ids": drawn_BL}) > 0).any(1).cpu())]
        if len(found_BL) < count:
            raise ValueError(
                f"the gates treat {len(found_BL)} of {len(drawn_BL)} prompts of topic {topic} as they should, and "
                f"{count} are wanted; give more --prompts, so that they know their requests better"
            )
        return found_BL[:count]


# --- what is timed ----------------------------------------------------------------------------------------------------


def prefill_of(model: Any, ids_BL: Int[Tensor, "B L"]) -> Callable[[], object]:
    """The prompts, with the arguments that `generate` begins with."""
    position_BL, named = torch.arange(ids_BL.shape[1], device=ids_BL.device).expand_as(ids_BL), cache_name(model)

    @torch.no_grad()
    def run() -> Any:
        cache = DynamicCache(config=model.config)
        model(input_ids=ids_BL, position_ids=position_BL, use_cache=True, logits_to_keep=1, **{named: cache})
        return cache

    return run


def cache_name(model: Any) -> str:
    """What a model calls the cache that it is given, before and since transformers 5.24."""
    return next(name for name in argument_names(type(model)) if name in CACHES)


class Decoder:
    """One token for each row behind a prompt. Every step makes the cache longer, until it is taken back."""

    def __init__(self, model: Any, ids_BL: Int[Tensor, "B L"]) -> None:
        self.model, self.token_BL, self.named = model, ids_BL[:, :1].clone(), cache_name(model)
        self.prompt: Any = prefill_of(model, ids_BL)()
        self.rewind()

    def rewind(self) -> None:
        """A cache that holds the prompt alone."""
        self.cache = copy.deepcopy(self.prompt)

    @torch.no_grad()
    def step(self) -> None:
        """The next token."""
        self.model(input_ids=self.token_BL, use_cache=True, **{self.named: self.cache})


def without(model: Any, run: Callable[[], object]) -> Callable[[], object]:
    """The same under `moelora.disabled`."""

    def disabled() -> None:
        with moelora.disabled(model):
            run()

    return disabled


def passes(model: Any, run: Callable[[], object]) -> int:
    """How often the model's blocks run in a call, once it is known where its hidden states come from."""
    run()
    counted: list[None] = []
    handle = model.base_model.register_forward_pre_hook(lambda module, args: counted.append(None))
    try:
        run()
    finally:
        handle.remove()
    return len(counted)


def variants_of(host: Host, shape: Shape) -> dict[str, list[Variant]]:
    """What is compared, by part.

    Raises:
        ValueError: if the gates are not decided from the prefill's own hidden states.
    """
    base, model = host.base, host.stack.model
    closed_BL, open_BL = host.prompts_of(shape, opened=False), host.prompts_of(shape, opened=True)
    closed, opened = prefill_of(model, closed_BL), prefill_of(model, open_BL)
    counted = passes(model, closed), passes(model, opened)
    if counted != (1, 2):
        raise ValueError(
            f"the model ran {counted[0]} and {counted[1]} times for prompts of {shape} behind closed and open gates, "
            "expected 1 and 2; are the prompts longer than a window of the features?"
        )
    plain, bare = prefill_of(base, closed_BL), without(model, closed)
    behind_base, behind_gates = Decoder(base, closed_BL), Decoder(model, closed_BL)
    return {
        PREFILL: [
            Variant(BASE, plain),
            Variant(DISABLED, bare),
            Variant(CLOSED, closed),
            Variant(OPEN, opened),
            Variant(BASE_AGAIN, plain),
        ],
        DECODE: [
            Variant(BASE, behind_base.step, behind_base.rewind),
            Variant(DISABLED, without(model, behind_gates.step), behind_gates.rewind),
            Variant(CLOSED, behind_gates.step, behind_gates.rewind),
            Variant(BASE_AGAIN, behind_base.step, behind_base.rewind),
        ],
    }


# --- results ----------------------------------------------------------------------------------------------------------


def cells(timing: Timing) -> tuple[str, ...]:
    """Microseconds and the ratio, as the file holds them."""
    return (
        *(f"{value:.1f}" for value in (timing.median, timing.p20, timing.p80)),
        "" if timing.ratio is None else f"{timing.ratio:.4f}",
    )


def append(path: Path, rows: Sequence[Sequence[object]]) -> None:
    """Put rows behind those that a file has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.is_file()
    with path.open("a", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([FIELDS, *rows] if new else rows)


def load(name: str, device: str, dtype: str) -> Any:
    """A causal model, to be called."""
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    return model.to(device).eval()


def main(argv: Sequence[str] | None = None) -> None:
    """Grow a stack, time it at each size and shape, and append what was found to the file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.unlearning cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder or id of a causal model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4])
    shapes = [Shape(1, 32), Shape(1, 128), Shape(8, 128)]
    parser.add_argument("--shapes", type=Shape.read, nargs="+", default=shapes, metavar="ROWSxTOKENS")
    parser.add_argument("--prompts", type=int, default=300, help="of each request; 70 % are fitted")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--revision", default="", help="of the code, where it cannot be asked from git")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    transformers.logging.disable_progress_bar()

    model = load(options.model, options.device, options.dtype)
    topics = Topics(model.config.get_text_config().vocab_size, max(options.requests))
    host = Host(model, topics, sorted({shape.tokens for shape in options.shapes}), options.prompts)
    about = (
        Path(options.model).name,
        str(model.dtype).removeprefix("torch."),
        options.threads,
        *about_here(options.device, options.revision or revision_here()).values(),
    )
    for requests in sorted(options.requests):
        host.forget(requests)
        for shape in options.shapes:
            for part, variants in variants_of(host, shape).items():
                rows: list[Sequence[object]] = []
                for name, timing in interleaved(variants, rounds=options.rounds, device=torch.device(options.device)):
                    if isinstance(timing, Failure):
                        raise SystemExit(f"cost: {part} of {shape}, {name}: {timing.error}")
                    rows.append((part, str(shape), requests, options.prompts, name, *cells(timing), *about))
                    print(f"{part} {shape}, {requests} requests, {name}: {' '.join(cells(timing))}", flush=True)
                append(options.output, rows)


if __name__ == "__main__":
    main()
