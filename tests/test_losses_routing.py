"""Losses beyond balance: LoRA-Mixer's, LoRAMoE's, LD-MoLE's, MeteoRA's; and many routers weighed at once."""

import inspect
import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from moelora import losses
from moelora.aux_losses import distinct, loss_of, weigh
from moelora.config import AuxLosses, MoELoRAConfig
from moelora.losses.specialization import entropy_weight
from moelora.routers.sparsegen import sparsegen
from moelora.routing import Routing, dense_weights
from moelora.tape import Record


def entropy_of(logits_E):
    """In nats."""
    return float(-(logits_E.softmax(-1) * logits_E.log_softmax(-1)).sum())


# --- LoRA-Mixer -------------------------------------------------------------------------------------------------------


def test_token_entropy_by_hand():
    """Gates (1/2, 1/2) and (3/4, 1/4): the mean of ln 2 and of their entropy, over ln 2."""
    logits_TE = torch.tensor([[0.5, 0.5], [0.75, 0.25]]).log()
    second = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))

    value = losses.token_entropy(logits_TE)

    torch.testing.assert_close(value, torch.tensor((math.log(2) + second) / 2 / math.log(2)))


def test_routing_specialization_by_hand():
    """Three tokens, two experts: 0.5 * balance -+ 0.1 * entropy, each with the value of its own test."""
    logits_TE = torch.tensor([[0.7, 0.3], [0.8, 0.2], [0.3, 0.7]]).log()
    experts_TK = torch.tensor([[0], [0], [1]])
    balance = 2 * (2 / 3 * 0.6 + 1 / 3 * 0.4)
    entropy = sum(-(p * math.log(p) + (1 - p) * math.log(1 - p)) for p in (0.7, 0.8, 0.3)) / 3 / math.log(2)

    def value(entropy):
        return losses.routing_specialization(logits_TE, experts_TK, entropy=entropy, alpha=0.5, lam=0.1)

    torch.testing.assert_close(value("as_printed"), torch.tensor(0.5 * balance - 0.1 * entropy))
    torch.testing.assert_close(value("specialize"), torch.tensor(0.5 * balance + 0.1 * entropy))


@pytest.mark.parametrize(("entropy", "end"), [("as_printed", 1.3863), ("specialize", 0.002)])
def test_the_sign_decides_between_uniform_and_one_hot_gates(entropy, end):
    """Gradient descent on the entropy term alone, over one gate of four scores: ln 4, or almost nothing."""
    logits_TE = torch.tensor([[0.6, -0.4, 0.1, -0.2]], requires_grad=True)
    optimizer = torch.optim.Adam([logits_TE], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        losses.routing_specialization(logits_TE, torch.tensor([[0]]), entropy=entropy, alpha=0.0).backward()
        optimizer.step()

    assert entropy_of(logits_TE.detach()[0]) == pytest.approx(end, abs=3e-3)


def test_the_two_shares_count_differently():
    """With both of two experts chosen by all, every assignment is balanced; the best of each token are not."""
    logits_TE = torch.tensor([[1.0, 0.0]] * 4)
    experts_TK = torch.tensor([[0, 1]] * 4)

    def balance(f):
        return losses.routing_specialization(logits_TE, experts_TK, entropy="specialize", lam=0.0, f=f)

    torch.testing.assert_close(balance("topk"), torch.tensor(1.0))
    torch.testing.assert_close(balance("top1"), 2 * logits_TE.softmax(-1)[0, 0])


@given(st.integers(2, 9), st.data())
def test_routing_specialization_is_the_same_at_balance_for_every_e_and_k(num_experts, data):
    """1 - 1: uniform gates are in balance and undecided."""
    top_k = data.draw(st.integers(1, num_experts))
    experts_TK = (torch.arange(num_experts)[:, None] + torch.arange(top_k)) % num_experts

    value = losses.routing_specialization(torch.zeros(num_experts, num_experts), experts_TK, entropy="as_printed")

    torch.testing.assert_close(value, torch.tensor(0.0), atol=1e-6, rtol=0)


def test_lora_mixer_is_its_loss():
    """The weights for a model's routings and the function say the same."""
    logits_TE = torch.randn(6, 4)
    routing = Routing(logits_TE.topk(2).indices, torch.ones(6, 2) / 2, logits_TE)
    for entropy in ("as_printed", "specialize"):
        expected = losses.routing_specialization(logits_TE, routing.experts_TK, entropy=entropy, alpha=0.3, lam=0.2)
        weights = AuxLosses.lora_mixer(alpha=0.3, lam=0.2, entropy=entropy)
        torch.testing.assert_close(loss_of(Record(routing, None), weights), expected)


def test_unknown_words_are_refused():
    """With the known ones. Without the checks of annotations, which users do not run."""
    logits_TE, experts_TK = torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"unknown entropy 'up'; expected one of \('as_printed', 'specialize'\)"):
        inspect.unwrap(entropy_weight)("up", 1.0)
    with pytest.raises(ValueError, match=r"unknown f 'all'; expected one of \('topk', 'top1'\)"):
        inspect.unwrap(losses.routing_specialization)(logits_TE, experts_TK, entropy="specialize", f="all")


# --- LoRAMoE ----------------------------------------------------------------------------------------------------------


def test_localized_balance_by_hand():
    """Two rows of one kind each, two experts: Z = (0.6 * 1.1, 0.4 * 0.9), (0.5 * 0.9, 0.5 * 1.1)."""
    weights_TE = torch.tensor([[0.7, 0.3], [0.5, 0.5], [0.5, 0.5]])
    cells = torch.tensor([0.6 * 1.1, 0.4 * 0.9, 0.5 * 0.9, 0.5 * 1.1])

    value = losses.localized_balance(
        weights_TE, torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([0, 0, 1]), delta=0.1
    )

    torch.testing.assert_close(value, cells.var(correction=0) / cells.mean() ** 2)


@given(st.integers(2, 9), st.integers(1, 4))
def test_localized_balance_is_zero_for_uniform_weights_of_rows_of_any_length(num_experts, rows):
    """Without a preference, for every E."""
    rows_T = torch.repeat_interleave(torch.arange(rows), torch.arange(rows) + 1)
    weights_TE = torch.full((len(rows_T), num_experts), 1 / num_experts)

    value = losses.localized_balance(
        weights_TE, torch.arange(num_experts) % 2, torch.arange(rows) % 2, rows_T, delta=0.0
    )

    torch.testing.assert_close(value, torch.tensor(0.0))


@pytest.mark.parametrize("delta", [0.3, -0.3])
def test_the_sign_of_delta_decides_who_gets_a_rows_tokens(delta):
    """Descent ends at weights proportional to 1 / (1 +- delta): a negative delta favours a row's own experts."""
    groups_E, kinds_B, rows_T = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1, 2])
    logits_TE = torch.zeros(4, 3, requires_grad=True)
    optimizer = torch.optim.Adam([logits_TE], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        losses.localized_balance(logits_TE.softmax(-1), groups_E, kinds_B, rows_T, delta=delta).backward()
        optimizer.step()

    weights_E = logits_TE.detach().softmax(-1)[3]
    assert float(weights_E[2] / weights_E[0]) == pytest.approx((1 - delta) / (1 + delta), rel=1e-2)


def test_localized_balance_leaves_out_padding_and_absent_experts():
    """A row of padding only, NaN in padding, an expert without rows: as if they were not there."""
    weights_TE = torch.rand(4, 3, dtype=torch.float64)
    groups_E, kinds_B, rows_T = torch.tensor([0, 1, 0]), torch.tensor([0, 1]), torch.tensor([0, 0, 1, 1])
    plain = losses.localized_balance(weights_TE, groups_E, kinds_B, rows_T, delta=0.2)

    wide_TE = torch.full((6, 4), torch.nan, dtype=torch.float64)
    wide_TE[:4, :3], wide_TE[:4, 3] = weights_TE, 0
    padded = losses.localized_balance(
        wide_TE,
        torch.tensor([0, 1, 0, 1]),
        torch.tensor([0, 1, 1]),
        torch.tensor([0, 0, 1, 1, 1, 2]),
        torch.tensor([True] * 4 + [False] * 2),
        delta=0.2,
        available_E=torch.tensor([True] * 3 + [False]),
    )

    torch.testing.assert_close(padded, plain)


def test_localized_balance_refuses_a_delta_that_turns_weights_over():
    """|delta| < 1."""
    ids = torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"delta must lie between -1 and 1, got 1\.0"):
        losses.localized_balance(torch.ones(1, 1), ids, ids, ids, delta=1.0)


# --- LD-MoLE ----------------------------------------------------------------------------------------------------------


def test_over_budget_by_hand():
    """(0.5, 0.3, 0.2): 0.2 + 2 * 0.2 beyond two experts. (0.6, 0.4, 0): nothing."""
    weights_TE = torch.tensor([[0.3, 0.5, 0.2], [0.6, 0.0, 0.4]])

    torch.testing.assert_close(losses.over_budget(weights_TE, budget=2), torch.tensor(0.3))


@given(st.integers(2, 9), st.data())
def test_over_budget_runs_from_zero_to_one(num_experts, data):
    """1 for uniform weights whatever E and k; 0 where k experts act."""
    budget = data.draw(st.integers(1, num_experts - 1))
    few_TE = torch.rand(5, num_experts).sort(descending=True).values
    few_TE[:, budget:] = 0

    torch.testing.assert_close(
        losses.over_budget(torch.full((3, num_experts), 1 / num_experts), budget=budget), torch.tensor(1.0)
    )
    assert losses.over_budget(few_TE, budget=budget) == 0
    assert losses.over_budget(few_TE, budget=num_experts) == 0


def test_target_k_by_hand():
    """Scores (1, 0.5, 0, -1), k = 2: lambda_2 = 1 - (1.5 - 0) = -0.5, so 0.25 at lambda -0.75 and 0 at 0."""
    logits_TE = torch.tensor([[0.5, 1.0, 0.0, -1.0]] * 2)

    value = losses.target_k(logits_TE, torch.tensor([-0.75, 0.0]), k=2)

    torch.testing.assert_close(value, torch.tensor(0.125))


@given(st.integers(0, 1000), st.integers(1, 4))
def test_target_k_and_over_budget_are_one_hinge(seed, k):
    """Token by token the first is 1 - lambda times the second, and 0 exactly where k experts act."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(1, 5, generator=generator, dtype=torch.float64)
    lam_T = torch.rand(1, generator=generator, dtype=torch.float64) * 4 - 3.01
    weights_TE = sparsegen(logits_TE, lam_T[:, None])

    value = losses.target_k(logits_TE, lam_T, k=k)

    torch.testing.assert_close(value, (1 - lam_T[0]) * losses.over_budget(weights_TE, budget=k))
    assert (value == 0) == (int((weights_TE > 0).sum()) <= k)


def test_target_k_teaches_lambda_alone():
    """As in its source."""
    logits_TE, lam_T = torch.randn(6, 4, requires_grad=True), torch.full((6,), -5.0, requires_grad=True)

    losses.target_k(logits_TE, lam_T).backward()

    assert logits_TE.grad is None
    torch.testing.assert_close(lam_T.grad, torch.full((6,), -1 / 6))


def test_at_a_site_with_few_experts_no_more_than_those_can_act():
    """Absent experts (-inf) are no excess, and give no NaN."""
    logits_TE = torch.tensor([[0.1, -torch.inf, 0.2, -torch.inf]])
    lam_T = torch.tensor([-3.0], requires_grad=True)
    for k in (2, 3, 4):
        value = losses.target_k(logits_TE, lam_T, k=k)
        assert value == 0
        assert torch.equal(torch.autograd.grad(value, lam_T)[0], torch.zeros(1))
    assert losses.target_k(logits_TE, lam_T, k=1) > 0


def test_at_least_one_expert_is_wanted():
    """A budget of none cannot be kept."""
    with pytest.raises(ValueError, match="expected a number from 1, got 0"):
        losses.over_budget(torch.ones(2, 3), budget=0)
    with pytest.raises(ValueError, match="expected a number from 1, got -1"):
        losses.target_k(torch.ones(2, 3), torch.zeros(2), k=-1)


# --- MeteoRA ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 9))
def test_a_gate_that_knows_nothing_has_cross_entropy_log_e(num_experts):
    """And one that is sure of the right task has none."""
    target_T = torch.arange(num_experts)

    torch.testing.assert_close(
        losses.gate_cross_entropy(torch.zeros(num_experts, num_experts), target_T), torch.tensor(math.log(num_experts))
    )
    sure_TE = torch.eye(num_experts) * 100
    torch.testing.assert_close(losses.gate_cross_entropy(sure_TE, target_T), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_gate_cross_entropy_by_hand_and_without_those_that_do_not_count():
    """-ln 3/4 and -ln 1/2; a token for nobody, padding, and a task without an expert here change nothing."""
    logits_TE = torch.tensor([[0.75, 0.25, 0.0], [0.5, 0.5, 0.0], [0.9, 0.1, 0.0], [0.1, 0.9, 0.0], [0.2, 0.8, 0.0]])
    logits_TE = logits_TE.log().requires_grad_()
    valid_T = torch.tensor([True, True, True, False, True])

    value = losses.gate_cross_entropy(logits_TE, torch.tensor([0, 1, -1, 1, 2]), valid_T)
    value.backward()

    torch.testing.assert_close(value.detach(), torch.tensor(-(math.log(0.75) + math.log(0.5)) / 2))
    assert logits_TE.grad is not None
    assert torch.equal(logits_TE.grad[2:], torch.zeros(3, 3))
    torch.testing.assert_close(logits_TE.grad[0], torch.tensor([-0.125, 0.125, 0.0]))


def test_gate_cross_entropy_of_no_token_is_zero():
    """Not NaN."""
    assert losses.gate_cross_entropy(torch.randn(3, 2), torch.full((3,), -1)) == 0


# --- all of them ------------------------------------------------------------------------------------------------------

TARGET_T = torch.tensor([0, 1, 2, 3, 1, 0, -1, 2, 3, 1])
SCORES_TE = torch.randn(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
EXPERTS_TK = torch.tensor([[0, 1], [2, 3], [1, 0], [3, -1], [0, 2], [1, 2], [1, 3], [2, 0], [0, 3], [2, 1]])


def _localized(logits_TE, valid_T):
    tokens, experts = logits_TE.shape
    rows_T = torch.arange(tokens) % 2
    return losses.localized_balance(
        logits_TE.softmax(-1), torch.arange(experts) % 2, torch.arange(2), rows_T, valid_T, delta=0.2
    )


ALL = {
    "token_entropy": losses.token_entropy,
    "routing_specialization": lambda z, v: losses.routing_specialization(
        z, EXPERTS_TK[: len(z)], v, entropy="as_printed"
    ),
    "localized_balance": _localized,
    "over_budget": lambda z, v: losses.over_budget(z.softmax(-1), v, budget=2),
    "target_k": lambda z, v: losses.target_k(SCORES_TE[: len(z)], z[:, 0] - 5, v),
    "gate_cross_entropy": lambda z, v: losses.gate_cross_entropy(z, TARGET_T[: len(z)], v),
}


@pytest.mark.parametrize("name", ALL)
@given(seed=st.integers(0, 1000), padding=st.integers(0, 4))
def test_padding_changes_nothing(name, seed, padding):
    """Whatever stands in padding, the value and the gradient are those without it."""
    logits_TE = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)).double().requires_grad_()
    junk_TE = torch.full((padding, 4), 50.0, dtype=torch.float64)
    valid_T = torch.tensor([True] * 6 + [False] * padding)

    padded = ALL[name](torch.cat([logits_TE, junk_TE]), valid_T)
    plain = ALL[name](logits_TE, None)

    torch.testing.assert_close(padded, plain)
    for ours, theirs in zip(torch.autograd.grad(padded, logits_TE), torch.autograd.grad(plain, logits_TE), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ALL)
def test_gradients_are_derivatives(name):
    """Against finite differences, in fp64."""
    logits_TE = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: ALL[name](z, None), logits_TE)


@pytest.mark.parametrize("name", ["token_entropy", "routing_specialization", "gate_cross_entropy", "over_budget"])
def test_an_expert_that_cannot_be_chosen_does_not_count(name):
    """A column of -inf is as good as no column, with a finite gradient."""
    logits_TE = torch.randn(6, 4, dtype=torch.float64)
    wide_TE = torch.cat([logits_TE, torch.full((6, 1), -torch.inf, dtype=torch.float64)], 1).requires_grad_()

    value = ALL[name](wide_TE, None)
    value.backward()

    torch.testing.assert_close(value.detach(), ALL[name](logits_TE, None))
    assert wide_TE.grad is not None
    assert torch.isfinite(wide_TE.grad[:, :4]).all()


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_survive_json_and_old_files_are_read():
    """All fields round; a file from before a loss existed leaves it at its default."""
    config = MoELoRAConfig(losses=AuxLosses(load_balance=0.0, token_entropy=-0.5, over_budget=0.1, budget=3))

    assert MoELoRAConfig.from_dict(config.to_dict()) == config
    old = config.to_dict() | {"losses": {"load_balance": 0.5, "z_loss": 0.25}}
    assert MoELoRAConfig.from_dict(old).losses == AuxLosses(load_balance=0.5, z_loss=0.25)


def test_only_the_entropy_has_a_sign_and_a_budget_is_no_weight():
    """What weighs is finite."""
    assert AuxLosses(load_balance=0.0, token_entropy=-1.0, budget=5).active() == {"token_entropy": -1.0}
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"weight of the loss over_budget must be finite.*got {weight}"):
            AuxLosses(over_budget=weight)
    for weight in (-math.inf, math.nan):
        with pytest.raises(ValueError, match="weight of the loss token_entropy must be finite"):
            AuxLosses(token_entropy=weight)
    with pytest.raises(ValueError, match="budget must be at least 1"):
        AuxLosses(budget=0)


EVERY = AuxLosses(
    load_balance=1.0,
    z_loss=0.1,
    importance=0.7,
    mutual_information=0.3,
    uniform_cross_entropy=0.9,
    gate_cross_entropy=0.5,
    token_entropy=-0.4,
    over_budget=0.6,
)


def many(generator, *, forms=((9, 4, 2), (9, 4, 2), (9, 4, 2), (5, 3, 1), (9, 4, 4), (0, 4, 2), (0, 4, 2))):
    """Routers' answers of several forms, masks and missing experts; their scores are leaves."""
    records = {}
    for number, (tokens, experts, top_k) in enumerate(forms):
        logits_TE = torch.randn(tokens, experts, generator=generator)
        if number % 2 and tokens:
            logits_TE[:, number % experts] = -torch.inf
        logits_TE.requires_grad_()
        values_TK, experts_TK = logits_TE.topk(top_k)
        weights_TK = values_TK.softmax(-1)
        routing = Routing(experts_TK.masked_fill(weights_TK == 0, -1), weights_TK, logits_TE)
        valid_T = None if number == 2 else torch.rand(tokens, generator=generator) < 0.7
        target_T = torch.randint(-1, experts, (tokens,), generator=generator)
        records[f"site {number}"] = [Record(routing, valid_T, target_T=target_T)]
    return records


def leaves_of(records):
    """The scores that losses are differentiated by."""
    return [record.routing.logits_TE for record in distinct(records) if record.routing.logits_TE is not None]


@settings(max_examples=10)
@given(st.integers(0, 1000))
def test_many_routers_at_once_are_as_one_by_one(seed):
    """Value and gradients, with absent experts that differ between routers of one form, and sites without tokens."""
    records = many(torch.Generator().manual_seed(seed))
    leaves = leaves_of(records)

    one_by_one = torch.stack([loss_of(record, EVERY) for record in distinct(records)]).mean()
    together = weigh(records, EVERY)

    assert together is not None
    torch.testing.assert_close(together, one_by_one)
    ours = torch.autograd.grad(together, leaves, retain_graph=True)
    for left, right in zip(ours, torch.autograd.grad(one_by_one, leaves), strict=True):
        torch.testing.assert_close(left.nan_to_num(0), right.nan_to_num(0))


def test_many_routers_take_few_operations():
    """As many for 40 routers as for 4, but for the stacking."""

    def operations(count):
        records = many(torch.Generator().manual_seed(0), forms=[(8, 4, 2)] * count)
        records = {site: [record._replace(valid_T=None)] for site, [record] in records.items()}
        counter = _Count()
        with counter:
            weigh(records, EVERY)
        return counter.count

    assert operations(40) < operations(4) + 40


class _Count(TorchDispatchMode):
    """Counts operations."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_many_routers_compile_as_one_graph():
    """torch.compile(fullgraph=True), with the same value and gradients."""
    script = """
    import torch
    from moelora.aux_losses import weigh
    from tests_losses import EVERY, leaves_of, many

    def loss(records):
        return weigh(records, EVERY)

    records = many(torch.Generator().manual_seed(0), forms=[(9, 4, 2)] * 3 + [(5, 3, 1)])
    leaves = leaves_of(records)
    expected = loss(records)
    value = torch.compile(loss, fullgraph=True, backend="eager")(records)
    torch.testing.assert_close(value, expected)
    for left, right in zip(
        torch.autograd.grad(value, leaves, retain_graph=True), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(left.nan_to_num(0), right.nan_to_num(0))
    """
    code = textwrap.dedent(script).replace("tests_losses", "test_losses_routing")
    # compiled code cannot hold the checks of annotations that tests run with
    env = os.environ | {"JAXTYPING_DISABLE": "1", "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_dense_weights_under_a_budget_are_those_of_the_routing():
    """An empty slot is no expert: K slots of which two act are within a budget of two."""
    routing = Routing(torch.tensor([[0, -1, 2]]), torch.tensor([[0.5, 0.0, 0.5]]), torch.zeros(1, 3))

    assert int((dense_weights(routing, 3) > 0).sum()) == 2
    assert loss_of(Record(routing, None), AuxLosses(load_balance=0.0, over_budget=1.0)) == 0
