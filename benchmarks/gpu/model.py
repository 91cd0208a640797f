"""What a patched model costs: a Llama of 1.1 B parameters with moelora on q, k, v and o, beside PEFT.

    python -m benchmarks.gpu.model                          # prefill, training step, decoded token
    python -m benchmarks.gpu.model --cases compiled         # decoded token under torch.compile: minutes of compiling
    python -m benchmarks.gpu.model --model ID_OR_FOLDER     # pretrained weights instead of random ones

bf16, 8 experts of rank 16, 2 active, 4 x 1024 tokens.

- "train": forward and backward of the language-model loss, without an optimiser; moelora trains fp32 experts and
  routers, its balance loss included. The embeddings' output asks for a gradient in every variant, so that the frozen
  base has a backward pass too.
- "prefill": without gradients or cache, logits of the last position, as generation begins; experts are frozen (bf16).
- "decode": one token behind 128 in a static cache of 512, batch 1, frozen experts. "graph" is a CUDA graph of the
  model's own kernels, captured by hand, in the same way for all; "compiled" is
  `torch.compile(mode="reduce-overhead", fullgraph=True)`.

"eager" includes what the host needs to launch; "graph" is the device's time alone.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import StaticCache

import moelora
from benchmarks.gpu.command import Session, parser_of
from benchmarks.gpu.llama import UNMASKED, builders, pretrained, random_llama, tinyllama
from benchmarks.gpu.providers import ARROW, BASE, BASE_AGAIN, MOELORA, PEFT, SHARED
from benchmarks.gpu.results import TIME
from benchmarks.gpu.timing import Failure, attempt, attempt_graph

CASES = ("train", "prefill", "decode", "compiled")
PROMPT, CACHE = 128, 512

TRAINED = (BASE, PEFT, SHARED, MOELORA, BASE_AGAIN)
"""Arrow routes to adapters as they are: it trains nothing, and waits for the host in its forward."""


class Decoder(NamedTuple):
    """One decoded token: the step, and how the cache is set back to the prompt."""

    step: Callable[[], object]
    rewind: Callable[[], object]


def prefill_of(model: Any, ids_BL: Tensor) -> Callable[[], object]:
    """The prompt, without gradients, as far as the first new token's logits."""
    model.eval()

    def run() -> None:
        with torch.no_grad():
            model(input_ids=ids_BL, use_cache=False, logits_to_keep=1)

    return run


def step_of(model: Any, ids_BL: Tensor) -> Callable[[], object]:
    """Forward and backward of the language-model loss."""
    model.train()

    def run() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids_BL, labels=ids_BL, use_cache=False).loss.backward()

    return run


def decoder_of(model: Any, ids_BL: Tensor, *, compiled: bool) -> Decoder:
    """One token behind a prompt in a static cache; every step writes one more position, until the cache is rewound."""
    cache: Any = StaticCache(config=model.config, max_cache_len=CACHE)
    with torch.no_grad():
        model.eval()(input_ids=ids_BL[:1, :PROMPT], past_key_values=cache, use_cache=True, logits_to_keep=1)
    token_BL = ids_BL[:1, :1].clone()
    called = torch.compile(model, mode="reduce-overhead", fullgraph=True) if compiled else model

    def step() -> None:
        with torch.no_grad():
            called(input_ids=token_BL, past_key_values=cache, use_cache=True)

    def rewind() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(PROMPT)

    return Decoder(step, rewind)


def measure_training(session: Session, models: dict[str, Any], ids_BL: Tensor) -> None:
    """The training step, eagerly and in graphs."""
    handles = [
        models[provider].get_input_embeddings().register_forward_hook(require_gradient)
        for provider in models
        if provider in TRAINED and provider != BASE_AGAIN
    ]
    runs = {provider: step_of(model, ids_BL) for provider, model in models.items() if provider in TRAINED}
    session.measure("train", "eager", runs)
    session.measure("train", "graph", {provider: attempt_graph(run, session.device) for provider, run in runs.items()})
    for handle in handles:
        handle.remove()
    for model in models.values():
        model.zero_grad(set_to_none=True)


def require_gradient(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
    """A hook: let the backward pass go through the whole model."""
    output.requires_grad_()


def measure_prefill(session: Session, models: dict[str, Any], ids_BL: Tensor) -> None:
    """The prompt, eagerly and in graphs."""
    runs = {provider: prefill_of(model, ids_BL) for provider, model in models.items()}
    session.measure("prefill", "eager", runs)
    graphs = {provider: attempt_graph(run, session.device) for provider, run in runs.items() if provider != ARROW}
    session.measure("prefill", "graph", graphs)


def measure_decoding(session: Session, case: str, models: dict[str, Any], ids_BL: Tensor) -> None:
    """One token: eagerly and in graphs, or compiled."""
    decoders, failures = {}, {}
    for provider, model in models.items():
        # the base again would be compiled again
        if provider != ARROW and (case, provider) != ("compiled", BASE_AGAIN):
            model.set_attn_implementation("sdpa")
            decoder = attempt(partial(decoder_of, model, ids_BL, compiled=case == "compiled"))
            if isinstance(decoder, Failure):
                failures[provider] = decoder
            else:
                decoders[provider] = decoder
    before = {provider: decoder.rewind for provider, decoder in decoders.items()}
    steps = {provider: decoder.step for provider, decoder in decoders.items()}
    if case == "compiled":
        session.measure("decode", "compiled", steps | failures, before)
    else:
        session.measure("decode", "eager", steps | failures, before)
        graphs = {provider: attempt_graph(step, session.device) for provider, step in steps.items()}
        session.measure("decode", "graph", graphs, before)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the cases, print a table and save it."""
    parser = parser_of("model", __doc__, CASES, rounds=15)
    parser.set_defaults(cases=[case for case in CASES if case != "compiled"])
    parser.add_argument("--model", help="id or folder of pretrained weights")
    parser.add_argument("--layers", type=int, default=22, help="of the random Llama")
    options = parser.parse_args(arguments)
    session = Session("model", options)
    device = session.device

    if options.model:
        base = pretrained(options.model, device)
    else:
        base = random_llama(tinyllama(options.layers, tiny=options.tiny), device)
    generator = torch.Generator(device).manual_seed(1)
    shape = (2, PROMPT) if options.tiny else (4, 1024)
    ids_BL = torch.randint(base.config.vocab_size, shape, generator=generator, device=device)

    models = {}
    with session.case("building"):
        base.set_attn_implementation(UNMASKED)
        for provider, build in builders(base, options.backend).items():
            if session.wants(provider):
                model = attempt(build)
                if isinstance(model, Failure):
                    session.results.add("prefill", "eager", provider, TIME, model)
                else:
                    models[provider] = model

    if "train" in options.cases:
        with session.case("train"):
            measure_training(session, models, ids_BL)
    for provider in (provider for provider in (SHARED, MOELORA) if provider in models):
        moelora.set_trainable(models[provider])
    if "prefill" in options.cases:
        with session.case("prefill"):
            measure_prefill(session, models, ids_BL)
    for case in (case for case in ("decode", "compiled") if case in options.cases):
        with session.case(case):
            measure_decoding(session, case, models, ids_BL)
    session.close()


if __name__ == "__main__":
    main()
