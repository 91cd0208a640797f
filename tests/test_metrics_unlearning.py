"""What is left after unlearning, and TOFU's measures: by hand, beside chance, and undefined where they are."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from moelora import metrics
from moelora.metrics import Accuracy, Unlearned


def accuracy(value: float, chance: float = 0.25, items: int = 100) -> Accuracy:
    """An accuracy on four-option questions."""
    return Accuracy(value=value, chance=chance, items=items)


def unlearned(sample: float, distribution: float, nearest: float, *utility: float) -> Unlearned:
    """A moment with utility sets "0", "1", ..."""
    return Unlearned(
        sample=accuracy(sample),
        distribution=accuracy(distribution),
        nearest=accuracy(nearest),
        utility={str(number): accuracy(value) for number, value in enumerate(utility)},
    )


# --- accuracy ---------------------------------------------------------------------------------------------------------


def test_accuracy_stands_beside_chance():
    """Three of four right; options 2, 4, 4, 5 make chance (1/2 + 1/4 + 1/4 + 1/5) / 4."""
    found = metrics.choice_accuracy(torch.tensor([True, True, False, True]), torch.tensor([2, 4, 4, 5]))

    assert (found.value, found.items) == (0.75, 4)
    assert found.chance == pytest.approx(0.3)
    assert found.above_chance == pytest.approx(0.45)
    assert accuracy(0.1).above_chance == pytest.approx(-0.15)


def test_accuracy_of_nothing_is_an_error():
    """No items, no options, or no share."""
    with pytest.raises(ValueError, match="one item or more"):
        metrics.choice_accuracy(torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match="each with options"):
        metrics.choice_accuracy(torch.tensor([True]), torch.tensor([0]))
    for value, chance, items in ((1.1, 0.2, 3), (math.nan, 0.2, 3), (0.5, -0.1, 3), (0.5, 0.1, 0)):
        with pytest.raises(ValueError, match="value and chance in"):
            Accuracy(value=value, chance=chance, items=items)
    with pytest.raises(ValueError, match="nothing to pool"):
        metrics.pooled([])


@given(st.lists(st.lists(st.tuples(st.booleans(), st.integers(2, 5)), min_size=1, max_size=9), min_size=1, max_size=4))
def test_pooled_is_the_accuracy_of_all_items_together(requests):
    """Not the mean of the requests' accuracies."""
    parts = [
        metrics.choice_accuracy(torch.tensor([c for c, _ in items]), torch.tensor([n for _, n in items]))
        for items in requests
    ]
    together = [item for items in requests for item in items]

    found = metrics.pooled(parts)

    assert found.items == len(together)
    assert found.value == pytest.approx(sum(correct for correct, _ in together) / len(together))
    assert found.chance == pytest.approx(sum(1 / n for _, n in together) / len(together))


# --- U2R --------------------------------------------------------------------------------------------------------------


def test_u2r_by_hand():
    """Drop (0.9 - 0.25) + (0.8 - 0.3) = 1.15; cost (0.8 - 0.7) + (0.7 - 0.68) + (0.6 - 0.57) = 0.15."""
    found = metrics.u2r(unlearned(0.9, 0.8, 0.8, 0.7, 0.6), unlearned(0.25, 0.3, 0.7, 0.68, 0.57))

    assert found.drop == pytest.approx(1.15)
    assert found.cost == pytest.approx(0.15)
    assert found.value == pytest.approx(1.15 / 0.15)
    assert found.value_to_chance == pytest.approx(found.value)
    assert found.reason == ""


def test_u2r_below_chance_earns_nothing():
    """Sample accuracy 0.05 of four options counts as 0.25."""
    found = metrics.u2r(unlearned(0.9, 0.8, 0.8, 0.7), unlearned(0.05, 0.3, 0.7, 0.7))

    assert found.value == pytest.approx((0.85 + 0.5) / 0.1)
    assert found.value_to_chance == pytest.approx((0.65 + 0.5) / 0.1)


@pytest.mark.parametrize(
    ("before", "after"), [((0.8, 0.7), (0.8, 0.7)), ((0.8, 0.7), (0.9, 0.7)), ((0.05, 0.1), (0.0, 0.15))]
)
def test_u2r_is_not_defined_where_utility_did_not_fall(before, after):
    """It stays, it rises, or one set gains what another loses, up to rounding: a reason, not a number."""
    found = metrics.u2r(unlearned(0.9, 0.8, *before), unlearned(0.2, 0.2, *after))

    assert found.value is None
    assert found.value_to_chance is None
    assert found.drop == pytest.approx(1.3)
    assert "utility did not fall" in found.reason


def test_u2r_compares_like_with_like():
    """The utility sets have the same names, in any order."""
    before, after = unlearned(0.9, 0.8, 0.8, 0.7, 0.6), unlearned(0.2, 0.2, 0.7, 0.7, 0.5)
    turned = Unlearned(
        sample=after.sample,
        distribution=after.distribution,
        nearest=after.nearest,
        utility=dict(reversed(list(after.utility.items()))),
    )

    assert metrics.u2r(before, turned) == metrics.u2r(before, after)
    with pytest.raises(ValueError, match="same utility sets"):
        metrics.u2r(before, unlearned(0.2, 0.2, 0.7, 0.7))


# --- TOFU -------------------------------------------------------------------------------------------------------------


def test_probabilities_by_hand():
    """exp(-nll); and the truth's part of probabilities 0.5, 0.25, 0.125."""
    nll_BC = -torch.tensor([[0.5, 0.25, 0.125], [0.1, 0.4, 0.3]]).double().log()

    assert metrics.conditional_probability(nll_BC[:, 0]).tolist() == pytest.approx([0.5, 0.1])
    assert metrics.option_probability(nll_BC).tolist() == pytest.approx([0.5 / 0.875, 0.1 / 0.8])


@pytest.mark.parametrize(
    ("generated", "reference", "expected"),
    [
        ("The cat sat on the mat.", "the cat on a mat", 4 / 5),
        ("on mat the cat", "the cat on mat", 2 / 4),
        ("Paris", "Paris.", 1),
        ("", "one", 0),
        ("He was born in Genève in 1931, not 1913", "born in 1913 in genève", 3 / 5),
        ("a a a", "a b a", 2 / 3),
        ("b", "a b a b", 1 / 4),
    ],
)
def test_rouge_l_recall_by_hand(generated, reference, expected):
    """Longest common subsequence over the reference's words; case and punctuation do not count."""
    assert metrics.rouge_l_recall(generated, reference) == pytest.approx(expected)


WORDS = st.lists(st.sampled_from("abc"), max_size=7)


@given(WORDS, WORDS.filter(len))
def test_rouge_l_recall_is_the_longest_common_subsequence(words, wanted):
    """Against trying all subsequences of the reference."""

    def contains(sub: list[str]) -> bool:
        rest = iter(words)
        return all(word in rest for word in sub)

    subs = ([w for i, w in enumerate(wanted) if bits >> i & 1] for bits in range(2 ** len(wanted)))
    longest = max(len(sub) for sub in subs if contains(sub))

    assert metrics.rouge_l_recall(" ".join(words), " ".join(wanted)) == longest / len(wanted)


def test_rouge_l_recall_of_nothing_is_an_error():
    """A reference without words."""
    with pytest.raises(ValueError, match="no word to recall"):
        metrics.rouge_l_recall("anything", "...")


def test_truth_ratios_by_hand():
    """Perturbed 0.5 and 0.125, paraphrased 0.25: arithmetic mean 0.3125 / 0.25, geometric 0.25 / 0.25."""
    perturbed_BC = -torch.tensor([[0.5, 0.125]]).double().log()
    paraphrased_B = -torch.tensor([0.25]).double().log()

    assert metrics.truth_ratio(perturbed_BC, paraphrased_B).item() == pytest.approx(1.25)
    assert metrics.released_truth_ratio(perturbed_BC, paraphrased_B).item() == pytest.approx(1)


@given(st.integers(0, 999), st.integers(1, 5))
def test_the_released_ratio_is_never_above_the_papers(seed, answers):
    """Geometric and arithmetic mean; equal for one perturbed answer."""
    nll_BC = torch.rand(4, answers + 1, generator=torch.Generator().manual_seed(seed)).double() * 5
    paper_B = metrics.truth_ratio(nll_BC[:, 1:], nll_BC[:, 0])
    released_B = metrics.released_truth_ratio(nll_BC[:, 1:], nll_BC[:, 0])

    assert (released_B <= paper_B * (1 + 1e-12)).all()
    if answers == 1:
        torch.testing.assert_close(released_B, paper_B)


def test_aggregates_of_truth_ratios_by_hand():
    """Forget: min(R, 1/R); kept: max(0, 1 - R). R = 0 and infinity are extremes, not errors."""
    ratio_B = torch.tensor([0.5, 2.0, 1.0, 0.0])

    assert metrics.forget_truth_ratio(ratio_B) == pytest.approx((0.5 + 0.5 + 1 + 0) / 4)
    assert metrics.kept_truth_ratio(ratio_B) == pytest.approx((0.5 + 0 + 0 + 1) / 4)
    assert metrics.forget_truth_ratio(torch.tensor([math.inf])) == 0
    assert metrics.kept_truth_ratio(torch.tensor([math.inf])) == 0
    # the released code stores 1 / R
    assert metrics.forget_truth_ratio(1 / ratio_B) == metrics.forget_truth_ratio(ratio_B)
    for bad in (torch.tensor([-0.1]), torch.tensor([math.nan]), torch.zeros(0)):
        with pytest.raises(ValueError, match="truth ratios"):
            metrics.forget_truth_ratio(bad)


def test_model_utility_is_the_harmonic_mean_of_nine():
    """As SciPy has it; 0 if one of them is 0."""
    scores = torch.tensor([[0.9, 0.8, 0.5], [0.6, 0.7, 0.4], [0.3, 0.95, 1.0]])

    assert metrics.model_utility(scores) == pytest.approx(float(stats.hmean(scores.double().flatten().numpy())))
    assert metrics.model_utility(torch.full((3, 3), 0.6)) == pytest.approx(0.6)
    scores[1, 1] = 0
    assert metrics.model_utility(scores) == 0
    for bad in (1.5, -0.1, math.nan):
        scores[1, 1] = bad
        with pytest.raises(ValueError, match=r"scores in \[0, 1\]"):
            metrics.model_utility(scores)


def test_forget_quality():
    """1 for equal samples; for samples apart, the exact 2 / C(2n, n); the same for R and 1 / R."""
    low, high = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1.5, 2.0, 2.5, 3.0])

    assert metrics.forget_quality(low, low) == pytest.approx(1)
    assert metrics.forget_quality(low, high) == pytest.approx(2 / math.comb(8, 4))
    mixed = torch.tensor([0.15, 0.2, 2.2, 0.35])
    assert metrics.forget_quality(mixed, high) == pytest.approx(metrics.forget_quality(1 / mixed, 1 / high))
    with pytest.raises(ValueError, match="retained ratios"):
        metrics.forget_quality(low, torch.zeros(0))
