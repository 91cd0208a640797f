"""UnlearningStack and ContinualStack on a tiny model: who acts where, and what an error leaves behind."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from stack_texts import BENIGN, FORGET, LENGTH, OTHER, PROMPT, prompts, texts
from transformers import BertConfig, BertForSequenceClassification

import moelora
from moelora.continual import (
    Collate,
    ContinualStack,
    HiddenStates,
    Orthogonality,
    Supervised,
    Training,
    UniformOptions,
    UnlearningStack,
)
from moelora.continual.gate import Promise
from moelora.continual.gathering import gather
from moelora.mixture import find_mixture
from moelora.testing import tiny

QUICK = Training(epochs=1, learning_rate=1e-2, batch_size=50)
BENIGN_TEXTS = texts(BENIGN, 150)


def made(model, *topics: int, **options) -> UnlearningStack:
    """A stack that has forgotten these topics."""
    stack = UnlearningStack(model, rank=2, **options)
    for topic in topics:
        stack.forget(texts(topic, 320), calibration=BENIGN_TEXTS, training=QUICK)
    return stack


@pytest.fixture(scope="module")
def forgetful():
    """A stack with two requests and the untouched model; tests that change it take a copy's."""
    model = tiny.model("llama").eval()
    base = copy.deepcopy(model)
    return made(model, FORGET, OTHER), base


def state_of(model) -> dict[str, torch.Tensor]:
    """A copy of all parameters and buffers."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before: dict[str, torch.Tensor]) -> bool:
    """Whether these are still the model's, bit for bit."""
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


def refused(message: str, call: Callable[[], object], model) -> None:
    """An error that leaves the model, its flags and its gates as they were."""
    before, flags = state_of(model), [parameter.requires_grad for parameter in model.parameters()]
    with torch.no_grad():
        logits = model(**prompts(FORGET, OTHER, BENIGN)).logits
    with pytest.raises(ValueError, match=message):
        call()
    assert unchanged(model, before)
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    with torch.no_grad():
        assert torch.equal(model(**prompts(FORGET, OTHER, BENIGN)).logits, logits)


# --- unlearning -------------------------------------------------------------------------------------------------------


def test_each_request_opens_its_own_gate_and_no_other(forgetful):
    """Prompts that no stack has seen."""
    stack, _ = forgetful
    weights_BE = stack.weights(prompts(FORGET, OTHER, BENIGN, FORGET))
    assert weights_BE.tolist() == [[1, 0], [0, 1], [0, 0], [1, 0]]
    assert stack.distances(prompts(FORGET)).argmin() == 0


def test_closed_rows_are_the_base_bit_for_bit_and_open_ones_are_not(forgetful):
    """In one batch, beside each other."""
    stack, base = forgetful
    batch = prompts(FORGET, BENIGN, OTHER, BENIGN)
    with torch.no_grad():
        got, expected = stack.model(**batch).logits, base(**batch).logits
    assert [torch.equal(*rows) for rows in zip(got, expected, strict=True)] == [False, True, False, True]


def test_generation_of_a_closed_prompt_is_the_base_models(forgetful):
    """Sampled, from the same state of the generator."""
    stack, base = forgetful
    batch = prompts(BENIGN, FORGET)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": True}
    outputs = []
    for model in (stack.model, base):
        torch.manual_seed(0)
        outputs.append(model.generate(**{name: value[:1] for name, value in batch.items()}, **options))
    assert torch.equal(*outputs)


@pytest.mark.parametrize(("prompt", "answer", "open_"), [(BENIGN, FORGET, False), (FORGET, BENIGN, True)])
def test_labels_are_no_prompt(forgetful, prompt, answer, open_):
    """With labels for each token a gate reads what comes before them, whatever the answer is about."""
    stack, base = forgetful
    answers = [prompts(answer, seed=seed)["input_ids"] for seed in range(9)]
    ids_BL = torch.cat([prompts(prompt)["input_ids"], *answers], dim=1)
    labels_BL = torch.where(torch.arange(ids_BL.shape[1]) < PROMPT, -100, ids_BL)
    with torch.no_grad():
        got, expected = (model(input_ids=ids_BL, labels=labels_BL).logits for model in (stack.model, base))
    assert torch.equal(got, expected) is not open_


def test_a_request_forgets_and_a_later_one_leaves_it_as_it_is():
    """The first expert keeps its bits, and its request its loss."""
    model = tiny.model("llama").eval()
    batch = prompts(FORGET)
    answers = {"input_ids": texts(FORGET, 1)[0]["input_ids"][None], "labels": None}
    answers["labels"] = torch.where(torch.arange(LENGTH) < PROMPT, -100, answers["input_ids"])
    with torch.no_grad():
        before = model(**answers).loss
    stack = made(model, FORGET)
    first = find_mixture(model)[1].layers["model.layers.0.self_attn.q_proj"].bank.expert(0)
    with torch.no_grad():
        logits, after = model(**batch).logits, model(**answers).loss
    assert after > before

    stack.forget(texts(OTHER, 320), calibration=BENIGN_TEXTS, training=QUICK)
    again = find_mixture(model)[1].layers["model.layers.0.self_attn.q_proj"].bank.expert(0)
    assert torch.equal(first.A_RD, again.A_RD)
    assert torch.equal(first.B_RO, again.B_RO)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, logits, rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_revoked_requests_are_gone_and_the_last_leaves_the_base():
    """Parameters, buffers and flags are those of before."""
    model = tiny.model("llama").eval()
    before, flags = state_of(model), [parameter.requires_grad for parameter in model.parameters()]
    stack = made(model, FORGET, OTHER)
    first, second = stack.requests
    stack.revoke(first)
    assert stack.requests == (second,)
    assert stack.weights(prompts(FORGET, OTHER)).tolist() == [[0], [1]]
    stack.revoke("request-2")
    assert stack.requests == ()
    assert not moelora.is_patched(model)
    assert unchanged(model, before)
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match="there is no request 'request-2'; there are"):
        stack.revoke(second)
    with pytest.raises(ValueError, match="this stack has no requests yet"):
        stack.weights(prompts(FORGET))


def test_the_certificate_speaks_of_all_requests(forgetful):
    """Its rates are those of the union of their gates."""
    stack, _ = forgetful
    for request in stack.requests:
        certificate = request.certificate
        assert certificate.requests == 2
        assert certificate.outcome == "both_kept"
        assert certificate.miss.samples == 96
        assert certificate.fire.samples == len(BENIGN_TEXTS)
        assert certificate.union_fire_bound <= 0.05
        assert "it erases nothing" in str(certificate)
    assert [request.name for request in stack.requests] == ["request-1", "request-2"]
    assert stack.requests[0].overlap == 0 < stack.requests[1].overlap < 1


def test_an_interrupted_call_does_not_take_a_request_off_its_prompts(forgetful):
    """Ctrl-C in a part of the model that is called alone: the next call of it does what it did before."""
    stack, base = forgetful
    batch, part = prompts(FORGET), stack.model.model

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        before_BLD = part(**batch).last_hidden_state
        handle = part.layers[0].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            part(**batch)
        handle.remove()
        after_BLD = part(**batch).last_hidden_state
        bare_BLD = base.model(**batch).last_hidden_state
    assert torch.equal(before_BLD, after_BLD)
    assert not torch.equal(after_BLD, bare_BLD)


def test_a_threshold_stays_while_the_rate_of_all_allows_it():
    """What an earlier request was promised and given is not taken away by a later one that has room of its own."""
    stack = UnlearningStack(tiny.model("llama").eval(), rank=2)
    first = stack.forget(texts(FORGET, 320), calibration=BENIGN_TEXTS, training=QUICK)
    before = first.certificate
    second = stack.forget(texts(OTHER, 320), calibration=BENIGN_TEXTS, training=QUICK)
    after = first.certificate
    assert (before.tau_hi, before.miss) == (after.tau_hi, after.miss)
    assert after.requests == 2
    assert after.union_fire_bound == second.certificate.union_fire_bound <= 0.05


def test_spending_leaves_earlier_thresholds_and_adds_up():
    """No earlier gate is calibrated again; bounds and doubts add up."""
    stack = UnlearningStack(tiny.model("llama").eval(), rank=2, union="spending")
    first = stack.forget(texts(FORGET, 320), calibration=texts(BENIGN, 700), training=QUICK)
    before = first.certificate
    stack.forget(texts(OTHER, 320), calibration=texts(BENIGN, 700), training=QUICK)
    after = first.certificate
    assert (before.tau_lo, before.fire) == (after.tau_lo, after.fire)
    assert after.requests == 2
    assert before.union_fire_bound < after.union_fire_bound <= 0.05
    assert after.union_confidence < before.union_confidence


def test_experts_do_not_leave_their_gates(forgetful, tmp_path):
    """Merged or exported, an unlearning expert would act on every input."""
    stack, _ = forgetful
    refused("must not leave the gates", lambda: moelora.merge(stack.model, weights="request-1"), stack.model)
    refused(
        "must not leave the gates",
        lambda: moelora.export_adapter(stack.model, tmp_path / "out", weights="request-1"),
        stack.model,
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("at least 299", {"max_miss": 0.01}),
        ("there is a request 'request-1' already", {"name": "request-1"}),
        ("unknown nan_policy 'ajar'", {"nan_policy": "ajar"}),
        ("overlap, so no threshold keeps both rates", {"calibration": texts(OTHER, 200, seed=5)}),
        ("held_out is a share between 0 and 1", {"held_out": 1.5}),
        ("the dataset is empty", {"held_out": []}),
        ("is not a mapping|a dataset has a length", {"calibration": 3}),
        (
            "in step 2 of the training of 'request-3'",
            {"training": Training(epochs=1, learning_rate=1e30, max_grad_norm=float("inf"))},
        ),
        ("options", {"objective": UniformOptions()}),
    ],
)
def test_refused_requests_leave_everything_as_it_was(forgetful, message, options):
    """Model, stack and gates, whether it is refused before the training or in it."""
    stack, _ = forgetful
    stack = copy.copy(stack)
    arguments = {"calibration": BENIGN_TEXTS, "training": QUICK} | options
    refused(message, lambda: stack.forget(texts(OTHER, 320, seed=4), **arguments), stack.model)
    assert len(stack.requests) == 2
    assert stack.weights(prompts(FORGET)).tolist() == [[1, 0]]


def test_a_first_request_that_fails_leaves_the_model_unpatched():
    """There was nothing before it."""
    model = tiny.model("llama").eval()
    stack = UnlearningStack(model, rank=2)
    failing = Training(epochs=1, learning_rate=1e30, max_grad_norm=float("inf"), batch_size=20)
    refused("in step", lambda: stack.forget(texts(FORGET, 320), calibration=BENIGN_TEXTS, training=failing), model)
    assert not moelora.is_patched(model)
    assert stack.requests == ()


def test_a_patched_model_and_unknown_options_are_refused(forgetful):
    """When the stack is made, not when it is used."""
    stack, _ = forgetful
    with pytest.raises(ValueError, match="patched"):
        UnlearningStack(stack.model)
    model = tiny.model("llama")
    with pytest.raises(ValueError, match="unknown union 'none'"):
        UnlearningStack(model, union="none")
    with pytest.raises(ValueError, match="unknown mode 'soft'"):
        UnlearningStack(model, orthogonality="soft")
    with pytest.raises(ValueError, match="rank must be at least 1"):
        UnlearningStack(model, rank=0)
    with pytest.raises(ValueError, match="unknown routing 'any'"):
        ContinualStack(model, routing="any")


@pytest.mark.parametrize(("policy", "opened"), [("open", 1.0), ("closed", 0.0)])
def test_features_that_are_not_finite_meet_the_policy(policy, opened):
    """A NaN opens or closes, as was asked for."""
    model = tiny.model("llama").eval()
    stack = UnlearningStack(model, rank=2)
    stack.forget(texts(FORGET, 320), calibration=BENIGN_TEXTS, training=QUICK, nan_policy=policy)
    with torch.no_grad():
        model.get_input_embeddings().weight[BENIGN] = torch.nan
    broken = {"input_ids": torch.full((1, PROMPT), BENIGN), "attention_mask": torch.ones(1, PROMPT, dtype=torch.long)}
    assert stack.weights(broken).tolist() == [[opened]]


def test_placed_away_from_benign_texts_an_expert_hardly_reads_them():
    """OURS-3: little goes through A where a gate errs."""
    model = tiny.model("llama").eval()
    stack = UnlearningStack(model, rank=2)
    stack.forget(texts(FORGET, 320), calibration=BENIGN_TEXTS, training=QUICK, avoid=texts(BENIGN, 50))
    _, mixture = find_mixture(model)
    bank = mixture.layers["model.layers.0.self_attn.q_proj"].bank
    moments = gather(model, [prompts(BENIGN, BENIGN), prompts(FORGET, FORGET)][:1])
    seen = gather(model, [prompts(FORGET, FORGET)])
    A_RD = bank.expert(0).A_RD.double()

    def energy(of):
        moment_DD = of["model.layers.0.self_attn.q_proj"].moment_DD
        return float((A_RD @ moment_DD @ A_RD.T).trace() / moment_DD.trace())

    assert energy(moments) < 0.2 * energy(seen)


def test_a_classifier_forgets_its_classes():
    """One label for a text: each of the classes becomes about as likely as the others, where the gate is open."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        num_labels=4,  # pyright: ignore[reportCallIssue]
    )
    model = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        model.classifier.weight.mul_(100)

    def labelled(topic, count):
        return [{"input_ids": text["input_ids"], "label": 2} for text in texts(topic, count)]

    batch = {name: value[:2] for name, value in Collate(model)(labelled(FORGET, 1) + labelled(BENIGN, 1)).items()}
    batch.pop("labels")
    with torch.no_grad():
        before_BC = model(**batch).logits.softmax(1)
    stack = UnlearningStack(model, rank=4)
    stack.forget(labelled(FORGET, 320), calibration=labelled(BENIGN, 150), training=replace(QUICK, epochs=6))
    with torch.no_grad():
        after_BC = model(**batch).logits.softmax(1)
    assert after_BC[0].max() < 0.4
    assert before_BC[0].max() > 0.6
    assert torch.equal(after_BC[1], before_BC[1])


def test_features_of_another_model_are_asked_of_that_model():
    """They are no hidden states of the call, even if the two models are alike."""
    model, other = tiny.model("llama").eval(), tiny.model("llama", seed=1).eval()
    stack = UnlearningStack(model, rank=2, features=HiddenStates(other))
    stack.forget(texts(FORGET, 320), calibration=BENIGN_TEXTS, training=QUICK)
    calls = []
    other.register_forward_hook(lambda *_: calls.append(1))
    other.model.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(**prompts(FORGET))
    assert calls


# --- continual learning -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", ["gates", "sum", "learned"])
def test_tasks_are_learned_one_after_the_other(routing):
    """Each way to route: losses fall, earlier experts keep their bits, removing all leaves the base."""
    model = tiny.model("llama").eval()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    stack = ContinualStack(model, rank=2, routing=routing, orthogonality="nullspace")
    training = Training(epochs=3, learning_rate=1e-2)
    first = stack.learn(texts(FORGET, 60), training=training)
    kept = find_mixture(model)[1].layers["model.layers.1.self_attn.v_proj"].bank.expert(0)
    second = stack.learn(texts(OTHER, 60), name="other", objective=Supervised(), training=training)
    assert [task.name for task in stack.tasks] == ["task-1", "other"]
    assert first.losses[-1] < first.losses[0]
    assert second.losses[-1] < second.losses[0]
    assert second.overlap < 1e-6
    again = find_mixture(model)[1].layers["model.layers.1.self_attn.v_proj"].bank.expert(0)
    assert torch.equal(kept.A_RD, again.A_RD)
    assert torch.equal(kept.B_RO, again.B_RO)

    if routing == "learned":
        losses = stack.train_router(texts(FORGET, 40) + texts(OTHER, 40), training=Training(epochs=2))
        assert len(losses) == 2
        with pytest.raises(ValueError, match="no gates decide"):
            stack.weights(prompts(FORGET))
    else:
        expected = [[1, 0], [0, 1]] if routing == "gates" else [[1, 1], [1, 1]]
        assert stack.weights(prompts(FORGET, OTHER)).tolist() == expected
        with pytest.raises(ValueError, match="there is no router to train"):
            stack.train_router(texts(FORGET, 4))
    assert model.generate(**prompts(FORGET), max_new_tokens=2).shape[0] == 1

    stack.remove(first)
    stack.remove("other")
    assert not moelora.is_patched(model)
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match="there is no task 'other'"):
        stack.remove("other")


def test_calibrated_tasks_leave_other_prompts_to_the_base():
    """Nearest task, and none beyond its threshold."""
    model = tiny.model("llama").eval()
    base = copy.deepcopy(model)
    stack = ContinualStack(model, rank=2, orthogonality=Orthogonality(mode="basis"))
    for topic in (FORGET, OTHER):
        task = stack.learn(
            texts(topic, 320), training=QUICK, calibration=BENIGN_TEXTS, held_out=0.3, promise=Promise(max_miss=0.05)
        )
        assert task.certificate is not None
    batch = prompts(FORGET, BENIGN, OTHER)
    assert stack.weights(batch).tolist() == [[1, 0], [0, 0], [0, 1]]
    with torch.no_grad():
        got, expected = model(**batch).logits, base(**batch).logits
    assert [torch.equal(*rows) for rows in zip(got, expected, strict=True)] == [False, True, False]
    refused(
        "earlier tasks of this stack are calibrated", lambda: stack.learn(texts(20, 60), training=QUICK), stack.model
    )


def test_calibration_belongs_to_gates():
    """Nobody would look at it."""
    stack = ContinualStack(tiny.model("llama"), rank=2, routing="sum")
    with pytest.raises(ValueError, match="calibration is for routing='gates'"):
        stack.learn(texts(FORGET, 20), calibration=BENIGN_TEXTS)
