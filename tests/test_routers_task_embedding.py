"""One mixture for each task: the same for all its tokens, dense, trained, saved."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moelora
from moelora import MoELoRAConfig, TaskEmbedding
from moelora.call_settings import GivenIds, Settings
from moelora.routing import dense_weights
from moelora.tape import Tape
from moelora.testing import tiny
from moelora.testing.router_contract import router_contract

TASKS = ("summary", "dialogue", "triage")


def build(available, **options):
    """A router of three tasks."""
    config = TaskEmbedding(tasks=TASKS, width=4, init_std=1.0, **options)
    return config.build(8, available, torch.Generator().manual_seed(0))


def ask(router, tasks_TK):
    """Its answer to tokens of these tasks."""
    tape = Tape(settings=Settings(given=GivenIds(ids=tasks_TK[None])), leading=(1, tasks_TK.shape[0]))
    return router(torch.randn(tasks_TK.shape[0], 8), tape)


@pytest.fixture
def model():
    """A tiny mixture of random experts, routed by task."""
    config = MoELoRAConfig(router=TaskEmbedding(tasks=TASKS, width=4, init_std=1.0))
    patched = moelora.patch_model(tiny.model("llama"), num_experts=3, rank=2, config=config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in patched.named_parameters():
        if ".bank." in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return patched


def logits(model, ids=None, **inputs):
    """What it answers to two rows of six tokens."""
    tokens = torch.arange(3, 15).view(2, 6)
    with torch.no_grad():
        if ids is None:
            return model(input_ids=tokens, **inputs).logits
        with moelora.given_experts(model, ids):
            return model(input_ids=tokens, **inputs).logits


def test_the_router_keeps_the_contract():
    """The tokens' tasks are on the tape, and do not move with the experts; some tokens have none."""
    tasks = [0, 2, -1, 1, 2, 0]

    def tape(tokens, order):
        return Tape(settings=Settings(given=GivenIds(ids=torch.tensor([[tasks[token] for token in tokens]]))))

    router_contract(lambda width, available: build(available), tape=tape)


@given(
    st.lists(st.booleans(), min_size=1, max_size=5).filter(any), st.lists(st.integers(-1, 2), min_size=1, max_size=6)
)
def test_the_gate_is_a_softmax_of_the_tasks_embedding(available, tasks):
    """Written out with another formula; an absent expert has no share, and a token without a task no expert."""
    router = build(available)
    routing = ask(router, torch.tensor(tasks))

    assert routing.logits_TE is None
    for task, weights_E in zip(tasks, dense_weights(routing, len(available)), strict=True):
        scores_E = (router.weight_EH * router.embedding_MH[task]).sum(-1).exp() * torch.tensor(available)
        expected_E = scores_E / scores_E.sum() if task >= 0 else torch.zeros(len(available))
        torch.testing.assert_close(weights_E, expected_E, rtol=1e-4, atol=1e-6)
    acts_TK = (torch.tensor(tasks)[:, None] >= 0) & torch.tensor(available)
    assert torch.equal(routing.experts_TK >= 0, acts_TK)


def test_the_gradient_reaches_the_tasks_that_were_seen():
    """The gate learns, and of the embeddings those of the batch."""
    router: Any = build([True] * 3)
    routing = ask(router, torch.tensor([0, 2, -1]))
    (routing.weights_TK * torch.arange(3)).sum().backward()

    assert (router.embedding_MH.grad.abs().sum(-1) > 0).tolist() == [True, False, True]
    assert router.weight_EH.grad.abs().sum() > 0
    assert torch.isfinite(router.weight_EH.grad).all()


def test_a_new_expert_has_a_score_of_zero():
    """The others keep theirs, so their shares stay in proportion."""
    router = build([True, True])
    before_ME = router.mixtures().detach()
    router.add_experts([True])
    after_ME = router.mixtures().detach()

    torch.testing.assert_close(after_ME[:, 0] / after_ME[:, 1], before_ME[:, 0] / before_ME[:, 1])
    assert router.top_k == 3
    assert not router.weight_EH[2].any()


def test_tasks_in_a_model(model):
    """By name or id, for the call, for rows, with the batch; -1 is the base model; each task answers differently."""
    one, two = logits(model, "summary"), logits(model, "triage")
    assert (one - two).abs().max() > 1e-3
    assert torch.equal(logits(model, ["summary", "triage"]), torch.stack([one[0], two[1]]))
    assert torch.equal(logits(model, expert_ids=torch.tensor([0, 2])), torch.stack([one[0], two[1]]))
    with moelora.disabled(model):
        base = logits(model)
    assert torch.equal(logits(model, -1), base)

    gates_ME = next(iter(model._moelora.routers().values())).mixtures()
    assert gates_ME.shape == (3, 3)
    per_token = torch.zeros(2, 6, dtype=torch.long)
    torch.testing.assert_close(logits(model, per_token), one)


def test_saved_and_loaded(model, tmp_path):
    """Tasks, gates and answers are the same."""
    moelora.save(model, tmp_path)
    twin = moelora.load(tiny.model("llama"), tmp_path)

    assert twin._moelora.config == model._moelora.config
    assert torch.equal(logits(twin, "dialogue"), logits(model, "dialogue"))


def test_training_moves_experts_and_gates(model):
    """All of a mixture's tensors get a gradient from a batch of all tasks but the base's."""
    ids = torch.tensor([[0, 0, 1, 1, 2, 2]] * 2)
    tokens = torch.arange(3, 15).view(2, 6)
    model.train()(input_ids=tokens, labels=tokens, expert_ids=ids).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert missing == []


def test_experts_are_removed_and_added(model):
    """The tasks stay what they are."""
    moelora.remove_expert(model, "expert1")
    moelora.add_expert(model, name="new", rank=2)
    assert torch.isfinite(logits(model, "dialogue")).all()
    assert model._moelora.given_names == TASKS


def test_the_configuration_survives_json():
    """Lists of JSON are tuples again."""
    router = TaskEmbedding(tasks=["a", "b"], width=3)
    config = MoELoRAConfig(router=router)
    assert MoELoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert dataclasses.replace(router, width=4).tasks == ("a", "b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": "summary"}, "the one text 'summary'"),
        ({"tasks": ()}, "tasks must be different names, one at least"),
        ({"tasks": ("a", "a")}, "tasks must be different names"),
        ({"tasks": ("a", "")}, "tasks must be different names"),
        ({"tasks": ("a",), "width": 0}, "width of a task's embedding must be at least 1, got 0"),
        ({"tasks": ("a",), "init_std": -1.0}, "init_std must not be negative"),
    ],
)
def test_options_that_make_no_sense(options, message):
    """Each says what was expected."""
    with pytest.raises(ValueError, match=message):
        TaskEmbedding(**options)


def test_what_does_not_fit(model):
    """Several tasks of a token, none at all, unknown ones, and a name without its options."""
    with pytest.raises(ValueError, match="a token has one task, but 2 ids were given"):
        logits(model, torch.zeros(2, 6, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="none were given"):
        logits(model)
    with pytest.raises(ValueError, match=r"between -1 .* and 2"):
        logits(model, expert_ids=torch.tensor([3, 0]))
    with pytest.raises(ValueError, match="no task 'summarise'; this model has 3 tasks"):
        logits(model, "summarise")
    with pytest.raises(
        ValueError, match=r"router='task_embedding' has options without a default.*TaskEmbedding\(tasks="
    ):
        moelora.patch_model(tiny.model("llama"), num_experts=2, rank=2, router="task_embedding")
