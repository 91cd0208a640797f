"""Training in stages, for LoRA-Mixer's router (`moelora.routers.hard_soft`). Begin with set_stage.

`HardSoftSchedule` calls it after every step of an optimiser, in a plain loop or in transformers' Trainer.
"""

from dataclasses import replace
from typing import Any, final

from torch import nn

from moelora.mixture import Mixture, find_mixture
from moelora.routers.hard_soft import STAGES, HardSoft


def set_stage(model: nn.Module, stage: str, ramp: float = 0.0, *, experts: bool | None = None) -> None:
    """From now on, train in this stage. Evaluation is the same in all of them.

    | stage | who acts on a token | what is trained |
    |---|---|---|
    | "expert" | the expert of its domain, with weight 1 | experts |
    | "router" | all experts, with the router's softmax | routers |
    | "joint" | (1 - ramp) times the first plus ramp times the second | both |
    | "sparse" | the top-k of the softmax, renormalised | both |

    Experts are trained if they are parameters: fresh ones, those of `patch_model(freeze_experts=False)` and those of
    `set_trainable`. What a stage leaves alone keeps its parameters and loses `requires_grad` and its gradient, so an
    optimiser that knows it skips it, and goes on in a later stage.

    A copy of the model is in no stage, and neither is a loaded one; that is the stage "router", with the flags as they
    are.

    Args:
        model: a patched model whose router is `HardSoft`.
        stage: "expert", "router", "joint" or "sparse".
        ramp: beta of the stage "joint", from 0 (the domain's expert alone) to 1 (the router alone).
        experts: whether experts are trained; None for what the table says. True in the stage "router" is LoRA-Mixer's
            variant with a penalty for what is to be preserved (`moelora.Anchor`).

    Raises:
        ValueError: for an unknown stage, another router, a ramp outside [0, 1] or of another stage, experts that are to
            be trained and are all frozen, and within `given_experts`, `use_experts` and `disabled`, whose end would
            undo it.
    """
    _, mixture = find_mixture(model)
    _check(mixture, stage, ramp)
    trainable = _some_expert_is_a_parameter(mixture)
    if (experts or (experts is None and stage == "expert")) and not trainable:
        raise ValueError(_all_frozen(f"the stage {stage!r} is to train experts"))
    tape = mixture.tape
    if tape.settings.disabled or tape.settings.fixed is not None or tape.settings.given is not None:
        raise ValueError(
            "set_stage within `given_experts`, `use_experts` or `disabled` would be undone at their end; "
            "call it (or the schedule's step) outside of them"
        )

    entered = stage != tape.settings.stage
    if entered or ramp != tape.settings.ramp:
        tape.settings = replace(tape.settings, stage=stage, ramp=ramp)
    trained = stage != "router" if experts is None else experts
    changed = _train(mixture, routers=stage != "expert", experts=trained)
    if entered or changed:
        mixture.hooks.watch_anew()


@final
class HardSoftSchedule:
    """LoRA-Mixer's training, stage after stage: "expert", "router", "joint", "sparse".

        schedule = moelora.HardSoftSchedule(model, expert_steps=1000, router_steps=200)
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        schedule.start()
        for batch in batches:  # with `expert_ids`
            model(**batch).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()

    A stage of no steps is left out, and the last one goes on for as long as the training does. In "joint" the ramp is
    the share of the stage that is over; as the last one it stays at 1. The paper has the first two, in this order.

    Making a schedule makes routers, and experts that are parameters, trainable, so that an optimiser made before
    `start` knows them all. With Trainer, pass `callbacks=[schedule.callback()]` and do not call `start` or `step`.

    Args:
        model: a patched model whose router is `HardSoft`.
        expert_steps, router_steps, joint_steps, sparse_steps: of the optimiser, in each stage.

    Attributes:
        lengths: steps of each stage.
        steps: how many steps of the optimiser are done; None before `start`.

    Raises:
        ValueError: for another router, a negative number of steps or none at all, or experts that are to be trained and
            are all frozen.
    """

    model: nn.Module
    lengths: dict[str, int]
    steps: int | None

    def __init__(
        self,
        model: nn.Module,
        *,
        expert_steps: int = 0,
        router_steps: int = 0,
        joint_steps: int = 0,
        sparse_steps: int = 0,
    ) -> None:
        _, mixture = find_mixture(model)
        self.lengths = dict(zip(STAGES, (expert_steps, router_steps, joint_steps, sparse_steps), strict=True))
        for stage, length in self.lengths.items():
            if length < 0:
                raise ValueError(f"{stage}_steps must not be negative, got {length}")
            if length:
                _check(mixture, stage, 0.0)
        if not any(self.lengths.values()):
            raise ValueError("a schedule needs a stage with steps; pass expert_steps=, router_steps= or another")
        if expert_steps and not _some_expert_is_a_parameter(mixture):
            raise ValueError(_all_frozen("expert_steps are to train experts"))
        self.model, self.steps = model, None
        self.release()

    def start(self) -> None:
        """Enter the first stage; call it when the optimiser is made."""
        self.go_to(0)

    def step(self) -> None:
        """A step of the optimiser is done.

        Raises:
            ValueError: before `start`.
        """
        if self.steps is None:
            raise ValueError("the schedule has not begun; call schedule.start() when the optimiser is made")
        self.go_to(self.steps + 1)

    def go_to(self, steps: int) -> None:
        """Be where this many steps of the optimiser lead."""
        set_stage(self.model, *self.at(steps))
        self.steps = steps

    def at(self, steps: int) -> tuple[str, float]:
        """The stage and its ramp after this many steps of the optimiser."""
        stages = [(stage, length) for stage, length in self.lengths.items() if length]
        for stage, length in stages:
            if steps < length or stage == stages[-1][0]:
                return stage, min(steps / length, 1.0) if stage == "joint" else 0.0
            steps -= length
        raise AssertionError("the last stage never ends")

    def release(self) -> None:
        """Make routers, and experts that are parameters, trainable, so that an optimiser made now knows them all."""
        _, mixture = find_mixture(self.model)
        if _train(mixture, routers=True, experts=True):
            mixture.hooks.watch_anew()

    def callback(self) -> Any:
        """A callback for transformers' Trainer, which follows `state.global_step`, also in a run that is resumed."""
        from moelora.integrations.stage_callback import StageCallback

        return StageCallback(self)

    def state_dict(self) -> dict[str, Any]:
        """How far it is, as plain values."""
        return {"steps": self.steps, "lengths": dict(self.lengths)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where a schedule of the same lengths was.

        Raises:
            ValueError: if its stages have other lengths.
        """
        if state["lengths"] != self.lengths:
            raise ValueError(
                f"the schedule was saved with the lengths {state['lengths']}, this one has {self.lengths}; "
                "make it with the same, or call go_to(steps)"
            )
        if state["steps"] is not None:
            self.go_to(state["steps"])


# --- inside -----------------------------------------------------------------------------------------------------------


def _check(mixture: Mixture, stage: str, ramp: float) -> None:
    router = mixture.config.router
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}; expected one of {STAGES}")
    if not isinstance(router, HardSoft):
        raise ValueError(
            f"this model's router knows no stages: it is {router}; patch with router=HardSoft(top_k=...) for them"
        )
    if not 0 <= ramp <= 1 or (ramp and stage != "joint"):
        raise ValueError(f"ramp must lie in [0, 1], and belongs to the stage 'joint'; got {ramp} for {stage!r}")
    if stage == "sparse" and router.top_k == 1:
        raise ValueError(
            "in the stage 'sparse' with top_k=1 the one kept weight is always 1, so the router would learn nothing; "
            "leave the stage out, or patch with a larger top_k"
        )


def _some_expert_is_a_parameter(mixture: Mixture) -> bool:
    return any(any(layer.bank.trainable) for layer in mixture.layers.values())


def _all_frozen(what: str) -> str:
    return (
        f"{what}, but all experts are frozen; patch with freeze_experts=False or num_experts=, "
        "or call moelora.set_trainable(model, experts=True), and make the optimiser afterwards"
    )


def _train(mixture: Mixture, *, routers: bool, experts: bool) -> bool:
    """Let exactly these be trained; whether that is a change."""
    parts = [(router, routers) for router in mixture.routers().values()]
    parts += [(layer.bank, experts) for layer in mixture.layers.values()]
    changed = False
    for part, trained in parts:
        for parameter in part.parameters():
            changed |= parameter.requires_grad != trained
            parameter.requires_grad_(trained)
            if not trained:
                # an optimiser skips what has no gradient, and would go on with one that is left over
                parameter.grad = None
    return changed
