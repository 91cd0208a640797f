"""Copies of a patched model: they live on their own, also right after a training step, and cast like any model."""

import copy
import threading

import pytest
import torch

import moelora
from moelora import AuxLosses, Learned, MoELoRAConfig
from moelora.testing import tiny

FAMILIES = ["llama", "t5", "bamba", "zamba2"]


def patched(family="llama", *, seed=1, share_router=False):
    """A tiny model with four random experts and routers that decide clearly, all trainable."""
    config = MoELoRAConfig(
        router=Learned(top_k=2, init_std=0.5), losses=AuxLosses(load_balance=0.5), share_router=share_router
    )
    model = moelora.patch_model(tiny.model(family), num_experts=4, rank=2, config=config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".bank." in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model


def _logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def _labelled(model):
    inputs = tiny.inputs(model)
    return inputs | {"labels": inputs.get("decoder_input_ids", inputs["input_ids"])}


def _train_step(model):
    output = model.train()(**_labelled(model))
    output.loss.backward()
    return output


def _pickled(model, folder):
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


@pytest.fixture(params=["deepcopy", "pickle"])
def copied(request, tmp_path):
    """Both ways to copy a model."""
    return copy.deepcopy if request.param == "deepcopy" else lambda model: _pickled(model, tmp_path)


@pytest.mark.parametrize("after_training", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_is_the_same_model(family, after_training, copied):
    """Equal logits and losses, no shared module or tensor, also when the tape still holds a training step's graph."""
    model = patched(family)
    if after_training:
        _train_step(model)
        model.zero_grad()

    twin = copied(model)

    assert torch.equal(_logits(twin.eval(), tiny.inputs(model)), _logits(model.eval(), tiny.inputs(model)))
    assert not {id(module) for module in model.modules()} & {id(module) for module in twin.modules()}
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in twin.parameters()}
    torch.manual_seed(3)
    ours = _train_step(model)
    torch.manual_seed(3)
    theirs = _train_step(twin)
    assert torch.equal(ours.loss, theirs.loss)
    assert torch.equal(ours.aux_loss, theirs.aux_loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_is_steered_and_trained_alone(family, copied):
    """Settings, recordings, routings kept for losses and weights of the one do nothing to the other."""
    model = patched(family)
    twin = copied(model)
    inputs = tiny.inputs(model)
    routed = _logits(model, inputs)

    with moelora.disabled(model), moelora.record(model) as recording:
        assert torch.equal(_logits(twin, inputs), routed)
        assert not torch.equal(_logits(model, inputs), routed)
    with moelora.record(model) as recording:
        _logits(twin, inputs)
        assert not recording
    _train_step(twin)
    assert not model._moelora.tape.records
    with pytest.raises(ValueError, match="no routing was kept"):
        moelora.aux_loss(model)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(_logits(model, inputs), routed)


@pytest.mark.parametrize("family", FAMILIES)
def test_unpatching_a_copy_leaves_the_original_patched(family, copied):
    """The copy becomes its base; hooks, guards and fused paths of the original stay as they were."""
    base = _logits(tiny.model(family), tiny.inputs(tiny.model(family)))
    model = patched(family)
    inputs = tiny.inputs(model)
    routed = _logits(model, inputs)
    twin = copied(model)

    moelora.unpatch_model(twin)

    assert torch.equal(_logits(twin, inputs), base)
    assert all(parameter.requires_grad for parameter in twin.parameters())
    assert not moelora.is_patched(twin)
    twin.state_dict()
    assert "save_pretrained" not in vars(twin)
    assert torch.equal(_logits(model, inputs), routed)
    with pytest.raises(ValueError, match="is patched"):
        model.save_pretrained("nowhere")
    moelora.unpatch_model(model)
    assert torch.equal(_logits(model, inputs), base)


def test_a_copy_warns_of_its_own_tensors(copied):
    """What gets no gradient is watched in each copy anew."""
    model = patched()
    _train_step(model)
    _train_step(model)
    twin = copied(model)
    twin.register_parameter("forgotten", torch.nn.Parameter(torch.zeros(3)))
    _train_step(twin)

    with pytest.warns(UserWarning, match="1 trainable tensors got no gradient .* forgotten"):
        _train_step(twin)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_model_computes_in_that_dtype(dtype):
    """`.to(dtype)`: logits in that dtype and near those in fp32, weights of the routings still fp32, scales exact."""
    model = patched()
    inputs = tiny.inputs(model)
    expected = _logits(model, inputs)
    scales = [layer.bank.scale_E.clone() for layer in model._moelora.layers.values()]

    model.to(dtype)
    with moelora.record(model) as recording:
        got = _logits(model, inputs)

    assert got.dtype == dtype
    assert all(routing.weights_TK.dtype == torch.float32 for routing in recording.values())
    after = [layer.bank.scale_E for layer in model._moelora.layers.values()]
    assert all(torch.equal(one, other) for one, other in zip(scales, after, strict=True))
    if dtype == torch.float64:
        torch.testing.assert_close(got.float(), expected, rtol=1e-4, atol=1e-5)
    else:
        # near ties between experts fall otherwise for a token here and there
        assert (got.float() - expected).abs().median() < 0.05
    with moelora.disabled(model):
        assert torch.equal(_logits(model, inputs), _logits(tiny.model("llama").to(dtype), inputs))


def test_half_trains_nothing_silently():
    """`.half()` casts the trainable rows too, and a step still reaches them."""
    model = patched().half()
    _train_step(model)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)


def test_two_models_do_not_meet():
    """Calls, settings and training of two patched models in turn are those of each alone."""
    one, other = patched(seed=1), patched("gpt2", seed=2)
    inputs = tiny.inputs(one)
    alone = _logits(one, inputs), _logits(other, inputs)

    with moelora.use_experts(one, "expert0"), moelora.disabled(other):
        _logits(one, inputs)
        _logits(other, inputs)
    loss_of_one = one.train()(**_labelled(one)).loss
    loss_of_other = other.train()(**_labelled(other)).loss
    loss_of_one.backward()
    aux = moelora.aux_loss(other)
    loss_of_other.backward()

    assert aux > 0
    assert torch.equal(_logits(one.eval(), inputs), alone[0])
    assert torch.equal(_logits(other.eval(), inputs), alone[1])


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("training", [False, True])
def test_a_failed_call_leaves_nothing_behind(family, training):
    """An error inside forward, within a context: the next call is right, and so is the next training step."""
    model = patched(family)
    inputs = tiny.inputs(model)
    routed = _logits(model, inputs)
    torch.manual_seed(3)
    expected = _train_step(model).loss.detach()
    model.train(training)
    site = list(model._moelora.layers)[-1]
    handle = model.get_submodule(site).base.register_forward_pre_hook(lambda *_: 1 / 0)

    with pytest.raises(ZeroDivisionError), moelora.disabled(model):
        model(**inputs)
    handle.remove()

    assert model._moelora.tape.depth == 0
    assert torch.equal(_logits(model.eval(), inputs), routed)
    torch.manual_seed(3)
    assert torch.equal(_train_step(model).loss, expected)


def test_two_threads_call_two_models():
    """The state of a call belongs to its model, whatever else runs."""
    models = [patched(seed=1), patched(seed=2)]
    inputs = tiny.inputs(models[0])
    expected = [_logits(model, inputs) for model in models]
    wrong, start = [], threading.Barrier(2)

    def work(number):
        start.wait()
        for turn in range(20):
            if turn % 5 == 4:
                with moelora.disabled(models[number]):
                    _logits(models[number], inputs)
            elif not torch.equal(_logits(models[number], inputs), expected[number]):
                wrong.append((number, turn))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []


def test_threads_train_two_models():
    """Backward of the one while the other runs forward: gradients are those of each alone."""
    models = [patched(seed=1), patched(seed=2)]
    expected = []
    for model in models:
        _train_step(model)
        expected.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    start = threading.Barrier(2)

    def work(model):
        start.wait()
        for _ in range(5):
            model.zero_grad()
            _train_step(model)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for model, gradients in zip(models, expected, strict=True):
        for got, wanted in zip([p.grad for p in model.parameters() if p.grad is not None], gradients, strict=True):
            torch.testing.assert_close(got, wanted)
