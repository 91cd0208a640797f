"""Adapters are chosen from a pool by what the method says, and the model does not notice."""

import pytest
import torch
from untouched import untouched

import moelora
from moelora.bank import Expert
from moelora.integrations.peft_folder import write_adapter
from moelora.routers.prototypes import arrow_prototype
from moelora.testing import tiny

POOL = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Four adapters of a tiny llama, by name."""
    folder = tmp_path_factory.mktemp("pool")
    for seed, name in enumerate(POOL):
        tiny.adapter(tiny.model("llama"), folder / name, seed=seed, rank=1 + seed)
    return {name: folder / name for name in POOL}


def batches_of(model) -> list[dict]:
    """Two batches with labels and padding."""
    made = [tiny.inputs(model, seed=seed, length=length) for seed, length in ((0, 7), (1, 5))]
    return [{**inputs, "labels": inputs["input_ids"]} for inputs in made]


def test_perplexity_is_the_loss_with_each_adapter_alone(pool):
    """As in mixtures of one; the model is as it was, also if it was training."""
    model = tiny.model("llama").train()
    batches = batches_of(model)
    expected = {}
    for name, folder in pool.items():
        single = moelora.patch_model(tiny.model("llama"), [folder], router="given")
        with torch.no_grad(), moelora.use_experts(single, name):
            expected[name] = sum(float(single(**batch).loss) for batch in batches) / 2

    with untouched(model):
        selection = moelora.select_experts(pool, k=3, model=model, batches=iter(batches))

    order = sorted(expected, key=expected.__getitem__)
    assert selection.names == tuple(order[:3])
    assert selection.scores == pytest.approx([expected[name] for name in order[:3]], rel=1e-5)


def test_prototype_is_the_mean_of_the_absolute_scores(pool):
    """On what the base's projections read, without padding; no labels are needed."""
    model = tiny.model("llama")
    batches = batches_of(model)
    read: dict[str, list[torch.Tensor]] = {}
    bare = tiny.model("llama")
    patched = moelora.patch_model(tiny.model("llama"), pool, router="given")
    layers = patched._moelora.layers
    for site in layers:
        bare.get_submodule(site).register_forward_pre_hook(
            lambda module, args, site=site: read.setdefault(site, []).append(args[0])
        )
    with torch.no_grad():
        for batch in batches:
            bare(**batch)
    expected = torch.zeros(4, dtype=torch.float64)
    for site, layer in layers.items():
        x_TD = torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(read[site], batches, strict=True)])
        for index in range(4):
            expert = layer.bank.expert(index)
            vector_D = arrow_prototype(expert.A_RD, expert.B_RO)
            expected[index] += (x_TD.double() @ vector_D).abs().mean() / len(layers)

    without_labels = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    with untouched(model):
        selection = moelora.select_experts(pool, "prototype", model=model, batches=without_labels)

    order = expected.argsort(descending=True).tolist()
    assert selection.names == tuple(POOL[index] for index in order)
    assert selection.scores == pytest.approx(expected[order].tolist(), rel=1e-5)


def test_random_is_a_draw_by_the_generator(pool):
    """Without replacement, the same for the same seed, over time everybody in every place."""
    global_state = torch.get_rng_state()
    draws = [moelora.select_experts(pool, "random", k=2, generator=torch.Generator().manual_seed(s)) for s in range(40)]

    assert torch.equal(torch.get_rng_state(), global_state)
    assert all(len(set(draw.names)) == 2 and not draw.scores for draw in draws)
    assert {draw.names[0] for draw in draws} == {draw.names[1] for draw in draws} == set(POOL)
    assert moelora.select_experts(pool, "random", k=2, generator=torch.Generator().manual_seed(7)) == draws[7]


def test_names_are_taken_as_they_come(pool):
    """Also from a pool whose names are derived; a selection is what `patch_model` takes next."""
    assert moelora.select_experts(list(pool.values()), ["d", "a"]).names == ("d", "a")
    selection = moelora.select_experts(pool, ["d", "a", "b"], k=2)
    assert selection.names == ("d", "a")
    model = moelora.patch_model(tiny.model("llama"), {name: pool[name] for name in selection.names})
    assert moelora.expert_names(model) == ["d", "a"]


def test_an_adapter_that_breaks_the_model_comes_last(pool):
    """Its loss is no number."""
    model = tiny.model("llama")
    site = model.model.layers[0].self_attn.q_proj
    huge = Expert(torch.full((1, site.in_features), 1e30), torch.full((1, site.out_features), 1e30))
    write_adapter(pool["a"].parent / "huge", {"model.layers.0.self_attn.q_proj": huge})

    with untouched(model):
        selection = moelora.select_experts(
            {"huge": pool["a"].parent / "huge", **pool}, model=model, batches=batches_of(model)
        )

    assert selection.names[-1] == "huge"
    assert selection.scores[-1] == float("inf")


def test_refusals_leave_the_model_as_it_was(pool):
    """Each with the sentence that says what is missing."""
    model = tiny.model("llama")
    batches = batches_of(model)
    unlabelled = [tiny.inputs(model)]
    wrong = [
        ({"method": "loss"}, "unknown method 'loss'"),
        ({"method": ["a", "z"]}, r"no adapters \['z'\]"),
        ({"method": ["a", "a"]}, "name different adapters"),
        ({"method": []}, "name different adapters"),
        ({"method": ["a", "b"], "k": 3}, "k must lie between 1 and 2"),
        ({"k": 5, "model": model, "batches": batches}, "k must lie between 1 and 4, since the pool holds 4"),
        ({"k": 0, "model": model, "batches": batches}, "k must lie between 1 and 4"),
        ({"method": "random"}, "needs generator="),
        ({"model": model}, "needs model= and batches="),
        ({"method": "prototype", "batches": batches}, "needs model= and batches="),
        ({"model": model, "batches": []}, "batches is empty"),
        ({"method": "prototype", "model": model, "batches": []}, "batches is empty"),
        ({"model": model, "batches": unlabelled}, "needs labels"),
    ]
    for arguments, match in wrong:
        with untouched(model), pytest.raises(ValueError, match=match):
            moelora.select_experts(pool, **arguments)
    patched = moelora.patch_model(tiny.model("llama"), pool)
    with untouched(patched), pytest.raises(ValueError, match="patched already"):
        moelora.select_experts(pool, model=patched, batches=batches)
