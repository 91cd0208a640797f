"""Experts that are heads of one A (HydraLoRA): one tensor, the sum of the heads' gradients, and the same mixture."""

import json
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import moelora
from moelora import Learned, MoELoRAConfig
from moelora.bank import Expert, ExpertBank
from moelora.kernels import api, reference, torch_paths
from moelora.kernels.api import mix
from moelora.testing import tiny
from moelora.testing.strategies import routings

D, O, P, E, T = 5, 7, 3, 4, 6


def heads(count=E, *, seed=0, biases=False):
    """Heads of one random A."""
    generator = torch.Generator().manual_seed(seed)
    A_RD = torch.randn(P, D, generator=generator)
    return [
        Expert(
            A_RD,
            torch.randn(P, O, generator=generator),
            1.0 + index,
            torch.randn(O, generator=generator) if biases else None,
        )
        for index in range(count)
    ]


def stack(experts, *, trainable: Iterable[int] = (), shared: Iterable[int] = range(E)):
    """A bank of these experts."""
    return ExpertBank.stack(experts, in_features=D, out_features=O, trainable=trainable, shared=shared)


def assert_same(left, right):
    """The same experts, bit for bit."""
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one.A_RD, other.A_RD)
        assert torch.equal(one.B_RO, other.B_RO)
        assert one.scale == other.scale


def sizes(bank):
    """How many numbers the bank holds in factors."""
    tensors = (bank.A_frozen_RD, bank.B_frozen_RO, bank.A_trainable_RD, bank.B_trainable_RO)
    return sum(tensor.numel() for tensor in tensors if tensor is not None)


@pytest.mark.parametrize("trainable", [(), range(E)], ids=["frozen", "trained"])
def test_the_A_is_there_once(trainable):
    """D r + E r O numbers, and every head is a view of the same rows; the experts come back as they went in."""
    bank = stack(heads(), trainable=trainable)

    assert sizes(bank) == D * P + E * P * O
    assert len({expert.A_RD.data_ptr() for expert in bank.split()}) == 1
    assert_same(bank.split(), heads())


@given(routings(E, T), st.sampled_from([(), range(E)]), st.booleans())
def test_the_mixture_is_that_of_separate_experts(routing, trainable, biases):
    """Every way to compute it, whatever is chosen."""
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(1))
    base_TO = torch.zeros(T, O)
    some = heads(biases=biases)
    expected_TO = reference.mix(base_TO, x_TD, stack(some, shared=()).factors(), routing)
    factors = stack(some, trainable=trainable).factors()

    for backend in ("reference", "dense", "gathered"):
        torch.testing.assert_close(mix(base_TO, x_TD, factors, routing, backend=backend), expected_TO)
    with torch.no_grad():
        one = moelora.Routing(routing.experts_TK[:1], routing.weights_TK[:1])
        torch.testing.assert_close(mix(base_TO[:1], x_TD[:1], factors, one), expected_TO[:1])


def test_dense_reads_the_A_once():
    """One product with r rows, not with E r: what is in `A_RD` is not looked at."""
    factors = stack(heads(), trainable=range(E)).factors()
    x_TD, base_TO = torch.randn(T, D), torch.zeros(T, O)
    routing = moelora.Routing(torch.arange(E).expand(T, E), torch.rand(T, E))

    blind = factors._replace(A_RD=torch.full_like(factors.A_RD, torch.nan))

    expected_TO = torch_paths.dense(base_TO, x_TD, factors, routing, every_token=True)
    assert torch.equal(torch_paths.dense(base_TO, x_TD, blind, routing, every_token=True), expected_TO)


@pytest.mark.parametrize("backend", ["reference", "dense", "gathered"])
def test_the_gradient_of_the_A_is_the_sum_over_its_heads(backend):
    """As if each head had an A of its own, and the gradients were added."""
    x_TD = torch.randn(T, D, dtype=torch.double)
    routing = moelora.Routing(torch.arange(E).expand(T, E), torch.rand(T, E))
    gradients = []
    for shared in ((), range(E)):
        bank: Any = stack(heads(), trainable=range(E), shared=shared).double()
        mix(
            torch.zeros(T, O, dtype=torch.double), x_TD, bank.factors(), routing, backend=backend
        ).square().sum().backward()
        gradients.append((bank.A_trainable_RD.grad, bank.B_trainable_RO.grad))

    (separate_RD, B_separate_RO), (shared_PD, B_shared_RO) = gradients
    torch.testing.assert_close(shared_PD, separate_RD.view(E, P, D).sum(0))
    torch.testing.assert_close(B_shared_RO, B_separate_RO)


def test_the_operator_runs_through_the_repeated_A(monkeypatch):
    """`backend="triton"` is what runs, forward and backward; its answer is torch's."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(2)
    x_TD, seen = torch.randn(T, 16, generator=generator).to(device), []
    A_RD = torch.randn(4, 16, generator=generator)
    some = [Expert(A_RD, torch.randn(4, 16, generator=generator), 1.0 + index) for index in range(2)]
    routing = moelora.Routing(*(part.to(device) for part in (torch.tensor([[0, 1]] * T), torch.rand(T, 2))))
    fused = api.mix_fused
    monkeypatch.setattr(api, "mix_fused", lambda *args, **options: seen.append(1) or fused(*args, **options))

    results = []
    for backend in ("reference", "triton"):
        bank: Any = ExpertBank.stack(
            some, in_features=16, out_features=16, device=device, trainable=range(2), shared=range(2)
        )
        mixed_TO = mix(torch.zeros(T, 16, device=device), x_TD, bank.factors(), routing, backend=backend)
        mixed_TO.square().sum().backward()
        results.append((mixed_TO.detach(), bank.A_trainable_RD.grad, bank.B_trainable_RO.grad))

    assert seen == [1]
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@given(st.permutations(["own", "own", "head", "head", "head"]), st.booleans(), st.sets(st.integers(0, 4)))
def test_heads_and_other_experts_live_together(kinds, heads_trained, trained):
    """In any order, frozen or trained, cast or dropped, every expert keeps its factors; heads stay one."""
    own = iter([Expert(torch.randn(rank, D), torch.randn(rank, O)) for rank in (2, 4)])
    others = iter(heads(3))
    some = [next(own) if kind == "own" else next(others) for kind in kinds]
    shared = {index for index, kind in enumerate(kinds) if kind == "head"}
    trainable = (trained - shared) | (shared if heads_trained else set())
    bank = stack(some, trainable=trainable, shared=shared)

    assert_same(bank.split(), some)
    factors = bank.factors()
    for index, expert in enumerate(some):
        assert torch.equal(factors.A_RD[factors.owner_R == index], expert.A_RD)
        assert torch.equal(factors.B_RO[factors.owner_R == index], expert.B_RO)
    assert sizes(bank) == sum(e.A_RD.numel() + e.B_RO.numel() for e in some) - 2 * P * D
    assert factors.shared_A_PD is None

    bank.set_trainable(set(range(5)) - trainable)
    assert_same(bank.split(), some)
    first = min(shared)
    bank.drop(first)
    assert_same(bank.split(), some[:first] + some[first + 1 :])
    assert sum(bank.shared) == 2


def test_a_head_comes_and_goes():
    """It takes the A that is there."""
    bank = stack(heads()[:-1], trainable=range(E - 1), shared=range(E - 1))
    bank.add(heads()[-1], trainable=True, shared=True)
    assert_same(bank.split(), heads())
    assert bank.A_trainable_RD is not None
    assert bank.A_trainable_RD.shape == (P, D)

    for _ in range(E):
        bank.drop(0)
    assert len(bank) == 0
    assert sizes(bank) == 0


def test_a_frozen_banks_answer_is_kept_until_its_buffers_change():
    """As for experts of their own: an A is repeated once, not at each step."""
    bank = stack(heads())
    first = bank.factors()
    assert bank.factors() is first

    bank.A_frozen_RD = bank.A_frozen_RD * 2

    assert torch.equal(bank.factors().A_RD, first.A_RD * 2)


def test_refusals_leave_the_bank_as_it_was():
    """Half of the heads cannot be trained, and an expert with another A is no head."""
    bank = stack(heads())
    other = Expert(heads()[0].A_RD + 1, torch.randn(P, O))

    with pytest.raises(ValueError, match="share one A, so they are trained together or not at all"):
        bank.set_trainable([1, 2])
    with pytest.raises(ValueError, match="experts 0 and 4 are to share one A, but theirs differ"):
        bank.add(other, shared=True)
    with pytest.raises(ValueError, match="trained together"):
        bank.add(heads()[0], trainable=True, shared=True)
    with pytest.raises(ValueError, match="theirs differ"):
        stack([*heads(E - 1), other])
    assert_same(bank.split(), heads())


# --- in a model -------------------------------------------------------------------------------------------------------


def hydra(**options):
    """A tiny mixture of three heads whose factors are random."""
    config = MoELoRAConfig(router=Learned(top_k=2, init_std=0.5), shared_A=True)
    model = moelora.patch_model(tiny.model("llama"), num_experts=3, rank=2, config=config, **options)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".bank.B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model


def logits(model):
    """What the model answers."""
    with torch.no_grad():
        return model(**tiny.inputs(model)).logits


def banks(model):
    """The banks of a patched model."""
    return [layer.bank for layer in model._moelora.layers.values()]


def test_a_model_trains_one_A_for_all_heads():
    """Parameters are counted, and one step moves the A of every head alike."""
    model = hydra().train()
    for bank in banks(model):
        counted = sum(parameter.numel() for parameter in bank.parameters())
        assert counted == 2 * bank.in_features + 3 * 2 * bank.out_features
        assert bank.A_frozen_RD.numel() == bank.B_frozen_RO.numel() == 0

    inputs = tiny.inputs(model)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = [bank.expert(0).A_RD.clone() for bank in banks(model)]
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimiser.step()

    for bank, old_RD in zip(banks(model), before, strict=True):
        assert not torch.equal(bank.expert(0).A_RD, old_RD)
        assert torch.equal(bank.expert(0).A_RD, bank.expert(2).A_RD)


def test_saved_as_plain_adapters_and_shared_again(tmp_path):
    """Each head is a PEFT folder with the A in it; loaded, the A is one, and the logits are the same bits."""
    model = hydra()
    moelora.save(model, tmp_path)
    twin = moelora.load(tiny.model("llama"), tmp_path)

    assert torch.equal(logits(twin), logits(model))
    assert all(all(bank.shared) for bank in banks(twin))
    assert [sizes(bank) for bank in banks(twin)] == [sizes(bank) for bank in banks(model)]
    assert len(load_file(tmp_path / "experts/000/adapter_model.safetensors")) == 2 * len(banks(model))


def test_heads_that_no_longer_agree_are_not_loaded(tmp_path):
    """Somebody has trained one of the folders on: with it the A would be two."""
    moelora.save(hydra(), tmp_path)
    place = tmp_path / "experts/001/adapter_model.safetensors"
    tensors = load_file(place)
    name = next(name for name in tensors if "lora_A" in name)
    save_file(tensors | {name: tensors[name] + 1}, place, metadata={"format": "pt"})
    manifest = json.loads((tmp_path / "moelora_config.json").read_text())
    manifest["experts"][1]["sha256"] = None
    (tmp_path / "moelora_config.json").write_text(json.dumps(manifest))
    model = tiny.model("llama")

    with pytest.raises(ValueError, match="are to share one A, but theirs differ"):
        moelora.load(model, tmp_path)
    assert not moelora.is_patched(model)


def test_heads_are_added_frozen_and_removed(tmp_path):
    """A fresh expert is another head; an adapter has an A of its own; freezing is for all heads at once."""
    model = hydra()
    before = logits(model)
    tiny.adapter(tiny.model("llama"), tmp_path / "law")
    with pytest.raises(ValueError, match="shares the A of the others, of rank 2; got rank=3"):
        moelora.add_expert(model, name="new", rank=3)
    with pytest.raises(ValueError, match="trained together"):
        moelora.set_trainable(model, experts=["expert0"])
    assert torch.equal(logits(model), before)

    moelora.add_expert(model, name="new", rank=2)
    moelora.add_expert(model, tmp_path / "law")
    assert {bank.shared for bank in banks(model)} == {(True, True, True, True, False)}
    assert all(bank.A_trainable_RD.shape[0] == 2 for bank in banks(model))

    answer = logits(model)
    moelora.set_trainable(model, experts=False)
    torch.testing.assert_close(logits(model), answer)
    assert all(bank.A_trainable_RD is None for bank in banks(model))
    moelora.remove_expert(model, "expert0")
    moelora.save(model, tmp_path / "mixture")
    assert torch.equal(logits(moelora.load(tiny.model("llama"), tmp_path / "mixture")), logits(model))


def test_shared_A_needs_fresh_experts(tmp_path):
    """Adapters bring their own A."""
    model = tiny.model("llama")
    tiny.adapter(model, tmp_path)
    with pytest.raises(ValueError, match="shared_A is for fresh experts"):
        moelora.patch_model(model, [tmp_path], config=MoELoRAConfig(router=moelora.Given(), shared_A=True))
