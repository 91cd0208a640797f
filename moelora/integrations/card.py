"""The card of a pushed mixture: README.md with the metadata that a hub reads. Begin with model_card.

A card is published, so nothing of the author's machine goes into it: a base model or an expert is named only if its
name looks like the id of a hub repository, otherwise it is called local.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

TAGS = ["moelora", "mixture-of-lora", "mixture-of-experts", "lora"]
Number = int | float

HUB = "https://huggingface.co"

ROUTED = (
    "A mixture is as good as its experts and the data that its router was trained on; elsewhere its choices are "
    "untested.",
    "The choice depends on the input, so the mixture cannot be merged into the base weights, and programs that know "
    "only plain LoRA cannot run it (a fixed mixture can be exported as one).",
)


def model_card(config: Mapping[str, Any]) -> str:
    """README.md for a mixture that is described by a plain mapping.

    Keys, all optional: `repo_id`; `base_model` and its `auto_class`; `experts`, each with `name`, `source` (a string,
    or a mapping with `kind`, `location`, `subfolder`), `commit`, `sha256`, `ranks`, `scales` (a number, a list, or
    site -> number) and `folder` (where its weights lie in the repository, if they do); `router` (its settings);
    `sites` (a count, or all of them); `package_version`; `metrics` (name -> value).

    Of a stack (`moelora.continual`) also: `stack`, the class that loads it; `tags`, more of them; `acts`, sentences in
    place of the one that says when experts act; `sections`, heading -> text; `limits`, sentences in place of those
    on routers.
    """
    repo_id = config.get("repo_id")
    base_model = config.get("base_model")
    base_id = base_model if looks_like_hub_id(base_model) else None
    experts = list(config.get("experts") or [])
    title = repo_id.rpartition("/")[2] if repo_id else "A mixture of LoRA experts"

    relation = {"base_model": base_id, "base_model_relation": "adapter"} if base_id else {}
    metadata = ModelCardData(library_name="moelora", tags=[*TAGS, *(config.get("tags") or [])], **relation)
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {_plain(title)}",
        _summary(config, base_id, len(experts)),
        "## Experts",
        _expert_table(experts),
        "## Router",
        _settings_table(config.get("router") or {}),
        *(part for heading, text in (config.get("sections") or {}).items() for part in (f"## {heading}", text)),
        "## How to load it",
        _loading(config, base_id, repo_id),
        *_results(config.get("metrics") or {}),
        "## Limits",
        _limits(experts, config.get("limits") or ROUTED, has_metrics=bool(config.get("metrics"))),
    ]
    return "\n\n".join(parts) + "\n"


def looks_like_hub_id(name: object) -> bool:
    """Whether a name can be a repository `owner/name` of a hub, and is none of a training run's folders."""
    if not isinstance(name, str) or name.count("/") != 1 or re.search(r"checkpoint-\d+$", name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.startswith((".", "~"))


def _summary(config: Mapping[str, Any], base_id: str | None, num_experts: int) -> str:
    base = f"[`{base_id}`]({HUB}/{base_id})" if base_id else "a base model that is not on a hub"
    experts = "one LoRA expert" if num_experts == 1 else f"{num_experts} LoRA experts"
    sites = config.get("sites")
    count = sites if isinstance(sites, int) else len(sites or ())
    where = f" at {count} linear projections" if count else ""
    version = config.get("package_version")
    made = f" Written by moelora {_plain(version)}." if version else ""
    acts = config.get("acts") or f"A router picks, for every token{where}, which few of them act."
    return f"A mixture of {experts} on {base}. {acts} The base model's weights are not part of this repository.{made}"


def _expert_table(experts: Iterable[Mapping[str, Any]]) -> str:
    rows = ["| expert | source | commit | rank | scale | sha-256 |", "|---|---|---|---|---|---|"]
    for expert in experts:
        commit = expert.get("commit") or _source_field(expert, "commit")
        sha256 = expert.get("sha256") or _source_field(expert, "sha256")
        cells = [
            _plain(expert.get("name") or "?"),
            _source(expert),
            f"`{_plain(commit)[:12]}`" if commit else "not pinned",
            _span(expert.get("ranks")),
            _span(expert.get("scales")),
            f"`{_plain(sha256)[:12]}`" if sha256 else "",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) if len(rows) > 2 else "None."


def _source(expert: Mapping[str, Any]) -> str:
    """A link for an expert from a hub; for any other, only what kind of thing it was."""
    source = expert.get("source")
    location = source.get("location") if isinstance(source, Mapping) else source
    kind = source.get("kind", "hub") if isinstance(source, Mapping) else "hub"
    if kind == "hub" and looks_like_hub_id(location):
        subfolder = _source_field(expert, "subfolder")
        return f"[`{location}`]({HUB}/{location})" + (f", folder `{_plain(subfolder)}`" if subfolder else "")
    return "made in this mixture" if kind == "fresh" else "local"


def _source_field(expert: Mapping[str, Any], name: str) -> Any:
    source = expert.get("source")
    return source.get(name) if isinstance(source, Mapping) else None


def _span(numbers: Number | Iterable[Number] | Mapping[str, Number] | None) -> str:
    """One number, or the smallest and the largest of many."""
    if isinstance(numbers, Mapping):
        numbers = numbers.values()
    values = [numbers] if isinstance(numbers, int | float) else list(numbers or ())
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _settings_table(settings: Mapping[str, Any]) -> str:
    if not settings:
        return "Not described."
    rows = [f"| {_plain(name)} | {_plain(value)} |" for name, value in settings.items() if value is not None]
    return "\n".join(["| setting | value |", "|---|---|", *rows])


def _loading(config: Mapping[str, Any], base_id: str | None, repo_id: str | None) -> str:
    auto_class = str(config.get("auto_class") or "AutoModelForCausalLM")
    if not auto_class.isidentifier():
        raise ValueError(f"auto_class is the name of a transformers class, got {auto_class!r}")
    base = base_id or "path/to/the/base-model"
    needed, load = "import moelora", "moelora.load"
    if stack := config.get("stack"):
        needed, load = f"from moelora.continual import {stack}", f"stack = {stack}.load"
    return (
        "```python\n"
        f"{needed}\n"
        f"from transformers import {auto_class}\n\n"
        f'model = {auto_class}.from_pretrained("{base}")\n'
        f'{load}(model, "{repo_id or "this-repository"}")\n'
        "```\n\n"
        "Inside `with moelora.disabled(model):` no expert acts."
    )


def _results(metrics: Mapping[str, Any]) -> list[str]:
    if not metrics:
        return []
    rows = [f"| {_plain(name)} | {_plain(value)} |" for name, value in metrics.items()]
    return ["## Results", "\n".join(["| measure | value |", "|---|---|", *rows])]


def _limits(experts: list[Mapping[str, Any]], first: Iterable[str], *, has_metrics: bool) -> str:
    outside = [expert for expert in experts if not expert.get("folder")]
    unpinned = [expert for expert in outside if not (expert.get("commit") or _source_field(expert, "commit"))]
    limits = [
        *first,
        "Experts keep the licences and the biases of their own training; see their cards.",
        "Files are checked for form, not for intent: an expert that was trained to do harm passes every check.",
    ]
    if outside:
        limits.append(f"Loading needs the sources of {_names(outside)} to be there: their weights are not included.")
    if unpinned:
        limits.append(f"No commit is recorded for {_names(unpinned)}, so their sources may have changed.")
    if not has_metrics:
        limits.append("No measurements were published with it.")
    return "\n".join(f"- {limit}" for limit in limits)


def _names(experts: Iterable[Mapping[str, Any]]) -> str:
    return ", ".join(_plain(expert.get("name") or "?") for expert in experts)


def _plain(value: object) -> str:
    """A value as one line of a table: no line ends, bars, backticks, brackets or HTML."""
    if isinstance(value, float):
        return f"{value:g}"
    return re.sub(r"[\s|`<>\[\]]+", " ", str(value)).strip()
