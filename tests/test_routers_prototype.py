"""Arrow and PHATGOOSE: prototypes are singular vectors, choices are PEFT's, gates are trained and nothing else is."""

from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from untouched import untouched

import moelora
from moelora import Arrow, Learned, MoELoRAConfig, Phatgoose
from moelora.bank import Expert, ExpertBank, fresh_expert
from moelora.integrations.peft_folder import write_adapter
from moelora.integrations.targets import resolve_sites
from moelora.routers.prototypes import arrow_prototype, shared_prototype
from moelora.tape import Tape
from moelora.testing import tiny
from moelora.testing.router_contract import router_contract

NAMES = ("a", "b", "c")


def random_expert(rank: int, seed: int, *, width: int = 12, out: int = 9, scale: float = 1.0) -> Expert:
    """Random factors, whose first rank-one unit dominates, so that the top singular vector is well determined."""
    generator = torch.Generator().manual_seed(seed)
    sizes_R1 = 0.3 ** torch.arange(rank)[:, None]
    A_RD, B_RO = (torch.randn(rank, side, generator=generator) for side in (width, out))
    return Expert(A_RD, B_RO * sizes_R1, scale)


def write_adapters(folder, *, ranks=(3, 3, 3), every=(1, 1, 1), family: str = "llama") -> dict:
    """Adapters of a tiny model whose prototypes are well determined; the n-th at every `every[n]`-th projection."""
    sites = resolve_sites(tiny.model(family)).sites
    for number, (name, rank, step) in enumerate(zip(NAMES, ranks, every, strict=True)):
        experts = {
            site.path: random_expert(rank, 100 * number + place, width=site.in_features, out=site.out_features)
            for place, site in enumerate(sites)
        }
        write_adapter(folder / name, {path: experts[path] for path in list(experts)[::step]})
    return {name: folder / name for name in NAMES}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three adapters of equal ranks at all projections."""
    return write_adapters(tmp_path_factory.mktemp("alike"))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Three adapters of mixed ranks; b at every second projection, c at every third."""
    return write_adapters(tmp_path_factory.mktemp("mixed"), ranks=(2, 5, 1), every=(1, 2, 3))


def logits_of(model) -> torch.Tensor:
    """What the model answers to the same input."""
    with torch.no_grad():
        return model(**tiny.inputs(model)).logits


# --- prototypes -------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    ranks=st.lists(st.integers(0, 20), min_size=1, max_size=3),
    scales=st.lists(st.sampled_from([-2.0, 0.5, 1.0]), min_size=3, max_size=3),
    seed=st.integers(0, 2**31 - 1),
)
def test_a_prototype_is_the_top_right_singular_vector(ranks, scales, seed):
    """Of the site's own map, and of several sites' maps one upon the other; ranks above the widths too."""
    experts = [
        random_expert(rank, seed + place, out=7 + place, scale=scales[place]) for place, rank in enumerate(ranks)
    ]
    delta_OD = torch.cat([expert.delta_OD() for expert in experts])

    ours_D = shared_prototype(experts)

    if not any(ranks):
        assert ours_D.tolist() == [0.0] * 12
        return
    _, _, right = torch.linalg.svd(delta_OD)
    assert ours_D.dtype == torch.float64
    assert torch.dot(ours_D, right[0]).abs() == pytest.approx(1, abs=1e-9)
    assert ours_D.norm() == pytest.approx(1, abs=1e-12)
    assert ours_D[ours_D.abs().argmax()] > 0, "the sign is the convention's"
    if len(experts) == 1:
        # a scale does not turn a vector
        alone_D = arrow_prototype(experts[0].A_RD, experts[0].B_RO)
        torch.testing.assert_close(alone_D, ours_D, atol=1e-9, rtol=0)


def test_a_prototype_by_hand():
    """The map 3 y1 x2 + y2 x1 lengthens x2 most; a site with a larger scale has the greater say."""
    A_RD, B_RO = torch.eye(2, 4), torch.tensor([[0.0, 1.0], [-3.0, 0.0]])
    assert arrow_prototype(A_RD, B_RO).tolist() == [0, 1, 0, 0]

    one, other = Expert(A_RD[:1], torch.ones(1, 1), 1.0), Expert(A_RD[1:], torch.ones(1, 1), -2.0)
    assert shared_prototype([one, other]).tolist() == [0, 1, 0, 0]
    assert shared_prototype([one, other._replace(scale=0.5)]).tolist() == [1, 0, 0, 0]


def test_signs_of_the_factors_change_nothing():
    """(-A, -B) is the same map, and (A, -B) has the same singular vectors."""
    expert = random_expert(4, seed=0)
    expected_D = arrow_prototype(expert.A_RD, expert.B_RO)

    for sign_A, sign_B in ((-1, -1), (1, -1), (-1, 1)):
        torch.testing.assert_close(arrow_prototype(sign_A * expert.A_RD, sign_B * expert.B_RO), expected_D)


def test_a_fresh_expert_has_no_prototype():
    """Its B is zero."""
    fresh = fresh_expert(6, 4, 2, scale=1.0)
    assert arrow_prototype(fresh.A_RD, fresh.B_RO).tolist() == [0.0] * 6


# --- routers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [Arrow(top_k=2), Arrow(top_k=99, temperature=0.5), Phatgoose(), Phatgoose(top_k=1)])
def test_prototype_routers_keep_the_contract(config):
    """With a prototype for each expert, weights sum to 1."""

    def build(in_features, available):
        router = config.build(in_features, available, None)
        router.prototype_ED.normal_()
        return router

    router_contract(build, weight_sum=1.0)


@pytest.mark.parametrize("config", [Arrow(top_k=2), Phatgoose(top_k=2)])
def test_experts_without_a_prototype_are_never_chosen(config):
    """Also where fewer than K have one; where none has, no expert acts, and nothing is infinite for the losses."""

    def build(in_features, available):
        router = config.build(in_features, available, None)
        router.prototype_ED[::2].normal_()
        return router

    router_contract(build)
    x_TD = torch.randn(5, 6, requires_grad=True)
    router = config.build(6, [True, True, False], None)
    for known in (0, 1):
        router.prototype_ED[:known] = torch.randn(known, 6)
        routing = router(x_TD, Tape())
        assert set(routing.experts_TK.flatten().tolist()) == {-1, *range(known)}
        assert routing.weights_TK.sum(-1).tolist() == [float(known)] * 5
        assert routing.logits_TE.softmax(-1).isfinite().all()
        (gradient_TD,) = torch.autograd.grad(routing.weights_TK.sum(), x_TD)
        assert gradient_TD.isfinite().all()


def test_scores_by_hand():
    """Arrow: |x . v| / T, with x as long as it is. PHATGOOSE: both layer-normalised, over the root of the width."""
    generator = torch.Generator().manual_seed(0)
    x_TD, rows_ED = (torch.randn(count, 6, generator=generator) for count in (4, 3))

    arrow = Arrow(top_k=2, temperature=0.5).build(6, [True] * 3, None)
    arrow.prototype_ED.copy_(rows_ED)
    logits_TE = arrow(x_TD, Tape()).logits_TE
    torch.testing.assert_close(logits_TE, 2 * (x_TD @ rows_ED.T).abs())
    torch.testing.assert_close(arrow(3 * x_TD, Tape()).logits_TE, 3 * logits_TE)
    routing = arrow(x_TD, Tape())
    best_TK, order_TK = logits_TE.topk(2)
    torch.testing.assert_close(routing.weights_TK, best_TK.softmax(-1))
    assert torch.equal(routing.experts_TK, order_TK)

    gates = Phatgoose(top_k=2).build(6, [True] * 3, None)
    gates.prototype_ED.copy_(rows_ED)
    expected_TE = F.layer_norm(x_TD, (6,)) @ F.layer_norm(rows_ED, (6,)).T / 6**0.5
    torch.testing.assert_close(gates(x_TD, Tape()).logits_TE, expected_TE)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Arrow(top_k=0), "top_k must be at least 1, got 0"),
        (lambda: Arrow(temperature=0.0), "temperature must be positive"),
        (lambda: Phatgoose(top_k=0), "top_k must be at least 1"),
    ],
)
def test_options_are_checked(make, match):
    """The sentence says what was expected."""
    with pytest.raises(ValueError, match=match):
        make()


# --- Arrow in a model -------------------------------------------------------------------------------------------------


def test_arrow_is_pefts(folders):
    """The same prototypes up to sign, the same choices, the same logits, for adapters that PEFT's Arrow can mix."""
    config = peft.ArrowConfig(top_k=2, router_temperature=0.7, rng_seed=0)
    paths = [str(folder) for folder in folders.values()]
    theirs = peft.tuners.lora.create_arrow_model(tiny.model("llama"), paths, config).eval()
    model = moelora.patch_model(tiny.model("llama"), folders, router=Arrow(top_k=2, temperature=0.7))

    torch.testing.assert_close(logits_of(model), logits_of(theirs), rtol=1e-4, atol=1e-4)
    for site, layer in model._moelora.layers.items():
        arrow: Any = theirs.get_submodule(f"base_model.model.{site}.lora_arrow.arrow_router")
        cosine_E = (arrow.prototypes * layer.router.prototype_ED).sum(-1).abs()
        assert (cosine_E > 0.999).all()


@pytest.mark.parametrize("shared", [False, True])
def test_arrow_routes_mixed_adapters_without_training(mixed, shared, tmp_path):
    """Its prototypes are those of the factors, saved and loaded bit for bit; nothing is trained, no sign matters."""
    config = MoELoRAConfig(router=Arrow(top_k=2), share_router=shared)
    model = moelora.patch_model(tiny.model("llama"), mixed, config=config)

    for router, layers in model._moelora.by_router():
        for index in range(3):
            deltas = [layer.bank.expert(index).delta_OD() for layer in layers]
            row_D = router.prototype_ED[index].double()
            top = torch.linalg.svd(torch.cat(deltas))[2][0]
            present = any(layer.bank.ranks[index] for layer in layers)
            assert torch.dot(row_D, top).abs() == pytest.approx(float(present), abs=1e-5)
    assert len(model._moelora.routers()) == (4 if shared else 8)
    moelora.set_trainable(model, routers=True)
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    moelora.save(model, tmp_path / "saved")
    again = moelora.load(tiny.model("llama"), tmp_path / "saved")
    assert again._moelora.config == config
    assert torch.equal(logits_of(again), logits_of(model))
    for router in model._moelora.routers().values():
        router.prototype_ED.neg_()
    assert torch.equal(logits_of(again), logits_of(model))


def test_an_added_expert_is_as_if_it_had_been_there(folders):
    """Bit for bit; the prototypes of the others stay."""
    together = moelora.patch_model(tiny.model("llama"), folders, router=Arrow(top_k=2))
    model = moelora.patch_model(tiny.model("llama"), [folders["a"], folders["b"]], router=Arrow(top_k=2))
    before = [layer.router.prototype_ED.clone() for layer in model._moelora.layers.values()]

    moelora.add_expert(model, folders["c"])

    assert torch.equal(logits_of(model), logits_of(together))
    for layer, before_ED in zip(model._moelora.layers.values(), before, strict=True):
        assert torch.equal(layer.router.prototype_ED[:2], before_ED)


def test_fresh_experts_wait_until_they_are_known(folders):
    """Beside adapters, they get no share; alone, the base answers; trained, `warm_start` makes them known."""
    model = moelora.patch_model(tiny.model("llama"), folders, router="arrow")
    expected = logits_of(model)
    moelora.add_expert(model, name="new", rank=2)
    # to rounding: a product of more rows may add up in another order
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)

    alone = moelora.patch_model(tiny.model("llama"), num_experts=2, rank=2, router=Arrow(top_k=1))
    assert torch.equal(logits_of(alone), logits_of(tiny.model("llama")))
    inputs = tiny.inputs(alone)
    loss = alone.train()(**inputs, labels=inputs["input_ids"]).loss
    assert loss.isfinite()
    for layer in alone.eval()._moelora.layers.values():
        torch.nn.init.normal_(layer.bank.B_trainable_RO)
    moelora.warm_start(alone)
    assert not torch.equal(logits_of(alone), logits_of(tiny.model("llama")))


# --- PHATGOOSE in a model ---------------------------------------------------------------------------------------------


def batches_of(model, count: int = 2) -> list[dict]:
    """Batches with labels."""
    made = [tiny.inputs(model, seed=seed) for seed in range(count)]
    return [{**inputs, "labels": inputs["input_ids"]} for inputs in made]


@pytest.mark.parametrize("router", [Phatgoose(), Learned()])
def test_a_gate_is_what_its_definition_trains(folders, router):
    """By a plain loop of torch's own modules around the base; the model is otherwise as it was."""
    model = moelora.patch_model(tiny.model("llama"), folders, router=router).train()
    if isinstance(router, Phatgoose):
        for layer in model._moelora.layers.values():
            layer.router.prototype_ED.normal_()
    batches = batches_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    with moelora.use_experts(model, "a"):
        gates = moelora.train_phatgoose(model, "b", batches, steps=3, lr=0.05)

    # the definition
    plain = tiny.model("llama").requires_grad_(False)
    vectors = {}
    for site, layer in model._moelora.layers.items():
        expert, vectors[site] = layer.bank.expert(1), torch.zeros(layer.in_features, requires_grad=True)

        def add(module, args, output, expert=expert, site=site):
            (x,) = args
            delta = expert.scale * (x @ expert.A_RD.T) @ expert.B_RO
            return output + torch.sigmoid(x @ vectors[site])[..., None] * delta

        plain.get_submodule(site).register_forward_hook(add)
    optimiser = torch.optim.Adam(vectors.values(), lr=0.05)
    for batch in (batches[0], batches[1], batches[0]):
        optimiser.zero_grad()
        plain(**batch).loss.backward()
        optimiser.step()
    assert gates.keys() == vectors.keys()
    for site, gate_D in gates.items():
        torch.testing.assert_close(gate_D, vectors[site].detach(), rtol=1e-3, atol=1e-4)
        assert gate_D.any()

    # and nothing else
    assert all(module.training for module in model.modules())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        if name.endswith("prototype_ED"):
            assert torch.equal(value[1], gates[name.removesuffix(".router.prototype_ED")])
            assert torch.equal(value[[0, 2]], before[name][[0, 2]])
        else:
            assert torch.equal(value, before[name])


def test_a_gate_learns_which_tokens_its_expert_is_for(folders):
    """The loss of the gated expert falls."""
    model = moelora.patch_model(tiny.model("llama"), folders, router="phatgoose")
    batch = batches_of(model, 1)[0]
    losses = []
    for steps in (1, 30):
        gates = moelora.train_phatgoose(model, "a", [batch], steps=steps, lr=0.02)
        layers = model._moelora.layers
        handles = [layer.register_forward_hook(gated(layer, gates[site])) for site, layer in layers.items()]
        with torch.no_grad(), moelora.disabled(model):
            losses.append(float(model(**batch).loss))
        for handle in handles:
            handle.remove()
    assert losses[1] < losses[0] - 0.05


def gated(layer, gate_D):
    """A hook that adds the first expert behind its gate."""
    expert = layer.bank.expert(0)

    def add(module, args, output):
        (x,) = args
        return output + torch.sigmoid(x @ gate_D)[..., None] * (expert.scale * (x @ expert.A_RD.T) @ expert.B_RO)

    return add


def test_phatgoose_from_patching_to_loading(mixed, tmp_path):
    """Without gates the base answers; with some, only their experts act; gates are saved and loaded bit for bit."""
    model = moelora.patch_model(tiny.model("llama"), mixed, router=Phatgoose(top_k=2))
    base = logits_of(tiny.model("llama"))
    assert torch.equal(logits_of(model), base)

    gates = moelora.train_phatgoose(model, "b", iter(batches_of(model)), steps=5)
    absent = {site for site, layer in model._moelora.layers.items() if not layer.bank.ranks[1]}
    assert {site for site, gate_D in gates.items() if not gate_D.any()} == absent
    with moelora.record(model) as recording:
        one = logits_of(model)
    assert not torch.equal(one, base)
    assert {int(expert) for site in recording for expert in recording[site].experts_TK.unique()} == {-1, 1}
    moelora.train_phatgoose(model, "a", batches_of(model), steps=2)
    assert not torch.equal(logits_of(model), one)

    moelora.save(model, tmp_path / "saved")
    again = moelora.load(tiny.model("llama"), tmp_path / "saved")
    assert torch.equal(logits_of(again), logits_of(model))


def test_gates_of_a_shared_router(folders):
    """q, k and v read one input, and share the gate."""
    config = MoELoRAConfig(router=Phatgoose(), share_router=True)
    model = moelora.patch_model(tiny.model("llama"), folders, config=config)
    gates = moelora.train_phatgoose(model, "c", batches_of(model), steps=2)
    q, k, o = (gates[f"model.layers.0.self_attn.{name}_proj"] for name in "qko")
    assert torch.equal(q, k)
    assert q.any()
    assert o.any()
    assert not torch.equal(q[:4], o[:4])


def test_refusals_of_training_a_gate(folders):
    """They leave the model as it was, also from within."""
    model = moelora.patch_model(tiny.model("llama"), folders, router="phatgoose")
    inputs = tiny.inputs(model)
    wrong = [
        (("z", batches_of(model)), {}, "no expert 'z'"),
        (("a", []), {}, "batches is empty"),
        (("a", [inputs]), {}, "returned no loss.*labels"),
        (("a", batches_of(model)), {"steps": 0}, "steps must be at least 1"),
        (("a", batches_of(model)), {"lr": 0.0}, "lr positive"),
    ]
    for arguments, options, match in wrong:
        with untouched(model), pytest.raises(ValueError, match=match):
            moelora.train_phatgoose(model, *arguments, **options)

    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    before = [layer.router for layer in model._moelora.layers.values()]
    with pytest.raises(ValueError, match=r"the loss is nan in step 0"):
        moelora.train_phatgoose(model, "a", batches_of(model))
    assert [layer.router for layer in model._moelora.layers.values()] == before


def test_banks_of_one_kind_give_routers_of_their_own():
    """`start_from` with some experts leaves the rows of the others."""
    experts = [random_expert(2, seed) for seed in range(3)]
    bank = ExpertBank.stack(experts, in_features=12, out_features=9)
    router = Arrow(top_k=1).build(12, [True] * 3, None)
    router.start_from([bank], [1])
    assert not router.prototype_ED[[0, 2]].any()
    torch.testing.assert_close(router.prototype_ED[1], arrow_prototype(experts[1].A_RD, experts[1].B_RO).float())
