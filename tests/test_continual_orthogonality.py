"""Experts kept apart over a whole model while they are really trained: what each mode promises, and what it refuses."""

import pytest
import torch
from held_experts import RANK, experts_at, gaussian, patched, randomise, seeded, train, trained_hooks
from torch import nn

import moelora
from moelora import Gated, MoELoRAConfig
from moelora.bank import Expert
from moelora.continual.covariance import InputCovariance
from moelora.continual.orthogonal import expert_overlap, mean_overlap, o3_penalty, o_lora_penalty
from moelora.continual.orthogonality import MODES, Orthogonality, hold, overlap_at_sites
from moelora.continual.penalties import Shares, num_blocks
from moelora.continual.placing import next_rows
from moelora.integrations.peft_folder import write_adapter
from moelora.mixture import find_mixture
from moelora.testing import tiny

# --- training ---------------------------------------------------------------------------------------------------------


def overlap_after(mode: str, side: str, steps: int) -> float:
    """Of a third expert with two, after training."""
    model = patched(3)
    held = hold(model, "e2", ["e0", "e1"], Orthogonality(mode=mode, side=side), generator=seeded())
    train(model, "e2", held, steps=steps)
    held.remove()
    return overlap_at_sites(model, "e2", ["e0", "e1"], side)


@pytest.mark.parametrize("side", ["in", "out", "both"])
def test_the_penalty_ends_at_a_thousandth(side):
    """With its default weight, from a random start, against two predecessors."""
    assert overlap_after("penalty", side, steps=50) <= 1e-3


def test_without_a_penalty_experts_overlap():
    """As rows of a width of 32 do by chance, at least."""
    assert overlap_after("none", "both", steps=20) > 0.05


@pytest.mark.parametrize("side", ["in", "out", "both"])
def test_the_nullspace_is_kept_to_rounding_under_adamw(side):
    """With weight decay; and the expert has learned."""
    model = patched(3)
    held = hold(model, "e2", ["e0", "e1"], Orthogonality(mode="nullspace", side=side), generator=seeded())
    at_start = experts_at(model, "e2")
    train(model, "e2", held, steps=15)
    held.remove()

    assert overlap_at_sites(model, "e2", ["e0", "e1"], side) <= 1e-6
    for path, expert in experts_at(model, "e2").items():
        assert not torch.equal(expert.A_RD, at_start[path].A_RD)
        assert expert.B_RO.any()


def test_the_nullspace_needs_the_optimiser():
    """Adam leaves the subspace, so a hold that is not attached does not keep it."""
    model = patched(2)
    held = hold(model, "e1", ["e0"], Orthogonality(mode="nullspace"), generator=seeded())
    held.attach = lambda optimizer: None
    train(model, "e1", held, steps=15)

    assert overlap_at_sites(model, "e1", ["e0"], "in") > 1e-6


def test_the_basis_keeps_a_as_it_is_and_trains_b():
    """Three experts in turn; orthonormal rows, which training leaves bit for bit."""
    model = patched(1)
    names = ["e0"]
    for name in ("e0", "e1", "e2"):
        if name != "e0":
            moelora.add_expert(model, name=name, rank=RANK)
            moelora.set_trainable(model, routers=False, experts=[name])
            names.append(name)
        held = hold(model, name, names[:-1], Orthogonality(mode="basis"), generator=seeded(7))
        placed = experts_at(model, name)
        train(model, name, held, steps=6)
        held.remove()

        for path, expert in experts_at(model, name).items():
            assert torch.equal(expert.A_RD, placed[path].A_RD)
            torch.testing.assert_close(expert.A_RD @ expert.A_RD.T, torch.eye(RANK), atol=1e-6, rtol=0)
            assert expert.B_RO.any()
        assert overlap_at_sites(model, name, names[:-1], "in") <= 1e-6


@pytest.mark.parametrize("mode", ["nullspace", "basis"])
def test_frozen_experts_in_bf16_are_kept_apart_from_as_they_are_stored(mode):
    """Rounding turns their rows a little; what counts is the rows that act."""
    model = moelora.patch_model(
        tiny.model("llama").bfloat16(), num_experts=1, rank=RANK, config=MoELoRAConfig(router=Gated())
    )
    names = moelora.expert_names(model)
    moelora.set_trainable(model, routers=False, experts=names)
    for number in range(3):
        held = hold(model, names[-1], names[:-1], Orthogonality(mode=mode), generator=seeded())
        train(model, names[-1], held, steps=2)
        held.remove()
        assert overlap_at_sites(model, names[-1], names[:-1], "in") <= 1e-6
        names.append(f"next-{number}")
        moelora.add_expert(model, name=names[-1], rank=RANK)
        moelora.set_trainable(model, routers=False, experts=names[-1:])

    olds = [layer.bank.expert(0).A_RD for layer in find_mixture(model)[1].layers.values()]
    assert all(old_RD.dtype == torch.bfloat16 for old_RD in olds)


@pytest.mark.parametrize(("mode", "side"), [("o_lora", "in"), ("o_lora", "both"), ("o3", "out"), ("o3", "in")])
def test_the_papers_penalties_go_down(mode, side):
    """Each its own value, against a training without; it is the paper's formula summed over sites."""
    values = {}
    for weight in (0.0, None):
        model = patched(3)
        orthogonality = Orthogonality(mode=mode, side=side, weight=weight)
        held = hold(model, "e2", ["e0", "e1"], orthogonality, generator=seeded())
        train(model, "e2", held, steps=25)
        held.remove()
        measure = hold(model, "e2", ["e0", "e1"], Orthogonality(mode=mode, side=side, weight=1.0), generator=seeded())
        values[weight] = measure.penalty().item()
    sides = ["in", "out"] if side == "both" else [side]
    new, olds = experts_at(model, "e2"), [experts_at(model, name) for name in ("e0", "e1")]
    expected = 0.0
    for path in new:
        for one in sides:
            rows, old_rows = (
                [expert.A_RD if one == "in" else expert.B_RO for expert in group]
                for group in ([new[path]], [old[path] for old in olds])
            )
            # O3 knows the last predecessor only, and divides by the number of blocks
            value = o_lora_penalty(rows[0], old_rows) if mode == "o_lora" else o3_penalty(rows[0], old_rows[-1]) / 2
            expected += float(value) / len(sides)

    assert values[None] < 0.7 * values[0.0]
    assert values[None] == pytest.approx(expected, rel=1e-4)


def test_the_penalty_is_the_weighed_mean_overlap():
    """The value that is reported, times the weight; on both sides the mean of the two."""
    model = patched(3)
    randomise(model, "e2", seed=9)
    olds = ["e0", "e1"]

    for side in ("in", "out", "both"):
        held = hold(model, "e2", olds, Orthogonality(side=side, weight=3.0), generator=seeded())
        assert held.penalty().item() == pytest.approx(3 * overlap_at_sites(model, "e2", olds, side), rel=1e-5)
    both = (overlap_at_sites(model, "e2", olds, "in") + overlap_at_sites(model, "e2", olds, "out")) / 2
    assert overlap_at_sites(model, "e2", olds, "both") == pytest.approx(both)


# --- sites and olds ---------------------------------------------------------------------------------------------------


def test_sites_where_an_expert_has_no_rows(tmp_path):
    """An old one without rows shares nothing there; where the new one has none there is nothing to hold."""
    model = tiny.model("llama")
    projections = {
        f"model.layers.{block}.self_attn.{name}": (32, 48 if name == "q_proj" else 24)
        for block in (0, 1)
        for name in ("q_proj", "v_proj")
    }
    paths = list(projections)
    for number, (name, sites) in enumerate({"old": paths[:2], "new": paths[1:3]}.items()):
        experts = {
            path: Expert(
                gaussian(2, projections[path][0], seed=number), gaussian(2, projections[path][1], seed=number + 9)
            )
            for path in sites
        }
        write_adapter(tmp_path / name, experts)
    config = MoELoRAConfig(router=Gated())
    moelora.patch_model(model, {"old": tmp_path / "old"}, targets=["q_proj", "v_proj"], config=config)
    moelora.add_expert(model, tmp_path / "new", name="new", trainable=True)
    moelora.set_trainable(model, routers=False, experts=["new"])
    new, old = experts_at(model, "new"), experts_at(model, "old")
    shared = float(expert_overlap(new[paths[1]], [old[paths[1]]], "in"))

    assert shared > 0.01
    assert overlap_at_sites(model, "new", ["old"], "in") == pytest.approx(shared / 2)
    held = hold(model, "new", ["old"], Orthogonality(weight=1.0), generator=seeded())
    assert held.penalty().item() == pytest.approx(shared / 2, rel=1e-5)
    for mode in MODES:
        if mode == "basis":
            continue
        held = hold(model, "new", ["old"], Orthogonality(mode=mode), generator=seeded())
        train(model, "new", held, steps=2)
        held.remove()


@pytest.mark.parametrize("mode", MODES)
def test_no_olds_is_fine(mode):
    """Nothing is penalised or taken away, and training runs."""
    model = patched(1)
    held = hold(model, "e0", [], Orthogonality(mode=mode), generator=seeded())
    train(model, "e0", held, steps=2)

    assert held.penalty() == 0
    assert overlap_at_sites(model, "e0", [], "both") == 0


def test_blocks_are_counted_by_the_first_number_in_a_path():
    """Also for numbers of two digits, and for sites outside of any block."""
    paths = ["model.layers.1.q", "model.layers.1.mlp.experts.3.up", "model.layers.11.q", "head"]

    assert num_blocks(paths) == 3
    assert num_blocks(["transformer.h.0"]) == 1


# --- all sites at once ------------------------------------------------------------------------------------------------


def test_shares_are_the_overlap_with_its_gradient():
    """Of sites of several shapes, dependent, zero and absent rows, against the reference in `orthogonal`."""
    rows = gaussian(3, 7)
    rows_of_sites = [
        rows,
        gaussian(3, 7, seed=1),
        torch.cat([rows[:2], rows[:1] + rows[1:2]]),
        0 * rows,
        gaussian(2, 5),
    ]
    olds = [[gaussian(2, 7, seed=2), gaussian(1, 7, seed=3)]] * 4 + [[gaussian(2, 5, seed=4), torch.zeros(0, 5)]]
    ours, theirs = ([rows.clone().requires_grad_() for rows in rows_of_sites] for _ in range(2))

    value = Shares(list(zip(ours, olds, strict=True)))()
    value.backward()
    expected = torch.stack([mean_overlap(new, old) for new, old in zip(theirs, olds, strict=True)]).mean()
    expected.backward()

    torch.testing.assert_close(value, expected)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.grad, their.grad, rtol=1e-4, atol=1e-6)


# --- errors and endings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "hard"}, r"unknown mode 'hard'; expected one of \('none', 'penalty'"),
        ({"side": "left"}, r"unknown side 'left'; expected one of \('in', 'out', 'both'\)"),
        ({"mode": "basis", "side": "both"}, "'basis' fixes the rows of A, which are on side 'in'"),
        ({"mode": "nullspace", "weight": 1.0}, "'nullspace' adds no loss that could be weighed"),
        ({"weight": -1.0}, "weight must be finite and not negative, got -1.0"),
        ({"weight": float("nan")}, "weight must be finite"),
    ],
)
def test_options_that_mean_nothing(arguments, message):
    """Refused where they are written."""
    with pytest.raises(ValueError, match=message):
        Orthogonality(**arguments)


def wide_moments(model: nn.Module, *, sites: int = 99) -> dict[str, InputCovariance]:
    """Moments whose inputs use every direction, of the first sites."""
    layers = list(find_mixture(model)[1].layers.items())[:sites]
    return {path: InputCovariance.of(gaussian(99, layer.in_features)) for path, layer in layers}


def the_rest_is_taken(model: nn.Module) -> None:
    """At the last site the old expert reads the one direction that the new one reads."""
    bank = list(find_mixture(model)[1].layers.values())[-1].bank
    bank.expert(1).A_RD.copy_(bank.expert(0).A_RD)


ERRORS = {
    "an unknown expert": ({"name": "e7"}, "there is no expert 'e7'"),
    "an unknown old one": ({"olds": ["e7"]}, "there is no expert 'e7'"),
    "itself": ({"olds": ["e1"]}, "older experts, each once and without 'e1' itself"),
    "twice": ({"olds": ["e0", "e0"]}, "each once"),
    "a frozen expert": ({"name": "e0", "olds": []}, r"expected 'e0' to be the only expert that is trained, .*\['e1'\]"),
    "avoid alone": ({"avoid": wide_moments}, "avoid and forget belong together"),
    "a missing site": (
        {"avoid": wide_moments, "forget": lambda model: wide_moments(model, sites=3)},
        r"forget has no moments of 5 of 8 sites, such as .*gather",
    ),
    "everything avoided": (
        {"avoid": wide_moments, "forget": wide_moments, "energy": 1.0},
        r"at model.layers.0.self_attn.q_proj: the forget inputs have 0 direction\(s\) outside",
    ),
    "rows inside": (
        {"mode": "nullspace", "prepare": the_rest_is_taken},
        r"at model.layers.1.self_attn.o_proj: rows \[0, 1, 2, 3\] of the parameter lie in the span",
    ),
    "rows from elsewhere": ({"mode": "basis"}, r"at .*: the older experts' rows of A are not from this site's basis"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_come_before_anything_is_changed(case):
    """Factors, flags and hooks are as before."""
    options, message = ERRORS[case]
    options = dict(options)
    model = patched(2)
    options.pop("prepare", lambda model: None)(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = {name: options.pop(name)(model) for name in ("avoid", "forget") if name in options}
    chosen = Orthogonality(mode=options.pop("mode", "penalty"))
    arguments = {"name": "e1", "olds": ["e0"], **options, **data}

    with pytest.raises(ValueError, match=message):
        hold(model, orthogonality=chosen, generator=seeded(), **arguments)

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert trained_hooks(model) == 0
    assert all(factor.requires_grad for name, factor in model.named_parameters() if "_trainable_" in name)


@pytest.mark.parametrize("mode", ["nullspace", "basis"])
def test_too_few_directions_are_an_error_before_anything_is_changed(mode):
    """Four experts of rank 8 fill a width of 32; the fifth has nowhere to go. The site is named."""
    model = patched(1, rank=8)
    for number in range(4):
        olds = [f"e{old}" for old in range(number)]
        hold(model, f"e{number}", olds, Orthogonality(mode=mode), generator=seeded()).remove()
        moelora.add_expert(model, name=f"e{number + 1}", rank=8)
        moelora.set_trainable(model, routers=False, experts=[f"e{number + 1}"])
    before = {name: value.clone() for name, value in model.state_dict().items()}

    with pytest.raises(ValueError, match=r"at model.layers.0.self_attn.q_proj: .* 32 .*so 0 are left.*rank is 8"):
        hold(model, "e4", ["e0", "e1", "e2", "e3"], Orthogonality(mode=mode), generator=seeded())

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert trained_hooks(model) == 0


def test_an_expert_beside_others_that_are_trained_is_refused():
    """A constraint on the stacked rows would hold the others too."""
    model = patched(2)
    moelora.set_trainable(model, routers=False, experts=True)
    with pytest.raises(ValueError, match=r"at model.layers.0.self_attn.q_proj that is \['e0', 'e1'\]"):
        hold(model, "e1", ["e0"], Orthogonality(), generator=seeded())


@pytest.mark.parametrize("mode", MODES)
def test_remove_frees_everything(mode):
    """No hook, no penalty; A is a parameter again, at its value, and moves where it likes."""
    model = patched(2)
    if mode == "basis":
        for layer in find_mixture(model)[1].layers.values():
            old = layer.bank.expert(0)
            old.A_RD.copy_(next_rows([], rank=RANK, width=layer.in_features, seed=0, site=layer.site))
    held = hold(model, "e1", ["e0"], Orthogonality(mode=mode, side="in"), generator=seeded())
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    held.attach(optimizer)
    placed = experts_at(model, "e1")

    held.remove()

    assert trained_hooks(model) == 0
    assert not optimizer._optimizer_step_post_hooks
    assert held.penalty() == 0
    for path, expert in experts_at(model, "e1").items():
        assert torch.equal(expert.A_RD, placed[path].A_RD)
    held = hold(model, "e1", [], Orthogonality(mode="none"), generator=seeded())
    randomise(model, "e1", seed=8)
    before = experts_at(model, "e1")
    train(model, "e1", held, steps=1)
    assert all(not torch.equal(expert.A_RD, before[path].A_RD) for path, expert in experts_at(model, "e1").items())


def test_an_optimiser_without_the_factors_is_refused():
    """As one that was made before the expert became trainable."""
    model = patched(2)
    held = hold(model, "e1", ["e0"], Orthogonality(mode="nullspace"), generator=seeded())
    with pytest.raises(ValueError, match="does not hold the constrained parameter"):
        held.attach(torch.optim.AdamW([nn.Parameter(torch.zeros(3))]))
