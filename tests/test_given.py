"""Ids from outside: for a call, for each row, for each token; through prefill and decoding; and what does not fit."""

import pytest
import torch
from adapters_on_disk import main_output, peft_model
from generating import cache_name

import moelora
from moelora.testing import tiny

B, L = 3, 7


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A gpt2 with three adapters, routed by given ids; the last adapter has factors at every second site only."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate("abc"):
        peft_model("gpt2", folder / name, seed=seed, every=2 if name == "c" else 1)
    return moelora.patch_model(tiny.model("gpt2"), [folder / name for name in "abc"], router="given")


@pytest.fixture(scope="module")
def inputs(model):
    """Three rows of seven tokens, without padding."""
    return {"input_ids": tiny.inputs(model, batch=B, length=L)["input_ids"]}


def given_output(model, inputs, ids, **options) -> torch.Tensor:
    """The logits with these ids."""
    with torch.no_grad(), moelora.given_experts(model, ids, **options):
        return main_output(model(**inputs))


def fixed_output(model, inputs, experts) -> torch.Tensor:
    """The logits with a fixed mixture."""
    with torch.no_grad(), moelora.use_experts(model, experts):
        return main_output(model(**inputs))


@pytest.mark.parametrize("ids", ["b", 1, torch.tensor(1), [1] * B, ["b"] * B, torch.ones(B, L, dtype=torch.long)])
def test_one_expert_for_all_however_it_is_said(model, inputs, ids):
    """A name, an id, a tensor; for the call, the rows, the tokens: the same answer as the fixed expert."""
    assert torch.equal(given_output(model, inputs, ids), fixed_output(model, inputs, "b"))


def test_ids_of_rows(model, inputs):
    """Each row has its own expert; -1 is the base model, bit for bit; an expert may be missing at some sites."""
    ours = given_output(model, inputs, ["a", -1, "c"])

    assert torch.equal(ours, fixed_output(model, inputs, ["a", None, "c"]))
    with torch.no_grad(), moelora.disabled(model):
        assert torch.equal(ours[1], main_output(model(**inputs))[1])


def test_ids_of_tokens(model, inputs):
    """A token's id acts on it: the first half is what the first expert makes of it, whatever comes later."""
    ids = torch.zeros(B, L, dtype=torch.long)
    ids[:, 4:] = 1
    ours = given_output(model, inputs, ids)

    torch.testing.assert_close(ours[:, :4], fixed_output(model, inputs, "a")[:, :4])
    assert (ours[:, 4:] - fixed_output(model, inputs, "a")[:, 4:]).abs().max() > 1e-3


def test_several_ids_of_a_token(model, inputs):
    """(B, L, K): the experts of a token add up; -1 fills a slot."""
    ids = torch.tensor([0, 1]).expand(B, L, 2)
    torch.testing.assert_close(given_output(model, inputs, ids), fixed_output(model, inputs, {"a": 1.0, "b": 1.0}))
    ids = torch.tensor([1, -1]).expand(B, L, 2)
    torch.testing.assert_close(given_output(model, inputs, ids), fixed_output(model, inputs, "b"))


def test_decoding_with_a_cache_goes_on_where_the_ids_are(model, inputs):
    """Prefill and single steps see the ids of their own tokens; behind them comes `rest`."""
    ids = torch.randint(-1, 3, (B, 5), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([ids, torch.full((B, 2), 2)], dim=1)
    expected = given_output(model, inputs, padded)

    with torch.no_grad(), moelora.given_experts(model, ids, rest="c"):
        whole = main_output(model(**inputs))
        step = model(inputs["input_ids"][:, :3], use_cache=True)
        parts = [step.logits]
        for position in range(3, L):
            cache = {cache_name(model): step[cache_name(model)]}
            step = model(inputs["input_ids"][:, position : position + 1], **cache, use_cache=True)
            parts.append(step.logits)

    assert torch.equal(whole, expected)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-5)


def test_generation_takes_rest_for_new_tokens(model, inputs):
    """Greedy decoding is the same with and without a cache."""
    ids = torch.tensor([[0] * L, [-1] * L, [1] * L])
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with moelora.given_experts(model, ids, rest="b"):
        cached = model.generate(**inputs, **settings)
        plain = model.generate(**inputs, **settings, use_cache=False)
    assert torch.equal(cached, plain)
    assert cached.shape == (B, L + 4)

    with moelora.given_experts(model, ids), pytest.raises(ValueError, match=f"the call reaches token {L + 1}.*`rest=`"):
        model.generate(**inputs, **settings)


def test_contexts_nest_and_end(model, inputs):
    """The inner ids hold inside; `disabled` and `use_experts` win; afterwards there are none."""
    with torch.no_grad(), moelora.given_experts(model, "a"):
        with moelora.given_experts(model, "b"):
            inner = main_output(model(**inputs))
        with moelora.disabled(model):
            base = main_output(model(**inputs))
        outer = main_output(model(**inputs))
    assert torch.equal(inner, fixed_output(model, inputs, "b"))
    assert torch.equal(outer, fixed_output(model, inputs, "a"))
    assert torch.equal(base, fixed_output(model, inputs, None))
    with pytest.raises(ValueError, match=r"none were given.*moelora\.given_experts"):
        model(**inputs)


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        ("z", "no expert 'z'"),
        (["a", "z", "b"], "no expert 'z'"),
        (3, "between -1 .* and 2, got 3 to 3"),
        (-2, "got -2 to -2"),
        ([0, 1, 7], "got 0 to 7"),
        (torch.zeros(3), r"integers.*float32 \(3,\)"),
        ([0.5, 1.0, 2.0], "integers"),
        ([[0, 1], [2]], "as many in every row"),
        ([], "integers of shape"),
        (torch.zeros(1, 1, 1, 1, dtype=torch.long), r"\(B, L, K\)"),
    ],
)
def test_ids_that_cannot_be(model, ids, match):
    """Found when the context is entered."""
    with pytest.raises((ValueError, TypeError), match=f"{match}|Type-check error"), moelora.given_experts(model, ids):
        pass


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        ([0, 1], r"each of 2 rows.*shape \(3, 7\)"),
        (torch.zeros(2, L, dtype=torch.long), f"for 2 rows of {L} tokens"),
        (torch.zeros(B, L - 1, dtype=torch.long), f"for {L - 1} tokens of each row, but the call reaches token {L}"),
    ],
)
def test_ids_that_do_not_fit_the_input(model, inputs, ids, match):
    """Found in the call, which says what was given and what came; the model works afterwards."""
    with moelora.given_experts(model, ids), pytest.raises(ValueError, match=match):
        model(**inputs)
    assert given_output(model, inputs, "a").isfinite().all()


def test_a_model_with_another_router_refuses_ids():
    """A learned router would not look at them."""
    learned = moelora.patch_model(tiny.model("gpt2"), num_experts=2, rank=2)
    with pytest.raises(ValueError, match=r'would not look at given ids.*router="given".*use_experts'):
        with moelora.given_experts(learned, 0):
            pass


def test_ids_choose_what_is_trained(inputs):
    """Gradients reach the named expert alone: training one task does not move another."""
    trained = moelora.patch_model(tiny.model("gpt2"), num_experts=3, rank=2, router="given").train()
    with moelora.given_experts(trained, "expert1"):
        trained(**inputs, labels=inputs["input_ids"]).loss.backward()
    for layer in trained._moelora.layers.values():
        grad_RO = layer.bank.B_trainable_RO.grad
        assert grad_RO[2:4].abs().max() > 0
        assert not grad_RO[:2].any()
        assert not grad_RO[4:].any()
