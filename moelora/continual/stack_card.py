"""What the card of a pushed stack says that no other mixture's does. Begin with about."""

from typing import Any

from moelora.continual.certificate import Certificate
from moelora.continual.stack_manifest import StackEntry, StackManifest

TAGS: dict[str, tuple[str, ...]] = {
    "UnlearningStack": ("unlearning", "machine-unlearning"),
    "ContinualStack": ("continual-learning",),
}

ACTS: dict[str, str] = {
    "UnlearningStack": (
        "It is an unlearning stack: each expert hides what one request asked to forget, behind a gate that reads the "
        "prompt and is open only near that request. Elsewhere the output is the base model's, bit for bit.\n\n"
        "**This is access control, not erasure.** The base model still holds what is hidden, for whoever has its "
        "weights, takes the experts out, or trains it further."
    ),
    "ContinualStack": "It is a continual stack: each expert has learned one task, one after the other.",
}

UNGATED = "`moelora.load` brings the experts without what decides about them, and such a mixture does not run."
"""Of stacks that are not routed by a router of their mixture."""


def about(manifest: StackManifest) -> dict[str, Any]:
    """Keys for `moelora.integrations.card.model_card`."""
    sections = {}
    if any(_certificate(entry) is not None for entry in manifest.entries):
        sections["What the gates promise"] = _promises(manifest)
    return {
        "stack": manifest.kind,
        "tags": TAGS[manifest.kind],
        "acts": ACTS[manifest.kind],
        "sections": sections,
        "limits": _limits(manifest),
    }


# --- inside -----------------------------------------------------------------------------------------------------------


def _promises(manifest: StackManifest) -> str:
    rows = [
        "| expert | miss rate at most | fire rate at most | confidence | guarantee | outcome |",
        "|---|---|---|---|---|---|",
    ]
    for entry in manifest.entries:
        certificate = _certificate(entry)
        if certificate is not None:
            rows.append(f"| {entry.name} | {_cells(certificate)} |")
    return "\n".join(
        [
            "A miss is a prompt like the expert's texts whose gate is not fully open, a fire one unlike them whose "
            "gate is not fully closed. Rates hold for prompts drawn as the calibration sets were, and say nothing of "
            "attacks, drift or another language. They are claims of whoever made the stack: the texts behind them are "
            "not here.\n",
            *rows,
        ]
    )


def _cells(certificate: Certificate) -> str:
    rates = [
        f"{rate.bound:.3g}" + ("" if rate.kept else " (not kept)") for rate in (certificate.miss, certificate.fire)
    ]
    return " | ".join([*rates, f"{certificate.confidence:g}", certificate.guarantee, certificate.outcome])


def _limits(manifest: StackManifest) -> list[str]:
    limits = []
    if manifest.kind == "UnlearningStack":
        limits.append(
            "It protects against questions to the model through its gates. It does not protect against access to the "
            "base model's weights, taking the experts out, or training the model further. The experts cannot be merged "
            "or exported, for without their gates they would act on every input."
        )
    if any(entry.gate is not None for entry in manifest.entries):
        kept = (
            "features of single texts that the gates were fitted to, by which one can tell what these were"
            if manifest.holds_features
            else "statistics of the texts that the gates were fitted to"
        )
        limits.append(f"`stack.safetensors` holds {kept}: share it as you would share the texts.")
    if manifest.settings.get("routing") != "learned":
        limits.append(UNGATED)
    return [*limits, "It is as good as its experts and the texts that they were trained on."]


def _certificate(entry: StackEntry) -> Certificate | None:
    calibration = None if entry.gate is None else entry.gate.calibration
    return None if calibration is None else calibration.certificate
