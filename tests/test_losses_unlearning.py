"""Losses that unlearn: values worked out by hand, gradients, masks, and where their optimum lies."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moelora.losses.options import option_uniform, random_own_option
from moelora.losses.rmu import control_vector, rmu, rmu_retain
from moelora.losses.sequences import gradient_ascent, npo, sequence_nll, sequence_total_nll, simnpo

FIVE = torch.arange(5)


def seeded(seed: int = 0) -> torch.Generator:
    """A generator in a known state."""
    return torch.Generator().manual_seed(seed)


def options(seed: int, counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random scores of items that have so many of five options."""
    logits_BC = torch.randn(len(counts), 5, dtype=torch.float64, generator=seeded(seed))
    return logits_BC, torch.tensor(counts)[:, None] > FIVE


# --- options ----------------------------------------------------------------------------------------------------------


def test_option_uniform_by_hand():
    """p = (3/4, 1/4): -(ln 3/4 + ln 1/4)/2 - ln 2; a second item with three equal options adds 0 to the mean."""
    logits_BC = torch.tensor([[math.log(3), 0.0, 9.0], [5.0, 5.0, 5.0]], dtype=torch.float64)
    valid_BC = torch.tensor([[True, True, False], [True, True, True]])

    value = option_uniform(logits_BC, valid_BC)

    assert value.item() == pytest.approx((-(math.log(0.75) + math.log(0.25)) / 2 - math.log(2)) / 2)


@given(st.integers(0, 999), st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_option_uniform_is_least_at_chance(seed, counts):
    """Positive wherever options differ, 0 where an item's own are alike, however many there are."""
    logits_BC, valid_BC = options(seed, counts)

    assert option_uniform(logits_BC, valid_BC).item() >= -1e-12
    assert option_uniform(torch.where(valid_BC, 3.0, logits_BC), valid_BC).item() == pytest.approx(0, abs=1e-12)
    if max(counts) > 1:
        assert option_uniform(logits_BC, valid_BC).item() > 1e-9


def test_option_uniform_costs_avoiding_the_truth_as_much_as_knowing_it():
    """The two directions away from chance are alike for two options, so accuracy is not driven below chance."""
    both = torch.ones(1, 2, dtype=torch.bool)
    for score in (0.5, 4.0):
        knows, avoids = torch.tensor([[score, 0.0]]), torch.tensor([[-score, 0.0]])
        torch.testing.assert_close(option_uniform(knows, both), option_uniform(avoids, both))


@given(st.integers(0, 999), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_other_options_change_nothing(seed, counts):
    """Whatever stands where an item has no option, NaN too: value and gradient are those without it, and finite."""
    logits_BC, valid_BC = options(seed, counts)
    junk_BC = torch.where(valid_BC, logits_BC, torch.nan).requires_grad_()
    more_BC = torch.cat([junk_BC, torch.full((1, 5), torch.nan, dtype=torch.float64)])
    valid_more_BC = torch.cat([valid_BC, torch.zeros(1, 5, dtype=torch.bool)])

    for loss in (option_uniform, lambda scores_BC, own_BC: random_own_option(scores_BC, own_BC, seeded(seed))):
        value = loss(more_BC, valid_more_BC)
        (grad_BC,) = torch.autograd.grad(value, junk_BC)

        torch.testing.assert_close(value, loss(logits_BC, valid_BC))
        assert grad_BC.isfinite().all()
        assert (grad_BC[~valid_BC] == 0).all()


def test_gradients_of_option_losses():
    """p - 1/n over an item's own options for option_uniform; finite differences for both."""
    logits_BC, valid_BC = options(0, [2, 5, 3])
    logits_BC.requires_grad_()

    (grad_BC,) = torch.autograd.grad(option_uniform(logits_BC, valid_BC), logits_BC)

    p_BC = torch.where(valid_BC, logits_BC, -torch.inf).softmax(1)
    expected_BC = torch.where(valid_BC, p_BC - 1 / valid_BC.sum(1, keepdim=True), 0) / 3
    torch.testing.assert_close(grad_BC, expected_BC)
    assert torch.autograd.gradcheck(lambda z: option_uniform(z, valid_BC), logits_BC)
    assert torch.autograd.gradcheck(lambda z: random_own_option(z, valid_BC, seeded()), logits_BC)


def test_random_own_option_draws_evenly_among_an_items_own_options():
    """Its mean over draws is option_uniform + log n: 4000 items with three of five options, one of them excluded."""
    logits_BC = torch.tensor([[2.0, 0.0, -1.0, 7.0, 7.0]], dtype=torch.float64).expand(4000, 5)
    valid_BC = (FIVE < 3).expand(4000, 5)

    value = random_own_option(logits_BC, valid_BC, seeded())
    without = random_own_option(logits_BC, valid_BC, seeded(), torch.zeros(4000, dtype=torch.long))

    # losses are 0.17, 2.17 and 3.17, with deviation 1.25 and, without the first, 0.5
    log_p_C = torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64).log_softmax(0)
    assert value.item() == pytest.approx(option_uniform(logits_BC, valid_BC).item() + math.log(3), abs=0.08)
    assert value.item() == pytest.approx(-log_p_C.mean().item(), abs=0.08)
    assert without.item() == pytest.approx(-log_p_C[1:].mean().item(), abs=0.04)


def test_random_own_option_is_reproducible_and_excludes_what_it_is_told_to():
    """The same generator state gives the same loss; of two options, excluding one leaves the other."""
    logits_BC, valid_BC = options(1, [5] * 20)
    assert random_own_option(logits_BC, valid_BC, seeded(3)) == random_own_option(logits_BC, valid_BC, seeded(3))
    assert random_own_option(logits_BC, valid_BC, seeded(3)) != random_own_option(logits_BC, valid_BC, seeded(4))

    logits_BC, valid_BC = options(1, [2, 2, 1])
    log_p_BC = torch.where(valid_BC, logits_BC, -torch.inf).log_softmax(1)
    # the third item has nothing left; the second excludes nothing that it has
    value = random_own_option(logits_BC[[0, 2]], valid_BC[[0, 2]], seeded(), torch.tensor([1, 0]))
    torch.testing.assert_close(value, -log_p_BC[0, 0])
    chosen = {
        round(random_own_option(logits_BC[1:2], valid_BC[1:2], seeded(seed), torch.tensor([-1])).item(), 6)
        for seed in range(20)
    }
    assert chosen == {round(-log_p_BC[1, c].item(), 6) for c in (0, 1)}


def test_excluding_the_truth_pushes_below_chance():
    """At chance, the gradient with the truth among the draws is 0 on average; without, it lowers the truth."""
    logits_BC = torch.zeros(6000, 3, dtype=torch.float64, requires_grad=True)
    valid_BC, truth_B = torch.ones(6000, 3, dtype=torch.bool), torch.zeros(6000, dtype=torch.long)

    (with_BC,) = torch.autograd.grad(random_own_option(logits_BC, valid_BC, seeded()), logits_BC)
    (without_BC,) = torch.autograd.grad(random_own_option(logits_BC, valid_BC, seeded(), truth_B), logits_BC)

    assert with_BC[:, 0].sum().item() == pytest.approx(0, abs=0.03)
    assert without_BC[:, 0].sum().item() == pytest.approx(1 / 3)


def test_no_items_are_a_loss_of_nothing():
    """Empty batches and batches of items without options: 0, with a gradient, no step of which is NaN."""
    for items in (0, 2):
        logits_BC = torch.randn(items, 4, requires_grad=True)
        valid_BC = torch.zeros(items, 4, dtype=torch.bool)
        for value in (option_uniform(logits_BC, valid_BC), random_own_option(logits_BC, valid_BC, seeded())):
            with torch.autograd.set_detect_anomaly(True):
                value.backward()
            assert value == 0
            assert logits_BC.grad is not None
            assert (logits_BC.grad == 0).all()


# --- sequences --------------------------------------------------------------------------------------------------------


def test_sequence_nll_by_hand():
    """Position l predicts label l + 1; the first label and those of -100 do not count."""
    p_LV = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.2, 0.2, 0.6], [0.3, 0.3, 0.4]], dtype=torch.float64)
    logits_BLV = p_LV.log().expand(2, 4, 3)
    labels_BL = torch.tensor([[2, -100, 2, 0], [-100, 1, -100, -100]])

    total_B = torch.tensor([-math.log(0.8) - math.log(0.2), -math.log(0.25)], dtype=torch.float64)
    torch.testing.assert_close(sequence_total_nll(logits_BLV, labels_BL), total_B)
    torch.testing.assert_close(sequence_nll(logits_BLV, labels_BL), total_B / torch.tensor([2, 1]))


def test_sequence_nll_is_the_loss_of_a_causal_model():
    """For one sequence, its mean is what transformers computes from the same labels."""
    from moelora.testing import tiny

    model = tiny.model("gpt2").eval()
    ids_BL = torch.randint(5, 60, (1, 9), generator=seeded())
    labels_BL = torch.where(torch.arange(9) < 4, -100, ids_BL)
    with torch.no_grad():
        output = model(input_ids=ids_BL, labels=labels_BL)

    torch.testing.assert_close(sequence_nll(output.logits, labels_BL)[0], output.loss)


def test_sequence_nll_gradient_and_padding():
    """Finite differences; logits whose label does not count get no gradient, and change nothing."""
    logits_BLV = torch.randn(2, 5, 4, dtype=torch.float64, generator=seeded(), requires_grad=True)
    labels_BL = torch.tensor([[-100, 1, 2, -100, -100], [-100, -100, 0, 3, 3]])
    assert torch.autograd.gradcheck(lambda z: sequence_nll(z, labels_BL), logits_BLV)

    (grad_BLV,) = torch.autograd.grad(sequence_nll(logits_BLV, labels_BL).sum(), logits_BLV)
    counted_BL = grad_BLV.abs().sum(-1) > 0
    assert counted_BL.tolist() == [[True, True, False, False, False], [False, True, True, True, False]]
    junk_BLV = torch.where(counted_BL[..., None], logits_BLV, 1e4)
    torch.testing.assert_close(sequence_nll(junk_BLV, labels_BL), sequence_nll(logits_BLV, labels_BL))


def test_a_sequence_without_labels_is_an_error():
    """Not a likelihood of 1."""
    logits_BLV = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="1 of 2 sequences have no label beyond the first"):
        sequence_nll(logits_BLV, torch.tensor([[-100, 1, 1], [2, -100, -100]]))
    with pytest.raises(ValueError, match="no likelihood"):
        sequence_total_nll(logits_BLV[:, :1], torch.tensor([[1], [2]]))


def test_npo_by_hand():
    """pi = pi_ref: (2/beta) ln 2. pi_ref = 3 pi at beta = 1: -2 ln(3/4)."""
    nll_B = torch.tensor([1.0, 7.0], dtype=torch.float64)

    assert npo(nll_B, nll_B, 0.1).item() == pytest.approx(20 * math.log(2))
    assert npo(nll_B + math.log(3), nll_B, 1.0).item() == pytest.approx(-2 * math.log(3 / 4))


@given(st.floats(0.01, 5), st.floats(-20, 20), st.floats(0, 20))
def test_the_gradient_of_npo_is_weighed_gradient_ascent(beta, change, reference):
    """The weight is 2 pi^beta / (pi^beta + pi_ref^beta): 1 at the start. The reference gets none."""
    reference_B = torch.tensor([reference], dtype=torch.float64, requires_grad=True)
    nll_B = (reference_B.detach() + change).requires_grad_()

    npo(nll_B, reference_B, beta).backward()

    expected = -2 / (1 + math.exp(beta * (nll_B.item() - reference)))
    assert nll_B.grad is not None
    assert nll_B.grad.item() == pytest.approx(expected, rel=1e-9)
    assert reference_B.grad is None


def test_npo_becomes_gradient_ascent_for_small_beta():
    """npo - (2/beta) ln 2 + mean reference -> gradient_ascent, with an error of beta x^2 / 4."""
    nll_B, reference_B = (torch.rand(4, dtype=torch.float64, generator=seeded(s)) * 9 for s in (0, 1))
    change_B = nll_B - reference_B
    for beta in (1e-2, 1e-4):
        shifted = npo(nll_B, reference_B, beta) - 2 / beta * math.log(2) - reference_B.mean()
        bound = beta / 4 * change_B.square().mean().item() + 1e-9
        assert abs(shifted.item() - gradient_ascent(nll_B).item()) <= bound


def test_simnpo_by_hand():
    """Mean nll ln 3, beta = 1: -2 ln(3/4); gamma = ln 3 takes it back to 2 ln 2, outside beta."""
    nll_B = torch.tensor([math.log(3)], dtype=torch.float64)

    assert simnpo(nll_B, 1.0, 0.0).item() == pytest.approx(-2 * math.log(3 / 4))
    assert simnpo(nll_B, 1.0, math.log(3)).item() == pytest.approx(2 * math.log(2))
    assert simnpo(nll_B, 2.0, math.log(3)).item() == pytest.approx(-math.log(3 / 4))


@given(st.floats(0.1, 5), st.floats(0, 3))
def test_simnpo_is_npo_against_a_constant(beta, gamma):
    """On answers of one token, the reference gives each a nll of gamma / beta."""
    nll_B = torch.tensor([0.5, 3.0, 8.0], dtype=torch.float64)

    torch.testing.assert_close(simnpo(nll_B, beta, gamma), npo(nll_B, torch.full_like(nll_B, gamma / beta), beta))


def test_sequence_losses_reward_forgetting():
    """All fall as answers grow unlikely; npo and simnpo stop at 0, gradient ascent does not."""
    nll_B, reference_B = torch.tensor([[1.0], [5.0], [5000.0]]), torch.tensor([1.0])

    for loss in (lambda x: npo(x, reference_B, 0.5), lambda x: simnpo(x, 0.5, 1.0), gradient_ascent):
        start, later, end = (loss(row) for row in nll_B)
        assert start > later > end
    assert npo(nll_B[2], reference_B, 0.5) == 0
    assert simnpo(nll_B[2], 0.5, 1.0) == 0
    assert gradient_ascent(nll_B[2]) == -5000


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_beta_must_be_positive(beta):
    """The loss divides by it."""
    nll_B = torch.ones(2)
    with pytest.raises(ValueError, match="beta must be positive"):
        npo(nll_B, nll_B, beta)
    with pytest.raises(ValueError, match="beta must be positive"):
        simnpo(nll_B, beta, 0.0)


# --- hidden states ----------------------------------------------------------------------------------------------------


def test_rmu_by_hand():
    """Squared distances 1 and 4 of the first sequence, 9 of the second: (2.5 + 9) / 2; a third without tokens."""
    control_D = torch.tensor([1.0, 1.0])
    moved_BL = torch.tensor([[1.0, 2.0], [3.0, torch.nan], [torch.nan, torch.nan]])
    hidden_BLD = torch.stack([1 + moved_BL, torch.ones(3, 2)], -1)
    valid_BL = ~moved_BL.isnan()

    assert rmu(hidden_BLD, control_D, valid_BL).item() == pytest.approx(5.75)
    assert rmu_retain(hidden_BLD, torch.ones(3, 2, 2), valid_BL).item() == pytest.approx(5.75)
    assert rmu(hidden_BLD[2:], control_D, valid_BL[2:]) == 0


def test_gradients_of_rmu():
    """Finite differences over valid tokens, 0 on padding even if it is NaN, none to the frozen model."""
    hidden_BLD = torch.randn(2, 3, 4, dtype=torch.float64, generator=seeded(), requires_grad=True)
    frozen_BLD = torch.randn(2, 3, 4, dtype=torch.float64, generator=seeded(1), requires_grad=True)
    valid_BL = torch.tensor([[True, True, False], [True, False, False]])
    control_D = torch.ones(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda h: rmu(h, control_D, valid_BL), hidden_BLD)

    padded_BLD = torch.where(valid_BL[..., None], hidden_BLD.detach(), torch.nan).requires_grad_()
    rmu_retain(padded_BLD, frozen_BLD, valid_BL).backward()
    tokens_BL1 = valid_BL.sum(1)[:, None, None]
    expected_BLD = torch.where(valid_BL[..., None], 2 * (hidden_BLD - frozen_BLD), 0) / tokens_BL1 / 2
    torch.testing.assert_close(padded_BLD.grad, expected_BLD.detach())
    assert frozen_BLD.grad is None


def test_control_vector():
    """Of the length asked for, in the positive orthant, the same for the same seed."""
    control_D = control_vector(64, scale=20.0, generator=seeded(5))

    assert control_D.norm().item() == pytest.approx(20)
    assert (control_D >= 0).all()
    assert torch.equal(control_D, control_vector(64, scale=20.0, generator=seeded(5)))
    assert not torch.equal(control_D, control_vector(64, scale=20.0, generator=seeded(6)))


def test_losses_of_half_precision_are_computed_in_fp32():
    """bf16 logits and hidden states: the loss is that of the same numbers in fp32."""
    logits_BLV = torch.randn(2, 4, 50, generator=seeded()).bfloat16()
    labels_BL = torch.randint(0, 50, (2, 4), generator=seeded())
    valid_BL = torch.ones(2, 4, dtype=torch.bool)

    torch.testing.assert_close(sequence_nll(logits_BLV, labels_BL), sequence_nll(logits_BLV.float(), labels_BL))
    valid_BC = torch.ones(2, 50, dtype=torch.bool)
    torch.testing.assert_close(
        option_uniform(logits_BLV[:, 0], valid_BC), option_uniform(logits_BLV[:, 0].float(), valid_BC)
    )
    assert rmu(logits_BLV, torch.zeros(50), valid_BL).dtype == torch.float32
