"""Two error rates of a gate: its thresholds and weights, what is refused, and what a certificate says."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moelora.continual.calibration import Calibration, calibrate, gate_weight, ramp
from moelora.continual.certificate import Certificate, union_of
from moelora.continual.conformal import (
    benign_p_values,
    benign_threshold,
    forget_p_values,
    forget_threshold,
)
from moelora.continual.pac import (
    certified_benign_threshold,
    certified_forget_threshold,
    upper_bound,
)
from moelora.continual.union import Standard, max_statistic, union_fire_spending

COUNTED = torch.arange(1.0, 100.0)
"""1 to 99: order statistic number k is k."""


def normal(count: int, mean: float, seed: int) -> torch.Tensor:
    """Normal scores with deviation 1."""
    return mean + torch.randn(count, generator=torch.Generator().manual_seed(seed))


def calibrated(gap: float, **options) -> Calibration:
    """Of 400 forget scores around 0 and 600 benign ones around `gap`, at 5 % and 5 %."""
    forget_N, benign_M = normal(400, 0.0, seed=0), normal(600, gap, seed=1)
    return calibrate(forget_N, benign_M, max_miss=0.05, max_fire=0.05, **options)


# --- calibrate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guarantee", ["pac", "marginal"])
def test_separate_scores_get_one_threshold_midway(guarantee):
    """Between what each set allows; both rates are kept, and no score is weighed in part."""
    forget_N, benign_M = normal(400, 0.0, seed=0), normal(600, 6.0, seed=1)
    lowest, highest = (
        (certified_forget_threshold(forget_N, 0.05), certified_benign_threshold(benign_M, 0.05))
        if guarantee == "pac"
        else (forget_threshold(forget_N, 0.05), benign_threshold(benign_M, 0.05))
    )

    calibration = calibrated(6.0, guarantee=guarantee)
    certificate = calibration.certificate

    assert calibration.tau_lo == calibration.tau_hi == pytest.approx((lowest + highest) / 2)
    assert certificate.miss.kept
    assert certificate.fire.kept
    assert certificate.outcome == "both_kept"
    assert certificate.miss.seen == (gate_weight(forget_N, calibration) == 0).sum() <= certificate.miss.allowed
    assert certificate.fire.seen == (gate_weight(benign_M, calibration) == 1).sum() <= certificate.fire.allowed
    # one calibration set promises less than the average over all
    assert (certificate.miss.bound <= 0.05) == (guarantee == "pac")


@given(current=st.floats(-8, 16))
def test_a_threshold_in_force_moves_no_further_than_it_must(current):
    """Into the interval that both rates allow, whose bounds do not depend on what it was."""
    lowest = certified_forget_threshold(normal(400, 0.0, seed=0), 0.05)
    highest = certified_benign_threshold(normal(600, 6.0, seed=1), 0.05)
    fresh = calibrated(6.0)

    kept = calibrated(6.0, current=current)

    assert kept.tau_lo == kept.tau_hi == sorted([lowest, current, highest])[1]
    assert (kept.certificate.miss.bound, kept.certificate.fire.bound) == (
        fresh.certificate.miss.bound,
        fresh.certificate.fire.bound,
    )


def test_where_both_rates_cannot_be_kept_the_threshold_in_force_does_not_matter():
    """The policy says where it goes."""
    for policy in ("protect_forget", "protect_utility", "ramp"):
        assert calibrated(2.0, on_conflict=policy, current=0.5) == calibrated(2.0, on_conflict=policy)


def test_a_kept_rate_is_bounded_by_its_rank_not_by_what_was_seen():
    """The midpoint was chosen by the scores, so that its own count is no fair sample: 12 of 400 are allowed, 3 seen."""
    miss = calibrated(6.0).certificate.miss

    assert (miss.seen, miss.allowed) == (3, 12)
    assert miss.bound == upper_bound(12, 400) > upper_bound(3, 400)


def test_overlapping_scores_raise_and_show_what_can_be_had():
    """Either threshold, with the rate that it costs on the other side."""
    forget_N, benign_M = torch.arange(0.0, 59.0), torch.arange(40.0, 140.0)

    with pytest.raises(
        ValueError,
        match=r"overlap.*miss rate of 0\.05 takes a threshold of 58, which fires on 19 of 100 benign scores \(a rate "
        r"of up to 0\.266\); a fire rate of 0\.05 takes 41, which misses 18 of 59 forget scores \(a rate of up to 0\.4",
    ):
        calibrate(forget_N, benign_M, max_miss=0.05, max_fire=0.05)


@pytest.mark.parametrize(("policy", "kept"), [("protect_forget", "miss"), ("protect_utility", "fire"), ("ramp", None)])
def test_policies_keep_the_rate_they_protect_and_state_the_other(policy, kept):
    """The other's bound is a Clopper-Pearson bound of what was seen."""
    forget_N, benign_M = normal(400, 0.0, seed=0), normal(600, 2.0, seed=1)
    lowest, highest = certified_forget_threshold(forget_N, 0.05), certified_benign_threshold(benign_M, 0.05)

    calibration = calibrated(2.0, on_conflict=policy)
    certificate = calibration.certificate

    assert certificate.outcome == policy
    assert (certificate.miss.kept, certificate.fire.kept) == (kept == "miss", kept == "fire")
    assert calibration.tau_lo == (lowest if policy == "protect_forget" else highest)
    assert calibration.tau_hi == pytest.approx(highest if policy == "protect_utility" else lowest)
    for rate in (certificate.miss, certificate.fire):
        if rate.kept:
            assert rate.seen == rate.allowed
            assert rate.bound <= 0.05
        else:
            assert rate.seen > rate.allowed
            assert rate.bound == upper_bound(rate.seen, rate.samples) > 0.05


def test_ramp_closes_on_few_forget_inputs_and_opens_on_few_benign_ones():
    """Weight 0 for as many forget scores as may be missed, also where they are equal to tau_U."""
    calibration = calibrated(2.0, on_conflict="ramp")
    certificate = calibration.certificate

    assert (gate_weight(normal(400, 0.0, seed=0), calibration) == 0).sum() == certificate.miss.allowed
    assert (gate_weight(normal(600, 2.0, seed=1), calibration) == 1).sum() == certificate.fire.allowed


def test_policy_gives_nothing_away_without_a_conflict():
    """Separate scores keep both rates, whatever was to give way."""
    for policy in ("protect_forget", "protect_utility", "ramp"):
        assert calibrated(6.0, on_conflict=policy) == calibrated(6.0)


def test_touching_scores_conflict_by_their_ties():
    """The allowed forget score equals the first benign one: open at it fires on the tie, closed at it misses."""
    with pytest.raises(ValueError, match="overlap"):
        calibrate(torch.full((59,), 1.0), torch.full((59,), 1.0), max_miss=0.05, max_fire=0.05)
    above = math.nextafter(1.0, 2.0)
    forget_N, benign_M = (torch.full((59,), score, dtype=torch.float64) for score in (1.0, above))
    close = calibrate(forget_N, benign_M, max_miss=0.05, max_fire=0.05)
    assert gate_weight(torch.tensor([1.0, above], dtype=torch.float64), close).tolist() == [1.0, 0.0]


SMALL = torch.arange(0.0, 20.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "20 forget scores cannot certify a miss rate of 0.05 at 0.95 confidence: it takes at least 59"),
        ({"max_miss": 0.2}, "20 benign scores cannot certify a fire rate of 0.05"),
        ({"guarantee": "marginal", "max_fire": 0.01}, "20 benign scores cannot support a fire rate of 0.01.*least 99"),
        ({"guarantee": "sure"}, "unknown guarantee 'sure'; expected one of"),
        ({"on_conflict": "guess"}, "unknown on_conflict 'guess'; expected one of"),
        ({"requests": 0}, "requests must be at least 1, got 0"),
        ({"requests": 3, "on_conflict": "protect_forget"}, "join the certificates with union_of"),
        ({"max_miss": 0.0}, "rate must lie strictly between 0 and 1, got 0.0"),
        ({"confidence": 1.0}, "confidence must lie strictly between 0 and 1, got 1.0"),
    ],
)
def test_calibrate_refuses(options, message):
    """What the sample cannot support, and what it does not know."""
    with pytest.raises(ValueError, match=message):
        calibrate(SMALL, SMALL + 100, **({"max_miss": 0.05, "max_fire": 0.05} | options))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_calibrate_nothing(bad):
    """Dropping them would hide that the detector fails on such inputs."""
    scores_N = torch.cat([COUNTED, torch.tensor([bad])])

    for use in (
        lambda: calibrate(scores_N, COUNTED + 200, max_miss=0.05, max_fire=0.05),
        lambda: forget_threshold(scores_N, 0.05),
        lambda: benign_p_values(COUNTED, scores_N),
        lambda: certified_benign_threshold(scores_N, 0.05),
        lambda: Standard.fit(scores_N),
    ):
        with pytest.raises(ValueError, match=r"1 of 100 (forget|benign) scores are NaN or infinite"):
            use()
    with pytest.raises(ValueError, match="a score is NaN, which has no p-value"):
        forget_p_values(torch.tensor([math.nan]), COUNTED)


# --- weight -----------------------------------------------------------------------------------------------------------


def test_ramp_by_hand():
    """1 at and below 2, 0 at and above 4, half at 3; the open end belongs to a step."""
    scores_T = torch.tensor([-9.0, 2.0, 2.5, 3.0, 4.0, 9.0])

    assert ramp(scores_T, 2.0, 4.0).tolist() == [1.0, 1.0, 0.75, 0.5, 0.0, 0.0]
    assert ramp(scores_T, 2.5, 2.5).tolist() == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match=r"expected tau_lo <= tau_hi, got 3.0 and 2.0"):
        ramp(scores_T, 3.0, 2.0)


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.lists(st.floats(-1e7, 1e7), min_size=2, max_size=20))
def test_ramp_falls_within_zero_and_one_and_is_exact_outside(tau_lo, width, scores):
    """Monotone, and no steeper than 1 / (tau_hi - tau_lo)."""
    tau_hi = tau_lo + width
    scores_T = torch.tensor(sorted(scores), dtype=torch.float64)

    weight_T = ramp(scores_T, tau_lo, tau_hi)

    assert (weight_T[scores_T <= tau_lo] == 1).all()
    assert (weight_T[(scores_T >= tau_hi) & (scores_T > tau_lo)] == 0).all()
    between_T = (scores_T > tau_lo) & (scores_T < tau_hi)
    assert ((weight_T[between_T] > 0) & (weight_T[between_T] < 1)).all()
    assert (weight_T.diff() <= 0).all()
    if width > 1e-3:
        assert (weight_T.diff().abs() <= scores_T.diff() / width + 1e-9).all()


@pytest.mark.parametrize("gap", [6.0, 2.0])
def test_scores_that_are_not_finite_follow_the_policy(gap):
    """On a step and on a ramp; open unless asked otherwise. -inf is no closeness to trust."""
    calibration = calibrated(gap, on_conflict="ramp")
    scores_T = torch.tensor([math.nan, math.inf, -math.inf])

    assert gate_weight(scores_T, calibration).tolist() == [1.0, 1.0, 1.0]
    assert gate_weight(scores_T, calibration, nan_policy="closed").tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="unknown nan_policy 'maybe'; expected one of"):
        gate_weight(scores_T, calibration, nan_policy="maybe")


def test_weights_keep_shape_and_dtype_and_compare_exactly():
    """A threshold between two neighbours in fp32 is not rounded to one of them."""
    below = torch.tensor([[1.0]])
    above = below.nextafter(torch.tensor(2.0))
    threshold = (below.double() + above.double()).item() / 2

    assert ramp(torch.cat([below, above]), threshold, threshold).tolist() == [[1.0], [0.0]]
    # nor is a weight between 0 and 1: neighbours of the ends of a ramp a million times as wide
    near_T = torch.tensor([1.0, 1e6]).nextafter(torch.tensor([2.0, 0.0]))
    assert [0 < weight < 1 for weight in ramp(near_T, 1.0, 1e6).tolist()] == [True, True]
    assert ramp(torch.ones(2, 3), 0.0, 2.0).dtype == torch.float32
    assert ramp(torch.ones(2, 3).bfloat16(), 0.0, 2.0).dtype == torch.float32
    assert ramp(torch.ones(2, 3).double(), 0.0, 2.0).dtype == torch.float64


# --- certificate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"guarantee": "marginal"}, {"on_conflict": "ramp"}])
def test_certificate_goes_through_json(options):
    """And what is read is checked."""
    certificate = calibrated(2.0 if options == {"on_conflict": "ramp"} else 6.0, **options).certificate

    values = json.loads(json.dumps(certificate.to_dict(), allow_nan=False))

    assert Certificate.from_dict(values) == certificate
    for changed, message in (
        ({"guarantee": "sure"}, "unknown guarantee 'sure'"),
        ({"outcome": "fine"}, "unknown outcome 'fine'"),
        ({"tau_lo": math.inf}, "expected finite tau_lo <= tau_hi"),
        ({"tau_lo": certificate.tau_hi + 1}, "expected finite tau_lo <= tau_hi"),
        ({"confidence": 1.5}, "confidence must lie strictly between 0 and 1"),
        ({"requests": 0}, "requests must be at least 1"),
        ({"colour": "blue"}, "not a certificate that this version can read.*colour"),
        ({"miss": {"bound": 0.1}}, "not a certificate that this version can read"),
    ):
        with pytest.raises(ValueError, match=message):
            Certificate.from_dict(values | changed)
    with pytest.raises(ValueError, match=r"not a certificate that this version can read.*fire"):
        Certificate.from_dict({name: value for name, value in values.items() if name != "fire"})


def test_certificate_says_what_is_guaranteed_and_what_is_not():
    """In sentences, with the numbers, and with the limits of the method."""
    kept = str(calibrated(6.0).certificate)
    average = str(calibrated(6.0, guarantee="marginal").certificate)
    given_up = str(calibrated(2.0, on_conflict="protect_forget").certificate)

    assert "Of forget inputs, at most 5 % meet a gate that is not fully open, with 95 % confidence" in kept
    assert "3 seen and 12 allowed among 400" in kept
    assert "both hold together with at least 90 %" in kept
    assert "Both rates are kept by one threshold" in kept
    assert "NOT KEPT" not in kept
    # rank 381 of 400 leaves 19 above
    bound = f"{100 * upper_bound(19, 400):.3g} %"
    assert f"on average over calibration sets; with this one it is at most {bound} with 95 % confidence" in average
    assert "NOT KEPT: of benign inputs, 5 % were to meet a gate that is not fully closed" in given_up
    for text in (kept, average, given_up):
        assert "Not guaranteed: anything for inputs that are not drawn as the calibration sets were" in text
        assert "it erases nothing" in text


# --- union ------------------------------------------------------------------------------------------------------------


def test_shares_of_a_stream_never_add_up_to_more_than_one():
    """6 / pi^2 for the first; the sum of the first 1000 lacks 6 / (pi^2 1000) of 1, to a thousandth of that."""
    shares = [union_fire_spending(number) for number in range(1, 1001)]

    assert shares[0] == pytest.approx(0.6079271)
    assert shares[9] == pytest.approx(shares[0] / 100)
    assert 1 - sum(shares) == pytest.approx(6 / (math.pi**2 * 1000), rel=2e-3)
    with pytest.raises(ValueError, match="requests are numbered from 1, got 0"):
        union_fire_spending(0)


def test_max_statistic_is_the_distance_to_the_closest_request():
    """On each request's own scale; NaN is not hidden by a finite neighbour."""
    first, second = Standard(mean=10.0, deviation=2.0), Standard(mean=0.0, deviation=1.0)

    closest_N = max_statistic([first(torch.tensor([14.0, 10.0, 12.0])), second(torch.tensor([1.0, 5.0, math.nan]))])

    assert closest_N[:2].tolist() == [1.0, 0.0]
    assert closest_N[2].isnan()
    with pytest.raises(ValueError, match="at least one request"):
        max_statistic([])


def test_standard_moves_thresholds_along():
    """Increasing, so the missed inputs stay the same; equal scores have no scale."""
    forget_N = normal(100, 3.0, seed=2)
    standard = Standard.fit(forget_N)

    moved = standard(torch.tensor(forget_threshold(forget_N, 0.05))).item()

    assert forget_threshold(standard(forget_N), 0.05) == pytest.approx(moved)
    assert standard(forget_N).std().item() == pytest.approx(1)
    for constant_N in (torch.full((9,), 2.0), torch.ones(1)):
        with pytest.raises(ValueError, match="at least two different forget scores"):
            Standard.fit(constant_N)
    with pytest.raises(ValueError, match="positive deviation"):
        Standard(mean=0.0, deviation=0.0)


def test_max_statistic_keeps_the_rate_of_the_union_where_single_gates_do_not():
    """Ten requests on independent scales, thresholds as large as each calibration allows."""
    count, requests = 2000, 10
    forget = [5.0 * number + (1 + number) * normal(300, 0.0, seed=number) for number in range(requests)]
    benign = [5.0 * n + (1 + n) * normal(2 * count, 3.0, seed=100 + n) for n in range(requests)]
    standards = [Standard.fit(forget_N) for forget_N in forget]
    z = [standard(scores_N) for standard, scores_N in zip(standards, benign)]

    together_N = max_statistic([scores_N[:count] for scores_N in z])
    options = {"max_miss": 0.05, "max_fire": 0.05, "on_conflict": "protect_utility"}
    gates = [
        calibrate(standard(own_N), together_N, requests=10, **options) for standard, own_N in zip(standards, forget)
    ]
    alone = [certified_benign_threshold(scores_N[:count], 0.05) for scores_N in z]

    fresh = [scores_N[count:] for scores_N in z]
    union = torch.stack([gate_weight(scores_N, gate) for scores_N, gate in zip(fresh, gates)]).amax(0).mean().item()
    careless = torch.stack([scores_N <= tau for scores_N, tau in zip(fresh, alone)]).any(0).double().mean().item()
    assert 0.02 < union <= 0.05
    assert careless > 0.3
    assert gates[0].certificate.requests == 10
    assert gates[0].certificate.union_fire_bound <= 0.05


def test_max_statistic_keeps_the_rate_of_the_union_with_thresholds_that_stay():
    """Requests come one after the other, each threshold as open as its turn allowed, on the same benign inputs."""
    count, requests = 2000, 5
    benign = [normal(2 * count, 5.0, seed=100 + number) for number in range(requests)]
    forget = [normal(300, 0.0, seed=number) for number in range(requests)]
    thresholds: list[float] = []
    for step in range(1, requests + 1):
        together_N = max_statistic([scores_N[:count] for scores_N in benign[:step]])
        options = {"max_miss": 0.05, "max_fire": 0.05, "requests": step}
        # the last order statistic that is allowed, as if the midpoint had been there
        thresholds.append(certified_benign_threshold(together_N, 0.05))
        thresholds = [
            calibrate(own_N, together_N, current=current, **options).tau_hi
            for own_N, current in zip(forget, thresholds, strict=False)
        ]

    fired = [scores_N[count:] <= threshold for scores_N, threshold in zip(benign, thresholds)]
    assert 0.02 < torch.stack(fired).any(0).double().mean() <= 0.05


def test_union_of_certificates_adds_bounds_and_doubts():
    """Two at 99 %: both rates together, with 98 % confidence. Twenty at 95 % leave none."""
    certificate = calibrated(6.0, confidence=0.99).certificate

    joined = union_of([certificate, certificate])[0]

    assert (joined.requests, joined.miss, joined.fire) == (2, certificate.miss, certificate.fire)
    assert joined.union_fire_bound == pytest.approx(2 * certificate.fire.bound)
    assert joined.union_confidence == pytest.approx(0.98)
    assert "Over 2 request(s)" in str(joined)
    with pytest.raises(ValueError, match="20 bounds leave no confidence in their sum"):
        union_of([calibrated(6.0).certificate] * 20)
    with pytest.raises(ValueError, match="at least one certificate"):
        union_of([])
