"""Read adapter_config.json: what scale and rank it means for each module, and what it asks for that we refuse.

Nothing in a config is imported, executed or matched as a regular expression by a backtracking engine; the keys of the
weight file decide what is loaded, the config only says how strongly it acts. Begin with read_config.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moelora.integrations.adapter_types import AdapterError, Limits, shown
from moelora.integrations.path_patterns import PathPatterns

# PEFT's own defaults, used when a config of an old or hand-written schema leaves the field out
_DEFAULT_R = 8
_DEFAULT_ALPHA = 8

# Starts that leave the base weights alone, so the saved factors are a plain LoRA. MiCA freezes B and trains A only.
_HARMLESS_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

# fields whose truthy value changes the formula or the base -> what the adapter is and what to do
_REFUSED = {
    "use_dora": "DoRA rescales the whole weight and is not additive; retrain with use_dora=False",
    "target_parameters": "LoRA on bare parameters (stacked MoE experts) cannot be routed; retrain on linear modules",
    "layer_replication": "the adapter was trained on a base with repeated layers; retrain on the plain base",
    "use_qalora": "QA-LoRA pools its input in groups; retrain with use_qalora=False",
    "use_bdlora": "block-diagonal LoRA changes the layout of the factors; retrain without use_bdlora",
    "kasa_config": "KaSA changes the base weights and adds a diagonal; retrain without kasa_config",
    "velora_config": "VeLoRA adapters are not supported; retrain without velora_config",
    "monteclora_config": "MonteCLoRA samples its factors; retrain without monteclora_config",
    "alora_invocation_tokens": "an activated LoRA acts only after its invocation tokens; retrain as a plain LoRA",
    "arrow_config": "this is an Arrow router, not an adapter; pass the adapters themselves",
    "megatron_config": "Megatron-sharded layers are not supported; gather and export a plain LoRA",
    "enable_lora": "merged linear layers of the first PEFT releases are not supported; export with a newer PEFT",
}

# fields that store whole weights beside the LoRA: refused when strict, left out and noted otherwise
_LEFT_OUT = {
    "modules_to_save": "full copies of modules, such as a new head",
    "trainable_token_indices": "trained token rows",
}

# read, or without meaning for the factors
_HARMLESS = (
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "merge_weights",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
)
_KNOWN = frozenset((*_HARMLESS, *_REFUSED, *_LEFT_OUT))


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What a config means.

    Attributes:
        r, lora_alpha: the defaults; the patterns override them per module, first match first.
        use_rslora: scale is alpha / sqrt(r) instead of alpha / r.
        lora_bias: lora_B has a bias.
        base_model: the named base, unchecked.
        targets: `target_modules` for reports: a list's entries, or a string as one entry.
        notes: oddities worth telling, one sentence each.
    """

    r: int
    lora_alpha: float
    use_rslora: bool = False
    lora_bias: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    base_model: str | None = None
    targets: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    _ranks: PathPatterns = field(repr=False, compare=False)
    _alphas: PathPatterns = field(repr=False, compare=False)

    def rank(self, path: str) -> int:
        """The rank that this config announces for a module path."""
        pattern = self._ranks.first_match(path)
        return self.r if pattern is None else self.rank_pattern[pattern]

    def scale(self, path: str, rank: int) -> float:
        """The factor PEFT multiplies B(A(x)) by: alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski, 2023)."""
        pattern = self._alphas.first_match(path)
        alpha = self.lora_alpha if pattern is None else self.alpha_pattern[pattern]
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_config(path: Path, limits: Limits) -> dict[str, Any]:
    """The JSON object in a file, bounded in size; interpret it with `interpret_config`."""
    size = path.stat().st_size
    if size > limits.config_bytes:
        raise AdapterError(f"{path.name} has {size} bytes; expected at most {limits.config_bytes}")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path.name} is not valid JSON: {shown(str(error))}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path.name} holds {type(config).__name__}; expected a JSON object")
    return config


def interpret_config(config: Mapping[str, Any], *, strict: bool = True, limits: Limits) -> AdapterConfig:
    """What a PEFT LoRA config means.

    Raises:
        AdapterError: naming every field that was refused, what it holds and what to do.
    """
    problems = config_problems(config, strict=strict, limits=limits)
    if problems:
        raise AdapterError("; ".join(problems))

    # everything below has been checked
    alpha = config.get("lora_alpha")
    ranks = dict(config.get("rank_pattern") or {})
    alphas = dict(config.get("alpha_pattern") or {})
    return AdapterConfig(
        r=_DEFAULT_R if config.get("r") is None else config["r"],
        lora_alpha=float(_DEFAULT_ALPHA if alpha is None else alpha),
        use_rslora=bool(config.get("use_rslora")),
        lora_bias=bool(config.get("lora_bias")),
        rank_pattern=ranks,
        alpha_pattern={pattern: float(value) for pattern, value in alphas.items()},
        base_model=_base_model(config),
        targets=_targets(config),
        notes=tuple(_notes(config, strict)),
        _ranks=PathPatterns(ranks),
        _alphas=PathPatterns(alphas),
    )


def config_problems(config: Mapping[str, Any], *, strict: bool = True, limits: Limits) -> list[str]:
    """Everything in a config that keeps its adapter from being loaded, one sentence each; [] when it can be."""
    if problem := _wrong_kind(config):
        return [problem]
    problems = [f"{name}={shown(config[name])}: {why}" for name, why in _REFUSED.items() if config.get(name)]
    problems += _init_problems(config.get("init_lora_weights"))
    problems += _number_problems(config, limits)
    problems += _pattern_problems(config, limits)

    # biases of the base, and whole weights beside the LoRA
    if config.get("bias") not in (None, "none"):
        problems.append(
            f"bias={shown(config['bias'])}: the file carries biases of the base model, which all experts share; "
            "retrain with bias='none'"
        )
    if strict:
        problems += [
            f"{name}={shown(config[name])}: the file stores {what}, which are not part of a mixture; "
            "pass strict=False to leave them out"
            for name, what in _LEFT_OUT.items()
            if config.get(name)
        ]

        # variants of a later PEFT: their formula is unknown
        problems += [
            f"{shown(name)}={shown(value)}: a field unknown to this version, which may change the formula; "
            "pass strict=False to ignore it"
            for name, value in config.items()
            if value and name not in _KNOWN and (str(name).startswith("use_") or str(name).endswith("_config"))
        ]
    return problems


def _wrong_kind(config: Mapping[str, Any]) -> str | None:
    kind = _plain_string(config.get("peft_type"))
    if kind == "LORA":
        return None
    if kind is not None:
        return f"peft_type={shown(kind)}: not a LoRA; expected peft_type='LORA', convert the adapter to LoRA"
    if "lora_parameters" in config:
        return (
            "no peft_type, but lora_parameters: this is the MLX format (its scale is the multiplier itself, its "
            "factors are transposed); convert it to a PEFT LoRA folder"
        )
    return f"no peft_type: not a PEFT adapter config (it has {shown(sorted(map(str, config))[:6])}); expected 'LORA'"


def _init_problems(init: object) -> list[str]:
    name = _plain_string(init)
    if init is None or isinstance(init, bool) or (name is not None and name.lower() in _HARMLESS_INITS):
        return []
    if name is not None and name.lower().startswith(_BASE_CHANGING_INITS):
        return [
            f"init_lora_weights={shown(name)}: this start changes the base weights, which all experts share; "
            "convert it to plain LoRA when saving (PEFT: path_initial_model_for_weight_conversion)"
        ]
    return [
        f"init_lora_weights={shown(init)}: unknown start; expected a boolean or one of {sorted(_HARMLESS_INITS)}, "
        "which leave the base weights alone"
    ]


def _number_problems(config: Mapping[str, Any], limits: Limits) -> list[str]:
    problems = []
    for name in ("use_rslora", "lora_bias"):
        if not isinstance(config.get(name), bool | None):
            problems.append(f"{name}={shown(config[name])}: expected true or false")
    r = config.get("r")
    if r is not None and (problem := _rank_problem(r, limits)):
        problems.append(f"r={shown(r)}: {problem}")
    alpha = config.get("lora_alpha")
    if alpha is not None and (problem := _alpha_problem(alpha, limits)):
        problems.append(f"lora_alpha={shown(alpha)}: {problem}")
    return problems


def _pattern_problems(config: Mapping[str, Any], limits: Limits) -> list[str]:
    problems = []
    for name, check in (("rank_pattern", _rank_problem), ("alpha_pattern", _alpha_problem)):
        patterns = config.get(name)
        if patterns is None:
            continue
        if not isinstance(patterns, Mapping) or not all(isinstance(key, str) for key in patterns):
            problems.append(f"{name}={shown(patterns)}: expected an object, module path -> number")
            continue
        try:
            PathPatterns(patterns)
        except AdapterError as error:
            problems.append(f"{name}: {error}")
        wrong = next(((key, found) for key, value in patterns.items() if (found := check(value, limits))), None)
        if wrong is not None:
            problems.append(f"{name}[{shown(wrong[0])}]={shown(patterns[wrong[0]])}: {wrong[1]}")
    return problems


def _rank_problem(rank: object, limits: Limits) -> str | None:
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= limits.rank:
        return f"expected a whole number from 1 to {limits.rank}"
    return None


def _alpha_problem(alpha: object, limits: Limits) -> str | None:
    # the scale itself is bounded once the rank is known
    bound = limits.scale * limits.rank
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not -bound <= alpha <= bound:
        return f"expected a number of at most {bound:g}; the trained scale is lora_alpha / r"
    return None


def _notes(config: Mapping[str, Any], strict: bool) -> list[str]:
    notes = []
    if not strict:
        notes += [f"left out: {name} ({what})" for name, what in _LEFT_OUT.items() if config.get(name)]
    for name, default in (("r", _DEFAULT_R), ("lora_alpha", _DEFAULT_ALPHA)):
        if config.get(name) is None:
            notes.append(f"the config has no {name}; PEFT's default {default} applies")
    if config.get("lora_alpha") == 0:
        notes.append("lora_alpha is 0: the adapter changes nothing")
    unknown = sorted(str(name) for name, value in config.items() if name not in _KNOWN and value)
    if unknown:
        notes.append(f"config fields without meaning for a LoRA were ignored: {shown(unknown[:8])}")
    return notes


def _base_model(config: Mapping[str, Any]) -> str | None:
    base = config.get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def _targets(config: Mapping[str, Any]) -> tuple[str, ...]:
    targets = config.get("target_modules")
    if isinstance(targets, str):
        return (targets,)
    if isinstance(targets, list | tuple | set | frozenset):
        return tuple(sorted({str(target) for target in targets}))
    return ()


def _plain_string(value: object) -> str | None:
    """A string, also out of the string enums that a live LoraConfig holds."""
    if isinstance(value, str):
        return str(getattr(value, "value", value))
    return None
