"""LoRA-Mixer: the weights of each stage, who gets a gradient, the schedule, Trainer, Mamba, and what is preserved."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from untouched import untouched

import moelora
from moelora import Anchor, AuxLosses, HardSoft, HardSoftSchedule, MoELoRAConfig, losses
from moelora.call_settings import GivenIds, Settings
from moelora.routers.hard_soft import STAGES
from moelora.routing import dense_weights
from moelora.tape import Tape
from moelora.testing import tiny
from moelora.testing.router_contract import router_contract

SILENT = AuxLosses(load_balance=0.0)


def router_with(available=(True, True, True), *, rows=((1.0,), (0.0,), (-1.0,)), **options):
    """A router in training whose scores of the input (s,) are s times these rows."""
    built = HardSoft(**({"top_k": 2} | options)).build(1, available, None)
    built.weight_ED.data = torch.tensor(rows)
    return built.train()


def tape_in(stage, ids=None, ramp=0.0, tokens=2):
    """What the tape says in a stage; ids one for each token."""
    given = None if ids is None else GivenIds(ids=torch.tensor([ids]))
    tape = Tape(settings=Settings(stage=stage, ramp=ramp, given=given))
    tape.leading = (1, tokens)
    return tape


def patched(family="llama", *, experts=3, seed=1, losses=SILENT, top_k=2, **options):
    """A tiny model with random fresh experts."""
    config = MoELoRAConfig(router=HardSoft(top_k=top_k, init_std=0.3), losses=losses)
    model = moelora.patch_model(tiny.model(family), num_experts=experts, rank=2, config=config, **options)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".bank." in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    return model


def part_of(name):
    """Which part of a mixture a parameter belongs to."""
    return "router" if ".router." in name else "bank" if ".bank." in name else "base"


def with_gradient(model):
    """The parts that got a gradient."""
    return {part_of(name) for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def trained(model):
    """The parts that are trained."""
    return {part_of(name) for name, p in model.named_parameters() if p.requires_grad}


def snapshot(model):
    """All parameters as they are."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def expert_gradients(model):
    """For each expert, whether any of its rows got a gradient."""
    found = set()
    for layer in model._moelora.layers.values():
        bank = layer.bank
        for A_RD in (bank.A_trainable_RD, bank.B_trainable_RO):
            found |= set(bank.owner_R[A_RD.grad.abs().sum(1) > 0].tolist())
    return found


# --- the router -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [HardSoft(), HardSoft(top_k=1), HardSoft(top_k=99, temperature=0.5)], ids=str)
def test_hard_soft_keeps_the_contract_in_evaluation(config):
    """Training differs by design, and is what the rest of this file is about."""

    def build(in_features, available):
        router = config.build(in_features, available, None)
        torch.nn.init.normal_(router.weight_ED)
        return router

    router_contract(build, deterministic=False, weight_sum=1.0)


@pytest.mark.parametrize("stage", [None, *STAGES])
def test_evaluation_is_the_top_k_renormalised_in_every_stage(stage):
    """Scores 1, 0, -1: softmax of the two best."""
    routing = router_with().eval()(torch.tensor([[1.0]]), tape_in(stage, tokens=1))

    top = 1 / (1 + math.exp(-1))
    assert routing.experts_TK.tolist() == [[0, 1]]
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[top, 1 - top]]))


def test_the_temperature_divides_the_scores():
    """Scores 2, 0, -2 at temperature 2 are 1, 0, -1; the gate that kernels fold in says the same."""
    router = router_with(temperature=2.0).eval()
    warm = router(torch.tensor([[2.0]]), tape_in(None, tokens=1))
    plain = router_with().eval()(torch.tensor([[1.0]]), tape_in(None, tokens=1))

    torch.testing.assert_close(warm.weights_TK, plain.weights_TK)
    gate = router.linear_gate()
    assert gate is not None
    assert gate[1:] == (2.0, 2, "renormalized")
    assert gate.weight_ED is router.weight_ED


def test_the_gate_is_for_evaluation_with_all_experts():
    """A gate knows no stage and no missing experts."""
    assert router_with().linear_gate() is None
    assert router_with((True, False, True)).eval().linear_gate() is None
    assert router_with().eval().linear_gate() is not None


def test_stage_expert_is_the_named_expert_alone():
    """Weight 1 for the domain's expert, none for -1, none where the expert has no rows; the router is skipped."""
    routing = router_with((True, False, True))(torch.ones(4, 1), tape_in("expert", [2, -1, 1, 0], tokens=4))

    assert routing.experts_TK.tolist() == [[2], [-1], [-1], [0]]
    assert routing.weights_TK.tolist() == [[1.0], [0.0], [0.0], [1.0]]
    assert routing.logits_TE is None


def test_stage_router_is_dense():
    """All experts in natural order with the softmax of all scores; ids, if there are any, say nothing."""
    for stage, ids in (("router", None), ("router", [1, 2]), (None, None)):
        routing = router_with()(torch.tensor([[1.0], [0.0]]), tape_in(stage, ids))

        assert routing.experts_TK.tolist() == [[0, 1, 2]] * 2
        expected = torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.0, 0.0]]).softmax(-1)
        torch.testing.assert_close(routing.weights_TK, expected)


def test_dense_stages_leave_out_experts_without_rows():
    """Id -1 with weight 0, also in between."""
    for stage in ("router", "joint"):
        routing = router_with((True, False, True))(torch.tensor([[0.0]]), tape_in(stage, tokens=1))

        assert routing.experts_TK.tolist() == [[0, -1, 2]]
        assert routing.weights_TK.tolist() == [[0.5, 0.0, 0.5]]
        assert routing.logits_TE.tolist() == [[0.0, -math.inf, 0.0]]


def test_stage_joint_is_in_between():
    """beta = 1/4: three quarters of the one-hot; a token without a domain is the router's alone."""
    routing = router_with()(torch.zeros(2, 1), tape_in("joint", [1, -1], ramp=0.25))

    twelfth = 1 / 12
    expected = torch.tensor([[twelfth, 0.75 + twelfth, twelfth], [1 / 3, 1 / 3, 1 / 3]])
    torch.testing.assert_close(routing.weights_TK, expected)


def test_stage_joint_where_the_named_expert_has_no_rows():
    """It adds nothing there, so beta of the mass is left."""
    routing = router_with((True, False, True))(torch.zeros(1, 1), tape_in("joint", [1], ramp=0.25, tokens=1))

    torch.testing.assert_close(routing.weights_TK, torch.tensor([[0.125, 0.0, 0.125]]))


@given(st.lists(st.integers(-1, 2), min_size=1, max_size=5), st.floats(-3, 3))
def test_the_ramp_goes_from_the_hard_to_the_soft_stage(ids, score):
    """At 0 the weights of named tokens are those of stage "expert", at 1 those of stage "router"."""
    x_TD, tokens, router = torch.full((len(ids), 1), score), len(ids), router_with()

    def weights_in(*stage):
        return dense_weights(router(x_TD, tape_in(*stage, tokens=tokens)), 3)

    hard_TE, soft_TE = weights_in("expert", ids), weights_in("router")
    named_T1 = torch.tensor(ids)[:, None] >= 0
    torch.testing.assert_close(weights_in("joint", ids, 0.0), torch.where(named_T1, hard_TE, soft_TE))
    torch.testing.assert_close(weights_in("joint", ids, 1.0), soft_TE)


def test_stage_sparse_sends_gradients_through_kept_scores_only():
    """The third of three experts is not kept: its row stays where it is; the others' rows pull against each other."""
    router = router_with()
    routing = router(torch.tensor([[1.0]]), tape_in("sparse", tokens=1))
    routing.weights_TK[0, 0].backward()

    p = 1 / (1 + math.exp(-1))
    slope = p * (1 - p)
    assert routing.experts_TK.tolist() == [[0, 1]]
    torch.testing.assert_close(router.weight_ED.grad, torch.tensor([[slope], [-slope], [0.0]]))


def test_stage_router_sends_gradients_to_all_rows():
    """Of a dense softmax."""
    router = router_with()
    router(torch.tensor([[1.0]]), tape_in("router", tokens=1)).weights_TK[0, 0].backward()

    p_E = torch.tensor([1.0, 0.0, -1.0]).softmax(-1)
    expected_E = p_E[0] * (torch.tensor([1.0, 0.0, 0.0]) - p_E)
    torch.testing.assert_close(router.weight_ED.grad, expected_E[:, None])


def test_promises_hold_in_training_and_evaluation():
    """Layers skip a look for tokens without experts in evaluation only, and know how many may act."""
    router = router_with((True, False, True, True), rows=((1.0,),) * 4)
    assert (router.every_token, router.top_k) == (False, 4)
    router.eval()
    assert (router.every_token, router.top_k) == (True, 2)
    router.keep_experts([1, 2])
    assert (router.every_token, router.top_k) == (True, 1)


def test_errors_of_ids():
    """No ids where they are needed, several where one is."""
    with pytest.raises(ValueError, match="none were given"):
        router_with()(torch.zeros(2, 1), tape_in("expert"))
    several = Tape(settings=Settings(stage="expert", given=GivenIds(ids=torch.zeros(1, 2, 3, dtype=torch.long))))
    several.leading = (1, 2)
    with pytest.raises(ValueError, match="one domain, but 3 expert ids"):
        router_with()(torch.zeros(2, 1), several)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"top_k": 0}, "top_k"), ({"temperature": 0.0}, "temperature"), ({"init_std": -1.0}, "init_std")],
)
def test_errors_of_options(options, match):
    """Each says which option."""
    with pytest.raises(ValueError, match=match):
        HardSoft(**options)


# --- stages of a model ------------------------------------------------------------------------------------------------


def test_stage_expert_is_each_adapter_alone():
    """A training call in the hard stage gives the logits of the named experts, row by row, and trains no other."""
    model = patched()
    inputs = tiny.inputs(model)
    moelora.set_stage(model, "expert")
    assert trained(model) == {"bank"}

    hard = model.train()(**inputs, expert_ids=torch.tensor([2, 0])).logits
    with moelora.use_experts(model, ["expert2", "expert0"]):
        torch.testing.assert_close(hard, model(**inputs).logits)

    model(**inputs, labels=inputs["input_ids"], expert_ids=torch.tensor([2, 2])).loss.backward()
    assert with_gradient(model) == {"bank"}
    assert expert_gradients(model) == {2}


def test_stage_router_trains_every_row_of_every_router_and_no_expert():
    """Dense, over frozen experts; as with experts that are buffers, also in what is kept for the backward pass."""
    model = patched()
    inputs = tiny.inputs(model)
    buffers = copy.deepcopy(model)
    moelora.set_trainable(buffers, experts=False)
    moelora.set_stage(model, "router")
    moelora.set_stage(buffers, "router")

    def run(model):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss = model.train()(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        return loss, sum(kept)

    (loss, kept), (loss_of_buffers, kept_of_buffers) = run(model), run(buffers)

    assert trained(model) == {"router"}
    assert with_gradient(model) == {"router"}
    for router in model._moelora.routers().values():
        assert (router.weight_ED.grad.abs().sum(1) > 0).all()
    torch.testing.assert_close(loss, loss_of_buffers)
    assert kept == kept_of_buffers


def test_a_stage_keeps_the_parameters_of_an_optimiser():
    """Flags change, objects do not; what is frozen loses its gradient and is not moved, not even by its momentum."""
    model = patched()
    inputs = tiny.inputs(model)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    known = [id(p) for group in optimiser.param_groups for p in group["params"]]

    for stage, still in (("joint", "base"), ("router", "bank"), ("expert", "router")):
        moelora.set_stage(model, stage)
        before = snapshot(model)
        model.train()(**inputs, labels=inputs["input_ids"], expert_ids=torch.tensor([0, 1])).loss.backward()
        optimiser.step()
        for name, value in snapshot(model).items():
            assert torch.equal(value, before[name]) == (part_of(name) in (still, "base")), (stage, name)
    assert known == [id(p) for p in model.parameters() if id(p) in known]


def test_frozen_adapters_are_routed_and_never_trained(tmp_path):
    """Public adapters: the router's stages train routers, and the expert's stage says what is missing."""
    for seed, name in enumerate("ab"):
        tiny.adapter(tiny.model("llama"), tmp_path / name, seed=seed)
    config = MoELoRAConfig(router=HardSoft(top_k=2), losses=SILENT)
    model = moelora.patch_model(tiny.model("llama"), [tmp_path / "a", tmp_path / "b"], config=config)
    for stage in ("router", "joint", "sparse"):
        moelora.set_stage(model, stage)
        assert trained(model) == {"router"}

    for wrong in (
        lambda: moelora.set_stage(model, "expert"),
        lambda: moelora.set_stage(model, "sparse", experts=True),
        lambda: HardSoftSchedule(model, expert_steps=1),
    ):
        with untouched(model), pytest.raises(ValueError, match=r"all experts are frozen.*set_trainable"):
            wrong()
    assert model._moelora.tape.settings.stage == "sparse"


def test_experts_may_be_trained_in_the_router_stage_or_left_in_another():
    """`experts` overrules the table."""
    model = patched()
    moelora.set_stage(model, "router", experts=True)
    assert trained(model) == {"router", "bank"}
    moelora.set_stage(model, "joint", 0.5, experts=False)
    assert trained(model) == {"router"}
    assert model._moelora.tape.settings.ramp == 0.5


def test_errors_of_set_stage():
    """Each says what to do, and changes nothing."""
    model, single = patched(), patched(top_k=1)
    plain = moelora.patch_model(tiny.model("llama"), num_experts=2, rank=2)
    wrong = [
        (lambda: moelora.set_stage(model, "soft"), r"unknown stage 'soft'.*'joint'"),
        (lambda: moelora.set_stage(plain, "router"), "knows no stages.*HardSoft"),
        (lambda: moelora.set_stage(tiny.model("llama"), "router"), "patch_model"),
        (lambda: moelora.set_stage(model, "joint", 1.5), r"ramp must lie in \[0, 1\]"),
        (lambda: moelora.set_stage(model, "router", 0.5), "belongs to the stage 'joint'"),
        (lambda: moelora.set_stage(single, "sparse"), "top_k=1 the one kept weight is always 1"),
        (lambda: HardSoftSchedule(single, router_steps=1, sparse_steps=1), "top_k=1"),
        (lambda: HardSoftSchedule(model), "needs a stage with steps"),
        (lambda: HardSoftSchedule(model, router_steps=-1), "router_steps must not be negative"),
        (lambda: HardSoftSchedule(plain, router_steps=1), "knows no stages"),
        (lambda: HardSoftSchedule(model, router_steps=1).step(), r"schedule\.start\(\)"),
    ]
    for verb, match in wrong:
        with pytest.raises(ValueError, match=match):
            verb()
    with moelora.given_experts(model, 0), pytest.raises(ValueError, match="outside of them"):
        moelora.set_stage(model, "joint")
    assert model._moelora.tape.settings == Settings()


def test_a_stage_is_watched_for_gradients_of_its_own():
    """What another stage was to train is not missed in this one; warnings are errors."""
    model = patched()
    batch = collate(rows(3))
    moelora.set_stage(model, "joint")
    model.train()(**batch)

    moelora.set_stage(model, "expert")
    for _ in range(2):
        model(**batch).loss.backward()

    model.register_parameter("forgotten", torch.nn.Parameter(torch.zeros(3)))
    moelora.set_stage(model, "router")
    model(**batch).loss.backward()
    with pytest.warns(UserWarning, match="1 trainable tensors got no gradient .* forgotten"):
        model(**batch)


def test_a_copy_is_in_no_stage():
    """As with all settings of a call."""
    model = patched()
    moelora.set_stage(model, "expert")

    assert copy.deepcopy(model)._moelora.tape.settings.stage is None
    assert model._moelora.tape.settings.stage == "expert"


def test_checkpointing_runs_the_stage_of_the_call_again():
    """The model is in another stage when backward runs the layers a second time."""
    gradients = []
    for checkpointing in (False, True):
        model = patched(losses=AuxLosses(mutual_information=0.1))
        inputs = tiny.inputs(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        moelora.set_stage(model, "joint", 0.5)
        loss = model.train()(**inputs, labels=inputs["input_ids"], expert_ids=torch.tensor([0, 1])).loss
        model._moelora.tape.settings = Settings(stage="sparse")
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


# --- the schedule -----------------------------------------------------------------------------------------------------


def test_schedule_by_hand():
    """2 hard steps, 1 soft, 4 in between with a growing ramp, then sparse for good."""
    model = patched()
    schedule = HardSoftSchedule(model, expert_steps=2, router_steps=1, joint_steps=4, sparse_steps=1)
    assert trained(model) == {"router", "bank"}, "an optimiser made now knows all"
    assert model._moelora.tape.settings.stage is None

    schedule.start()
    seen = []
    for _ in range(10):
        settings = model._moelora.tape.settings
        seen.append((settings.stage, settings.ramp, trained(model)))
        schedule.step()

    experts, routers, both = {"bank"}, {"router"}, {"bank", "router"}
    assert seen == [
        ("expert", 0.0, experts),
        ("expert", 0.0, experts),
        ("router", 0.0, routers),
        ("joint", 0.0, both),
        ("joint", 0.25, both),
        ("joint", 0.5, both),
        ("joint", 0.75, both),
        ("sparse", 0.0, both),
        ("sparse", 0.0, both),
        ("sparse", 0.0, both),
    ]


@given(st.lists(st.integers(0, 4), min_size=4, max_size=4).filter(any), st.integers(0, 20))
def test_every_stage_has_its_steps(lengths, last):
    """In any schedule, stages come in order, each for its number of steps, the last one for the rest; ramps grow."""
    schedule = HardSoftSchedule.__new__(HardSoftSchedule)
    schedule.lengths = dict(zip(STAGES, lengths, strict=True))

    seen = [schedule.at(steps) for steps in range(sum(lengths) + last)]

    expected = [stage for stage, length in schedule.lengths.items() for _ in range(length)]
    assert [stage for stage, _ in seen] == expected + [expected[-1]] * last
    ramps = [ramp for stage, ramp in seen if stage == "joint"]
    assert ramps == sorted(ramps)
    assert all(0 <= ramp <= 1 for ramp in ramps)
    if expected[-1] == "joint" and last:
        assert ramps[-1] == 1.0


def test_schedule_resumes():
    """A new model and a new schedule go on where the old one was; other lengths are refused."""
    schedule = HardSoftSchedule(patched(), expert_steps=2, joint_steps=2)
    schedule.start()
    for _ in range(3):
        schedule.step()

    model = patched()
    again = HardSoftSchedule(model, expert_steps=2, joint_steps=2)
    again.load_state_dict(schedule.state_dict())

    assert again.steps == 3
    assert model._moelora.tape.settings == Settings(stage="joint", ramp=0.5)
    other = HardSoftSchedule(model, expert_steps=3, joint_steps=2)
    with pytest.raises(ValueError, match="saved with the lengths"):
        other.load_state_dict(schedule.state_dict())


# --- Trainer ----------------------------------------------------------------------------------------------------------


class Rows(list[dict], Dataset[dict]):
    """A dataset in memory."""


def rows(count=16, length=6):
    """Each domain has tokens of its own."""
    generator = torch.Generator().manual_seed(0)
    return Rows(
        {"ids": torch.randint(3 + 8 * (n % 3), 11 + 8 * (n % 3), (length,), generator=generator), "domain": n % 3}
        for n in range(count)
    )


def collate(batch):
    """Ids of the domains go along with the batch."""
    ids = torch.stack([row["ids"] for row in batch])
    domains = torch.tensor([row["domain"] for row in batch])
    return {"input_ids": ids, "labels": ids, "expert_ids": domains}


class Watch(TrainerCallback):
    """The stage of each step, and what moved in it."""

    def __init__(self, model):
        self.model, self.seen, self.before = model, [], {}

    def on_step_begin(self, args, state, control, **kwargs):
        self.before = snapshot(self.model)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.stage = self.model._moelora.tape.settings.stage

    def on_optimizer_step(self, args, state, control, **kwargs):
        moved = {part_of(n) for n, p in snapshot(self.model).items() if not torch.equal(p, self.before[n])}
        self.seen.append((self.stage, moved))


def run_trainer(model, folder, *, resume=None, callbacks=(), **options):
    """Two hard steps, two soft ones, then in between; several batches a step."""
    schedule = HardSoftSchedule(model, expert_steps=2, router_steps=2, joint_steps=2)
    defaults: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "save_strategy": "no",
    }
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        learning_rate=1e-2,
        remove_unused_columns=False,
        **(defaults | options),
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows(),
        data_collator=collate,
        callbacks=[*callbacks, schedule.callback()],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, schedule


def test_trainer_goes_through_the_stages(tmp_path):
    """By steps of the optimiser, not batches; each stage moves what it says."""
    model = patched()
    watch = Watch(model)

    run_trainer(model, tmp_path, callbacks=[watch])

    hard, soft, both = ("expert", {"bank"}), ("router", {"router"}), ("joint", {"bank", "router"})
    assert watch.seen == [hard, hard, soft, soft, both, both]


def test_trainer_may_train_again(tmp_path):
    """Its next optimiser knows the experts again, though the last stage has frozen them."""
    model = patched()
    watch = Watch(model)
    options = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 2}
    trainer, schedule = run_trainer(model, tmp_path, callbacks=[watch], max_steps=3, **options)
    assert model._moelora.tape.settings.stage == "router"
    assert trained(model) == {"router", "bank"}

    trainer.train()

    assert watch.seen == [("expert", {"bank"}), ("expert", {"bank"}), ("router", {"router"})] * 2
    assert schedule.steps == 3


@pytest.mark.parametrize("step", [1, 3])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(step, tmp_path):
    """Saved within a stage, with the rest frozen: equal weights bit for bit."""
    whole, _ = run_trainer(patched(), tmp_path / "a", save_strategy="steps", save_steps=step)

    again, schedule = run_trainer(patched(seed=2), tmp_path / "b", resume=str(tmp_path / f"a/checkpoint-{step}"))

    assert schedule.steps == 6
    expected = snapshot(whole.model)
    assert all(torch.equal(value, expected[name]) for name, value in snapshot(again.model).items())


# --- Mamba ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "mamba2"])
def test_mamba_is_trained_through_all_stages(family):
    """Before and after the selective scan: the loss goes down in every stage, and only what a stage trains moves."""
    model = patched(family, roles=["ssm_in", "ssm_out"])
    assert {site.rpartition(".")[2] for site in model._moelora.layers} == {"in_proj", "out_proj"}
    batch = collate(rows(6))
    schedule = HardSoftSchedule(model, expert_steps=12, router_steps=12, joint_steps=12, sparse_steps=12)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule.start()

    moves = {"expert": {"bank"}, "router": {"router"}, "joint": {"bank", "router"}, "sparse": {"bank", "router"}}
    model.train()
    for stage, expected in moves.items():
        before, values = snapshot(model), []
        while model._moelora.tape.settings.stage == stage and len(values) < 12:
            loss = model(**batch).loss
            values.append(loss.item())
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
        assert len(values) == 12
        # the ramp of "joint" changes the task from step to step
        assert values[-1] < values[0] or stage == "joint", (stage, values)
        for name, value in snapshot(model).items():
            assert torch.equal(value, before[name]) != (part_of(name) in expected), (stage, name)


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_trains_mamba(stage):
    """The same in every stage on its own, with the ramp held still."""
    model = patched("mamba", roles=["ssm_in", "ssm_out"])
    batch = collate(rows(6))
    moelora.set_stage(model, stage, 0.5 if stage == "joint" else 0.0)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    values = []
    model.train()
    for _ in range(8):
        loss = model(**batch).loss
        values.append(loss.item())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    assert values[-1] < values[0] - 1e-3


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_a_mixture_is_saved_and_loaded(family, tmp_path):
    """Bit for bit, whatever stage it was saved in; the router's options come along."""
    model = patched(family)
    moelora.set_stage(model, "router")
    inputs = tiny.inputs(model)
    with torch.no_grad():
        expected = model.eval()(**inputs).logits

    moelora.save(model, tmp_path / "mixture")
    loaded = moelora.load(tiny.model(family), tmp_path / "mixture")

    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, expected)
    assert loaded._moelora.config.router == HardSoft(top_k=2, init_std=0.3)


# --- preservation -----------------------------------------------------------------------------------------------------


def test_preservation_by_hand():
    """(1 - 0)^2 + (2 - 4)^2 + 3^2 = 14, with gradient 2 (theta - theta^0) and none for the anchors."""
    thetas = [torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([[3.0]], requires_grad=True)]
    anchors = [torch.tensor([0.0, 4.0], requires_grad=True), torch.tensor([[0.0]])]

    value = losses.preservation(thetas, anchors)
    gradients = torch.autograd.grad(value, [*thetas, anchors[0]], allow_unused=True)

    assert value.item() == 14.0
    assert gradients[0].tolist() == [2.0, -4.0]
    assert gradients[1].tolist() == [[6.0]]
    assert gradients[2] is None
    with pytest.raises(ValueError, match="2 parameters and 1 anchors"):
        losses.preservation(thetas, anchors[:1])
    with pytest.raises(ValueError, match="0 parameters"):
        losses.preservation([], [])


def test_an_anchor_measures_and_pulls_back_only_what_it_protects():
    """0 at first; then the squared distance of the protected experts' factors, with gradients for them alone."""
    model = patched()
    anchor = Anchor(model, ["expert1"])
    assert anchor.penalty().item() == 0.0

    with torch.no_grad():
        for layer in model._moelora.layers.values():
            layer.bank.A_trainable_RD += 0.5
    anchor.penalty().backward()

    sites = model._moelora.layers.values()
    expected = sum(0.25 * 2 * layer.in_features for layer in sites)
    assert anchor.penalty().item() == pytest.approx(expected, rel=1e-5)
    for layer in sites:
        bank = layer.bank
        rows_RD = torch.zeros_like(bank.A_trainable_RD)
        rows_RD[bank.owner_R == 1] = 1.0
        torch.testing.assert_close(bank.A_trainable_RD.grad, rows_RD)
        assert not bank.B_trainable_RO.grad.any()


def test_an_anchored_expert_stays_nearer():
    """Trained with the router, as LoRA-Mixer's variant does."""
    moved = []
    for weight in (0.0, 10.0):
        model = patched()
        moelora.set_stage(model, "router", experts=True)
        anchor, batch = Anchor(model), collate(rows(6))
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for _ in range(10):
            loss = model.train()(**batch).loss + weight * anchor.penalty()
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        moved.append(anchor.penalty().item())

    assert 0 < moved[1] < moved[0] / 2


def test_an_anchor_holds_an_expert_that_has_a_bias_and_frozen_neighbours(tmp_path):
    """Rows stand elsewhere then; what is frozen needs no anchor, and what has changed is noticed."""
    for seed, name in enumerate("ab"):
        tiny.adapter(tiny.model("llama"), tmp_path / name, seed=seed)
    model = moelora.patch_model(
        tiny.model("llama"), [tmp_path / "a", tmp_path / "b"], config=MoELoRAConfig(router=HardSoft(top_k=2))
    )
    moelora.set_trainable(model, experts=["a"])
    anchor = Anchor(model)
    assert anchor.names == ("a",)
    with torch.no_grad():
        for layer in model._moelora.layers.values():
            layer.bank.B_trainable_RO += 1
    assert anchor.penalty().item() == sum(4 * layer.out_features for layer in model._moelora.layers.values())

    for names, match in ((["b"], r"\['b'\] are frozen"), (["z"], "no expert 'z'"), ([], "are frozen")):
        with pytest.raises(ValueError, match=match):
            Anchor(model, names)
    moelora.set_trainable(model, experts=["b"])
    with pytest.raises(ValueError, match="make a new Anchor"):
        anchor.penalty()
