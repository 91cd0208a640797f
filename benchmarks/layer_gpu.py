"""What one patched projection costs on a GPU: moelora beside the frozen linear and PEFT's single LoRA, in one run.

    python benchmarks/layer_gpu.py                       # all cases; needs CUDA
    python benchmarks/layer_gpu.py --cases train-r16-e8  # one of them

A bf16 base, random data, the router included; moelora's experts are fp32 where they are trained and bf16 where they are
frozen. Variants are timed in turns; each number is the median over rounds of the mean over a round's calls, by CUDA
events. "decode" runs in CUDA graphs. Ratios are to the frozen `nn.Linear` alone.
"""

import argparse
import csv
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import moelora
from moelora import Learned, MoELoRAConfig

RESULTS = Path(__file__).parent / "results"


class Case(NamedTuple):
    """One line of the table."""

    tokens: int
    in_features: int
    out_features: int
    rank: int
    experts: int
    top_k: int
    mode: str  # "train": forward, and forward with backward; "router": the same with frozen experts; "decode"


CASES = {
    "train-r16-e8": Case(8192, 4096, 4096, 16, 8, 2, "train"),
    "train-r64-e28": Case(8192, 4096, 4096, 64, 28, 2, "train"),
    "train-r16-e64": Case(8192, 4096, 4096, 16, 64, 2, "train"),
    "router-r16-e8": Case(8192, 4096, 4096, 16, 8, 2, "router"),
    "narrow-r16-e8": Case(8192, 4096, 1024, 16, 8, 2, "train"),
    "decode-t1-e8": Case(1, 4096, 4096, 16, 8, 2, "decode"),
    "decode-t16-e8": Case(16, 4096, 4096, 16, 8, 2, "decode"),
    "decode-t64-e8": Case(64, 4096, 4096, 16, 8, 2, "decode"),
    "decode-t1-e256": Case(1, 4096, 4096, 16, 256, 2, "decode"),
    "decode-t64-e256": Case(64, 4096, 4096, 16, 256, 2, "decode"),
}


class Block(nn.Module):
    """A model of one projection."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.proj = nn.Linear(case.in_features, case.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The projection."""
        return self.proj(x)


def base_of(case: Case) -> Block:
    """The frozen projection, in bf16 on the GPU, with the same weights each time."""
    torch.manual_seed(0)
    return Block(case).to("cuda", torch.bfloat16).requires_grad_(False)


def moelora_of(case: Case) -> nn.Module:
    """The projection with a learned router over experts that do something."""
    config = MoELoRAConfig(router=Learned(top_k=case.top_k))
    probe = torch.zeros(1, case.in_features, dtype=torch.bfloat16, device="cuda")
    model: Any = base_of(case)
    moelora.patch_model(
        model, num_experts=case.experts, rank=case.rank, targets=["proj"], config=config, probe_inputs=probe
    )
    nn.init.normal_(model.proj.bank.B_trainable_RO, std=0.02)
    if case.mode != "train":
        moelora.set_trainable(model)
    # the hooks around a model are not what this measures
    return model.proj


def peft_of(case: Case, *, in_fp32: bool) -> nn.Module:
    """The projection with one LoRA, in fp32 as PEFT makes it by default, or in the base's bf16."""
    config = LoraConfig(r=case.rank, target_modules=["proj"])
    model: Any = get_peft_model(base_of(case), config, autocast_adapter_dtype=in_fp32)
    nn.init.normal_(model.base_model.model.proj.lora_B["default"].weight, std=0.02)
    return model.base_model.model.proj


def in_rounds(variants: dict[str, Callable[[], object]], rounds: int, calls: int) -> dict[str, float]:
    """Microseconds of each variant: medians over rounds in which every variant has its turn."""
    for run in variants.values():
        for _ in range(5):
            run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(calls):
                run()
            stop.record()
            torch.cuda.synchronize()
            times[name].append(1000 * start.elapsed_time(stop) / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def graph_of(run: Callable[[], object]) -> Callable[[], object]:
    """The run, captured in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure(case: Case, rounds: int) -> list[tuple[str, str, float, float]]:
    """Rows of (what, variant, microseconds, ratio to the base)."""
    layers = {
        "base": base_of(case).proj,
        "PEFT, one LoRA, fp32": peft_of(case, in_fp32=True),
        "PEFT, one LoRA, bf16": peft_of(case, in_fp32=False),
        "moelora": moelora_of(case),
    }
    x_TD = torch.randn(case.tokens, case.in_features, dtype=torch.bfloat16, device="cuda")
    grad_TO = torch.randn(case.tokens, case.out_features, dtype=torch.bfloat16, device="cuda")
    leaf_TD = x_TD.clone().requires_grad_()

    def forward(layer: nn.Module) -> None:
        with torch.no_grad():
            layer(x_TD)

    def both(layer: nn.Module) -> None:
        leaf_TD.grad = None
        layer.zero_grad(set_to_none=True)
        layer(leaf_TD).backward(grad_TO)

    runs: dict[str, dict[str, Callable[[], object]]] = {
        "forward": {name: lambda layer=layer: forward(layer) for name, layer in layers.items()},
    }
    if case.mode == "decode":
        runs = {"decode": {name: graph_of(run) for name, run in runs["forward"].items()}}
    else:
        runs["forward + backward"] = {name: lambda layer=layer: both(layer) for name, layer in layers.items()}
    rows = []
    for what, variants in runs.items():
        times = in_rounds(variants, rounds, calls=50 if case.mode == "decode" else 10)
        rows += [(what, name, round(value, 1), round(value / times["base"], 2)) for name, value in times.items()]
    return rows


def main() -> None:
    """Measure the cases, print a table and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("layer_gpu: this benchmark needs a CUDA device")

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print(f"{'case':<17}{'what':<20}{'variant':<22}{'us':>9}{'ratio':>7}")
    rows = [(name, *row) for name in options.cases for row in measure(CASES[name], options.rounds)]
    for name, what, variant, microseconds, ratio in rows:
        print(f"{name:<17}{what:<20}{variant:<22}{microseconds:>9.1f}{ratio:>7.2f}")
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "layer_gpu.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("case", "what", "variant", "microseconds", "ratio"), *rows])


if __name__ == "__main__":
    main()
