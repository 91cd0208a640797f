"""The rows of A chosen before training: by what texts are like at each site, or in turn from one basis."""

import pytest
import torch
from held_experts import experts_at, patched, randomise, seeded, train
from torch import nn

import moelora
from moelora.continual.covariance import InputCovariance
from moelora.continual.gathering import gather
from moelora.continual.orthogonality import MODES, Orthogonality, hold, overlap_at_sites
from moelora.continual.placing import next_rows
from moelora.mixture import find_mixture
from moelora.site_inputs import listen
from moelora.testing import tiny

# --- placement by data ------------------------------------------------------------------------------------------------


def moments(model: nn.Module, *, few: bool, seed: int) -> dict[str, InputCovariance]:
    """Of texts of six tokens of the vocabulary, or of all."""
    high = 9 if few else 99
    ids = torch.randint(3, high, (24, 8), generator=seeded(seed))
    return gather(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])


@pytest.mark.parametrize("mode", MODES)
def test_a_placed_expert_reads_little_of_benign_inputs(mode):
    """A x is small on benign texts, as the energy says, and large on the request's; training leaves A as it is."""
    model = patched(2)
    avoid, forget = moments(model, few=True, seed=1), moments(model, few=False, seed=2)
    held = hold(
        model, "e1", ["e0"], Orthogonality(mode=mode), generator=seeded(), avoid=avoid, forget=forget, energy=0.8
    )
    placed = experts_at(model, "e1")
    train(model, "e1", held, steps=6)
    held.remove()

    for path, expert in experts_at(model, "e1").items():
        assert torch.equal(expert.A_RD, placed[path].A_RD)
        assert expert.B_RO.any()
        read = {}
        for name, covariance in (("avoid", avoid[path]), ("forget", forget[path])):
            energy = (expert.A_RD.double() @ covariance.moment_DD @ expert.A_RD.double().T).trace()
            read[name] = float(energy / covariance.moment_DD.trace())
        assert read["avoid"] <= 0.2
        assert read["avoid"] < read["forget"]
    apart = overlap_at_sites(model, "e1", ["e0"], "in")
    assert apart > 1e-3 if mode == "none" else apart <= 1e-6


def test_benign_inputs_that_span_little_are_not_read_at_all():
    """Where all of their energy is avoided, A x is zero to rounding, on the very inputs of the site."""
    model = patched(1)
    ids = torch.randint(3, 99, (1, 6), generator=seeded(3))
    avoid, forget = gather(model, [{"input_ids": ids}]), moments(model, few=False, seed=4)
    held = hold(model, "e0", [], Orthogonality(), generator=seeded(), avoid=avoid, forget=forget, energy=1.0)
    train(model, "e0", held, steps=1)
    placed = experts_at(model, "e0")

    read: dict[str, float] = {}
    with torch.no_grad(), moelora.disabled(model):
        with listen(model, lambda site, x_TD: read.update({site: float((x_TD @ placed[site].A_RD.T).abs().max())})):
            model(input_ids=ids)
    assert set(read) == set(placed)
    assert max(read.values()) < 1e-5


def test_gather_sees_what_the_sites_read_in_the_base_without_padding():
    """The second moments of the real tokens' inputs, for each site; the mode and the flags of the model stay."""
    model = patched(2)
    randomise(model, "e1", seed=5)
    model.train()
    batch = tiny.inputs(model, batch=3, length=7)
    inputs: dict[str, torch.Tensor] = {}
    base = tiny.model("llama")
    paths = list(find_mixture(model)[1].layers)
    for path in paths:
        base.get_submodule(path).register_forward_pre_hook(lambda _, args, path=path: inputs.update({path: args[0]}))
    with torch.no_grad():
        base(**batch)

    halves = [{name: values[rows] for name, values in batch.items()} for rows in (slice(0, 1), slice(1, 3))]
    found = gather(model, [{**half, "options": torch.zeros(1, 2)} for half in halves])

    valid_BL = batch["attention_mask"].bool()
    assert not valid_BL.all()
    assert list(found) == paths
    for path, covariance in found.items():
        x_ND = inputs[path][valid_BL].double()
        torch.testing.assert_close(covariance.moment_DD, x_ND.T @ x_ND, rtol=1e-4, atol=1e-4)
        assert covariance.count == len(x_ND)
    assert model.training


def test_gather_refuses_no_batch_and_says_where_inputs_are_not_finite():
    """At the first site that reads them."""
    model = patched(1)
    with pytest.raises(ValueError, match="no batch to gather from"):
        gather(model, [])
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[5] = torch.nan
    with pytest.raises(ValueError, match=r"at model.layers.0.self_attn.q_proj: .* NaN"):
        gather(model, [{"input_ids": torch.tensor([[4, 5]])}])


# --- one basis a site -----------------------------------------------------------------------------------------------


def test_the_basis_is_that_of_the_seed_and_the_site_and_rows_come_free_again():
    """The same however often it is asked for; an expert that was removed leaves its rows to the next."""
    basis_ND = next_rows([], rank=6, width=9, seed=3, site="a")

    torch.testing.assert_close(basis_ND @ basis_ND.T, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(next_rows([], rank=2, width=9, seed=3, site="a"), basis_ND[:2])
    assert not torch.allclose(next_rows([], rank=6, width=9, seed=4, site="a"), basis_ND)
    assert not torch.allclose(next_rows([], rank=6, width=9, seed=3, site="b"), basis_ND)
    # experts of unequal rank, rounded to bf16, the first of three removed
    olds = [basis_ND[2:3].bfloat16(), -3 * basis_ND[3:5]]
    torch.testing.assert_close(next_rows(olds, rank=3, width=9, seed=3, site="a"), basis_ND[[0, 1, 5]])
