"""What O3 printed and what it released, with the facts that speak against using either; values worked out by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import EmpiricalCovariance
from sklearn.svm import OneClassSVM

from moelora.continual.detectors import O3Code, O3Paper
from moelora.continual.detectors.ball import enclosing_ball
from moelora.continual.detectors.o3 import GAMMA, split
from moelora.continual.detectors.o3_layers import O3Layers
from moelora.continual.detectors.o3_weights import TwoGaussians, weight_code_scienceqa, weight_code_tofu, weight_eq13
from moelora.losses.contrastive_entropy import contrastive_entropy, contrastive_entropy_with_mlm
from moelora.testing.detector_contract import Request, detector_contract

LOUD = "ignore:O3Paper is O3 as printed:UserWarning"


def drawn(shape, seed=0):
    """Random features whose directions differ in strength, about a common mean."""
    generator = torch.Generator().manual_seed(seed)
    scale_D = 1 / (1 + torch.arange(shape[-1])) ** 0.5
    offset_SD = 0.3 * torch.randn(shape[1:], generator=torch.Generator().manual_seed(99))
    return torch.randn(shape, generator=generator) * scale_D + offset_SD


@pytest.mark.filterwarnings(LOUD)
def test_o3_as_printed_keeps_the_contract():
    """Its score may shrink on the way: a direction without variance is not measured."""
    detector_contract(lambda layers, width: O3Paper(), grows=False)


@pytest.mark.parametrize("variant", ["scienceqa", "tofu"])
def test_o3_as_released_keeps_the_contract_but_has_no_direction(variant):
    """Which of near and far scores higher depends on which of its two terms is larger."""
    detector_contract(lambda layers, width: O3Code(variant), separates=False, grows=False)


@pytest.mark.parametrize(("rows", "width"), [(32, 64), (20, 19), (80, 24)])
def test_the_pseudo_inverse_is_scikit_learns(rows, width):
    """`EmpiricalCovariance` of the same rows, with fewer rows than dimensions and more."""
    fit_NSD, ask_BSD = drawn((rows, 1, width)).double(), drawn((7, 1, width), 1).double()
    expected_B = EmpiricalCovariance().fit(fit_NSD[:, 0].numpy()).mahalanobis(ask_BSD[:, 0].numpy())

    found_B = O3Layers.fit(fit_NSD).mahalanobis(ask_BSD)[:, 0]

    torch.testing.assert_close(found_B, torch.as_tensor(expected_B), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("rows", "width"), [(8, 64), (32, 64), (64, 64), (65, 64)])
def test_the_pseudo_inverse_says_nothing_of_the_fitted_rows(rows, width):
    """With n - 1 <= d every one of them has the distance n - 1, whatever the features; new rows have another."""
    fit_NSD = drawn((rows, 2, width)).double()

    layers = O3Layers.fit(fit_NSD)

    found_NS = layers.mahalanobis(fit_NSD)
    torch.testing.assert_close(found_NS, torch.full_like(found_NS, rows - 1), rtol=1e-6, atol=0)
    new_BS = layers.mahalanobis(drawn((50, 2, width), 1).double())
    assert float(new_BS.std()) > 0.05 * float(new_BS.mean())


def test_o3_warns_that_it_does_not_close():
    """Loudly, where it is made."""
    with pytest.warns(UserWarning, match=r"at least 0.5 for every input"):
        O3Paper()


@pytest.mark.filterwarnings(LOUD)
@settings(max_examples=10)
@given(seed=st.integers(0, 1000), rows=st.integers(10, 60), far=st.floats(0, 1e3), zeta=st.sampled_from([1.0, 10.0]))
def test_the_weight_of_o3_is_never_below_a_half(seed, rows, far, zeta):
    """However far an input is."""
    detector = O3Paper(zeta=zeta).fit(drawn((rows, 2, 16), seed))
    ask_BSD = drawn((20, 2, 16), seed + 1) + far * torch.randn(20, 2, 16, generator=torch.Generator().manual_seed(seed))

    weight_B = detector.weight(ask_BSD)

    assert weight_B.dtype == torch.float32
    assert bool(((weight_B >= 0.5) & (weight_B < 1)).all())


@pytest.mark.filterwarnings(LOUD)
def test_the_weight_of_o3_falls_to_a_half_in_both_tails():
    """Two-sided: an input at the centre of the ball is as untypical as a far one."""
    draw = drawn((300, 2, 6)).double()
    detector = O3Paper().fit(draw[:200])
    fitted = detector._fitted

    weights = [
        float(weight_eq13(fitted.mixture.typicality(distance[None]))[0])
        for distance in (fitted.mixture.median, fitted.mixture.median + 1e6, fitted.mixture.median - 1e6)
    ]

    assert weights == pytest.approx([1 / (1 + math.exp(-10)), 0.5, 0.5])


def test_o3_as_released_scores_by_its_svm():
    """`score_samples` for ScienceQA, `decision_function` for TOFU, of scikit-learn's own SVM."""
    fit_NSD, ask_BSD = drawn((60, 3, 16)), drawn((7, 3, 16), 1)
    for detector, share, nu in ((O3Code("scienceqa"), 0.8, 0.1), (O3Code("tofu"), 0.7, 0.01)):
        used_NSD, rest_MSD = split(fit_NSD, torch.arange(60), share, 0)
        layers = O3Layers.fit(used_NSD)
        scores = [
            (-0.5 * layers.mahalanobis(part) + GAMMA * layers.cosine(part)).numpy() for part in (used_NSD, ask_BSD)
        ]
        svm = OneClassSVM(kernel="linear", nu=nu).fit(scores[0])
        expected = svm.score_samples(scores[1]) if nu == 0.1 else svm.decision_function(scores[1])

        found_B = detector.fit(fit_NSD).score(ask_BSD)

        assert len(used_NSD) == round(60 * share)
        assert len(rest_MSD) == 60 - len(used_NSD)
        size = float(np.abs(svm.score_samples(scores[1])).max())
        np.testing.assert_allclose(found_B.numpy(), expected, rtol=1e-5, atol=1e-6 * size)


def test_o3_as_released_has_no_direction():
    """The same kind of shift scores high with few rows for the dimensions, and low with many."""
    draw = Request(12, torch.Generator().manual_seed(0)), Request(256, torch.Generator().manual_seed(0))
    higher = []
    for request, rows in zip(draw, (400, 40), strict=True):
        detector = O3Code().fit(request.rows(rows))
        far, near = detector.score(request.rows(50, shifted=True)).mean(), detector.score(request.rows(50)).mean()
        higher.append(bool(far > near))

    assert higher[0] != higher[1]


def test_cut_offs_as_released():
    """w = sigmoid(10 u - 2) at a few places: not monotone for ScienceQA, above 1 for TOFU just below its cut-off."""

    def u(*weights):
        return torch.tensor([(math.log(w / (1 - w)) + 2) / 10 for w in weights], dtype=torch.float64)

    scienceqa = weight_code_scienceqa(u(0.2, 0.35, 0.5, 0.89, 0.95))
    tofu = weight_code_tofu(u(0.15, 0.25, 0.319, 0.33, 0.99))

    assert scienceqa.tolist() == pytest.approx([0, 0.35, 0, 0, 1.2])
    assert tofu.tolist() == pytest.approx([0, 0.625, 1.01761, 1, 1])


def test_two_gaussians_by_hand():
    """Equal deviations: the median is the midpoint, in the paper's way too. Otherwise it lies nearer the narrow one."""
    used_N, rest_M = torch.tensor([-1.0, 1.0]).double(), torch.tensor([3.0, 5.0]).double()
    wide_M = torch.tensor([0.0, 8.0]).double()

    same, other, code = (
        TwoGaussians.paper(used_N, rest_M),
        TwoGaussians.paper(used_N, wide_M),
        TwoGaussians.code(used_N, wide_M),
    )

    assert float(same.median) == pytest.approx(2.0)
    assert 0 < float(other.median) < 2
    assert float(other.cumulative(other.median[None])) == pytest.approx(0.5)
    assert float(code.median) == pytest.approx(2.0)
    assert float(code.deviation_used) == float(code.deviation_rest) == pytest.approx(4.0)
    # at the mean of the left one, one deviation each: p = (0.5 + Phi(-4)) / 2, p' = (Phi(4) + 0.5) / 2
    expected = 1 - (math.erf(4 / math.sqrt(2))) / 2
    assert float(same.typicality(torch.zeros(1).double())) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("points", "centre", "radius"),
    [
        ([[1.0, 2.0], [1.0, 2.0]], [1.0, 2.0], 0.0),
        ([[0.0, 0.0], [4.0, 0.0], [2.0, 1.0]], [2.0, 0.0], 2.0),
        ([[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)], [0.1, 0.2]], [0.0, 0.0], 1.0),
        ([[-1e4], [-1e4 + 2]], [-1e4 + 1], 1.0),
    ],
)
def test_the_smallest_ball_by_hand(points, centre, radius):
    """A point, a diameter, an equilateral triangle with a point inside, a far segment."""
    found_S, found = enclosing_ball(torch.tensor(points, dtype=torch.float64))

    torch.testing.assert_close(found_S, torch.tensor(centre, dtype=torch.float64), atol=1e-4, rtol=1e-8)
    assert float(found) == pytest.approx(radius, abs=1e-6)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), count=st.integers(1, 40), width=st.integers(1, 8))
def test_the_smallest_ball_holds_all_and_cannot_be_moved(seed, count, width):
    """No small move of the centre gives a smaller radius."""
    generator = torch.Generator().manual_seed(seed)
    points_NS = torch.randn(count, width, generator=generator).double()

    centre_S, radius = enclosing_ball(points_NS)

    assert bool(((points_NS - centre_S).norm(dim=-1) <= radius + 1e-12).all())
    moved_MS = centre_S + 0.01 * torch.randn(50, width, generator=generator).double()
    assert float((points_NS - moved_MS[:, None]).norm(dim=-1).amax(-1).min()) >= float(radius) - 1e-6


# --- the backbone's loss ----------------------------------------------------------------------------------------------


def test_contrastive_entropy_by_hand():
    """One layer, two rows: inner products (ln 3, 0) and (0, 0) give entropies of (3/4, 1/4) and (1/2, 1/2)."""
    queries_SND = torch.tensor([[[math.log(3.0), 0.0], [0.0, 0.0]]])
    keys_SND = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    first = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))

    one = contrastive_entropy(queries_SND, keys_SND)
    two = contrastive_entropy(queries_SND.repeat(2, 1, 1), keys_SND.repeat(2, 1, 1))

    torch.testing.assert_close(one, torch.tensor(first + math.log(2)))
    torch.testing.assert_close(two, 2 * one)


def test_contrastive_entropy_does_not_name_the_positive():
    """All queries sure of the same wrong key: as good as each sure of its own."""
    keys_SND = torch.eye(3)[None]
    right, wrong = 100 * torch.eye(3)[None], 100 * torch.eye(3)[None, [1, 1, 1]]

    for queries_SND in (right, wrong):
        assert float(contrastive_entropy(queries_SND, keys_SND)) == pytest.approx(0.0, abs=1e-30)


def test_contrastive_entropy_has_a_finite_gradient_of_large_products():
    """Raw inner products of hidden states go into the hundreds."""
    generator = torch.Generator().manual_seed(0)
    queries_SND = (30 * torch.randn(2, 4, 8, generator=generator)).bfloat16().requires_grad_()

    loss = contrastive_entropy(queries_SND, 30 * torch.randn(2, 4, 8, generator=generator).bfloat16())
    (gradient_SND,) = torch.autograd.grad(loss, queries_SND)

    assert loss.dtype == torch.float32
    assert bool(gradient_SND.isfinite().all())


def test_masked_language_model_is_summed_over_tokens_and_averaged_over_rows():
    """Two masked tokens in the first row, one in the second, each with -log 1/4: (2 + 1) / 2 times log 4."""
    queries_SND = torch.zeros(1, 2, 3)
    label_NL = torch.tensor([[0, 3, -100], [-100, -100, 2]])

    loss = contrastive_entropy_with_mlm(queries_SND, queries_SND, torch.zeros(2, 3, 4), label_NL)

    torch.testing.assert_close(loss, torch.tensor(2 * math.log(2) + 1.5 * math.log(4)))
