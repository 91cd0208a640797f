"""Routers that begin at prototypes: which rows, how long, which way, and that nothing else moves."""

import pytest
import torch
from untouched import untouched

import moelora
from moelora import Learned, MoELoRAConfig
from moelora.routers.prototypes import shared_prototype
from moelora.testing import tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three adapters of a tiny llama."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate("abc"):
        tiny.adapter(tiny.model("llama"), folder / name, seed=seed, rank=2 + seed)
    return {name: folder / name for name in "abc"}


def mixture(folders, **options):
    """A patched tiny llama."""
    return moelora.patch_model(tiny.model("llama"), folders, config=MoELoRAConfig(**options))


def rows_of(model) -> list[torch.Tensor]:
    """Each router's rows."""
    return [router.weight_ED.detach().clone() for router in model._moelora.routers().values()]


def prototypes_of(model) -> list[torch.Tensor]:
    """Each router's prototypes, (E, D)."""
    return [
        torch.stack([shared_prototype([layer.bank.expert(index) for layer in layers]) for index in range(3)])
        for _, layers in model._moelora.by_router()
    ]


def inputs_of_sites(model, name, batches) -> dict[str, list[torch.Tensor]]:
    """What each projection reads in calls in which one expert acts alone."""
    heard: dict[str, list[torch.Tensor]] = {}

    def hear(layer, args) -> None:
        heard.setdefault(layer.site, []).append(args[0])

    handles = [layer.register_forward_pre_hook(hear) for layer in model._moelora.layers.values()]
    with torch.no_grad(), moelora.use_experts(model, name):
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return heard


@pytest.mark.parametrize("shared", [False, True])
def test_rows_become_prototypes(folders, shared):
    """Of the length that was asked for, in the parameters that an optimiser may hold already."""
    model = mixture(folders, share_router=shared)
    parameters = [id(router.weight_ED) for router in model._moelora.routers().values()]

    moelora.warm_start(model, scale=1.5)

    for rows_ED, prototype_ED in zip(rows_of(model), prototypes_of(model), strict=True):
        torch.testing.assert_close(rows_ED.double(), 1.5 * prototype_ED, rtol=1e-5, atol=1e-6)
    assert [id(router.weight_ED) for router in model._moelora.routers().values()] == parameters
    assert all(router.weight_ED.requires_grad for router in model._moelora.routers().values())


def test_inputs_of_mean_square_one_get_scores_of_the_spread_that_was_asked_for(folders):
    """What the length of the rows is for."""
    model = mixture(folders)
    moelora.warm_start(model, scale=2.0)
    for rows_ED in rows_of(model):
        scores_TE = torch.randn(4000, rows_ED.shape[1]) @ rows_ED.T
        torch.testing.assert_close(scores_TE.std(0), torch.full((3,), 2.0), rtol=0.1, atol=0)


def test_data_chooses_the_sign(folders):
    """The mean score of an expert's own inputs is positive, whatever the adapter's factors look like."""
    model = mixture(folders)
    data = {name: [tiny.inputs(model, seed=seed), tiny.inputs(model, seed=9)] for seed, name in enumerate("ab")}
    moelora.warm_start(model)
    convention = rows_of(model)

    moelora.warm_start(model, batches=data)

    turned = 0
    for rows_ED, before_ED in zip(rows_of(model), convention, strict=True):
        assert torch.equal(rows_ED.abs(), before_ED.abs())
        assert torch.equal(rows_ED[2], before_ED[2]), "without batches it is the convention"
        turned += int((rows_ED[:2] != before_ED[:2]).any(-1).sum())
    assert 0 < turned < 2 * len(convention)
    for index, name in enumerate("ab"):
        inputs = [tiny.inputs(model, seed=index), tiny.inputs(model, seed=9)]
        heard = inputs_of_sites(model, name, inputs)
        for site, layer in model._moelora.layers.items():
            x_TD = torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(heard[site], inputs, strict=True)])
            assert float((x_TD @ layer.router.weight_ED[index].detach()).mean()) > 0


def test_given_rows_and_some_experts_only(folders):
    """Rows are taken at unit length; rows of zeros stay zeros; the other experts' rows stay, bit for bit."""
    model = mixture(folders)
    before = rows_of(model)
    given = {site: torch.randn(3, layer.in_features) for site, layer in model._moelora.layers.items()}
    for rows_ED in given.values():
        rows_ED[2] = 0

    moelora.warm_start(model, given, experts=["c", "a"], scale=0.5)

    for rows_ED, before_ED, given_ED in zip(rows_of(model), before, given.values(), strict=True):
        torch.testing.assert_close(rows_ED[0], 0.5 * given_ED[0] / given_ED[0].norm())
        assert torch.equal(rows_ED[1], before_ED[1])
        assert not rows_ED[2].any()


def test_gates_of_phatgoose_start_a_learned_router(folders):
    """Stacked, they are what `warm_start` takes; sites with a shared router need one entry."""
    model = mixture(folders, share_router=True)
    inputs = tiny.inputs(model)
    batches = [{**inputs, "labels": inputs["input_ids"]}]
    gates = [moelora.train_phatgoose(model, name, batches, steps=2) for name in "abc"]
    stacked = {site: torch.stack([gate[site] for gate in gates]) for site in gates[0] if "k_proj" not in site}

    moelora.warm_start(model, stacked)

    for router, layers in model._moelora.by_router():
        directions_ED = stacked[layers[0].site]
        torch.testing.assert_close(router.weight_ED.detach(), torch.nn.functional.normalize(directions_ED, dim=-1))


def test_refusals_change_nothing(folders):
    """Each with the sentence that says what to do."""
    model = mixture(folders)
    inputs = [tiny.inputs(model)]
    given = {site: torch.randn(3, layer.in_features) for site, layer in model._moelora.layers.items()}
    site = next(iter(given))
    wrong = [
        ({"prototypes": "svd"}, "unknown prototypes 'svd'"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"experts": ["z"]}, "no expert 'z'"),
        ({"batches": {"z": inputs}}, "batches of 'z'"),
        ({"batches": {"b": inputs}, "experts": "a"}, "batches of 'b'"),
        ({"batches": {"a": inputs, "b": []}}, "the batches of 'b' are empty"),
        ({"prototypes": given, "batches": {"a": inputs}}, "signs of their own"),
        ({"prototypes": given | {"nowhere": given[site]}}, r"no patched sites \['nowhere'\]"),
        ({"prototypes": {name: rows for name, rows in given.items() if name != site}}, "no rows for"),
        ({"prototypes": given | {site: given[site][:2]}}, "must be finite and of shape"),
        ({"prototypes": given | {site: given[site] * torch.nan}}, "must be finite and of shape"),
    ]
    for arguments, match in wrong:
        with untouched(model), pytest.raises(ValueError, match=match):
            moelora.warm_start(model, **arguments)
    named = moelora.patch_model(tiny.model("llama"), folders, router="given")
    with untouched(named), pytest.raises(ValueError, match="a GivenRouter has no row for each expert"):
        moelora.warm_start(named)


@pytest.mark.parametrize("shared", [False, True])
def test_an_added_expert_starts_at_its_prototype(folders, shared):
    """As long as the other rows are on average; these stay, bit for bit."""
    first = {name: folders[name] for name in "ab"}
    model = mixture(first, router=Learned(top_k=2, noisy=True, balance_bias_speed=0.1), share_router=shared)
    before = rows_of(model)

    moelora.add_expert(model, folders["c"])

    for rows_ED, before_ED, prototype_ED in zip(rows_of(model), before, prototypes_of(model), strict=True):
        assert torch.equal(rows_ED[:2], before_ED)
        expected_D = before_ED.norm(dim=-1).mean() * prototype_ED[2]
        torch.testing.assert_close(rows_ED[2].double(), expected_D, rtol=1e-5, atol=1e-6)
    for router in model._moelora.routers().values():
        assert not router.noise_weight_ED[2].any()
        assert not router.balance_bias_E[2]


def test_an_added_expert_starts_at_zero_where_that_is_asked_for_or_nothing_is_known(folders):
    """`router_start="zero"`, a fresh expert, and other rows that are zero."""
    first = {name: folders[name] for name in "ab"}
    asked, fresh, still = mixture(first), mixture(first), mixture(first, router=Learned(init_std=0.0))

    moelora.add_expert(asked, folders["c"], router_start="zero")
    moelora.add_expert(fresh, name="new", rank=2)
    moelora.add_expert(still, folders["c"])

    for model in (asked, fresh, still):
        assert not any(rows_ED[2].any() for rows_ED in rows_of(model))
    with untouched(asked), pytest.raises(ValueError, match="unknown router_start 'random'"):
        moelora.add_expert(asked, folders["c"], name="again", router_start="random")
