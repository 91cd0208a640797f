"""A stack goes to a folder and comes back bit for bit; what tells too much, or could not be read, is not written."""

import json
import warnings
from pathlib import Path
from typing import Any, final

import pytest
import torch
from safetensors.torch import load_file
from small_stacks import FORGETTING, PROMPTS, REQUESTS, TRAINING, assert_same, files_of, made, outputs, state
from torch import Tensor, nn

import moelora
from moelora.continual import (
    ContinualStack,
    ExternalEncoder,
    GradientAscent,
    HiddenStates,
    Mahalanobis,
    Nearest,
    Orthogonality,
    RelativeMahalanobis,
    RelativeNearest,
    SumOf,
    UnlearningStack,
)
from moelora.continual.detectors import Detector, LayerGaussians, O3Code, O3Paper
from moelora.mixture import find_mixture
from moelora.testing import tiny


@pytest.fixture(scope="module")
def stack() -> UnlearningStack:
    """Two requests; nobody changes it."""
    return made(requests=2)


@pytest.fixture(scope="module")
def saved(stack: UnlearningStack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder; nobody changes it."""
    folder = tmp_path_factory.mktemp("saved") / "stack"
    stack.save(folder)
    return folder


# --- there and back ---------------------------------------------------------------------------------------------------


def test_a_loaded_stack_is_the_one_that_was_saved(stack, saved, tmp_path):
    """Bit for bit, with gates that are open and closed; saved again, its folder is the same byte for byte."""
    weights_BE = stack.weights(PROMPTS)
    assert 0 < int((weights_BE > 0).any(1).sum()) < len(weights_BE), "some rows are open, some closed"

    loaded = UnlearningStack.load(tiny.model("llama"), saved)

    assert_same(loaded, stack)
    closed_B = (weights_BE == 0).all(1)
    assert torch.equal(outputs(loaded.model)[closed_B], outputs(tiny.model("llama"))[closed_B])
    loaded.save(tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(saved)


def test_requests_go_on_where_they_stopped(saved):
    """A request forgotten, revoked, and forgotten on an empty model: the loaded stack does as the first one would."""
    first, loaded = made(requests=2), UnlearningStack.load(tiny.model("llama"), saved)

    for stack in (first, loaded):
        stack.forget(REQUESTS[2], **FORGETTING)
        stack.revoke("request-1")
    assert first.requests[-1].overlap > 0, "it was kept apart from an earlier expert"
    assert_same(first, loaded)

    for stack in (first, loaded):
        for request in stack.requests:
            stack.revoke(request)
        assert torch.equal(outputs(stack.model), outputs(tiny.model("llama")))
        stack.forget(REQUESTS[1], name="again", **FORGETTING)
    assert_same(first, loaded)


def relative() -> RelativeMahalanobis:
    """A detector that is made with tensors."""
    background_NSD = torch.randn(20, 2, 32, generator=torch.Generator().manual_seed(0))
    return RelativeMahalanobis(LayerGaussians.fit(background_NSD))


def relative_nearest() -> RelativeNearest:
    """One that is made with rows of benign text."""
    background_MSD = torch.randn(20, 2, 32, generator=torch.Generator().manual_seed(0))
    return RelativeNearest(background_MSD, neighbours=2)


def test_a_recipe_with_rows_is_saved_knowingly(tmp_path):
    """Also where no gate was fitted with it."""
    stack = made()
    stack.detector = relative_nearest()

    with pytest.raises(ValueError, match=r"coming requests.*include_features=True"):
        stack.save(tmp_path / "stack")

    stack.save(tmp_path / "stack", include_features=True)
    assert_same(UnlearningStack.load(tiny.model("llama"), tmp_path / "stack"), stack)


@pytest.mark.parametrize(
    "options",
    [
        {"union": "spending", "combine": "max_single", "alpha": 3.0, "seed": 7},
        {"orthogonality": Orthogonality(mode="penalty", side="both", weight=3.0), "rank": 3},
        {"orthogonality": "basis", "detector": Mahalanobis(folds=3, seed=2, directions=3)},
        {"targets": "auto", "detector": relative()},
        {"targets": ["o_proj"], "detector": SumOf(relative(), SumOf(Mahalanobis(), Nearest(neighbours=2)))},
        {"targets": ["o_proj"], "detector": SumOf(relative(), relative_nearest())},
        {"detector": O3Code("tofu")},
    ],
    ids=["union", "penalty", "basis", "relative", "sum", "rows", "o3"],
)
def test_all_options_come_back(options, tmp_path):
    """The next request has the same rank, scale, sites, seeds and detector, so it gets the same expert."""
    stack = made(**options)
    stack.save(tmp_path / "stack", include_features=True)

    loaded = UnlearningStack.load(tiny.model("llama"), tmp_path / "stack")

    assert_same(loaded, stack)
    for each in (stack, loaded):
        each.forget(REQUESTS[1], **FORGETTING)
    assert_same(loaded, stack)
    assert find_mixture(loaded.model)[1].config == find_mixture(stack.model)[1].config
    assert find_mixture(loaded.model)[1].sites == find_mixture(stack.model)[1].sites


def test_sites_that_a_predicate_chose_come_back(tmp_path):
    """It is not saved, but what it chose is: also a stack that was emptied patches these again."""
    stack = made(targets=lambda path, module: path.endswith("1.self_attn.k_proj"))
    stack.save(tmp_path / "stack")
    loaded = UnlearningStack.load(tiny.model("llama"), tmp_path / "stack")
    loaded.revoke("request-1")

    loaded.forget(REQUESTS[0], **FORGETTING)

    assert list(find_mixture(loaded.model)[1].sites) == ["model.layers.1.self_attn.k_proj"]
    assert_same(loaded, stack)


def test_features_come_back(tmp_path):
    """Layers and windows, on another model: an encoder in bf16."""
    model = tiny.model("roberta").bfloat16()
    features = HiddenStates(model, [2], window=3, stride=2, windows_at_once=5)
    stack = UnlearningStack(model, rank=2, features=features)
    stack.forget(REQUESTS[0], objective=GradientAscent(), **FORGETTING)
    stack.save(tmp_path / "stack")

    loaded = UnlearningStack.load(tiny.model("roberta").bfloat16(), tmp_path / "stack")

    assert_same(loaded, stack)
    assert isinstance(loaded.features, HiddenStates)
    assert (loaded.features.layers, loaded.features.window, loaded.features.stride) == ((2,), 3, 2)
    assert loaded.features.windows_at_once == 5
    assert loaded.features.model is loaded.model


def test_a_loaded_model_generates_as_the_saved_one(stack, saved):
    """Gates are asked once for a generation."""
    loaded = UnlearningStack.load(tiny.model("llama"), saved)
    models: list[Any] = [stack.model, loaded.model]
    texts_BL = [model.generate(**PROMPTS, max_new_tokens=3, do_sample=False) for model in models]
    assert torch.equal(*texts_BL)


@pytest.mark.parametrize("routing", ["gates", "calibrated", "sum", "learned"])
def test_a_continual_stack_comes_back(routing, tmp_path):
    """With gates, calibrated or not, without, and with a router that was trained; and it learns on."""
    calibration = FORGETTING["calibration"] if routing == "calibrated" else None
    stack = ContinualStack(tiny.model("llama"), rank=2, routing=routing.replace("calibrated", "gates"))
    learning: dict[str, Any] = {"held_out": 0.4, "training": TRAINING, "calibration": calibration}
    if routing == "calibrated":
        learning["promise"] = made().requests[0].gate.promise
    for dataset in REQUESTS[:2]:
        stack.learn(dataset, **learning)
    if routing == "learned":
        stack.train_router([*REQUESTS[0], *REQUESTS[1]], training=TRAINING)
    stack.save(tmp_path / "stack")

    loaded = ContinualStack.load(tiny.model("llama"), tmp_path / "stack")

    for _ in range(2):
        assert state(loaded) == state(stack)
        assert torch.equal(outputs(loaded.model), outputs(stack.model))
        assert not torch.equal(outputs(loaded.model), outputs(tiny.model("llama")))
        flags = [
            {name: value.requires_grad for name, value in each.model.named_parameters()} for each in (stack, loaded)
        ]
        assert flags[0] == flags[1]
        if routing in ("gates", "calibrated"):
            assert_same(loaded, stack)
        for each in (stack, loaded):
            each.learn(REQUESTS[2], **learning)
    with pytest.raises(ValueError, match=r"holds a ContinualStack, expected UnlearningStack; load it with Continual"):
        UnlearningStack.load(tiny.model("llama"), tmp_path / "stack")


# --- what is not written ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "detector", [Nearest(), SumOf(Mahalanobis(), Nearest()), O3Code(), pytest.param(None, id="O3Paper")]
)
def test_features_of_single_texts_are_written_only_if_that_is_wanted(detector, tmp_path):
    """The error names the alternatives, and nothing is written; with the flag the file says what it holds."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "O3Paper is O3 as printed")
        stack = made(detector=O3Paper() if detector is None else detector)
        for verb in (stack.save, lambda folder: stack.push_to_hub("acme/stack")):
            with pytest.raises(ValueError, match=r"'request-1'.*Mahalanobis.*directions=.*include_features=True"):
                verb(tmp_path / "stack")
        assert not (tmp_path / "stack").exists()

        stack.save(tmp_path / "stack", include_features=True)
        assert json.loads((tmp_path / "stack" / "stack.json").read_text())["holds_features"] is True
        assert_same(UnlearningStack.load(tiny.model("llama"), tmp_path / "stack"), stack)


def test_statistics_are_no_rows(saved):
    """No tensor of the default detector has an axis for texts, but the distances of those held out."""
    names = load_file(saved / "stack.safetensors")
    assert [name for name in names if "N" in name.rpartition("_")[2]] == ["000.held_N", "001.held_N"]
    assert json.loads((saved / "stack.json").read_text())["holds_features"] is False


@final
class Own(Detector):
    """A detector of somebody's own, under the name of another."""

    kind = "mahalanobis"

    def _fit(self, features_NSD: Tensor, row_N: Tensor) -> LayerGaussians:
        return LayerGaussians.fit(features_NSD)

    def _score(self, fitted: LayerGaussians, features_BSD: Tensor) -> Tensor:
        return fitted.distances(features_BSD).sum(-1)

    def _settings(self) -> dict[str, Any]:
        return {}

    def _restore(self, tensors: Any) -> Any:
        raise NotImplementedError


def other_states() -> HiddenStates:
    """Hidden states of another model, as large as ours."""
    return HiddenStates(tiny.model("llama", seed=1))


def encoder() -> ExternalEncoder:
    """Means of token numbers."""
    return ExternalEncoder(lambda batch: nn.functional.one_hot(batch["input_ids"], 99).float().mean(1)[:, None])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (lambda: {"features": encoder()}, r"not the hidden states of its own model.*HiddenStates\(model\)"),
        (lambda: {"features": other_states()}, "not the hidden states of its own model"),
        (lambda: {"detector": Own()}, r"a Own cannot be saved with a stack.*expected one of.*'Mahalanobis'"),
        (lambda: {"detector": SumOf(Mahalanobis(), Own())}, "a Own cannot be saved"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(options, match, tmp_path):
    """Another encoder, another model, a detector of one's own."""
    with pytest.raises(ValueError, match=match):
        made(**options()).save(tmp_path / "stack")
    assert not (tmp_path / "stack").exists()


def test_a_stack_without_experts_or_with_others_is_not_written(tmp_path):
    """There is no mixture to write; and none that its own methods did not make."""
    with pytest.raises(ValueError, match="no experts to save yet"):
        made(requests=0).save(tmp_path / "stack")
    stack = made()
    moelora.add_expert(stack.model, rank=2, name="stranger")
    with pytest.raises(
        ValueError, match=r"experts are \['request-1', 'stranger'\], those of this stack \['request-1'\]"
    ):
        stack.save(tmp_path / "stack")
    assert not (tmp_path / "stack").exists()


def test_a_save_replaces_an_earlier_one(saved, tmp_path):
    """A revoked expert is gone from the folder, other files stay, and a save that is refused leaves all as it was."""
    stack = UnlearningStack.load(tiny.model("llama"), saved)
    stack.save(tmp_path / "stack")
    (tmp_path / "stack" / "notes.txt").write_text("mine")
    stack.revoke("request-1")

    stack.save(tmp_path / "stack")

    files = files_of(tmp_path / "stack")
    assert {name.partition("/")[2] for name in files if name.startswith("experts/")} == {
        "000/adapter_config.json",
        "000/adapter_model.safetensors",
    }
    assert files["notes.txt"] == b"mine"
    assert_same(UnlearningStack.load(tiny.model("llama"), tmp_path / "stack"), stack)

    bank = next(iter(find_mixture(stack.model)[1].layers.values())).bank
    bank.A_frozen_RD[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        stack.save(tmp_path / "stack")
    assert files_of(tmp_path / "stack") == files
