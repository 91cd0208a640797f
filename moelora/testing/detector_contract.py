"""What every detector must keep, as one call for the tests of yours. Begin with detector_contract.

def test_my_detector():
    detector_contract(lambda layers, width: MyDetector())
"""

import copy
import json
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moelora.continual.detectors.base import Detector, DetectorState

LAYERS = 2
WIDTH = 12

Build = Callable[[int, int], Detector]


def detector_contract(
    build: Build, *, least_rows: int = 10, separates: bool = True, grows: bool = True, examples: int = 10
) -> None:
    """Run a detector through the properties that gates and their calibration rely on.

    Args:
        build: makes an unfitted detector for a number of layers and a width, the same one each time.
        least_rows: how many rows it can be fitted to; one less is an error that names this number.
        separates: whether rows of the request score lower on average than rows that are shifted away from it.
        grows: whether the score grows along the way from the request's mean to a direction orthogonal to it.
        examples: how many random cases each property is tried on.

    Raises:
        AssertionError: naming the property that does not hold.
    """

    # one failure at a time: an AssertionError that names its property; a seed has no simpler form to look for
    @settings(
        max_examples=examples,
        deadline=None,
        report_multiple_bugs=False,
        phases=[Phase.explicit, Phase.reuse, Phase.generate],
    )
    @given(case=cases(least_rows))
    def check(case: "tuple[int, int, int]") -> None:
        seed, rows, width = case
        generator = torch.Generator().manual_seed(seed)
        draw = Request(width, generator)
        fit_NSD, same_BSD, other_BSD = draw.rows(rows), draw.rows(8), draw.rows(8, shifted=True)
        detector = build(LAYERS, width)
        assert detector.fit(fit_NSD) is detector, "fit returns the detector"
        mixed_BSD = torch.cat([same_BSD, other_BSD, fit_NSD[:2]])
        before_BSD = mixed_BSD.clone()
        scores_B = detector.score(mixed_BSD)

        # the form of the answer
        assert scores_B.shape == (len(mixed_BSD),), "one score for each row"
        assert scores_B.dtype == torch.float32, "scores are fp32"
        assert bool(torch.isfinite(scores_B).all()), "scores are finite"
        assert not scores_B.requires_grad, "scores carry no gradient"
        assert torch.equal(mixed_BSD, before_BSD), "features are only read"
        assert detector.score(mixed_BSD[:0]).shape == (0,), "no rows have no scores"

        # what it must not depend on
        scale = float(scores_B.abs().max()) + 1.0
        order = torch.randperm(len(mixed_BSD), generator=generator)
        assert close(detector.score(mixed_BSD[order]), scores_B[order], scale), "the order of a batch changes nothing"
        alone = [detector.score(mixed_BSD[row : row + 1]) for row in range(len(mixed_BSD))]
        assert close(torch.cat(alone), scores_B, scale), "a row is scored alike alone and among others"
        assert torch.equal(detector.score(mixed_BSD), scores_B), "asking twice gives the same bits"
        again = build(LAYERS, width).fit(fit_NSD)
        assert torch.equal(again.score(mixed_BSD), scores_B), "a second fit to the same rows gives the same bits"
        refitted = copy.deepcopy(detector).fit(draw.rows(rows, shifted=True)).fit(fit_NSD)
        assert torch.equal(refitted.score(mixed_BSD), scores_B), "a new fit forgets the old one"

        # what a distance means
        if separates:
            far, near = detector.score(draw.rows(64, shifted=True)).mean(), detector.score(draw.rows(64)).mean()
            assert far > near, "rows of the request score lower on average than shifted ones"
        if grows:
            along_B = detector.score(draw.arc(torch.linspace(0.5, 1.5, 6)))
            assert bool((along_B.diff() > 0).all()), "a row farther from the mean scores higher"

        # saved and loaded
        state = detector.state()
        assert same_json(state.description), "a state's description is JSON"
        kept = {name: tensor.clone() for name, tensor in state.tensors.items()}
        loaded = type(detector).from_state(DetectorState(state.description, kept))
        assert torch.equal(loaded.score(mixed_BSD), scores_B), "a loaded state gives the same bits"
        assert torch.equal(loaded.to("cpu").score(mixed_BSD), scores_B), "moving it to where it is changes nothing"
        spoiled = kept | {name: torch.full_like(tensor, torch.nan) for name, tensor in kept.items()}
        refuses(
            lambda: type(detector).from_state(DetectorState(state.description, spoiled)), "a state that holds NaN", ""
        )
        fewer = dict(list(kept.items())[1:])
        refuses(lambda: type(detector).from_state(DetectorState(state.description, fewer)), "a state with less", "")

        # what it must refuse
        unfitted = build(LAYERS, width)
        refuses(lambda: unfitted.score(same_BSD), "scores before a fit", "fit")
        refuses(lambda: unfitted.state(), "a state before a fit", "fit")
        refuses(lambda: unfitted.fit(fit_NSD[: least_rows - 1]), "a fit to too few rows", str(least_rows))
        for bad in (torch.nan, torch.inf):
            spoilt_NSD = fit_NSD.clone()
            spoilt_NSD[1, 0, 2] = bad
            refuses(lambda: unfitted.fit(spoilt_NSD), "a fit to NaN or infinity", "NaN")  # noqa: B023
            refuses(lambda: detector.score(spoilt_NSD), "scores of NaN or infinity", "[1]")  # noqa: B023
        wide_BSD = torch.cat([same_BSD, same_BSD], dim=-1)
        refuses(lambda: detector.score(wide_BSD), "features of another width", str(2 * width))
        assert torch.equal(detector.score(mixed_BSD), scores_B), "a refusal changes nothing"

    check()


class Request:
    """A made-up request: unit-length features about one direction in each layer, and others about another one."""

    generator: torch.Generator
    mean_SD: Tensor
    away_SD: Tensor

    def __init__(self, width: int, generator: torch.Generator) -> None:
        self.generator = generator
        axes = [torch.linalg.qr(torch.randn(width, 2, generator=generator)).Q for _ in range(LAYERS)]
        self.mean_SD, self.away_SD = torch.stack([axis.mT for axis in axes]).unbind(1)

    def rows(self, count: int, *, shifted: bool = False) -> Tensor:
        """Rows of the request, or rows that are about 45 degrees away from it."""
        centre_SD = self.mean_SD + self.away_SD if shifted else self.mean_SD
        width = centre_SD.shape[-1]
        noise_NSD = torch.randn(count, *centre_SD.shape, generator=self.generator) * (0.3 / width**0.5)
        return torch.nn.functional.normalize(torch.nn.functional.normalize(centre_SD, dim=-1) + noise_NSD, dim=-1)

    def arc(self, angle_B: Tensor) -> Tensor:
        """From the mean's direction, by these angles, towards one orthogonal to it."""
        angle_B11 = angle_B[:, None, None]
        return angle_B11.cos() * self.mean_SD + angle_B11.sin() * self.away_SD


@st.composite
def cases(draw: Any, least_rows: int) -> Any:
    """A seed, a number of rows, and a width that is less than that number or far greater."""
    rows = draw(st.integers(max(least_rows, 20), max(least_rows, 20) + 40))
    return draw(st.integers(0, 2**31 - 1)), rows, draw(st.sampled_from([WIDTH, 8 * WIDTH]))


def close(left: Tensor, right: Tensor, scale: float) -> bool:
    """Equal up to rounding, relative to the largest score."""
    return torch.allclose(left, right, atol=1e-5 * scale, rtol=1e-5)


def refuses(action: Callable[[], Any], what: str, words: str) -> None:
    """The action raises a ValueError whose message holds these words."""
    said = None
    try:
        action()
    except ValueError as error:
        said = str(error)
    assert said is not None, f"{what} must be a ValueError"
    assert words in said, f"the error for {what} says {words!r}; it says: {said}"


def same_json(value: Any) -> bool:
    """Whether JSON gives a value back as it was."""
    return json.loads(json.dumps(value)) == value
