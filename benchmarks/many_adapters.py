"""How long many adapters take to load, and what they cost per decoded token: moelora beside PEFT, in one run.

    python benchmarks/many_adapters.py                  # 32 adapters, 32 layers, CPU
    python benchmarks/many_adapters.py --experts 4 8    # other sizes of the mixture for the decode curve

The model is a random Llama of 32 narrow layers, so that the bookkeeping shows and not the arithmetic. Every number is a
median; variants are timed in turns (all once, then all again), so that a slow moment hits all of them.
"""

import argparse
import csv
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import moelora

RESULTS = Path(__file__).parent / "results"


def toy(layers: int, width: int) -> nn.Module:
    """A Llama with random weights: many layers, little arithmetic."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=1024,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).eval()


def write_adapters(folder: Path, model: nn.Module, count: int, rank: int) -> list[Path]:
    """Adapters on q, k, v and o, as PEFT saves them, with random factors."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    peft = get_peft_model(model, config)
    peft.save_pretrained(str(folder / "000"))
    peft.unload()
    template = load_file(folder / "000" / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(1)
    folders = []
    for number in range(count):
        place = folder / f"{number:03d}"
        place.mkdir(exist_ok=True)
        tensors = {key: 0.02 * torch.randn(value.shape, generator=generator) for key, value in template.items()}
        save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
        (place / "adapter_config.json").write_text((folder / "000" / "adapter_config.json").read_text())
        folders.append(place)
    return folders


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def time_loading(folders: list[Path], layers: int, width: int, repeats: int) -> tuple[dict[str, float], nn.Module]:
    """Seconds to load all adapters: reading the files alone, into a moelora mixture, into a PeftModel (once).

    The first round of the first two warms the file cache and the imports, and does not count.
    """
    read, mixed = [], []
    for _ in range(repeats + 1):
        read.append(seconds(lambda: [load_file(folder / "adapter_model.safetensors") for folder in folders]))
        model = toy(layers, width)
        sources = {f"a{folder.name}": folder for folder in folders}
        mixed.append(seconds(partial(moelora.patch_model, model, sources, progress=False)))

    names = [f"a{folder.name}" for folder in folders]
    start = time.perf_counter()
    peft = PeftModel.from_pretrained(toy(layers, width), str(folders[0]), adapter_name=names[0])
    for name, folder in zip(names[1:], folders[1:]):
        peft.load_adapter(str(folder), name)
    times = {
        "read the files (safetensors)": statistics.median(read[1:]),
        "moelora.patch_model": statistics.median(mixed[1:]),
        "PEFT load_adapter": time.perf_counter() - start,
    }
    return times, peft


def decoder(model: nn.Module, prompt: int = 16) -> Callable[[], object]:
    """One decoded token behind a prompt of this length; the token is taken out of the cache again."""
    ids = torch.arange(prompt)[None] % 1000
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    token = torch.tensor([[7]])

    def step() -> None:
        with torch.no_grad():
            model(input_ids=token, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def in_turns(variants: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each variant, all of them timed once in every round."""
    for run in variants.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            times[name].append(1000 * seconds(run))
    return times


def decode_variants(
    folders: list[Path], layers: int, width: int, experts: list[int], peft: Any
) -> dict[str, Callable[[], object]]:
    """The base, mixtures of several sizes with two experts active, and PEFT with one and with all active."""
    variants = {"base": decoder(toy(layers, width))}
    for count in experts:
        sources = {f"a{folder.name}": folder for folder in folders[:count]}
        for shared in (False, True):
            config = moelora.MoELoRAConfig(share_router=shared)
            model = moelora.patch_model(toy(layers, width), sources, config=config, progress=False)
            name = f"moelora, {count} experts, 2 active" + (", one router for q, k, v" if shared else "")
            variants[name] = decoder(model)

    single = PeftModel.from_pretrained(toy(layers, width), str(folders[0])).eval()
    variants["PEFT, 1 adapter"] = decoder(single)
    names = [f"a{folder.name}" for folder in folders]
    peft.base_model.set_adapter(names)
    variants[f"PEFT, {len(names)} active"] = decoder(peft.eval())
    return variants


def main() -> None:
    """Run both parts, print two tables and save them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--experts", type=int, nargs="+", default=None, help="sizes of the mixture for decoding")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    experts = options.experts or sorted({4, 8, 16, options.adapters})
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

    with tempfile.TemporaryDirectory() as name:
        folders = write_adapters(Path(name), toy(options.layers, options.width), options.adapters, options.rank)
        loading, peft = time_loading(folders, options.layers, options.width, repeats=7)
        times = in_turns(decode_variants(folders, options.layers, options.width, experts, peft), options.repeats)

    read = loading["read the files (safetensors)"]
    size = f"{options.layers} layers of width {options.width}"
    rows = [("load", name, f"{value:.2f} s", round(value / read, 2)) for name, value in loading.items()]
    base = statistics.median(times["base"])
    for name, values in times.items():
        middle = statistics.median(values)
        rows.append(("decode one token", name, f"{middle:.1f} ms", round(middle / base, 2)))
    print(f"\n{options.adapters} adapters of rank {options.rank} on q, k, v, o of {size}")
    print(f"torch {torch.__version__}, {options.threads} thread(s), {platform.processor() or platform.machine()}\n")
    print(f"{'what':<18}{'variant':<52}{'median':>10}{'ratio':>9}")
    for what, name, median, ratio in rows:
        print(f"{what:<18}{name:<52}{median:>10}{ratio:>8.2f}x")

    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "many_adapters.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("what", "variant", "median", "ratio"), *rows])
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    full = {"settings": settings, "torch": torch.__version__, "loading_s": loading, "decode_ms": times}
    (options.output / "many_adapters.json").write_text(json.dumps(full, indent=1) + "\n")


if __name__ == "__main__":
    main()
