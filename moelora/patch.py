"""The front door: patch_model puts a mixture into a model, unpatch_model takes it out again."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from moelora.bank import ExpertBank, fresh_expert
from moelora.base_model import describe_base
from moelora.collector import collector_paused
from moelora.config import MoELoRAConfig, RouterConfig, resolve_router
from moelora.guards import guard
from moelora.hooks import RootHooks
from moelora.integrations.adapters import load_adapters
from moelora.integrations.state_space import force_unfused
from moelora.integrations.targets import Resolution, Site, resolve_sites
from moelora.layer import MoELoRALinear
from moelora.mixture import ATTRIBUTE, Mixture, find_mixture, is_patched
from moelora.plan import Plan, base_dtype, make_plan
from moelora.routers.base import AbstractRouter
from moelora.siblings import Siblings
from moelora.surgery import install, restore
from moelora.tape import Tape


@collector_paused()
def patch_model(
    model: nn.Module,
    experts: "Sequence[Any] | Mapping[str, Any] | None" = None,
    *,
    router: "str | RouterConfig" = "learned",
    top_k: int = 2,
    targets: Any = "auto",
    roles: "Sequence[str] | None" = None,
    num_experts: int | None = None,
    rank: int | None = None,
    config: MoELoRAConfig | None = None,
    freeze_experts: bool = True,
    strict: bool = True,
    dry_run: bool = False,
    revision: str | None = None,
    token: "str | bool | None" = None,
    endpoint: str | None = None,
    cache_dir: Any = None,
    local_files_only: bool = False,
    progress: bool | None = None,
    probe_inputs: Any = None,
) -> Any:
    """Replace projections of a model by mixtures of LoRA experts, in place.

    Everything is resolved and checked first; on any error the model is as it was. The base model's parameters are
    frozen, routers are trainable, and so are fresh experts.

    Args:
        model: a Hugging Face model or any `nn.Module`.
        experts: adapters to mix, a list or a mapping from names to sources. A source is a folder, a hub id,
            `id@revision`, `id:subfolder`, a state dict with its config, or a live `PeftModel` (all its adapters).
        router: "learned" (with `top_k`), "given" (ids come from `moelora.given_experts`), or a router's configuration.
        top_k: how many experts act on a token, for `router="learned"`.
        targets: "auto"; name endings such as ["q_proj", "v_proj"]; or a predicate of (path, module). With adapters,
            "auto" is every projection that some adapter has factors for; without, the attention and state-space ones.
        roles: narrows "auto" to roles such as "attn_in", "attn_out", "ssm_in", "ssm_out".
        num_experts: fresh experts to train, besides the adapters if there are any.
        rank: rank of the fresh experts.
        config: all options in one; then `router` and `top_k` stay at their defaults.
        freeze_experts: False makes the adapters' factors trainable.
        strict: an adapter that fits the targets only in part is an error; False leaves the rest out and says so.
        dry_run: change nothing and return what would be done; `print` it.
        revision, token, endpoint, cache_dir, local_files_only: for the hub, as in transformers and PEFT.
        progress: a bar over the adapters; None shows one in a terminal.
        probe_inputs: arguments for a trial forward (dict or tuple), for models whose inputs cannot be guessed.

    Returns:
        The same model object; with `dry_run` a plan.

    Raises:
        ValueError: if something is not found, does not fit, or would be lost; the message says what to do.
    """
    refuse_patched(model)
    config = _resolve_config(config, router, top_k)
    _check_fresh(experts, num_experts, rank)
    if config.shared_A and num_experts is None:
        raise ValueError(
            "shared_A is for fresh experts, and there are none; pass num_experts= and rank=, or leave it off"
        )
    adapters = []
    if experts is not None:
        adapters = load_adapters(
            experts,
            revision=revision,
            token=token,
            endpoint=endpoint,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            strict=strict,
            progress=progress,
        )
    plan = make_plan(
        model,
        adapters,
        config=config,
        targets=targets,
        roles=roles,
        num_experts=num_experts or 0,
        rank=rank or 0,
        freeze_experts=freeze_experts,
        strict=strict,
        probe_inputs=probe_inputs,
    )
    if dry_run:
        return plan
    carry_out(model, plan)
    try:
        for started, layers in find_mixture(model)[1].by_router():
            started.start_from([layer.bank for layer in layers], range(len(plan.experts)))
    except BaseException:
        unpatch_model(model)
        raise
    return model


def unpatch_model(model: nn.Module) -> nn.Module:
    """Take a mixture out: the original modules, hooks and trainable flags are back.

    Raises:
        ValueError: if the model is not patched.
    """
    root, mixture = find_mixture(model)
    restore(mixture.places)
    for undo in reversed(mixture.undo):
        undo()
    for name, parameter in root.named_parameters():
        if name in mixture.trainable_before:
            parameter.requires_grad_(mixture.trainable_before[name])
    delattr(root, ATTRIBUTE)
    return model


def resolve_targets(
    model: nn.Module, *, targets: Any = "auto", roles: "Sequence[str] | None" = None, probe_inputs: Any = None
) -> Resolution:
    """Which projections of a model would be patched, and why others are not. `print` it for a table.

    Args and errors are those of `patch_model`.
    """
    refuse_patched(model)
    return resolve_sites(model, targets=targets, roles=roles, probe_inputs=probe_inputs)


def carry_out(model: nn.Module, plan: Plan) -> nn.Module:
    """Build a plan's layers and put them in. Nothing that can fail comes after the first change."""
    tape = Tape()
    layers = build_layers(model, plan, tape)
    hooks = RootHooks(tape, layers, plan.config)
    mixture = Mixture(
        config=plan.config,
        tape=tape,
        names=[expert.name for expert in plan.experts],
        sources=[expert.source.to_dict() for expert in plan.experts],
        sites={site.path: describe(site, layers[site.path]) for site in plan.sites},
        layers=layers,
        hooks=hooks,
        trainable_before={name: parameter.requires_grad for name, parameter in model.named_parameters()},
        base_model=describe_base(model),
        changed={expert.name for expert in plan.experts if expert.trainable},
    )

    # the one step that can refuse, before anything is changed
    mixture.undo.append(force_unfused(model, list(layers)))
    model.requires_grad_(False)
    mixture.places = install(model, layers)
    setattr(model, ATTRIBUTE, mixture)
    mixture.undo += guard(model, mixture)
    return model


def build_layers(model: nn.Module, plan: Plan, tape: Tape) -> dict[str, MoELoRALinear]:
    """A layer for each site of a plan, around the projection that is there now."""
    generator = torch.Generator().manual_seed(plan.config.seed)
    group_of = {path: group for group in plan.resolution.groups if len(group) > 1 for path in group}
    shared: dict[tuple[str, ...], AbstractRouter] = {}
    layers = {}
    for site in plan.sites:
        base = model.get_submodule(site.path)
        device = next((tensor.device for tensor in (*base.parameters(), *base.buffers())), torch.device("cpu"))
        bank = build_bank(plan, site, dtype=base_dtype(base, model), device=device, generator=generator)

        group = group_of.get(site.path) if plan.config.share_router else None
        if group is None:
            router = plan.config.router.build(site.in_features, bank.present, generator).to(device)
        else:
            if group not in shared:
                available = [any(ranks) for ranks in zip(*map(plan.ranks, group), strict=True)]
                shared[group] = plan.config.router.build(site.in_features, available, generator).to(device)
            router = shared[group]

        layers[site.path] = MoELoRALinear(
            base,
            bank,
            router,
            tape,
            site=site.path,
            shared_router=group is not None,
            reads_encoder=site.reads_encoder,
            dropout=plan.config.dropout,
            backend=plan.config.backend,
        )
    for group in set(group_of.values()):
        siblings = Siblings([layers[path] for path in group if path in layers])
        for layer in siblings.layers:
            layer.siblings = siblings
    return layers


def build_bank(
    plan: Plan, site: Site, *, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> ExpertBank:
    """The bank of one site."""
    experts = []
    for expert in plan.experts:
        made = expert.at(site)
        if made is None:
            scale = fresh_scale(plan.config, expert.rank)
            made = fresh_expert(site.in_features, site.out_features, expert.rank, scale=scale, generator=generator)
            if expert.shared_A:
                first = next((other for other in range(len(experts)) if plan.experts[other].shared_A), None)
                made = made if first is None else made._replace(A_RD=experts[first].A_RD)
        experts.append(made)
    trainable = [index for index, expert in enumerate(plan.experts) if expert.trainable and experts[index].rank]
    return ExpertBank.stack(
        experts,
        in_features=site.in_features,
        out_features=site.out_features,
        dtype=dtype,
        device=device,
        trainable=trainable,
        shared=[index for index, expert in enumerate(plan.experts) if expert.shared_A and experts[index].rank],
    )


def fresh_scale(config: MoELoRAConfig, rank: int) -> float:
    """Scale of a fresh expert: alpha/r, or alpha/sqrt(r) for rsLoRA."""
    alpha = 2.0 * rank if config.alpha is None else config.alpha
    return alpha / (rank**0.5 if config.use_rslora else rank)


def describe(site: Site, layer: MoELoRALinear) -> dict[str, Any]:
    """What the manifest says of a site."""
    return {
        "role": site.role,
        "in_features": site.in_features,
        "out_features": site.out_features,
        "aliases": list(site.aliases),
        "fan_in_fan_out": type(layer.base).__name__ == "Conv1D",
    }


def refuse_patched(model: nn.Module) -> None:
    """Raise if the model carries a mixture or PEFT layers already."""
    if is_patched(model):
        raise ValueError("this model is patched already; call moelora.unpatch_model(model) first")
    injected = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    if injected or hasattr(model, "peft_config"):
        raise ValueError(
            f"this model carries PEFT layers ({injected[:2]}); patch a plain base model and pass the PeftModel itself "
            "as an expert source: patch_model(base, experts={'name': peft_model})"
        )


def _resolve_config(config: MoELoRAConfig | None, router: Any, top_k: int) -> MoELoRAConfig:
    if config is None:
        if not isinstance(router, str) and top_k != 2:
            raise ValueError(f"top_k is given twice; set it in the router's configuration: Learned(top_k={top_k})")
        return MoELoRAConfig(router=resolve_router(router, top_k=top_k))
    if not isinstance(config, MoELoRAConfig):
        raise ValueError(f"config must be a MoELoRAConfig, got {type(config).__name__}")
    if router != "learned" or top_k != 2:
        raise ValueError(
            "the router is given twice; with config=, set it there: MoELoRAConfig(router=Learned(top_k=4))"
        )
    return config


def _check_fresh(experts: Any, num_experts: int | None, rank: int | None) -> None:
    if (num_experts is None) != (rank is None):
        raise ValueError(f"fresh experts need both num_experts and rank, got num_experts={num_experts}, rank={rank}")
    if num_experts is not None and rank is not None and (num_experts < 1 or rank < 1):
        raise ValueError(f"num_experts and rank must be at least 1, got {num_experts} and {rank}")
    if experts is None and num_experts is None:
        raise ValueError(
            "there is nothing to mix: pass experts=['org/adapter', './folder', ...], "
            "or num_experts= and rank= for fresh ones"
        )
