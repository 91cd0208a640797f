"""Write experts as a plain PEFT LoRA folder, which any tool can read. Begin with write_adapter.

A PEFT scale is lora_alpha / r (or, for rsLoRA, lora_alpha / sqrt(r)), so a site whose rank or scale differs from the
rest goes into rank_pattern and alpha_pattern; a scale itself is never rounded into the factors.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moelora.bank import Expert
from moelora.integrations.adapter_file import CONFIG_NAME, WEIGHTS_NAME


def write_adapter(
    folder: Path, experts: Mapping[str, Expert], *, base_model: str | None = None, fan_in_fan_out: bool = False
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        folder: made if it does not exist.
        experts: the expert of each site, by module path; those without rows are left out.
        base_model: hub id of the base, if it has one.
        fan_in_fan_out: True if the sites are `Conv1D` layers, whose weight is stored (in, out).

    Raises:
        ValueError: if no expert has rows.
    """
    present = {path: expert for path, expert in experts.items() if expert.rank}
    if not present:
        raise ValueError("this expert has no factors at any site; there is nothing to write")
    folder.mkdir(parents=True, exist_ok=True)
    config = adapter_config(present, base_model=base_model, fan_in_fan_out=fan_in_fan_out)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(adapter_tensors(present), folder / WEIGHTS_NAME, metadata={"format": "pt"})


def adapter_tensors(experts: Mapping[str, Expert]) -> dict[str, Tensor]:
    """The factors under PEFT's keys and in PEFT's layout: lora_B is (out, r)."""
    with_bias = any(expert.bias_O is not None for expert in experts.values())
    tensors = {}
    for path, expert in experts.items():
        prefix = f"base_model.model.{path}"
        tensors[f"{prefix}.lora_A.weight"] = expert.A_RD.detach().cpu().contiguous().clone()
        tensors[f"{prefix}.lora_B.weight"] = expert.B_RO.detach().cpu().T.contiguous().clone()
        if with_bias:
            bias_O = expert.bias_O if expert.bias_O is not None else expert.B_RO.new_zeros(expert.B_RO.shape[1])
            tensors[f"{prefix}.lora_B.bias"] = bias_O.detach().cpu().contiguous().clone()
    return tensors


def adapter_config(experts: Mapping[str, Expert], *, base_model: str | None, fan_in_fan_out: bool) -> dict[str, Any]:
    """A LoRA config that gives every site its rank and scale."""
    use_rslora = not _exact(experts, rslora=False) and _exact(experts, rslora=True)
    alphas = {path: alpha_of(expert.scale, expert.rank, rslora=use_rslora) for path, expert in experts.items()}
    (rank, alpha), _ = Counter((expert.rank, alphas[path]) for path, expert in experts.items()).most_common(1)[0]
    return {
        "peft_type": "LORA",
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: expert.rank for path, expert in experts.items() if expert.rank != rank},
        "alpha_pattern": {path: alphas[path] for path in experts if alphas[path] != alpha},
        "target_modules": sorted(experts),
        "lora_dropout": 0.0,
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "lora_bias": any(expert.bias_O is not None for expert in experts.values()),
        "use_rslora": use_rslora,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def alpha_of(scale: float, rank: int, *, rslora: bool = False) -> int | float:
    """The lora_alpha for which PEFT computes this scale again, an integer where that is exact.

    Not every scale is a quotient of floating-point numbers with this divisor; for others the nearest is taken.
    """
    divisor = math.sqrt(rank) if rslora else rank
    alpha = scale * divisor
    if round(alpha) / divisor == scale:
        return round(alpha)
    # a quotient's numerator is found again within a few steps, since product and quotient round once each
    below = above = alpha
    for _ in range(4):
        for candidate in (below, above):
            if candidate / divisor == scale:
                return candidate
        below, above = math.nextafter(below, -math.inf), math.nextafter(above, math.inf)
    return alpha


def _exact(experts: Mapping[str, Expert], *, rslora: bool) -> bool:
    """Whether all scales can be written exactly in this form."""
    return all(
        alpha_of(expert.scale, expert.rank, rslora=rslora) / (math.sqrt(expert.rank) if rslora else expert.rank)
        == expert.scale
        for expert in experts.values()
    )


def concatenate(experts: list[tuple[Expert, float]]) -> Expert:
    """A weighted sum of experts as one: their rank rows, one after the other. Exact; ranks add up.

    A single expert keeps its factors bit for bit, with its weight in the scale; of several, weights and scales are
    folded into B, in fp32.
    """
    kept = [(expert, weight) for expert, weight in experts if expert.rank and weight]
    if len(kept) == 1:
        expert, weight = kept[0]
        return expert._replace(scale=expert.scale * weight)
    if not kept:
        return experts[0][0]._replace(A_RD=experts[0][0].A_RD[:0], B_RO=experts[0][0].B_RO[:0], bias_O=None)
    A_RD = torch.cat([expert.A_RD.float() for expert, _ in kept])
    B_RO = torch.cat([expert.B_RO.float() * (expert.scale * weight) for expert, weight in kept])
    biases = [expert.bias_O.float() * (expert.scale * weight) for expert, weight in kept if expert.bias_O is not None]
    return Expert(A_RD, B_RO, 1.0, torch.stack(biases).sum(0) if biases else None)
