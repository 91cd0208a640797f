"""Features of prompts: padding changes nothing, long prompts come in windows, a patched model is its base."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import moelora
from moelora.continual.detectors import Mahalanobis
from moelora.continual.features import ExternalEncoder, HiddenStates, Windows, cut, spread
from moelora.prefill import masked_mean
from moelora.testing import tiny

DECODERS, ENCODERS = ["llama", "gpt2", "opt"], ["bert", "roberta", "distilbert"]
FAMILIES = [*DECODERS, *ENCODERS, "t5"]

MODELS = {family: tiny.model(family) for family in FAMILIES}


def tokens(rows, length, seed=0):
    """Random token ids, none of them special."""
    return torch.randint(5, 99, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_the_masked_mean_of_the_models_own_hidden_states(family):
    """At unit length, in fp32, of the blocks' outputs and not of the embeddings."""
    model, ids_BL = MODELS[family], tokens(2, 6)
    stack = model.get_encoder() if family == "t5" else model.base_model
    with torch.no_grad():
        states = stack(
            input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL), output_hidden_states=True
        ).hidden_states

    windows = HiddenStates(model)({"input_ids": ids_BL})

    expected_BSD = nn.functional.normalize(torch.stack([state.mean(1) for state in states[1:]], dim=1), dim=-1)
    torch.testing.assert_close(windows.features_WSD, expected_BSD, rtol=1e-4, atol=1e-5)
    assert windows.features_WSD.shape == (2, 2, 32)
    assert windows.features_WSD.dtype == torch.float32
    assert windows.row_W.tolist() == [0, 1]
    assert not windows.features_WSD.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(family, side):
    """A padded row among longer ones has the features that it has alone, whatever stands in its padding."""
    features, short_BL, long_BL = HiddenStates(MODELS[family]), tokens(1, 5), tokens(1, 9, seed=1)
    junk_BL, ones_BL = tokens(1, 4, seed=2), torch.ones(1, 5, dtype=torch.long)
    zeros_BL = torch.zeros(1, 4, dtype=torch.long)
    parts = [(short_BL, ones_BL), (junk_BL, zeros_BL)][:: 1 if side == "right" else -1]
    padded_BL, mask_BL = (torch.cat(pair, dim=1) for pair in zip(*parts, strict=True))

    alone = features({"input_ids": short_BL}).features_WSD
    among = features(
        {
            "input_ids": torch.cat([long_BL, padded_BL]),
            "attention_mask": torch.cat([torch.ones_like(long_BL), mask_BL]),
        }
    )

    torch.testing.assert_close(among.features_WSD[1:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_window_is_a_prompt_of_its_own(family):
    """Windows of 4 tokens, 2 apart, the last one at the end: whatever stands before them, they are run alone."""
    model, ids_BL = MODELS[family], tokens(1, 9)
    short_BL = tokens(1, 3, seed=1)
    ids_2L = torch.cat([ids_BL, torch.cat([short_BL, torch.zeros(1, 6, dtype=torch.long)], dim=1)])
    mask_2L = torch.tensor([[1] * 9, [1] * 3 + [0] * 6])

    windows = HiddenStates(model, window=4, stride=2, windows_at_once=3)(
        {"input_ids": ids_2L, "attention_mask": mask_2L}
    )

    whole = HiddenStates(model)
    pieces = [ids_BL[:, start : start + 4] for start in (0, 2, 4, 5)] + [short_BL]
    expected = torch.cat([whole({"input_ids": piece}).features_WSD for piece in pieces])
    assert windows.row_W.tolist() == [0, 0, 0, 0, 1]
    assert windows.num_rows == 2
    torch.testing.assert_close(windows.features_WSD, expected, rtol=1e-4, atol=1e-5)


@given(length=st.integers(1, 60), window=st.integers(1, 20), data=st.data())
def test_windows_hide_nothing(length, window, data):
    """Every token is in a window, and so are any `window - stride` + 1 that follow one another, together."""
    stride = data.draw(st.integers(1, window))
    padding = data.draw(st.integers(0, 5))
    mask_BL = torch.cat([torch.zeros(1, padding), torch.ones(1, length)], dim=1).bool()

    windows = [set((position_L - padding).tolist()) for _, position_L in cut(mask_BL, window=window, stride=stride)]

    together = min(window - stride + 1, length)
    for start in range(length - together + 1):
        assert any(set(range(start, start + together)) <= positions for positions in windows)
    assert all(len(positions) == min(window, length) for positions in windows)
    assert len(windows) == len({min(positions) for positions in windows})


def test_a_question_behind_a_long_prefix_is_found():
    """The distance of a long prompt is that of its nearest window; a mean over all of it would be far off."""
    model = MODELS["llama"]
    generator = torch.Generator().manual_seed(0)
    request_NL = torch.randint(5, 15, (40, 8), generator=generator)
    prefix_L = torch.randint(50, 99, (56,), generator=generator)
    hidden_L = torch.cat([prefix_L, request_NL[0]])[None]
    windowed, whole = HiddenStates(model, window=8, stride=4), HiddenStates(model, window=64, stride=64)
    fit = windowed({"input_ids": request_NL[1:]})
    detector = Mahalanobis().fit(fit.features_WSD, fit.row_W)

    seen = windowed({"input_ids": hidden_L}).score(detector)
    diluted = whole({"input_ids": hidden_L}).score(detector)
    plain = windowed({"input_ids": request_NL[:1]}).score(detector)

    torch.testing.assert_close(seen, plain, rtol=1e-3, atol=1e-3)
    assert float(diluted) > float(seen) + 10


def test_the_lowest_score_is_by_row():
    """Rows with several windows have their least score."""
    windows = Windows(torch.zeros(5, 1, 2), torch.tensor([0, 0, 1, 2, 2]), 3)

    assert windows.lowest(torch.tensor([3.0, 1.0, 5.0, -1.0, 2.0])).tolist() == [1.0, 5.0, -1.0]
    with pytest.raises(ValueError, match="expected 5 scores"):
        windows.lowest(torch.zeros(3))


def test_batches_join_in_order():
    """The rows of the second come behind those of the first."""
    first = Windows(torch.zeros(3, 1, 2), torch.tensor([0, 0, 1]), 2)
    second = Windows(torch.ones(2, 1, 2), torch.tensor([0, 1]), 2)

    joined = Windows.join([first, second])

    assert joined.row_W.tolist() == [0, 0, 1, 2, 3]
    assert joined.num_rows == 4
    assert joined.features_WSD[:, 0, 0].tolist() == [0, 0, 0, 1, 1]
    with pytest.raises(ValueError, match="no batch to join"):
        Windows.join([])


def test_a_patched_model_gives_its_bases_features_bit_for_bit(tmp_path):
    """Experts, routers and dropout have no part in them, and afterwards all is as it was."""
    model, batch = tiny.model("llama"), {"input_ids": tokens(3, 7)}
    expected = HiddenStates(model)(batch).features_WSD
    tiny.adapter(model, tmp_path / "one")
    tiny.adapter(model, tmp_path / "two", seed=1)
    moelora.patch_model(model, experts=[str(tmp_path / "one"), str(tmp_path / "two")], top_k=2)
    before = model(**batch).logits
    model.train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]

    found = HiddenStates(model)(batch).features_WSD

    assert torch.equal(found, expected)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(model.eval()(**batch).logits, before)
    # the adapters would have changed them
    assert not torch.equal(model(**batch, output_hidden_states=True).hidden_states[-1].mean(1), found[:, -1])


def test_dropout_has_no_part_in_them():
    """A model in training gives the features that it gives in evaluation, and stays in training."""
    model, batch = tiny.model("bert"), {"input_ids": tokens(3, 7)}
    expected = HiddenStates(model)(batch).features_WSD
    model.train()

    found = HiddenStates(model)(batch).features_WSD

    assert torch.equal(found, expected)
    assert all(module.training for module in model.modules())


def test_what_is_not_normalised_has_the_same_direction():
    """`means` is for detectors that read the length."""
    features, batch = HiddenStates(MODELS["bert"]), {"input_ids": tokens(2, 5)}

    raw = features.means(batch).features_WSD

    torch.testing.assert_close(nn.functional.normalize(raw, dim=-1), features(batch).features_WSD)
    assert float((raw.norm(dim=-1) - 1).abs().max()) > 0.1


def test_token_types_are_read():
    """Where they come with the batch."""
    features, ids_BL = HiddenStates(MODELS["bert"]), tokens(1, 5)

    one = features({"input_ids": ids_BL, "token_type_ids": torch.zeros_like(ids_BL)}).features_WSD
    two = features({"input_ids": ids_BL, "token_type_ids": torch.ones_like(ids_BL)}).features_WSD

    torch.testing.assert_close(one, features({"input_ids": ids_BL}).features_WSD)
    assert not torch.allclose(one, two, atol=1e-3)


def test_labels_and_positions_are_not_read():
    """A batch of a trainer can be handed in as it is."""
    features, ids_BL = HiddenStates(MODELS["llama"]), tokens(1, 5)

    found = features({"input_ids": ids_BL, "labels": ids_BL, "position_ids": 3 + torch.arange(5)[None]})

    assert torch.equal(found.features_WSD, features({"input_ids": ids_BL}).features_WSD)


@given(depth=st.integers(1, 80), count=st.integers(1, 8))
def test_layers_are_spread_over_the_depth(depth, count):
    """The last included, the embeddings not, and gaps that differ by one at most."""
    layers = spread(depth, count)

    assert layers[-1] == depth
    assert layers[0] >= 1
    assert len(layers) == min(depth, count)
    gaps = {after - before for before, after in zip((0, *layers), layers)}
    assert max(gaps) - min(gaps) <= 1


def test_layers_can_be_chosen():
    """By number, counted from 1."""
    model = tiny.model("llama", num_hidden_layers=4)
    batch = {"input_ids": tokens(2, 5)}

    every = HiddenStates(model, [1, 2, 3, 4])(batch).features_WSD
    some = HiddenStates(model, [3, 1])(batch).features_WSD

    assert torch.equal(some, every[:, [2, 0]])
    assert HiddenStates(model).layers == (1, 2, 3, 4)


@pytest.mark.parametrize("layers", [[0], [3], [-1], []])
def test_layers_that_are_not_there(layers):
    """The embeddings, one too many, one from behind, none."""
    with pytest.raises(ValueError, match=r"from 1 \(the first block's output\) to 2"):
        HiddenStates(MODELS["llama"], layers)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"pixel_values": torch.zeros(1, 3, 4, 4)}, "ExternalEncoder"),
        ({"input_ids": tokens(1, 4), "inputs_embeds": torch.zeros(1, 4, 32)}, "inputs_embeds"),
        ({"input_ids": tokens(1, 4), "attention_mask": torch.zeros(1, 1, 4, 4)}, "attention_mask must have the shape"),
        ({"input_ids": tokens(2, 4), "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])}, "row 1 of the"),
        ({"input_ids": tokens(0, 4)}, "with a row at least"),
    ],
)
def test_batches_that_have_no_features(batch, message):
    """No text, a mask of another form, a row without tokens, no row."""
    with pytest.raises(ValueError, match=message):
        HiddenStates(MODELS["llama"])(batch)


@pytest.mark.parametrize(("window", "stride"), [(4, 0), (4, 5)])
def test_strides_that_leave_tokens_out(window, stride):
    """Or never move on."""
    with pytest.raises(ValueError, match=f"between 1 and window={window}"):
        HiddenStates(MODELS["llama"], window=window, stride=stride)


class Foreign(nn.Module):
    """No Hugging Face model, but it returns hidden states."""

    def __init__(self, config, depth=3):
        super().__init__()
        self.config, self.depth = config, depth
        self.embed = nn.Embedding(99, 6)

    def forward(self, input_ids, attention_mask, output_hidden_states):
        state = self.embed(input_ids)
        return SimpleNamespace(hidden_states=tuple(state + layer for layer in range(self.depth + 1)))


def test_any_module_with_hidden_states_will_do():
    """With a config that says how deep it is, or with layers."""
    torch.manual_seed(0)
    batch = {"input_ids": tokens(2, 4)}

    found = HiddenStates(Foreign(SimpleNamespace(num_hidden_layers=3)))(batch).features_WSD

    assert found.shape == (2, 3, 6)
    assert HiddenStates(Foreign(SimpleNamespace()), [2])(batch).features_WSD.shape == (2, 1, 6)
    with pytest.raises(ValueError, match="does not say how many layers"):
        HiddenStates(Foreign(SimpleNamespace()))
    with pytest.raises(ValueError, match=r"returned 4 hidden states.*need 6"):
        HiddenStates(Foreign(SimpleNamespace()), [5])(batch)


def test_padding_may_hold_anything():
    """NaN too."""
    states_WLD = torch.tensor([[[1.0], [3.0], [torch.nan]]])

    assert masked_mean(states_WLD, torch.tensor([[True, True, False]])).tolist() == [[2.0]]


def test_an_external_encoder():
    """Any function of texts."""
    table = {"a": [3.0, 4.0], "b": [0.0, 2.0]}
    encoder = ExternalEncoder(lambda texts: torch.tensor([[table[text]] for text in texts]))

    windows = encoder(["a", "b"])

    torch.testing.assert_close(windows.features_WSD, torch.tensor([[[0.6, 0.8]], [[0.0, 1.0]]]))
    assert windows.row_W.tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"shape \(rows, layers, width\), got torch.float32 \(2, 3\)"):
        ExternalEncoder(lambda texts: torch.zeros(2, 3))(["a", "b"])
