"""Which runs answer which question, as data. Begin with Run and METHODS.

A method's learning rate is tuned like every other's: three rates, a seed of their own, the validation loss decides.
Then it is run with three seeds. Runs of one question differ only in what the question is about.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

SEEDS = (0, 1, 2)
TUNING_SEED = 100
"""Not one of the seeds that are reported."""

SAMPLES = {"decoder": 4000, "encoder": 1200, "mixed": 4000}
"""Sequences that a router on frozen adapters learns from, where the question is another."""

ACCURACY = ("encoder", "mixed")
"""Suites whose validation figure is a share of right answers; the others' is a loss."""

SKILLS = (
    "clinc-banking",
    "clinc-kitchen_and_dining",
    "clinc-home",
    "clinc-meta",
    "banking77",
    "boolq",
    "pubmedqa",
    "pubmedqa-conclusion",
    "arc",
    "openbookqa",
)
"""What "mixed" is made of, if its adapters help."""

ADAPTER_RATES = (1e-3, 3e-3, 9e-3)
ROUTER_RATES = (2e-3, 1e-2, 5e-2)
"""Learning rates that are tried: of low-rank factors, and of a router alone."""
PROBE_STRENGTHS = (3.0, 30.0, 300.0)
"""Tried in a rate's place for a head on the frozen encoder: C of its logistic regression."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where a worker finds things, and how much of the work to do (`scale` below 1 only tries the logic)."""

    model: str
    data: Path
    cache: Path
    device: str
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to use adapters.

    Attributes:
        kind: "adapters" trains one adapter for each domain; "pool" mixes these, frozen; "joint" trains fresh experts
            and their router on all domains together; "single" one adapter on all domains; "peft" is PEFT's own mixture
            of the same adapters; "skill" trains one skill's adapter and head, "probe" its head on the frozen encoder.
        router: name of the router's configuration and its options; empty where nothing is routed.
        losses: weights of the losses on the routings (`moelora.AuxLosses`).
        fixed: in place of a router: "base", "uniform", "random" or "oracle".
        rates: learning rates to try; none where nothing is trained.
        rank_times: of a single adapter: its rank, in ranks of one expert ("k" and "E" stand for those numbers).
        rate_of: the method whose rate it takes, where it is a variant whose effect is asked for and nothing else.
        options: further options of the training, such as `samples` of RLOO.
    """

    kind: str
    router: str = ""
    router_options: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, Any] = field(default_factory=dict)
    fixed: str = ""
    rates: tuple[float, ...] = ()
    rank_times: str = ""
    rate_of: str = ""
    options: dict[str, Any] = field(default_factory=dict)


BALANCE = {"load_balance": 1e-2}
NOTHING = {"load_balance": 0.0}


def _learned(kind: str, top_k: int, combine: str, losses: dict[str, Any] = BALANCE) -> Method:
    rates = ROUTER_RATES if kind == "pool" else ADAPTER_RATES
    return Method(
        kind=kind, router="learned", router_options={"top_k": top_k, "combine": combine}, losses=losses, rates=rates
    )


def _rloo(kind: str, top_k: int, weight: str, samples: int = 4) -> Method:
    rates = ROUTER_RATES if kind == "pool" else ADAPTER_RATES
    return Method(
        kind=kind,
        router="rloo",
        router_options={"top_k": top_k, "weight": weight},
        losses=NOTHING,
        rates=rates,
        options={"samples": samples},
    )


def _hard_soft(kind: str, top_k: int, losses: dict[str, Any] = BALANCE, **stages: float) -> Method:
    return Method(
        kind=kind,
        router="hard_soft",
        router_options={"top_k": top_k},
        losses=losses,
        rates=ROUTER_RATES if kind == "pool" else ADAPTER_RATES,
        options={"stages": stages or {"router": 1.0}},
    )


METHODS: dict[str, Method] = {
    # each adapter alone on its own domain; the others below that say "pool" mix these
    "adapters": Method(kind="adapters", rates=ADAPTER_RATES),
    # nothing is trained, or nothing but the adapters themselves
    "base": Method(kind="pool", fixed="base"),
    "uniform average": Method(kind="pool", fixed="uniform"),
    "random routing": Method(kind="pool", fixed="random"),
    "oracle": Method(kind="pool", fixed="oracle"),
    "Arrow, top 2": Method(kind="pool", router="arrow", router_options={"top_k": 2}),
    "PHATGOOSE, top 2": Method(kind="pool", router="phatgoose", router_options={"top_k": 2}),
    # routers on frozen adapters
    "softmax, top 2": _learned("pool", 2, "softmax"),
    "renormalized, top 2": _learned("pool", 2, "renormalized"),
    "unit, top 1": _learned("pool", 1, "unit"),
    "unit, top 2": _learned("pool", 2, "unit"),
    "constant by RLOO, top 2": _rloo("pool", 2, "mean"),
    "constant by RLOO, top 1": _rloo("pool", 1, "sum"),
    "LoRA-Mixer, top 3": _hard_soft("pool", 3),
    "PEFT Arrow, top 2": Method(kind="peft", router="arrow", router_options={"top_k": 2}),
    "PEFT X-LoRA": Method(kind="peft", router="xlora", rates=ADAPTER_RATES),
    "supervised gate, top 2": _learned("pool", 2, "renormalized", {"load_balance": 0.0, "gate_cross_entropy": 1.0}),
    "classifier per row": Method(kind="pool", router="classifier"),
    # losses on the routing, LoRA-Mixer's router stage
    **{
        f"router stage, {name}": _hard_soft("pool", 3, losses)
        for name, losses in {
            "no loss": NOTHING,
            "balance": BALANCE,
            "RSL as printed": {"load_balance": 1e-2, "token_entropy": -1e-2},
            "RSL specialize": {"load_balance": 1e-2, "token_entropy": 1e-2},
            "mutual information": {"load_balance": 0.0, "mutual_information": 1e-2},
        }.items()
    },
    # experts and routers trained together
    **{f"mixture, top {k}": _learned("joint", k, "unit" if k == 1 else "renormalized") for k in (1, 2, 4)},
    **{f"ReMix, top {k}": _rloo("joint", k, "rslora") for k in (1, 2, 4)},
    **{
        f"ReMix, top 2, M = {samples}": replace(_rloo("joint", 2, "rslora", samples), rates=(), rate_of="ReMix, top 2")
        for samples in (2, 8, 16)
    },
    "hard, then soft": _hard_soft("joint", 2, expert=0.7, router=0.3),
    "hard, then joint": _hard_soft("joint", 2, expert=0.5, joint=0.3, sparse=0.2),
    "soft from the start": _hard_soft("joint", 2, sparse=1.0),
    "one LoRA of rank k r": Method(kind="single", rank_times="k", rates=ADAPTER_RATES),
    "one LoRA of rank E r": Method(kind="single", rank_times="E", rates=ADAPTER_RATES),
    # one skill alone
    **{f"probe: {skill}": Method(kind="probe", rates=PROBE_STRENGTHS, options={"skill": skill}) for skill in SKILLS},
    **{f"adapter: {skill}": Method(kind="skill", rates=ADAPTER_RATES, options={"skill": skill}) for skill in SKILLS},
}
"""All methods, by the name that tables call them."""

QUESTIONS: dict[str, dict[str, Any]] = {
    "a": {
        "title": "Which loss teaches a router with few samples?",
        "methods": [name for name in METHODS if name.startswith("router stage")],
        "samples": {"decoder": (1000, 2000, 4000, 10000), "encoder": (150, 400, 1200)},
    },
    "a-stages": {
        "title": "Does the hard stage matter?",
        "methods": ["hard, then soft", "hard, then joint", "soft from the start", "mixture, top 2"],
    },
    "b": {
        "title": "Do learned weights collapse, and do constant weights with RLOO do better?",
        "methods": [f"{name}, top {k}" for k in (1, 2, 4) for name in ("mixture", "ReMix")],
    },
    "b-samples": {
        "title": "How do more samples help ReMix?",
        "methods": [*(f"ReMix, top 2, M = {samples}" for samples in (2, 8, 16)), "ReMix, top 2"],
    },
    "c": {
        "title": "Frozen adapters: which weights keep their quality?",
        "methods": [
            "base",
            "uniform average",
            "random routing",
            "oracle",
            "Arrow, top 2",
            "PHATGOOSE, top 2",
            "softmax, top 2",
            "renormalized, top 2",
            "unit, top 1",
            "unit, top 2",
            "constant by RLOO, top 1",
            "constant by RLOO, top 2",
            "LoRA-Mixer, top 3",
            "supervised gate, top 2",
            "PEFT Arrow, top 2",
            "PEFT X-LoRA",
        ],
    },
    "d": {
        "title": "When is a mixture worth it?",
        "methods": ["one LoRA of rank k r", "one LoRA of rank E r", "mixture, top 2", "ReMix, top 2"],
    },
    "e": {
        "title": "Does placement change the answer?",
        "methods": [
            "one LoRA of rank k r",
            "one LoRA of rank E r",
            "mixture, top 2",
            "renormalized, top 2",
            "oracle",
        ],
        "placement": "all",
    },
    "f-skills": {
        "title": "Unlike skills on the encoder: where does an adapter help?",
        "methods": [f"{kind}: {skill}" for skill in SKILLS for kind in ("probe", "adapter")],
        "suites": ("mixed",),
    },
    "f": {
        "title": "Unlike skills on the encoder: what does routing keep of them?",
        "methods": [
            "base",
            "uniform average",
            "random routing",
            "oracle",
            "Arrow, top 2",
            "PHATGOOSE, top 2",
            "softmax, top 2",
            "renormalized, top 2",
            "LoRA-Mixer, top 3",
            "supervised gate, top 2",
            "classifier per row",
            "one LoRA of rank k r",
            "one LoRA of rank E r",
            "mixture, top 2",
        ],
        "suites": ("mixed",),
    },
}
"""The questions, and what each compares; those that name no suites are the decoder's and the first encoder's."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training and its evaluation.

    Attributes:
        suite: "decoder", "encoder" (ten like domains) or "mixed" (unlike skills on the same encoder).
        method: a name in METHODS.
        seed: of data order and initial weights; `TUNING_SEED` for a run that only tunes.
        rate: learning rate, or a probe's strength; 0 where nothing is trained.
        samples: how many sequences a router on frozen adapters learns from.
        placement: "attention" (q, k, v, o) or "all" (every linear of a block).
    """

    suite: str
    method: str
    seed: int
    rate: float = 0.0
    samples: int = 0
    placement: str = "attention"

    @property
    def key(self) -> str:
        """What two equal runs share, to be found again in a file of results."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def pool(self) -> str:
        """The folder of the adapters that a run of "adapters" writes."""
        return f"{self.suite}-{self.placement}-{self.seed}-{self.rate}"

    @property
    def setting(self) -> tuple[str, str, str]:
        """What a learning rate is tuned for; numbers of samples share it."""
        return self.suite, self.method, self.placement


def settings(suite: str, questions: list[str]) -> list[Run]:
    """Each different run that the questions ask for, with its seed and its rate still to be chosen."""
    found: dict[str, Run] = {}
    for question in questions:
        asked = QUESTIONS[question]
        if suite not in asked.get("suites", ("decoder", "encoder")):
            continue
        for method in asked["methods"]:
            # the encoder's adapters are there already
            if suite == "encoder" and METHODS[method].kind != "pool":
                continue
            for samples in asked.get("samples", {}).get(suite, (SAMPLES[suite],)):
                placement = asked.get("placement", "attention")
                run = Run(suite=suite, method=method, seed=TUNING_SEED, samples=samples, placement=placement)
                found.setdefault(run.key, run)
    return list(found.values())


def tuning_runs(suite: str, questions: list[str]) -> Iterator[Run]:
    """What has to be run before a rate can be chosen."""
    for setting in settings(suite, questions):
        if setting.samples == SAMPLES[suite]:
            for rate in METHODS[setting.method].rates:
                yield replace(setting, rate=rate)


def final_runs(suite: str, questions: list[str], best: dict[tuple[str, str, str], float]) -> Iterator[Run]:
    """The runs that are reported, at the rates that tuning found."""
    for setting in settings(suite, questions):
        method = METHODS[setting.method]
        tuned = replace(setting, method=method.rate_of or setting.method)
        for seed in SEEDS:
            yield replace(setting, seed=seed, rate=best.get(tuned.setting, 0.0))
