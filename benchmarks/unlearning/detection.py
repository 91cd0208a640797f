"""Can a detector tell a request from benign text, and known intents from unknown ones? Begin with requests and scope.

`requests`: a detector is fitted to what each request hands over, and tells the request's test split from near (the
retained domains) and far inputs (Banking77, out-of-scope queries). `scope`: all ten domains are fitted, and the union
of their detectors tells CLINC150's test split from its out-of-scope queries, beside the scores of the literature.

Nothing is chosen on test data. The layers and the detector of `scope` are chosen by the AUROC on validation splits.

Axes: N utterances fitted, B scored, S layers, D width, C classes.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from benchmarks.unlearning.clinc import OUTSIDE, REQUESTS, Corpus, Roles, Utterances
from benchmarks.unlearning.remembered import Remembered, View
from benchmarks.unlearning.results import Figure
from moelora.continual.detectors import (
    Detector,
    LayerGaussians,
    Mahalanobis,
    Nearest,
    O3Code,
    O3Paper,
    RelativeMahalanobis,
    RelativeNearest,
    SumOf,
)
from moelora.continual.features import spread
from moelora.metrics import auroc, auroc_interval, benign_fire_rate_at_forget_recall, forget_miss_rate_at_benign

Score = Callable[[Utterances], Float[Tensor, " B"]]
"""A distance of each utterance: larger is farther."""

UPPER = 3
"""How many of the last layers our choice looks at."""

CHOSEN = "relative Mahalanobis + relative Nearest + Nearest, upper layers"
"""The detector of the stacks in `requests`: of those with a distance that is relative to nothing, so that what is far
from all that is known is far from a request, the best by its AUROC on validation splits."""

OWN = "the classifier's own probability (it knows the intents)"
"""A row to compare with, which a model without such a head does not have."""


SUMS = (
    ("Mahalanobis", "Nearest"),
    ("relative Mahalanobis", "Nearest"),
    ("relative Mahalanobis", "relative Nearest"),
    ("relative Mahalanobis", "relative Nearest", "Nearest"),
)
"""Of detectors that are tried together."""


class Parts(NamedTuple):
    """The detectors at one choice of layers, each on its own: a `SumOf` of them is the sum of their scores."""

    layers: tuple[int, ...]
    detectors: Mapping[str, Callable[[], Detector]]


def upper(depth: int) -> tuple[int, ...]:
    """The layers of our choice."""
    return tuple(range(max(1, depth - UPPER + 1), depth + 1))


def chosen_detector(background_NSD: Float[Tensor, "N S D"]) -> Detector:
    """Two distances less those from benign text, and one that needs none: what is far from both is no request."""
    return SumOf(RelativeMahalanobis(LayerGaussians.fit(background_NSD)), RelativeNearest(background_NSD), Nearest())


# --- requests ---------------------------------------------------------------------------------------------------------


def requests(
    remembered: Remembered, roles: Roles, head: nn.Linear, corpus: Corpus
) -> Iterator[tuple[str, list[Figure]]]:
    """Figures of each detector, row by row, over all requests."""
    found: dict[str, list[Figure]] = {}
    for request in REQUESTS:
        asked = roles.asked[request]
        for row, score in _scores(remembered, asked, roles, head, sorted(corpus.labels_of([request]))):
            found.setdefault(row, []).extend(_against(score, request, roles))
    yield from found.items()


def _scores(
    remembered: Remembered, asked: Utterances, roles: Roles, head: nn.Linear, labels: Sequence[int]
) -> Iterator[tuple[str, Score]]:
    depth = remembered.states.layers[-1]
    for name, layers in (("five layers", spread(depth, 5)), ("upper layers", upper(depth))):
        view = View(remembered, layers)
        benign_NSD = view.of(roles.background)
        background = LayerGaussians.fit(benign_NSD)
        parts: dict[str, Score] = {}
        for kind, detector in (
            ("Mahalanobis", Mahalanobis()),
            ("Nearest", Nearest()),
            ("relative Mahalanobis", RelativeMahalanobis(background)),
            ("relative Nearest", RelativeNearest(benign_NSD)),
        ):
            parts[kind] = _of(detector.fit(view.of(asked)), view)
        for names in SUMS:
            parts[" + ".join(names)] = _sum(*(parts[name] for name in names))
        for kind, score in parts.items():
            yield f"{kind}, {name}", score

    raw = View(remembered, remembered.states.layers, unit=False)
    paper, code = o3_detectors()
    for kind, detector in (("o3_paper", paper), ("o3_code", code)):
        detector.fit(raw.of(asked))
        yield f"{kind}, distance", _of(detector, raw)
        # what O3 opens by; larger is nearer
        yield f"{kind}, weight", lambda utterances, own=detector: -own.weight(raw.of(utterances))

    final = View(remembered, [depth])
    yield OWN, lambda utterances: -head(final.of(utterances)[:, 0]).softmax(-1)[:, labels].sum(-1)


def o3_detectors() -> tuple[O3Paper, O3Code]:
    """Both presets; that the paper's gate does not close is what is measured here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return O3Paper(), O3Code()


def _against(score: Score, request: str, roles: Roles) -> Iterator[Figure]:
    # what is chosen, is chosen by this one; the three kinds of benign text count alike
    held_N = score(roles.held[request])
    known = [auroc(held_N, score(utterances)) for utterances in roles.calibration.values()]
    yield Figure("AUROC", sum(known) / len(known), request, "validation")
    forget_B = score(roles.held_out[request])
    for versus, utterances in (("near", roles.retained), ("Banking77", roles.banking), ("out of scope", roles.outside)):
        yield from figures_of(forget_B, score(utterances), request, versus)


def figures_of(
    forget_N: Float[Tensor, " N"], benign_M: Float[Tensor, " M"], request: str, versus: str
) -> Iterator[Figure]:
    """AUROC with DeLong's interval, and the error rates at fixed rates of the other kind."""
    constant = min(forget_N.min(), benign_M.min()) == max(forget_N.max(), benign_M.max())
    low, high = (float("nan"),) * 2 if constant else auroc_interval(forget_N, benign_M)
    yield Figure("AUROC", auroc(forget_N, benign_M), request, versus, low=low, high=high)
    yield Figure("fire at recall 95", benign_fire_rate_at_forget_recall(forget_N, benign_M), request, versus)
    yield Figure("miss at benign 95", forget_miss_rate_at_benign(forget_N, benign_M), request, versus)


# --- scope ------------------------------------------------------------------------------------------------------------

BASELINES = ("max logit", "1-NN cosine", "Mahalanobis, final embedding")


def scope(remembered: Remembered, corpus: Corpus, head: nn.Linear) -> Iterator[tuple[str, list[Figure]]]:
    """Figures of each score that tells known intents from unknown ones."""
    splits = corpus.splits
    known = {"validation": splits["val"], "test": splits["test"]}
    unknown = {"validation": splits["oos_train"] + splits["oos_val"], "test": splits["oos_test"]}
    for row, score in (*_baselines(remembered, splits["train"], head), *_unions(remembered, corpus)):
        figures: list[Figure] = []
        for versus in known:
            inside = [utterance for utterance in known[versus] if utterance.label != OUTSIDE]
            figures += figures_of(score(inside), score(unknown[versus]), "", versus)
        yield row, figures


def _baselines(remembered: Remembered, train: Utterances, head: nn.Linear) -> Iterator[tuple[str, Score]]:
    final = View(remembered, [remembered.states.layers[-1]])
    fitted_ND = final.of(train)[:, 0]
    label_N = torch.tensor([utterance.label for utterance in train])
    yield "max logit", lambda utterances: -head(final.of(utterances)[:, 0]).amax(-1)
    yield "1-NN cosine", lambda utterances: 1 - (final.of(utterances)[:, 0] @ fitted_ND.mT).amax(-1)
    distance = _class_mahalanobis(fitted_ND, label_N)
    yield "Mahalanobis, final embedding", lambda utterances: distance(final.of(utterances)[:, 0])


def _class_mahalanobis(
    fitted_ND: Float[Tensor, "N D"], label_N: Int[Tensor, " N"]
) -> Callable[[Tensor], Float[Tensor, " B"]]:
    """min_c (z - mu_c)^T S^-1 (z - mu_c) with one covariance for all classes. Lee et al. (2018), arXiv 1807.03888."""
    exact_ND = fitted_ND.double()
    mean_CD = torch.stack([exact_ND[label_N == label].mean(0) for label in label_N.unique().tolist()])
    place_N = label_N.unique(return_inverse=True)[1]
    centred_ND = exact_ND - mean_CD[place_N]
    covariance_DD = centred_ND.mT @ centred_ND / len(exact_ND)
    # features of unit length lie on a sphere: the mean direction has next to no variance
    precision_DD = torch.linalg.inv(covariance_DD + 1e-6 * torch.eye(len(covariance_DD), dtype=torch.float64))

    def distance(features_BD: Tensor) -> Tensor:
        z_BD = features_BD.double()
        own_B = ((z_BD @ precision_DD) * z_BD).sum(-1)
        cross_BC = z_BD @ precision_DD @ mean_CD.mT
        return (own_B[:, None] - 2 * cross_BC + ((mean_CD @ precision_DD) * mean_CD).sum(-1)).amin(-1)

    return distance


def _unions(remembered: Remembered, corpus: Corpus) -> Iterator[tuple[str, Score]]:
    """Ours: a detector for each domain, which knows no intents; an input is as far as it is from the closest one."""
    depth = remembered.states.layers[-1]
    for name, layers in (("last layer", (depth,)), ("upper layers", upper(depth))):
        view = View(remembered, layers)
        # the background is every known utterance; none that is out of scope
        background = LayerGaussians.fit(view.of(corpus.splits["train"][::5]))
        kinds: dict[str, list[Score]] = {}
        for domain in corpus.domains:
            features_NSD = view.of(corpus.of("train", [domain]))
            for kind, detector in (
                ("Mahalanobis", Mahalanobis()),
                ("Nearest", Nearest()),
                ("relative Mahalanobis", RelativeMahalanobis(background)),
            ):
                kinds.setdefault(kind, []).append(_of(detector.fit(features_NSD), view))
        kinds["Mahalanobis + Nearest"] = [_sum(*pair) for pair in zip(kinds["Mahalanobis"], kinds["Nearest"])]
        kinds["relative Mahalanobis + Nearest"] = [
            _sum(*pair) for pair in zip(kinds["relative Mahalanobis"], kinds["Nearest"])
        ]
        for kind, scores in kinds.items():
            yield f"{kind}, {name}", _closest(scores)


# --- inside -----------------------------------------------------------------------------------------------------------


def _of(detector: Detector, view: View) -> Score:
    return _once(lambda utterances: detector.score(view.of(utterances)))


def _sum(*scores: Score) -> Score:
    return lambda utterances: torch.stack([score(utterances) for score in scores]).sum(0)


def _closest(scores: Sequence[Score]) -> Score:
    return lambda utterances: torch.stack([score(utterances) for score in scores]).amin(0)


def _once(score: Score) -> Score:
    """Scores of a list are computed once, for all sums that they are in."""
    known: dict[tuple[str, ...], Tensor] = {}

    def remembered(utterances: Utterances) -> Tensor:
        key = tuple(utterance.text for utterance in utterances)
        if key not in known:
            known[key] = score(utterances)
        return known[key]

    return remembered


def best_union(lines: Iterable[Mapping[str, str]]) -> str:
    """The row of `scope` with the best AUROC on validation data, baselines aside."""
    ours = {
        line["row"]: float(line["value"])
        for line in lines
        if line["part"] == "scope"
        and line["row"] not in BASELINES
        and (line["metric"], line["versus"]) == ("AUROC", "validation")
    }
    if not ours:
        raise ValueError("there are no results of the part 'scope' yet; run it first")
    return max(ours, key=ours.__getitem__)
