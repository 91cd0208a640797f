"""Order statistics that bound an error rate: conformal ones on average, certified ones for one calibration set."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moelora.continual.conformal import (
    benign_p_values,
    benign_threshold,
    forget_p_values,
    forget_threshold,
    smallest_conformal_sample,
)
from moelora.continual.pac import (
    allowed_exceedances,
    certified_benign_threshold,
    certified_forget_threshold,
    smallest_sample,
    upper_bound,
)

COUNTED = torch.arange(1.0, 100.0)
"""1 to 99: order statistic number k is k."""


# --- conformal --------------------------------------------------------------------------------------------------------


def test_thresholds_are_the_order_statistics_of_the_formulas():
    """ceil(100 * 0.95) = 95 and floor(100 * 0.05) = 5; 100 * 0.29 is 29 although 0.29 is a little less in binary."""
    assert forget_threshold(COUNTED, 0.05) == 95
    assert forget_threshold(COUNTED, 0.29) == 71
    for fire, rank in ((0.05, 5), (0.29, 29), (0.011, 1)):
        threshold = benign_threshold(COUNTED, fire)
        assert threshold < rank == math.nextafter(threshold, math.inf)


def test_thresholds_that_the_sample_cannot_support_never_close_and_never_open():
    """99 scores support 1 % and no less."""
    assert (forget_threshold(COUNTED, 0.01), benign_threshold(COUNTED, 0.01)) == (99, math.nextafter(1, 0))
    assert (forget_threshold(COUNTED, 0.0099), benign_threshold(COUNTED, 0.0099)) == (math.inf, -math.inf)
    assert forget_threshold(torch.zeros(0), 0.5) == math.inf
    assert [smallest_conformal_sample(rate) for rate in (0.01, 0.05, 0.3)] == [99, 19, 3]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.sampled_from([0.05, 0.1, 0.25, 0.5]))
def test_thresholds_decide_as_the_p_values_do(scores, rate):
    """Closed above tau_U exactly where p_U <= rate, open up to tau_B exactly where p_B <= rate; with ties."""
    scores_N = torch.tensor(scores, dtype=torch.float64)
    probe_T = torch.linspace(-1, 7, 33, dtype=torch.float64)

    closed_T = forget_p_values(probe_T, scores_N) <= rate
    open_T = benign_p_values(probe_T, scores_N) <= rate

    assert torch.equal(closed_T, probe_T > forget_threshold(scores_N, rate))
    assert torch.equal(open_T, probe_T <= benign_threshold(scores_N, rate))


def test_p_values_by_hand():
    """Among 1, 2, 2, 5 the score 2 has three at or above it and three at or below it."""
    scores_N = torch.tensor([5.0, 2.0, 1.0, 2.0])
    probe_T = torch.tensor([2.0, 6.0, 0.0])

    assert forget_p_values(probe_T, scores_N).tolist() == [0.8, 0.2, 1.0]
    assert benign_p_values(probe_T, scores_N).tolist() == [0.8, 1.0, 0.2]


@given(st.lists(st.integers(0, 3), min_size=2, max_size=12), st.sampled_from([0.1, 0.25, 0.5]))
def test_conformal_rates_hold_for_exchangeable_scores_with_ties(scores, rate):
    """Each of n + 1 scores takes its turn as the new one: at most a share `rate` of them is missed, or fired on."""
    missed = fired = 0
    for index, new in enumerate(scores):
        others_N = torch.tensor(scores[:index] + scores[index + 1 :], dtype=torch.float64)
        missed += new > forget_threshold(others_N, rate)
        fired += new <= benign_threshold(others_N, rate)

    assert missed <= rate * len(scores)
    assert fired <= rate * len(scores)


def test_equal_benign_scores_never_fire():
    """They cannot be told from one another, so opening at their value would fire on all."""
    equal_N = torch.full((200,), 2.5)

    assert benign_threshold(equal_N, 0.05) < 2.5
    assert certified_benign_threshold(equal_N, 0.05) < 2.5
    assert forget_threshold(equal_N, 0.05) == certified_forget_threshold(equal_N, 0.05) == 2.5


# --- certified --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "smallest", "allowed"),
    [
        (0.05, 59, {58: None, 59: 0, 92: 0, 93: 1, 299: 8, 1000: 38, 5000: 224}),
        (0.01, 299, {298: None, 299: 0, 500: 1, 1000: 4, 5000: 38}),
        (0.001, 2995, {2994: None, 2995: 0, 5000: 1}),
    ],
)
def test_sample_sizes_and_allowed_exceedances(rate, smallest, allowed):
    """At 95 % confidence; (1 - rate)^n <= 5 % gives the smallest n."""
    assert smallest_sample(rate) == smallest == math.ceil(math.log(0.05) / math.log1p(-rate))
    assert {samples: allowed_exceedances(samples, rate) for samples in allowed} == allowed


@given(st.integers(0, 400), st.sampled_from([0.01, 0.05, 0.3]), st.sampled_from([0.9, 0.95, 0.999]))
def test_allowed_exceedances_are_the_most_that_the_bound_allows(samples, rate, confidence):
    """One more has a bound above the rate; and the smallest sample for them is not larger than this one."""
    allowed = allowed_exceedances(samples, rate, confidence)

    if allowed is None:
        assert upper_bound(0, samples, confidence) > rate
        assert samples < smallest_sample(rate, confidence)
    else:
        assert upper_bound(allowed, samples, confidence) <= rate < upper_bound(allowed + 1, samples, confidence)
        assert smallest_sample(rate, confidence, allowed) <= samples < smallest_sample(rate, confidence, allowed + 1)


@pytest.mark.parametrize(("samples", "percent"), [(20, 13.9), (100, 8.9), (500, 6.7), (1000, 6.2), (5000, 5.5)])
def test_bound_of_a_conformal_threshold_for_one_calibration_set(samples, percent):
    """At 5 % on average the rate is Beta(n + 1 - k, k) with k = ceil(0.95 (n + 1)), so this in 95 % of the sets."""
    above = samples - math.ceil((samples + 1) * 0.95)

    assert round(100 * upper_bound(above, samples), 1) == percent


def test_upper_bound_by_hand():
    """0 of n: 1 - 0.05^(1/n). All of n: 1."""
    assert upper_bound(0, 8) == pytest.approx(1 - 0.05 ** (1 / 8))
    assert upper_bound(8, 8) == 1
    assert upper_bound(0, 0) == 1
    with pytest.raises(ValueError, match="expected between 0 and 3 exceedances, got 4"):
        upper_bound(4, 3)


def test_certified_thresholds_leave_the_allowed_number_outside():
    """Of 1 to 93 one may be missed or fired on at 5 %."""
    scores_N = torch.arange(93.0, 0.0, -1.0)

    assert certified_forget_threshold(scores_N, 0.05) == 92
    assert certified_benign_threshold(scores_N, 0.05) == math.nextafter(2, 0)


@pytest.mark.parametrize(("samples", "best"), [(8, "0.312"), (12, "0.221")])
def test_small_samples_refuse_and_say_how_many_it_takes(samples, best):
    """8 items certify no rate below 31 %, 12 none below 22 %."""
    expected = rf"{samples} {{}} scores cannot certify.*at 0.95 confidence: it takes at least {{}}, .*below {best}"
    for rate, needed in ((0.05, 59), (float(best) - 0.005, samples + 1)):
        with pytest.raises(ValueError, match=expected.format("forget", needed)):
            certified_forget_threshold(COUNTED[:samples], rate)
        with pytest.raises(ValueError, match=expected.format("benign", needed)):
            certified_benign_threshold(COUNTED[:samples], rate)
    assert certified_forget_threshold(COUNTED[:samples], float(best) + 0.001) == samples


def test_certified_rates_are_broken_by_one_calibration_set_in_twenty():
    """93 uniform scores, one exceedance: the chance is P(Bin(93, 0.05) <= 1) = 4.99 %. A conformal threshold, which is
    right on average, breaks its rate in 40 % of the sets."""
    scores_SN = torch.rand(3000, 93, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    miss_S = torch.tensor([1 - certified_forget_threshold(scores_N, 0.05) for scores_N in scores_SN])
    fire_S = torch.tensor([certified_benign_threshold(scores_N, 0.05) for scores_N in scores_SN])
    marginal_S = torch.tensor([1 - forget_threshold(scores_N, 0.05) for scores_N in scores_SN])

    # 5 % and three standard deviations of a count among 3000; not far below either, or scores were wasted
    for broken in ((miss_S > 0.05).double().mean(), (fire_S > 0.05).double().mean()):
        assert 0.05 - 0.012 < broken < 0.05 + 0.012
    assert (marginal_S > 0.05).double().mean() > 0.3
    assert marginal_S.mean() == pytest.approx(4 / 94, abs=0.002)


def test_certified_rates_hold_with_ties():
    """Scores in nine levels of unequal mass: the true rates, counted over levels, are broken no more often."""
    mass_V = torch.tensor([0.02, 0.03, 0.2, 0.2, 0.1, 0.2, 0.2, 0.04, 0.01], dtype=torch.float64)
    drawn_SN = torch.multinomial(mass_V, 3000 * 93, True, generator=torch.Generator().manual_seed(1)).view(3000, 93)

    def rates(scores_N: torch.Tensor) -> tuple[float, float]:
        closed = math.floor(certified_forget_threshold(scores_N, 0.045)) + 1
        opened = math.floor(certified_benign_threshold(scores_N, 0.045)) + 1
        return mass_V[closed:].sum().item(), mass_V[:opened].sum().item()

    miss_S, fire_S = torch.tensor([rates(scores_N.double()) for scores_N in drawn_SN]).T

    assert miss_S.max() >= 0.05 > 0.045
    for rate_S in (miss_S, fire_S):
        assert (rate_S > 0.045).double().mean() < 0.05 + 0.012
