"""Experts come and go in a patched model: ids, names, routers, what is trained, and nothing half done."""

import copy

import pytest
import torch
from adapters_on_disk import main_output, peft_model
from untouched import untouched

import moelora
from moelora.config import AuxLosses, MoELoRAConfig
from moelora.testing import tiny


@pytest.fixture
def folders(tmp_path):
    """Three adapters: a and c everywhere, b at every second site."""
    for seed, (name, every) in enumerate((("a", 1), ("b", 2), ("c", 1))):
        peft_model("gpt2", tmp_path / name, seed=seed, every=every, rank=3 + seed)
    return {name: tmp_path / name for name in "abc"}


def output_of(model) -> torch.Tensor:
    """What the model answers to the same input."""
    with torch.no_grad():
        return main_output(model(**tiny.inputs(model)))


def alone(model, name) -> torch.Tensor:
    """What one expert answers."""
    with moelora.use_experts(model, name):
        return output_of(model)


def randomise(model, part: str) -> None:
    """Random values for the routers or the banks."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{part}." in name:
                parameter.normal_(0, 0.1)


CONFIGS = {
    "own routers": MoELoRAConfig(),
    "shared routers": MoELoRAConfig(share_router=True),
    "noise and balancing": MoELoRAConfig(router=moelora.Learned(noisy=True, balance_bias_speed=0.1)),
    "given": MoELoRAConfig(router=moelora.Given()),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_added_expert_is_the_one_that_a_fresh_patch_has(kind, folders):
    """It comes last, acts as in a model that was patched with all three, and routers keep their old rows."""
    config = CONFIGS[kind]
    model = moelora.patch_model(tiny.model("gpt2"), {"a": folders["a"], "b": folders["b"]}, config=config)
    together = moelora.patch_model(tiny.model("gpt2"), folders, config=config)
    before = {id(router): copy.deepcopy(router.state_dict()) for router in model._moelora.routers().values()}

    moelora.add_expert(model, folders["c"])

    assert moelora.expert_names(model) == ["a", "b", "c"]
    for name in "abc":
        assert torch.equal(alone(model, name), alone(together, name))
    for router in model._moelora.routers().values():
        for name, value in router.state_dict().items():
            assert torch.equal(value[:2], before[id(router)][name])
            if name == "weight_ED":
                length = float(value[:2][router.available_E[:2]].norm(dim=-1).mean())
                assert float(value[2].norm()) == pytest.approx(length, rel=1e-5), "the new one starts at its prototype"
            else:
                assert not value[2:].any()
    if kind == "given":
        with moelora.given_experts(model, "c"):
            assert torch.equal(output_of(model), alone(model, "c"))
    else:
        assert output_of(model).isfinite().all()


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "given"])
def test_adding_and_removing_is_the_identity(kind, folders):
    """Bit for bit; also for an expert in the middle, in the order of the ids that are left."""
    model = moelora.patch_model(tiny.model("gpt2"), {"a": folders["a"], "b": folders["b"]}, config=CONFIGS[kind])
    randomise(model, "router")
    expected, state = output_of(model), copy.deepcopy(model.state_dict())

    moelora.add_expert(model, folders["c"], name="other")
    moelora.add_expert(model, name="new", rank=2)
    randomise(model, "bank")
    moelora.remove_expert(model, "other")
    assert moelora.expert_names(model) == ["a", "b", "new"]
    moelora.remove_expert(model, "new")

    assert torch.equal(output_of(model), expected)
    now = model.state_dict()
    assert now.keys() == state.keys()
    assert all(torch.equal(now[name], value) for name, value in state.items())


def test_removing_moves_the_ids_behind_up(folders):
    """The experts that are left answer as before, to rounding (a product of fewer rows may add up in another order)."""
    model = moelora.patch_model(tiny.model("gpt2"), folders)
    randomise(model, "router")
    answers = {name: alone(model, name) for name in "bc"}
    rows = [router.weight_ED.detach().clone() for router in model._moelora.routers().values()]

    moelora.remove_expert(model, "a")

    assert moelora.expert_names(model) == ["b", "c"]
    for name in "bc":
        torch.testing.assert_close(alone(model, name), answers[name], rtol=1e-4, atol=1e-5)
    for router, before_ED in zip(model._moelora.routers().values(), rows, strict=True):
        assert torch.equal(router.weight_ED, before_ED[1:])


def test_sites_that_no_expert_is_left_at_are_the_base(folders):
    """Removing the only adapter that has factors at a site leaves that site as it was before patching."""
    model = moelora.patch_model(tiny.model("gpt2"), {"a": folders["a"], "b": folders["b"]}, top_k=1)
    expected = alone(model, "b")

    moelora.remove_expert(model, "a")

    with moelora.record(model) as routings:
        torch.testing.assert_close(output_of(model), expected)  # top-1 of one expert has weight 1
    assert len(routings) == 2
    moelora.unpatch_model(model)
    assert torch.equal(output_of(model), output_of(tiny.model("gpt2")))


def test_a_fresh_expert_changes_nothing_until_it_is_trained(folders):
    """B is zero; its factors are trainable, the adapters stay frozen, and training moves it."""
    model = moelora.patch_model(tiny.model("gpt2"), {"a": folders["a"], "b": folders["b"]})
    base = output_of(tiny.model("gpt2"))

    moelora.add_expert(model, name="new", rank=4)

    assert torch.equal(alone(model, "new"), base)
    assert not any(router.weight_ED[2].any() for router in model._moelora.routers().values()), "a score of 0"
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(".bank.A_trainable_RD" in name for name in trained)
    inputs = tiny.inputs(model)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    before = alone(model, "a")
    with moelora.use_experts(model, "new"):
        model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimiser.step()
    model.eval()
    assert not torch.equal(alone(model, "new"), base)
    assert torch.equal(alone(model, "a"), before)


def test_fresh_experts_differ_from_one_another(folders):
    """Each gets first weights of its own."""
    model = moelora.patch_model(tiny.model("gpt2"), num_experts=1, rank=2, top_k=1)
    moelora.add_expert(model, name="second", rank=2)
    moelora.add_expert(model, name="third", rank=2, trainable=False)

    for layer in model._moelora.layers.values():
        first, second, third = (expert.A_RD for expert in layer.bank.split())
        assert not torch.equal(first, second)
        assert not torch.equal(second, third)
        assert layer.bank.trainable == (True, True, False)


def test_set_trainable(folders):
    """Routers and experts, by name, all, none; the base keeps its flags; outputs do not change."""
    model = moelora.patch_model(tiny.model("gpt2"), {"a": folders["a"], "b": folders["b"]})
    expected = output_of(model)

    def trained() -> set[str]:
        names = (name for name, p in model.named_parameters() if p.requires_grad)
        return {"router" if ".router." in name else "bank" if ".bank." in name else "base" for name in names}

    assert trained() == {"router"}
    moelora.set_trainable(model, experts=True)
    assert trained() == {"router", "bank"}
    moelora.set_trainable(model, routers=False, experts=["b"])
    assert trained() == {"bank"}
    assert {layer.bank.trainable for layer in model._moelora.layers.values()} == {(False, True), (False, False)}
    moelora.set_trainable(model, routers=False, experts="a")
    assert {layer.bank.trainable for layer in model._moelora.layers.values()} == {(True, False)}
    model.requires_grad_(False)
    moelora.set_trainable(model, routers=True, experts="a")
    assert trained() == {"router", "bank"}, "also after somebody froze everything by hand"
    moelora.set_trainable(model, routers=False)
    assert trained() == set()
    assert torch.equal(output_of(model), expected)
    with untouched(model), pytest.raises(ValueError, match=r"no expert 'd'.*'a'"):
        moelora.set_trainable(model, experts=["a", "d"])


def test_errors_leave_the_mixture_as_it_was(folders, tmp_path):
    """Every refusal of add_expert and remove_expert, with the sentence that says why."""
    peft_model("gpt2", tmp_path / "mlp", seed=5, paths=["transformer.h.0.mlp.c_fc", "transformer.h.0.attn.c_attn"])
    peft_model("bert", tmp_path / "bert", seed=6)
    peft_model("gpt2", tmp_path / "wide", seed=7)
    live = peft_model("gpt2", seed=8)
    live.load_adapter(str(folders["a"]), "second")
    model = moelora.patch_model(tiny.model("gpt2"), {"a": folders["a"], "b": folders["b"]})
    expected = output_of(model)
    wrong = [
        ({}, "either an adapter as source, or rank="),
        ({"source": folders["c"], "rank": 2}, "either an adapter as source, or rank="),
        ({"rank": 2}, "needs a name"),
        ({"rank": 0, "name": "x"}, "rank of at least 1"),
        ({"rank": 2, "name": "../x"}, "cannot name an expert"),
        ({"rank": 2, "name": "a"}, "an expert 'a' already"),
        ({"source": folders["a"]}, "an expert 'a' already"),
        ({"source": folders["c"], "name": "b"}, "an expert 'b' already"),
        ({"source": tmp_path / "nowhere"}, "no folder"),
        (
            {"source": tmp_path / "mlp"},
            r"1 projections of adapter 'mlp' are not patched.*mlp\.c_fc.*patch the model anew",
        ),
        ({"source": tmp_path / "bert"}, "projections of adapter 'bert' are not patched"),
        ({"source": live}, "holds 2 adapters; add them one by one"),
    ]
    for arguments, match in wrong:
        with untouched(model), pytest.raises(ValueError, match=match):
            moelora.add_expert(model, **arguments)
    for name, match in (("z", "no expert 'z'"), ("a", "1 experts would be left, but 2 act on each token")):
        with untouched(model), pytest.raises(ValueError, match=match):
            moelora.remove_expert(model, name)

    assert moelora.expert_names(model) == ["a", "b"]
    assert torch.equal(output_of(model), expected)


def test_the_last_expert_stays():
    """A mixture of none is an unpatched model."""
    model = moelora.patch_model(tiny.model("gpt2"), num_experts=1, rank=2, router="given")
    with pytest.raises(ValueError, match=r"0 experts would be left.*unpatch"):
        moelora.remove_expert(model, "expert0")


def test_lifecycle_of_a_model_that_is_not_patched():
    """The error says what to call first."""
    model = tiny.model("gpt2")
    for verb in (
        lambda: moelora.add_expert(model, name="x", rank=1),
        lambda: moelora.remove_expert(model, "x"),
        lambda: moelora.set_trainable(model),
    ):
        with untouched(model), pytest.raises(ValueError, match=r"call moelora\.patch_model"):
            verb()


def test_training_goes_on_after_a_change(folders):
    """Balancing does not count what experts did that are no more, and new tensors are watched for gradients anew."""
    router = moelora.Learned(top_k=1, combine="unit", balance_bias_speed=0.1)
    config = MoELoRAConfig(router=router, losses=AuxLosses(load_balance=0.1))
    model = moelora.patch_model(tiny.model("gpt2"), folders, config=config).train()
    model.transformer.ln_f.weight.requires_grad_()
    inputs = tiny.inputs(model)

    def forward() -> torch.Tensor:
        return model(**inputs, labels=inputs["input_ids"]).loss

    def biases() -> list[torch.Tensor]:
        return [router.balance_bias_E.clone() for router in model._moelora.routers().values()]

    forward()
    moelora.remove_expert(model, "a")
    before = biases()
    forward()
    assert all(torch.equal(now_E, then_E) for now_E, then_E in zip(biases(), before, strict=True))
    forward().backward()
    assert not all(torch.equal(now_E, then_E) for now_E, then_E in zip(biases(), before, strict=True))

    # warnings are errors: a tensor that was replaced is not missed
    moelora.set_trainable(model, routers=True, experts=True)
    forward()
    moelora.add_expert(model, name="new", rank=2)
    forward().backward()
    forward().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad)
