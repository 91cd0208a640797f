"""Detectors in numbers, and how sure a number is: by hand, by counting, against exact formulas, and by coverage."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from moelora import metrics

SCORES = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=12)
"""Few values, so that ties are common."""


def tensor(values) -> torch.Tensor:
    """In fp64."""
    return torch.tensor(values, dtype=torch.float64)


# --- detection --------------------------------------------------------------------------------------------------------


def test_auroc_by_hand():
    """Larger is farther from the request: perfect 1, reversed 0; of four pairs, two in order and one tied."""
    assert metrics.auroc(tensor([1, 2]), tensor([3, 4])) == 1
    assert metrics.auroc(tensor([3, 4]), tensor([1, 2])) == 0
    assert metrics.auroc(tensor([1, 3]), tensor([3, 2])) == 2.5 / 4
    assert metrics.auroc(tensor([7, 7, 7]), tensor([7])) == 0.5


@given(SCORES, SCORES)
def test_auroc_counts_pairs_with_half_ties(forget, benign):
    """And turns to its complement when scores change sign or sides, and to itself under a monotone map."""
    pairs = [(b > f) + (b == f) / 2 for f in forget for b in benign]
    f, b = tensor(forget), tensor(benign)

    area = metrics.auroc(f, b)

    assert area == pytest.approx(sum(pairs) / len(pairs))
    assert metrics.auroc(-f, -b) == pytest.approx(1 - area)
    assert metrics.auroc(b, f) == pytest.approx(1 - area)
    assert metrics.auroc(f.exp(), b.exp()) == area


def test_the_two_conventions_by_hand():
    """20 forget scores 1..20 and 20 benign ones: 95 % of each side allows one to be on the wrong side."""
    forget = torch.arange(1.0, 21)
    benign = torch.cat([torch.tensor([2.5]), torch.full((4,), 18.5), torch.full((15,), 30.0)])

    # opens up to 19, on five benign ones; opens below 18.5, so that 19 and 20 are missed
    assert metrics.benign_fire_rate_at_forget_recall(forget, benign, 0.95) == 5 / 20
    assert metrics.forget_miss_rate_at_benign(forget, benign, 0.95) == 2 / 20
    # all forget inputs, or all benign ones
    assert metrics.benign_fire_rate_at_forget_recall(forget, benign, 1.0) == 5 / 20
    assert metrics.forget_miss_rate_at_benign(forget, benign, 1.0) == 18 / 20


@given(SCORES, SCORES, st.integers(1, 20).map(lambda k: k / 20))
def test_rates_are_the_best_of_all_thresholds(forget, benign, share):
    """Over gates that open below a value or at it: the least rate among those that keep the other side's share."""
    f, b = tensor(forget), tensor(benign)
    cuts = sorted({*forget, *benign, 99.0})
    fired, missed = [], []
    for cut in cuts:
        for open_f, open_b in (((f <= cut), (b <= cut)), ((f < cut), (b < cut))):
            if int(open_f.sum()) * 20 >= round(share * 20) * len(f):
                fired.append(open_b.double().mean().item())
            if int((~open_b).sum()) * 20 >= round(share * 20) * len(b):
                missed.append((~open_f).double().mean().item())

    assert metrics.benign_fire_rate_at_forget_recall(f, b, share) == min(fired)
    assert metrics.forget_miss_rate_at_benign(f, b, share) == min(missed)
    # the two conventions are one another's mirror image
    assert metrics.forget_miss_rate_at_benign(f, b, share) == metrics.benign_fire_rate_at_forget_recall(-b, -f, share)


def test_a_share_is_the_decimal_number_it_is_written_as():
    """0.55 of 100 is 55, though 0.55 * 100 is a little more in binary."""
    forget, benign = torch.arange(100.0), torch.full((1,), 54.5)

    assert math.ceil(0.55 * 100) == 56
    assert metrics.benign_fire_rate_at_forget_recall(forget, benign, 0.55) == 0
    assert metrics.benign_fire_rate_at_forget_recall(forget, benign, 0.56) == 1


def test_errors_of_detection():
    """No scores, scores that are no numbers, shares that are none."""
    one = torch.ones(1)
    with pytest.raises(ValueError, match="no benign scores"):
        metrics.auroc(one, torch.zeros(0))
    with pytest.raises(ValueError, match="1 of 2 forget scores are NaN or infinite"):
        metrics.forget_miss_rate_at_benign(torch.tensor([1.0, math.nan]), one)
    for share in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="recall must lie in"):
            metrics.benign_fire_rate_at_forget_recall(one, one, share)
        with pytest.raises(ValueError, match="left_alone must lie in"):
            metrics.forget_miss_rate_at_benign(one, one, share)


# --- intervals --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.data(), st.sampled_from([0.8, 0.95, 0.99]))
def test_clopper_pearson_is_scipys_exact_interval(trials, data, confidence):
    """And the mirror image for the complement."""
    events = data.draw(st.integers(0, trials))

    found = metrics.clopper_pearson(events, trials, confidence)

    exact = stats.binomtest(events, trials).proportion_ci(confidence, method="exact")
    assert tuple(found) == pytest.approx((exact.low, exact.high), abs=1e-9)
    mirror = metrics.clopper_pearson(trials - events, trials, confidence)
    assert (1 - mirror.high, 1 - mirror.low) == pytest.approx(tuple(found), abs=1e-12)


def test_clopper_pearson_at_the_ends():
    """None of n: the high end is 1 - (a/2)^(1/n), not 0."""
    assert metrics.clopper_pearson(0, 59) == pytest.approx((0, 1 - 0.025 ** (1 / 59)))
    assert metrics.clopper_pearson(59, 59) == pytest.approx((0.025 ** (1 / 59), 1))
    for events, trials in ((-1, 3), (4, 3), (0, 0)):
        with pytest.raises(ValueError, match="0 <= events <= trials"):
            metrics.clopper_pearson(events, trials)
    with pytest.raises(ValueError, match="confidence must lie strictly between"):
        metrics.clopper_pearson(1, 3, 1.0)


def test_seeds_interval_by_hand():
    """Mean 2, deviation 1, three seeds: t = 4.302653 with two degrees of freedom, over sqrt 3."""
    found = metrics.seeds_interval(tensor([1, 2, 3]))

    half = 4.302653 / math.sqrt(3)
    assert tuple(found) == pytest.approx((2 - half, 2 + half), rel=1e-6)
    with pytest.raises(ValueError, match="two or more, got 1"):
        metrics.seeds_interval(tensor([1]))
    with pytest.raises(ValueError, match="1 values are NaN"):
        metrics.seeds_interval(tensor([1, 2, math.nan]))


def test_bootstrap_interval():
    """Of a mean: near mean -+ 1.96 s / sqrt n. Rows stay together, the same generator state gives the same interval."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))

    def interval(seed: int) -> metrics.Interval:
        return metrics.bootstrap_interval(torch.mean, values, torch.Generator().manual_seed(seed), resamples=1000)

    half = 1.96 * values.std().item() / 20
    assert tuple(interval(1)) == pytest.approx((values.mean().item() - half, values.mean().item() + half), abs=0.02)
    assert interval(1) == interval(1)
    assert interval(1) != interval(2)

    pairs = torch.stack([values, values + 1], 1)
    gap = metrics.bootstrap_interval(
        lambda rows: (rows[:, 1] - rows[:, 0]).mean(), pairs, torch.Generator(), resamples=100
    )
    assert tuple(gap) == pytest.approx((1, 1), abs=1e-6)


def test_errors_of_the_bootstrap():
    """Too few rows or resamples; a statistic that is no number."""
    generator = torch.Generator()
    with pytest.raises(ValueError, match="two rows and 100 resamples or more, got 1 and 2000"):
        metrics.bootstrap_interval(torch.mean, torch.ones(1), generator)
    with pytest.raises(ValueError, match="got 5 and 10"):
        metrics.bootstrap_interval(torch.mean, torch.ones(5), generator, resamples=10)
    with pytest.raises(ValueError, match="100 values are NaN"):
        metrics.bootstrap_interval(lambda rows: math.nan, torch.ones(5), generator, resamples=100)


def test_auroc_interval_by_hand():
    """Forget 1, 3 and benign 2, 4: both sides' shares are 1 and 1/2, each with variance 1/8, so 0.125 in all."""
    low, high = metrics.auroc_interval(tensor([1, 3]), tensor([2, 4]))

    half = 1.959964 * math.sqrt(0.125) / (0.75 * 0.25)
    assert math.log(low / (1 - low)) == pytest.approx(math.log(3) - half, rel=1e-5)
    assert math.log(high / (1 - high)) == pytest.approx(math.log(3) + half, rel=1e-5)


@given(
    st.lists(st.integers(-9, 9).map(float), min_size=2, max_size=9), st.lists(st.floats(-9, 9), min_size=2, max_size=9)
)
def test_auroc_interval_holds_the_auroc(forget, benign):
    """Lies in [0, 1], is never a point, and mirrors when the scores change sign."""
    f, b = tensor(forget), tensor(benign)
    if len({*forget, *benign}) == 1:
        with pytest.raises(ValueError, match="a constant detects nothing"):
            metrics.auroc_interval(f, b)
        return

    low, high = metrics.auroc_interval(f, b)

    assert 0 <= low <= metrics.auroc(f, b) <= high <= 1
    assert low < high
    assert tuple(metrics.auroc_interval(-f, -b)) == pytest.approx((1 - high, 1 - low), abs=1e-9)


def test_auroc_interval_of_perfect_separation_is_no_point():
    """Ten and thirty scores apart: ten pairs in order, so the low end is 0.025^(1/10)."""
    found = metrics.auroc_interval(torch.arange(10.0), 50 + torch.arange(30.0))

    assert tuple(found) == pytest.approx((0.025**0.1, 1))
    with pytest.raises(ValueError, match="two scores or more of each kind, got 1 forget"):
        metrics.auroc_interval(torch.ones(1), torch.ones(5))


@pytest.mark.parametrize("area", [0.8, 0.97])
def test_auroc_interval_covers(area):
    """Normal scores with a known AUROC, 40 and 60 of them: about 95 % of 400 intervals hold it."""
    shift = math.sqrt(2) * float(stats.norm.ppf(area))
    generator = torch.Generator().manual_seed(7)
    covered = 0
    for _ in range(400):
        forget, benign = torch.randn(40, generator=generator), torch.randn(60, generator=generator) + shift
        low, high = metrics.auroc_interval(forget, benign)
        covered += low <= area <= high

    # 0.95 -+ 3.5 standard errors
    assert 0.91 <= covered / 400 <= 0.99
