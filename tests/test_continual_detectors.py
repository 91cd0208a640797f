"""Every detector keeps the contract; the arithmetic agrees with scikit-learn and with values worked out by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score

from moelora.continual.detectors import (
    DetectorState,
    LayerGaussians,
    Mahalanobis,
    Nearest,
    O3Code,
    O3Paper,
    RelativeMahalanobis,
    RelativeNearest,
    SumOf,
    detector_from_state,
)
from moelora.continual.detectors.base import Detector
from moelora.continual.detectors.folds import cross_fitted, fold_of
from moelora.continual.detectors.nearest import nearest_terms
from moelora.continual.detectors.o3_layers import O3Layers
from moelora.testing.detector_contract import detector_contract

LOUD = "ignore:O3Paper is O3 as printed:UserWarning"


def unit(shape, seed=0):
    """Random unit-length features whose directions differ in strength."""
    generator = torch.Generator().manual_seed(seed)
    scale_D = 1 / (1 + torch.arange(shape[-1])) ** 0.5
    offset_SD = 0.3 * torch.randn(shape[1:], generator=torch.Generator().manual_seed(99))
    return torch.nn.functional.normalize(torch.randn(shape, generator=generator) * scale_D + offset_SD, dim=-1)


def benign_rows(layers, width):
    """All over the sphere."""
    return torch.randn(40, layers, width, generator=torch.Generator().manual_seed(1))


def background(layers, width):
    """Of benign rows."""
    return LayerGaussians.fit(benign_rows(layers, width))


# --- the contract -----------------------------------------------------------------------------------------------------

STANDARDISED = {
    "mahalanobis": lambda layers, width: Mahalanobis(),
    "mahalanobis, 4 directions": lambda layers, width: Mahalanobis(directions=4, seed=3),
    "nearest": lambda layers, width: Nearest(),
    "sum": lambda layers, width: SumOf(Mahalanobis(), Nearest()),
    "relative": lambda layers, width: RelativeMahalanobis(background(layers, width)),
    "relative nearest": lambda layers, width: RelativeNearest(benign_rows(layers, width)),
    "sum with relative": lambda layers, width: SumOf(RelativeMahalanobis(background(layers, width)), Nearest()),
    "sum of both relatives": lambda layers, width: SumOf(
        RelativeMahalanobis(background(layers, width)), RelativeNearest(benign_rows(layers, width), neighbours=3)
    ),
}


@pytest.mark.parametrize("name", STANDARDISED)
def test_standardised_detectors_keep_the_contract(name):
    """With fewer rows than dimensions and with more."""
    detector_contract(STANDARDISED[name], examples=6)


def test_the_contract_notices_a_broken_detector():
    """A detector that scores by its batch, one that turns its scores round, and one that takes NaN."""

    class ByBatch(Mahalanobis):  # pyright: ignore[reportGeneralTypeIssues]
        def _score(self, fitted, features_BSD):
            scores_B = super()._score(fitted, features_BSD)
            return scores_B - scores_B.mean() if len(scores_B) else scores_B

    class Reversed(Mahalanobis):  # pyright: ignore[reportGeneralTypeIssues]
        def _score(self, fitted, features_BSD):
            return -super()._score(fitted, features_BSD)

    class Careless(Mahalanobis):  # pyright: ignore[reportGeneralTypeIssues]
        def _check_for_scores(self, features_BSD):
            return self._need_fitted()

    for broken, words in ((ByBatch, "alone and among others"), (Reversed, "score lower"), (Careless, "NaN")):
        with pytest.raises(AssertionError, match=words):
            detector_contract(lambda layers, width: broken(), examples=2)  # noqa: B023


# --- Gaussians --------------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(seed=st.integers(0, 1000), rows=st.integers(3, 60))
def test_the_distance_is_that_of_the_dense_inverse(seed, rows):
    """Woodbury from the rows equals scikit-learn's Ledoit-Wolf precision, with fewer rows than dimensions and more."""
    fit_NSD, ask_BSD = unit((rows, 1, 24), seed), unit((9, 1, 24), seed + 1)
    dense = LedoitWolf().fit(fit_NSD[:, 0].double().numpy())
    centred_BD = ask_BSD[:, 0].double() - torch.as_tensor(dense.location_)
    expected_B = (centred_BD @ torch.as_tensor(dense.get_precision()) * centred_BD).sum(-1)

    gaussians = LayerGaussians.fit(fit_NSD)

    assert gaussians.directions_SRD.shape == (1, min(rows - 1, 24), 24)
    torch.testing.assert_close(gaussians.distances(ask_BSD)[:, 0], expected_B, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [120, 350, 500])
def test_what_lies_outside_the_directions_is_not_lost_to_rounding(rows):
    """As by a second product with V, for rows that were fitted too, which have next to nothing outside.

    A few dimensions are much the strongest, as in hidden states: V is close to the axes, and its rounding is greatest.
    """
    generator, width = torch.Generator().manual_seed(0), 384
    scale_D, mean_D = 1 / (1 + torch.arange(width)), torch.randn(width, generator=generator) / 2
    draw_NSD = torch.randn(rows + 50, 1, width, generator=generator) * scale_D + mean_D
    gaussians = LayerGaussians.fit(draw_NSD[:rows])

    centred_BD = torch.nn.functional.normalize(draw_NSD[-100:, 0].double(), dim=-1) - gaussians.mean_SD[0].double()
    directions_RD = gaussians.directions_SRD[0].double()
    along_BR = centred_BD @ directions_RD.mT
    rest_B = (centred_BD - along_BR @ directions_RD).square().sum(-1)
    expected_B = along_BR.square() @ (1 / gaussians.variance_SR[0].double()) + rest_B / gaussians.remainder_S.double()

    torch.testing.assert_close(gaussians.distances(draw_NSD[-100:])[:, 0], expected_B, rtol=5e-6, atol=0)


def test_length_changes_nothing():
    """Features are taken at unit length, whatever they come as."""
    fit_NSD, ask_BSD = unit((30, 2, 12)), unit((5, 2, 12), 1)

    expected_B = Mahalanobis().fit(fit_NSD).score(ask_BSD)
    scaled_B = Mahalanobis().fit(fit_NSD * 7).score(ask_BSD * 0.01)

    torch.testing.assert_close(scaled_B, expected_B, rtol=1e-3, atol=1e-3)


def test_compressing_keeps_the_trace_and_the_strong_directions():
    """What is dropped is spread over all other directions."""
    whole = LayerGaussians.fit(unit((20, 2, 30)))

    small = whole.compressed(6)

    def trace(part):
        rank, width = part.directions_SRD.shape[1:]
        return part.variance_SR.sum(-1) + (width - rank) * part.remainder_S

    torch.testing.assert_close(trace(small), trace(whole))
    torch.testing.assert_close(small.variance_SR, whole.variance_SR[:, :6])
    assert bool((small.remainder_S > whole.remainder_S).all())
    assert whole.compressed(19) is whole


def test_a_request_scores_about_zero_with_deviations_of_the_layers():
    """Standardised on held-out rows: new rows of the request have a mean near 0 in each layer and a spread near 1."""
    draw = unit((1200, 1, 16))

    scores_B = Mahalanobis().fit(draw[:600]).score(draw[600:])

    assert abs(float(scores_B.mean())) < 0.15
    assert abs(float(scores_B.std()) - 1) < 0.15


def test_cross_fitting_matters_with_fewer_rows_than_dimensions():
    """On the fitted rows themselves the distance is far below that of new rows; the held-out mean is not."""
    draw = unit((100, 1, 200))
    gaussians = LayerGaussians.fit(draw[:50])
    seen, new = gaussians.distances(draw[:50]).mean(), gaussians.distances(draw[50:]).mean()

    standard = cross_fitted(
        lambda kept: LayerGaussians.fit(kept).distances, draw[:50], torch.arange(50), folds=5, seed=0
    )

    held = float(standard.mean_S[0])
    assert seen < 0.75 * new
    assert abs(held - float(new)) < 0.2 * float(new)


@given(prompts=st.integers(10, 30), seed=st.integers(0, 100))
def test_windows_of_a_prompt_share_a_fold(prompts, seed):
    """And folds are as equal as can be."""
    row_N = torch.arange(prompts).repeat_interleave(3)

    fold_N = fold_of(row_N, 5, seed)

    assert bool((fold_N.reshape(-1, 3) == fold_N[::3, None]).all())
    count_F = fold_N[::3].bincount(minlength=5)
    assert int(count_F.max() - count_F.min()) <= 1


def test_windows_of_few_prompts_are_too_few():
    """Twenty windows of nine prompts are nine prompts."""
    row_N = torch.arange(20) % 9

    with pytest.raises(ValueError, match="at least 10 prompts, got 9"):
        Mahalanobis().fit(unit((20, 1, 8)), row_N)


def test_copies_have_no_scale():
    """Rows that are all the same, up to length, in one layer."""
    same_NSD = unit((1, 1, 8)).repeat(20, 1, 1)
    different_NSD = unit((20, 1, 8))

    for detector in (Mahalanobis(), Nearest()):
        with pytest.raises(ValueError, match=r"layer 1 of the features"):
            detector.fit(torch.cat([different_NSD, same_NSD], dim=1))


def test_features_come_from_the_detectors_device():
    """Or the error says what to do."""
    detector = Mahalanobis().fit(unit((30, 2, 12))).to("meta")

    with pytest.raises(ValueError, match=r"features are on cpu, the detector on meta; call detector.to"):
        detector.score(unit((5, 2, 12)))


def test_autocast_does_not_change_scores():
    """Nor does bf16 for the model around it."""
    detector, ask_BSD = SumOf(Mahalanobis(), Nearest()).fit(unit((30, 2, 12))), unit((5, 2, 12), 1)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside_B = detector.score(ask_BSD)

    assert torch.equal(inside_B, detector.score(ask_BSD))


# --- the others -------------------------------------------------------------------------------------------------------


def test_nearest_by_hand():
    """Two neighbours: 1 - mean of the two largest cosines, here (1 + 0.6) / 2."""
    bank_NSD = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])[:, None]

    terms_BS = nearest_terms(bank_NSD, 2, 5)(torch.tensor([[[5.0, 0.0]]]))

    torch.testing.assert_close(terms_BS, torch.tensor([[0.2]], dtype=torch.float64), rtol=0, atol=1e-7)


def test_nearest_needs_as_many_rows_as_neighbours():
    """In every fold, not in all."""
    with pytest.raises(ValueError, match="9 neighbours need as many rows"):
        Nearest(neighbours=9).fit(unit((10, 1, 8)))


def test_a_sum_is_the_sum():
    """And the detectors that it was made of are not fitted by it."""
    parts, fit_NSD, ask_BSD = (Mahalanobis(), Nearest()), unit((30, 2, 12)), unit((5, 2, 12), 1)

    together_B = SumOf(*parts).fit(fit_NSD).score(ask_BSD)

    with pytest.raises(ValueError, match="not fitted"):
        parts[0].score(ask_BSD)
    torch.testing.assert_close(together_B, sum(part.fit(fit_NSD).score(ask_BSD) for part in parts))


def test_relative_subtracts_the_background():
    """Standardised, so the difference up to one scale and offset."""
    benign, fit_NSD, ask_BSD = background(1, 12), unit((30, 1, 12)), unit((6, 1, 12), 1)

    scores_B = RelativeMahalanobis(benign).fit(fit_NSD).score(ask_BSD)

    plain_B = (LayerGaussians.fit(fit_NSD).distances(ask_BSD) - benign.distances(ask_BSD))[:, 0].float()
    ratio_B = (scores_B - scores_B[0])[1:] / (plain_B - plain_B[0])[1:]
    torch.testing.assert_close(ratio_B, ratio_B[:1].expand(5), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"\(1, 12\), the request \(2, 12\)"):
        RelativeMahalanobis(benign).fit(unit((30, 2, 12)))


def test_relative_nearest_is_a_difference_of_mean_cosines():
    """Standardised, so the difference up to one scale and offset; by hand, with one layer."""
    benign_MD, fit_ND, ask_BD = (
        rows[:, 0].double() for rows in (benign_rows(1, 12), unit((30, 1, 12)), unit((6, 1, 12), 1))
    )

    scores_B = RelativeNearest(benign_MD[:, None], neighbours=2).fit(fit_ND[:, None]).score(ask_BD[:, None])

    unit_MD = torch.nn.functional.normalize(benign_MD, dim=-1)
    near_B, benign_B = ((ask_BD @ rows.mT).topk(2).values.mean(-1) for rows in (fit_ND, unit_MD))
    plain_B = (benign_B - near_B).float()
    ratio_B = (scores_B - scores_B[0])[1:] / (plain_B - plain_B[0])[1:]
    torch.testing.assert_close(ratio_B, ratio_B[:1].expand(5), rtol=1e-3, atol=1e-3)


def test_relative_nearest_follows_borders_that_one_gaussian_cannot():
    """The request is on both sides of the benign text: its mean is in the middle of it."""
    generator = torch.Generator().manual_seed(0)

    def around(*angles):
        angle_N = torch.tensor(angles).repeat(40) + 0.03 * torch.randn(40 * len(angles), generator=generator)
        return torch.stack([angle_N.cos(), angle_N.sin(), torch.ones_like(angle_N)], dim=-1)[:, None]

    benign_MSD, fit_NSD = around(0.0), around(-0.4, 0.4)
    detector = RelativeNearest(benign_MSD).fit(fit_NSD)

    assert detector.score(around(-0.4, 0.4)).max() < detector.score(around(0.0)).min()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RelativeNearest(torch.randn(3, 1, 4), neighbours=4), "benign rows, 3, got 4"),
        (lambda: RelativeNearest(torch.full((9, 1, 4), torch.nan)), "finite"),
        (lambda: RelativeNearest(torch.randn(9, 1, 4)).fit(unit((30, 2, 4))), r"\(1, 4\), the request \(2, 4\)"),
        (lambda: RelativeNearest(torch.randn(9, 1, 4), neighbours=9).fit(unit((10, 1, 4))), "add rows"),
    ],
)
def test_relative_nearest_refuses(build, message):
    """Too few rows, and features that do not fit."""
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.filterwarnings(LOUD)
@pytest.mark.parametrize(
    "build", [*STANDARDISED.values(), lambda layers, width: O3Paper(), lambda layers, width: O3Code()]
)
def test_a_state_says_what_it_is_of(build):
    """`detector_from_state` needs nothing else."""
    fit_NSD, ask_BSD = unit((30, 2, 12)), unit((5, 2, 12), 1)
    detector: Detector = build(2, 12).fit(fit_NSD)

    loaded = detector_from_state(detector.state())

    assert type(loaded) is type(detector)
    assert torch.equal(loaded.score(ask_BSD), detector.score(ask_BSD))
    # the settings too: it can be fitted anew
    assert torch.equal(loaded.fit(fit_NSD).score(ask_BSD), detector.score(ask_BSD))


def test_a_state_that_was_changed_is_refused():
    """Unknown kinds, other kinds, other shapes."""
    description, tensors = Mahalanobis().fit(unit((30, 2, 12))).state()

    with pytest.raises(ValueError, match="unknown detector 'magic'; expected one of mahalanobis, nearest"):
        detector_from_state(DetectorState(description | {"kind": "magic"}, tensors))
    with pytest.raises(ValueError, match="expected the state of a 'nearest' detector"):
        Nearest.from_state(DetectorState(description, tensors))
    short = tensors | {"gaussians.mean_SD": tensors["gaussians.mean_SD"][:1]}
    with pytest.raises(ValueError, match="does not fit the other tensors"):
        detector_from_state(DetectorState(description, short))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Mahalanobis(folds=1), "folds must be at least 2"),
        (lambda: Mahalanobis(directions=0), "directions must be at least 1"),
        (lambda: Nearest(neighbours=0), "neighbours must be at least 1"),
        (lambda: SumOf(Nearest()), "at least two detectors"),
        (lambda: O3Paper(zeta=0.0), "zeta must be positive"),
        (lambda: O3Paper(used=1.0), "share between 0 and 1"),
        (lambda: background(1, 8).compressed(0), "directions must be at least 1"),
    ],
)
def test_settings_that_mean_nothing(build, message):
    """An error where the detector is made."""
    with pytest.raises(ValueError, match=message):
        build()


# --- what it is good for ----------------------------------------------------------------------------------------------


def auroc(near_B, far_B):
    """P(far > near), ties by half."""
    labels = [0] * len(near_B) + [1] * len(far_B)
    return float(roc_auc_score(labels, torch.cat([near_B, far_B]).numpy()))


def test_shrinkage_beats_the_pseudo_inverse_just_below_n_equals_d():
    """The pseudo-inverse is worst there; shrinkage is not, and neither is its sum with the nearest rows.

    A decaying spectrum about a common mean, as hidden states have it, and another mean for what is not the request.
    Mean of four seeds with 119 rows: pseudo-inverse 0.71, shrinkage 0.92, sum 0.88; with 64: 0.81, 0.87, 0.85. (With
    many more rows than dimensions they are equal: with 500, 0.97, 0.96, 0.93.)
    """
    width, seeds = 128, 4
    found = {rows: {"pseudo-inverse": 0.0, "shrunk": 0.0, "sum": 0.0} for rows in (64, 119)}
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        scale_D = (1 + torch.arange(width)) ** -0.5
        mean_D = 10 * torch.randn(width, generator=generator) / width**0.5
        shift_D = torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=-1)
        noise_NSD = torch.randn(719, 1, width, generator=generator) * scale_D
        near_BSD, far_BSD = mean_D + noise_NSD[:300], mean_D + shift_D + noise_NSD[300:600]

        for rows, totals in found.items():
            fit_NSD = mean_D + noise_NSD[600 : 600 + rows]
            pseudo = O3Layers.fit(fit_NSD)
            totals["pseudo-inverse"] += auroc(*(pseudo.mahalanobis(part)[:, 0] for part in (near_BSD, far_BSD))) / seeds
            for name, detector in (("shrunk", Mahalanobis()), ("sum", SumOf(Mahalanobis(), Nearest()))):
                detector.fit(fit_NSD)
                totals[name] += auroc(detector.score(near_BSD), detector.score(far_BSD)) / seeds

    assert found[119]["shrunk"] > found[119]["pseudo-inverse"] + 0.1
    assert found[119]["sum"] > found[119]["pseudo-inverse"] + 0.05
    assert found[119]["pseudo-inverse"] < found[64]["pseudo-inverse"] - 0.03
    assert found[119]["shrunk"] > found[64]["shrunk"]
