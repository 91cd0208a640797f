"""The supervised gate: ids that come with a batch teach every router the task of a token, as in MeteoRA."""

import math

import pytest
import torch
from random_mixture import random_mixture
from torch.nn import functional as F

import moelora
from moelora import AuxLosses, Learned
from moelora.routers.learned import LearnedRouter
from moelora.tape import Tape
from moelora.testing import tiny

SUPERVISED = AuxLosses(load_balance=0.0, gate_cross_entropy=1.0)
B, L = 4, 7


def supervised(*, losses=SUPERVISED, router=None, **options):
    """A mixture of four experts whose routers are trained, and a batch of four rows, two of them padded."""
    model = random_mixture(losses=losses, router=router or Learned(), experts=False, num_hidden_layers=1, **options)
    return model, tiny.inputs(model, batch=B, length=L)


def routers(model):
    """All of them."""
    return [module for module in model.modules() if isinstance(module, LearnedRouter)]


def scores(recording, site):
    """Of all experts at a site."""
    logits_TE = recording[site].logits_TE
    assert logits_TE is not None
    return logits_TE


def test_gates_learn_the_task_of_a_row():
    """After training every router's best expert is the one that the row was for; padding is not looked at."""
    model, inputs = supervised()
    # each task has words of its own, since q, k and v of the first block see no others
    inputs["input_ids"] = torch.arange(5, 5 + B * L).view(B, L)
    ids = torch.tensor([2, 0, 3, 1])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.06)
    before = float(model(**inputs, labels=inputs["input_ids"], expert_ids=ids).aux_loss)
    for _ in range(50):
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"], expert_ids=ids).loss.backward()
        optimizer.step()

    assert before > 0.8 * math.log(4)
    assert model(**inputs, labels=inputs["input_ids"], expert_ids=ids).aux_loss < 0.3
    with torch.no_grad(), moelora.record(model.eval()) as recording:
        model(**inputs)
    for site in recording:
        best_T = scores(recording, site).argmax(-1)
        assert (best_T == ids.repeat_interleave(L))[recording.valid(site)].float().mean() > 0.9


def test_the_loss_is_the_mean_over_routers_of_their_cross_entropy():
    """By torch's own function, at real tokens with an id, with the given weight."""
    model, inputs = supervised(losses=AuxLosses(load_balance=0.0, gate_cross_entropy=50.0))
    ids = torch.tensor([1, -1, 0, 3])
    with moelora.record(model) as recording:
        output = model(**inputs, labels=inputs["input_ids"], expert_ids=ids)

    target_T = ids.repeat_interleave(L)
    counts_T = inputs["attention_mask"].flatten().bool() & (target_T >= 0)
    values = [F.cross_entropy(scores(recording, site)[counts_T], target_T[counts_T]) for site in recording]
    torch.testing.assert_close(output.aux_loss, 50 * torch.stack(values).mean())
    with torch.no_grad():
        plain = model.eval()(**inputs, labels=inputs["input_ids"]).loss
    torch.testing.assert_close(output.loss.detach(), plain + output.aux_loss)


@pytest.mark.parametrize("shape", [(), (B,), (B, L)])
def test_ids_may_be_of_the_call_of_rows_or_of_tokens(shape):
    """And may come over the context as well: the loss and the router's own choice are the same."""
    model, inputs = supervised()
    ids = torch.full(shape, 2)

    with_batch = model(**inputs, labels=inputs["input_ids"], expert_ids=ids)
    with moelora.given_experts(model, ids):
        in_context = model(**inputs, labels=inputs["input_ids"])

    reference = model(**inputs, labels=inputs["input_ids"], expert_ids=torch.tensor(2))
    for output in (with_batch, in_context):
        assert torch.equal(output.loss, reference.loss)
        assert torch.equal(output.aux_loss, reference.aux_loss)


def test_ids_do_not_steer():
    """A supervised router still decides for itself."""
    model, inputs = supervised()
    one = model(**inputs, labels=inputs["input_ids"], expert_ids=torch.tensor(0))
    two = model(**inputs, labels=inputs["input_ids"], expert_ids=torch.tensor(1))

    assert torch.equal(one.logits, two.logits)
    assert not torch.equal(one.aux_loss, two.aux_loss)


def test_training_without_ids_is_an_error_that_says_how_to_give_them():
    """A loss that weighs something is not left out in silence."""
    model, inputs = supervised()
    with pytest.raises(ValueError, match=r"gate_cross_entropy compares.*model\(\*\*batch, expert_ids=ids\)"):
        model(**inputs, labels=inputs["input_ids"])

    # the failed call leaves nothing behind
    output = model(**inputs, labels=inputs["input_ids"], expert_ids=torch.tensor([0] * B))
    assert torch.isfinite(output.loss)


def test_evaluation_needs_no_ids():
    """Nor does training mode without gradients, as in a reward pass; recorded or not."""
    model, inputs = supervised()
    with torch.no_grad():
        model(**inputs)
        model.eval()
        with moelora.record(model) as recording:
            plain = model(**inputs)
        steered = model(**inputs, expert_ids=torch.tensor([0] * B))
    assert len(recording) > 0
    assert torch.equal(plain.logits, steered.logits)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()


def test_ids_for_a_model_that_does_not_look_at_them_are_refused():
    """Without the loss, ids mean nothing to a learned router."""
    model, inputs = supervised(losses=AuxLosses())
    with pytest.raises(ValueError, match="expert_ids were passed, but this model's router would not look at them"):
        model(**inputs, expert_ids=torch.tensor(0))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_the_same_with_checkpointing(reentrant):
    """The second pass has the ids of the first."""
    model, inputs = supervised()
    ids = torch.tensor([2, 0, -1, 1])

    def gradients():
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"], expert_ids=ids).loss.backward()
        found = [router.weight_ED.grad for router in routers(model)]
        return [gradient.clone() for gradient in found if gradient is not None]

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert len(plain) == 4
    for ours, theirs in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(ours, theirs)


# --- temperature ------------------------------------------------------------------------------------------------------


def test_inference_temperature_takes_over_in_evaluation():
    """Weights by hand: scores (2, 0) over 1 in training and over 20 in evaluation."""
    router = Learned(inference_temperature=20.0).build(1, [True, True], None)
    with torch.no_grad():
        router.weight_ED.copy_(torch.tensor([[2.0], [0.0]]))
    x_TD = torch.ones(1, 1)

    training = router.train()(x_TD, Tape())
    evaluation = router.eval()(x_TD, Tape())

    torch.testing.assert_close(training.weights_TK[0], torch.tensor([2.0, 0.0]).softmax(0))
    torch.testing.assert_close(evaluation.weights_TK[0], torch.tensor([0.1, 0.0]).softmax(0))
    assert torch.equal(training.experts_TK, evaluation.experts_TK)


@pytest.mark.parametrize("temperature", [15.0, 30.0])
def test_a_higher_inference_temperature_mixes_more(temperature):
    """In a model: the weights of the chosen two come closer, and training is as without."""
    soft, inputs = supervised(router=Learned(init_std=0.5, inference_temperature=temperature))
    hard, _ = supervised(router=Learned(init_std=0.5))
    ids = torch.tensor([0] * B)
    ours = soft(**inputs, labels=inputs["input_ids"], expert_ids=ids)
    theirs = hard(**inputs, labels=inputs["input_ids"], expert_ids=ids)
    assert torch.equal(ours.loss, theirs.loss)

    gaps = []
    for model in (soft.eval(), hard.eval()):
        with torch.no_grad(), moelora.record(model) as recording:
            model(**inputs)
        weights = torch.cat([recording[site].weights_TK for site in recording])
        gaps.append(float((weights[:, 0] - weights[:, 1]).mean()))
    assert 0 < gaps[0] < gaps[1] / 5


def test_the_kernels_gate_has_the_temperature_of_the_mode():
    """`linear_gate` is asked anew for each call, and says what `forward` does."""
    router = Learned(temperature=2.0, inference_temperature=15.0).build(8, [True] * 3, None)

    gates = [router.train().linear_gate(), router.eval().linear_gate()]

    assert [gate and gate.temperature for gate in gates] == [2.0, 15.0]
    same = Learned(temperature=2.0).build(8, [True] * 3, None).eval().linear_gate()
    assert same is not None
    assert same.temperature == 2.0


def test_inference_temperature_is_positive_and_saved():
    """Through the configuration's plain values."""
    with pytest.raises(ValueError, match=r"inference_temperature must be positive, got 0\.0"):
        Learned(inference_temperature=0.0)
    config = moelora.MoELoRAConfig(router=Learned(inference_temperature=20.0), losses=SUPERVISED)
    assert moelora.MoELoRAConfig.from_dict(config.to_dict()) == config
