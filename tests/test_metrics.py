"""Measures of a routing, against numbers worked out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moelora
from moelora.metrics import agreement, effective_support, expert_load, routing_entropy, specialisation
from moelora.routing import Routing
from moelora.testing import tiny


def routing(experts, weights, logits=None) -> Routing:
    """A routing from nested lists."""
    logits_TE = None if logits is None else torch.tensor(logits)
    return Routing(torch.tensor(experts), torch.tensor(weights), logits_TE)


FOUR = routing([[0, 1], [0, 2], [1, -1], [-1, -1]], [[0.5, 0.5], [0.9, 0.1], [-1.0, 0.0], [0.0, 0.0]])
"""Four tokens on three experts: two, two, one and none act."""


def test_expert_load():
    """Five choices: two fell on expert 0, two on 1, one on 2; padding does not count."""
    assert expert_load(FOUR, 3).tolist() == [2 / 5, 2 / 5, 1 / 5]
    assert expert_load(FOUR, 4, valid_T=torch.tensor([True, False, True, True])).tolist() == [1 / 3, 2 / 3, 0, 0]
    assert expert_load(FOUR, 3, valid_T=torch.tensor([False, False, False, True])).tolist() == [0, 0, 0]


def test_routing_entropy():
    """log 4 for equal scores, 0 for one winner, log 2 where only two can be chosen."""
    inf = math.inf
    some = routing([[0]] * 3, [[1.0]] * 3, [[1.0] * 4, [100.0, 0.0, 0.0, 0.0], [2.0, 2.0, -inf, -inf]])
    for token, expected in enumerate((math.log(4), 0.0, math.log(2))):
        valid_T = torch.arange(3) == token
        assert routing_entropy(some, valid_T=valid_T).item() == pytest.approx(expected, abs=1e-12)
    assert routing_entropy(some).item() == pytest.approx((math.log(4) + math.log(2)) / 3)
    with pytest.raises(ValueError, match="given, not computed"):
        routing_entropy(FOUR)


def test_effective_support():
    """1 for one, n for n equal ones of any sign, (0.9 + 0.1)^2 / (0.81 + 0.01) between, 0 for none."""
    assert effective_support(FOUR.weights_TK).tolist() == pytest.approx([2, 1 / 0.82, 1, 0], rel=1e-6)
    assert effective_support(torch.tensor([[0.5, -0.5, 0.5, 0.5]])).tolist() == [4]


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=6))
def test_effective_support_lies_between_one_and_the_number_of_experts(weights):
    """And does not change with the scale of the weights."""
    weights_TK = torch.tensor([weights])
    support = effective_support(weights_TK).item()
    acting = sum(weight != 0 for weight in weights)
    assert (support == 0) if not acting else (1 - 1e-9 <= support <= acting + 1e-9)
    assert effective_support(8 * weights_TK).item() == pytest.approx(support)


def test_specialisation():
    """log 2 if two labels have an expert each, 0 if both use both alike, and a case between, by hand."""
    label_T = torch.tensor([5, 5, 7, 7])
    own = routing([[0], [0], [2], [2]], [[1.0]] * 4)
    alike = routing([[0, 1]] * 4, [[0.5, 0.5]] * 4)
    most = routing([[0], [0], [0], [1]], [[3.0]] * 4)
    assert specialisation(own, label_T, 3).item() == pytest.approx(math.log(2))
    assert specialisation(alike, label_T, 3).item() == pytest.approx(0, abs=1e-12)
    # joint: (5, 0) 1/2, (7, 0) 1/4, (7, 1) 1/4; expert 0 has 3/4
    expected = 0.5 * math.log(0.5 / (0.5 * 0.75)) + 0.25 * math.log(0.25 / (0.5 * 0.75)) + 0.25 * math.log(2)
    assert specialisation(most, label_T, 3).item() == pytest.approx(expected)
    # the last token has no expert, the one before is padding
    assert specialisation(FOUR, label_T, 3, valid_T=torch.tensor([True, True, False, True])).item() == pytest.approx(0)


def test_agreement():
    """The strongest expert by absolute weight; a token without an expert agrees with -1."""
    assert agreement(FOUR, torch.tensor([0, 0, 1, -1]), 3).item() == 1
    assert agreement(FOUR, torch.tensor([2, 2, 1, 0]), 3).item() == 1 / 4
    valid_T = torch.tensor([False, False, True, False])
    assert agreement(FOUR, torch.tensor([2, 2, 1, 0]), 3, valid_T=valid_T).item() == 1
    with pytest.raises(ValueError, match="no token"):
        agreement(FOUR, torch.tensor([2, 2, 1, 0]), 3, valid_T=torch.zeros(4, dtype=torch.bool))


def test_metrics_of_a_recording():
    """On a model, with its padding left out."""
    model = moelora.patch_model(tiny.model("gpt2"), num_experts=4, rank=2)
    inputs = tiny.inputs(model)
    with torch.no_grad(), moelora.record(model) as recording:
        model(**inputs)
    for site, found in recording.items():
        valid_T = recording.valid(site)
        assert valid_T.sum() == inputs["attention_mask"].sum()
        assert expert_load(found, 4, valid_T=valid_T).sum().item() == pytest.approx(1)
        assert 0 < routing_entropy(found, valid_T=valid_T).item() <= math.log(4) + 1e-9
        assert ((effective_support(found.weights_TK) >= 1) & (effective_support(found.weights_TK) <= 2)).all()
