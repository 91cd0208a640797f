"""What every router must keep, as one call for the tests of yours. Begin with router_contract.

def test_my_router():
    router_contract(lambda in_features, available: MyRouter(in_features, available))
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moelora.routers.base import AbstractRouter
from moelora.routing import Routing, dense_weights
from moelora.tape import Tape

WIDTH = 12

Build = Callable[[int, Sequence[bool]], AbstractRouter]
MakeTape = Callable[[list[int], list[int]], Tape]


def router_contract(
    build: Build,
    *,
    tape: MakeTape | None = None,
    deterministic: bool = True,
    weight_sum: float | None = None,
    examples: int = 25,
) -> None:
    """Run a router through the properties that layers, losses and kernels rely on.

    Args:
        build: makes a router for an input width and a list of which experts have rows at the site. The same arguments
            may give different weights each time.
        tape: for routers that read the tape, makes it for some tokens (their numbers) and some order of the experts
            (their old ids); by default an empty tape.
        deterministic: whether training and evaluation give the same answer.
        weight_sum: what the weights of a token sum to, where that is fixed.
        examples: how many random cases each property is tried on.

    Raises:
        AssertionError: naming the property that does not hold.
    """
    make_tape = tape or (lambda tokens, order: Tape())

    def ask(router: AbstractRouter, x_TD: Tensor, tokens: list[int], order: list[int]) -> Routing:
        state = make_tape(tokens, order)
        state.leading = (len(tokens),)
        with torch.no_grad():
            return router(x_TD[tokens], state)

    # one failure at a time: an AssertionError that names its property
    @settings(max_examples=examples, deadline=None, report_multiple_bugs=False)
    @given(case=cases())
    def check(case: "tuple[int, list[bool], int]") -> None:
        seed, available, num_tokens = case
        generator = torch.Generator().manual_seed(seed)
        x_TD = torch.randn(num_tokens, WIDTH, generator=generator)
        tokens, order = list(range(num_tokens)), list(range(len(available)))
        router = build(WIDTH, available).eval()
        before = copy.deepcopy(router.__dict__)
        routing = ask(router, x_TD, tokens, order)

        # the form of the answer
        experts_TK, weights_TK, logits_TE, log_prob_T = routing
        assert experts_TK.shape == weights_TK.shape, "ids and weights have one shape"
        assert experts_TK.shape[0] == num_tokens, "one answer for each token"
        assert weights_TK.dtype == torch.float32, "weights are fp32"
        assert not experts_TK.is_floating_point(), "ids are integers"
        assert bool(((experts_TK >= -1) & (experts_TK < len(available))).all()), "ids are -1 or a known expert"
        assert bool(torch.isfinite(weights_TK).all()), "weights are finite"
        assert bool((weights_TK[experts_TK < 0] == 0).all()), "an empty slot weighs nothing"
        for row in experts_TK.tolist():
            chosen = [expert for expert in row if expert >= 0]
            assert len(set(chosen)) == len(chosen), "the experts of a token are distinct"
            assert all(available[expert] for expert in chosen), "an expert without rows is never chosen"
            assert chosen or not router.every_token, (
                "a router that promises an expert for every token keeps the promise"
            )
        if weight_sum is not None:
            sums_T = weights_TK.sum(-1)
            assert torch.allclose(sums_T, torch.full_like(sums_T, weight_sum), atol=1e-5), "weights sum as they should"
        if logits_TE is not None:
            assert logits_TE.dtype == torch.float32, "logits are fp32"
            assert logits_TE.shape == (num_tokens, len(available)), "a score for each token and expert"
        if log_prob_T is not None:
            assert log_prob_T.shape == (num_tokens,), "a log-probability for each token"

        # what it must not depend on
        weights_TE = dense_weights(routing, len(available))
        for start in range(num_tokens):
            alone_TE = dense_weights(ask(router, x_TD, [start], order), len(available))
            assert close(alone_TE, weights_TE[start : start + 1]), "a token is routed alike alone and among others"
        shuffled = torch.randperm(num_tokens, generator=generator).tolist()
        answer_TE = dense_weights(ask(router, x_TD, shuffled, order), len(available))
        assert close(answer_TE, weights_TE[shuffled]), "a permutation of the tokens permutes the answer"

        renamed = torch.randperm(len(available), generator=generator).tolist()
        other = copy.deepcopy(router)
        other.keep_experts(renamed)
        answer_TE = dense_weights(ask(other, x_TD, tokens, renamed), len(available))
        assert close(answer_TE, weights_TE[:, renamed]), "a permutation of the experts permutes the answer"

        if deterministic:
            training = ask(copy.deepcopy(router).train(), x_TD, tokens, order)
            assert close(dense_weights(training, len(available)), weights_TE), "training and evaluation route alike"
        assert same_state(before, router.__dict__), "a router leaves nothing on itself"

        # experts come and go
        grown = copy.deepcopy(router)
        grown.add_experts([True])
        assert grown.num_experts == len(available) + 1, "add_experts appends"
        grown.keep_experts(order)
        again_TE = dense_weights(ask(grown, x_TD, tokens, order), len(available))
        assert close(again_TE, weights_TE), "adding an expert and removing it changes nothing"

    check()


@st.composite
def cases(draw: Any) -> Any:
    """A seed, which experts are there (two at least), and a number of tokens."""
    available = draw(st.lists(st.booleans(), min_size=3, max_size=7).filter(lambda flags: sum(flags) >= 2))
    return draw(st.integers(0, 2**31 - 1)), available, draw(st.integers(1, 6))


def close(left: Tensor, right: Tensor) -> bool:
    """Equal up to fp32 rounding of a sum in another order."""
    return torch.allclose(left, right, atol=1e-5, rtol=1e-5)


def same_state(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Whether two modules' attributes are equal, tensors compared by value."""
    if left.keys() != right.keys():
        return False
    for name, value in left.items():
        other = right[name]
        if isinstance(value, Mapping):
            if not same_state(value, other):
                return False
        elif isinstance(value, Tensor):
            if not (isinstance(other, Tensor) and torch.equal(value, other)):
                return False
        elif isinstance(value, torch.nn.Module):
            if not same_state(value.__dict__, other.__dict__):
                return False
        elif value != other:
            return False
    return True
