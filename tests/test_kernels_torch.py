"""Every implementation computes what the reference defines, and leaves rows without experts alone."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moelora.bank import Expert, ExpertBank
from moelora.kernels import reference
from moelora.kernels.api import choose, is_decode_step, mix
from moelora.routing import Routing, active_tokens
from moelora.testing.strategies import experts, routings

D, O = 6, 9
BACKENDS = ["dense", "gathered"]


def _as_dtype(factors, dtype):
    floating = [isinstance(part, torch.Tensor) and part.is_floating_point() for part in factors]
    cast = [part.to(dtype) if is_floating else part for part, is_floating in zip(factors, floating, strict=True)]
    return factors._replace(**dict(zip(factors._fields, cast, strict=True)))


@st.composite
def problems(draw, token_counts=(0, 1, 2, 17)):
    """Factors, an input, a base output and a routing that belong together."""
    some = draw(experts(D, O))
    tokens = draw(st.sampled_from(token_counts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    trainable = [index for index in range(len(some)) if draw(st.booleans())]
    bank = ExpertBank.stack(some, in_features=D, out_features=O, trainable=trainable)
    x_TD, base_TO = torch.randn(tokens, D, generator=generator), torch.randn(tokens, O, generator=generator)
    return bank, base_TO, x_TD, draw(routings(len(some), tokens))


def by_experts(base_TO, x_TD, bank, routing):
    """The mixture as a loop over tokens and experts, in fp64: no stacking, no index tensors."""
    out_TO = base_TO.double().clone()
    some = bank.split()
    for token in range(len(x_TD)):
        for expert, weight in zip(routing.experts_TK[token].tolist(), routing.weights_TK[token].tolist(), strict=True):
            if expert >= 0:
                one = some[expert]
                out_TO[token] += weight * (one.delta_OD() @ x_TD[token].double())
                if one.bias_O is not None:
                    out_TO[token] += weight * one.scale * one.bias_O.double()
    return out_TO


@given(problems())
def test_reference_is_the_sum_over_experts(problem):
    """The specification itself, against a loop in fp64."""
    bank, base_TO, x_TD, routing = problem

    ours_TO = reference.mix(base_TO.double(), x_TD.double(), _as_dtype(bank.factors(), torch.float64), routing)

    # the gate is rounded to fp32
    torch.testing.assert_close(ours_TO, by_experts(base_TO, x_TD, bank, routing), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
@given(problem=problems())
def test_no_worse_than_the_reference(backend, dtype, problem):
    """Against fp64, the error is at most twice the reference's in the same dtype."""
    bank, base_TO, x_TD, routing = problem
    base_TO, x_TD, factors = base_TO.to(dtype), x_TD.to(dtype), _as_dtype(bank.factors(), dtype)
    factors = factors._replace(scale_E=bank.scale_E, fill_FP=bank.fill_FP)
    exact_TO = reference.mix(base_TO.double(), x_TD.double(), _as_dtype(factors, torch.float64), routing)

    eager_TO = reference.mix(base_TO, x_TD, factors, routing)
    every_token = bool(active_tokens(routing).all())
    ours_TO = mix(base_TO, x_TD, factors, routing, backend=backend, every_token=every_token)

    assert ours_TO.dtype == dtype
    # one rounding of each number: eager may be luckier than that
    unit = (
        torch.finfo(dtype).eps * (1 + exact_TO.abs().max().item() if exact_TO.numel() else 1) * exact_TO.numel() ** 0.5
    )
    error, eager_error = (ours_TO - exact_TO).norm(), (eager_TO - exact_TO).norm()
    assert error <= 2 * eager_error + unit


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@given(problem=problems())
def test_rows_without_experts_are_the_base(backend, problem):
    """Bit for bit, and also where the experts' factors are NaN."""
    bank, base_TO, x_TD, routing = problem
    factors = bank.factors()
    for broken in (factors, factors._replace(A_RD=factors.A_RD * torch.nan, B_RO=factors.B_RO * torch.nan)):
        ours_TO = mix(base_TO, x_TD, broken, routing, backend=backend)

        idle_T = ~active_tokens(routing)[:, 0]
        assert torch.equal(ours_TO[idle_T].view(torch.int32), base_TO[idle_T].view(torch.int32))


@given(problem=problems(token_counts=(1,)))
def test_a_decode_step_is_no_worse_than_the_reference(problem):
    """One token in fp32 without gradients goes expert by expert, with the same answer; in bf16 it does not."""
    bank, base_TO, x_TD, routing = problem
    bank.set_trainable([])
    factors = bank.factors()
    exact_TO = reference.mix(base_TO.double(), x_TD.double(), _as_dtype(factors, torch.float64), routing)

    with torch.no_grad():
        assert is_decode_step(base_TO, x_TD, factors) == (factors.bias_EO is None)
        assert not is_decode_step(base_TO.bfloat16(), x_TD.bfloat16(), _as_dtype(factors, torch.bfloat16))
        ours_TO = mix(base_TO, x_TD, factors, routing)
    eager_TO = reference.mix(base_TO, x_TD, factors, routing)

    unit = torch.finfo(torch.float32).eps * (1 + exact_TO.abs().max().item())
    assert (ours_TO - exact_TO).norm() <= 2 * (eager_TO - exact_TO).norm() + unit
    if not active_tokens(routing).any():
        assert torch.equal(ours_TO, base_TO)


@pytest.mark.parametrize("backend", BACKENDS)
@given(problem=problems())
def test_gradients_are_those_of_the_reference(backend, problem):
    """With respect to the input, the base output, both factors, the bias and the weights, in fp64."""
    bank, base_TO, x_TD, routing = problem
    factors = _as_dtype(bank.factors(), torch.float64)

    def gradients(run):
        leaves = [base_TO.double(), x_TD.double(), factors.A_RD, factors.B_RO, routing.weights_TK.double()]
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        bias_EO = None if factors.bias_EO is None else factors.bias_EO.detach().clone().requires_grad_()
        base, x, A_RD, B_RO, weights_TK = leaves
        out_TO = run(
            base,
            x,
            factors._replace(A_RD=A_RD, B_RO=B_RO, bias_EO=bias_EO),
            Routing(routing.experts_TK, weights_TK),
        )
        loss = (out_TO * torch.linspace(-1, 1, out_TO.numel(), dtype=torch.float64).view_as(out_TO)).sum()
        wanted = leaves if bias_EO is None else [*leaves, bias_EO]
        return torch.autograd.grad(loss, wanted, materialize_grads=True)

    expected = gradients(reference.mix)
    every_token = bool(active_tokens(routing).all())
    run = partial(mix, backend=backend, every_token=every_token)
    for got, want in zip(gradients(run), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_one_token_gathers_and_many_go_over_all():
    """Gathering is chosen where it copies no more rows than there are."""
    bank = ExpertBank.stack([_expert()] * 8, in_features=D, out_features=O)

    assert choose((1, 2), bank.factors()) == "gathered"
    assert choose((4, 2), bank.factors()) == "gathered"
    assert choose((5, 2), bank.factors()) == "dense"


def _expert():
    return Expert(torch.ones(4, D), torch.ones(4, O))


def test_an_unknown_backend_is_refused():
    """What was asked for runs or raises."""
    bank = ExpertBank.stack([_expert()], in_features=D, out_features=O)
    routing = Routing(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1))
    with pytest.raises(ValueError, match="unknown backend 'fast'; expected one of"):
        mix(torch.zeros(1, O), torch.zeros(1, D), bank.factors(), routing, backend="fast")
