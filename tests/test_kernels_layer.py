"""A patched model computes with the Triton operator what it computes with torch; layers of one input run as one."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import moelora
from moelora import AuxLosses, Learned, MoELoRAConfig
from moelora.kernels.gpu import ops
from moelora.testing import tiny

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(backend, *, share_router=False, dropout=0.0, family="llama", **router):
    """A tiny model with four experts that do something, the same for every backend."""
    config = MoELoRAConfig(
        router=Learned(init_std=0.5, **router),
        losses=AuxLosses(load_balance=0.5, z_loss=0.1),
        share_router=share_router,
        backend=backend,
        dropout=dropout,
    )
    model = tiny.model(family, num_hidden_layers=1).to(DEVICE)
    moelora.patch_model(model, num_experts=4, rank=3, config=config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".bank." in name:
            parameter.data.copy_(torch.empty(parameter.shape).normal_(0, 0.1, generator=generator))
    return model


def inputs_of(model):
    """A model's inputs, where it is."""
    return {name: value.to(DEVICE) for name, value in tiny.inputs(model).items()}


def step(model):
    """Loss and gradients of one training step."""
    model.zero_grad()
    inputs = inputs_of(model)
    output = model(**inputs, labels=inputs["input_ids"])
    output.loss.backward()
    return output.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(ours, theirs):
    """Loss and gradients agree to fp32 rounding."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.fixture
def sizes(monkeypatch):
    """How many projections each call of the operator had."""
    seen = []
    real = ops.mixture

    def counted(lists, settings, *, keeps):
        seen.append(len(lists.A))
        return real(lists, settings, keeps=keeps)

    monkeypatch.setattr(ops, "mixture", counted)
    return seen


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [3, 1]),
        ({"share_router": True}, [3, 1]),
        ({"top_k": 1, "combine": "unit"}, [3, 1]),
        ({"combine": "softmax", "temperature": 0.7}, [3, 1]),
        # these routers are no plain linear maps: they choose by themselves, and every projection runs alone
        ({"balance_bias_speed": 0.01}, [1, 1, 1, 1]),
        ({"balance_bias_speed": 0.01, "share_router": True}, [1, 1, 1, 1]),
    ],
    ids=str,
)
def test_training_is_that_of_torch(options, expected, sizes):
    """Loss, balance losses and every gradient; q, k and v in one operator, o in another."""
    assert_same_step(step(build("triton", **options).train()), step(build("dense", **options).train()))
    assert sizes == expected


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_nothing(use_reentrant):
    """The second pass hands on what the first did."""
    model = build("triton").train()
    expected = step(build("triton").train())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert_same_step(step(model), expected)


@torch.no_grad()
def test_every_setting_gives_what_torch_gives():
    """Routed, fixed for all, fixed per row, closed; what each site chose; and generation."""
    ours, theirs = build("triton"), build("dense")
    inputs = inputs_of(ours)
    contexts = [
        lambda model: nullcontext(),
        lambda model: moelora.use_experts(model, {"expert0": 0.3, "expert2": -0.7}),
        lambda model: moelora.use_experts(model, ["expert1", None]),
        moelora.disabled,
    ]
    for context in contexts:
        with context(ours), moelora.record(ours) as got:
            logits = ours(**inputs).logits
        with context(theirs), moelora.record(theirs) as expected:
            torch.testing.assert_close(logits, theirs(**inputs).logits, rtol=1e-4, atol=1e-4)
        assert got.keys() == expected.keys()
        for site, routing in expected.items():
            assert torch.equal(got[site].experts_TK, routing.experts_TK)
            torch.testing.assert_close(got[site].weights_TK, routing.weights_TK)

    prompt = {name: value[:, -3:] for name, value in inputs.items()}
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(ours.generate(**prompt, **settings), theirs.generate(**prompt, **settings))


@torch.no_grad()
def test_rows_without_experts_are_the_base():
    """Bit for bit, in the same batch as rows with experts."""
    model = build("triton")
    inputs = inputs_of(model)
    with moelora.disabled(model):
        base = model(**inputs).logits
    with moelora.use_experts(model, ["expert1", None]):
        mixed = model(**inputs).logits

    assert torch.equal(mixed[1], base[1])
    assert not torch.equal(mixed[0], base[0])


def unlike(model, change):
    """Make one of q, k and v something that must be called, or computed, by itself."""
    attention = model.model.layers[0].self_attn
    if change == "hook":
        attention.k_proj.base.register_forward_hook(lambda module, arguments, output: None)
    elif change == "subclass":
        attention.k_proj.base.__class__ = type("Special", (nn.Linear,), {})
    elif change == "trained base":
        attention.k_proj.base.weight.requires_grad_()
    elif change == "other experts":
        attention.k_proj.bank.set_trainable([0])
    else:
        assert change == "other dropout"
        attention.k_proj.dropout = 0.5


@pytest.mark.parametrize("change", ["hook", "subclass", "trained base", "other experts", "other dropout"])
def test_unlike_layers_run_alone(change, sizes):
    """A hook sees its call, a trained base gets its gradient: what is special keeps all three apart."""
    model = build("triton").train()
    unlike(model, change)
    called = []
    if change == "hook":
        model.model.layers[0].self_attn.k_proj.base.register_forward_hook(lambda *arguments: called.append(1))
    _, gradients = step(model)

    assert sizes == [1, 1, 1, 1]
    assert len(called) == (change == "hook")
    if change == "trained base":
        assert gradients["model.layers.0.self_attn.k_proj.base.weight"].abs().sum() > 0


def test_a_layer_that_is_called_with_another_input_computes_anew():
    """What q handed on to k was for q's own input."""
    model = build("triton")
    attention = model.model.layers[0].self_attn
    x, other = torch.randn(2, 5, attention.q_proj.in_features, device=DEVICE).unbind()
    with torch.no_grad():
        expected = attention.k_proj(other)
        attention.q_proj(x)
        assert torch.equal(attention.k_proj(other), expected)
        # and again with the first: nothing is left of it
        torch.testing.assert_close(attention.k_proj(x), attention.k_proj(x.clone()))


@torch.no_grad()
def test_an_empty_input_has_an_empty_output():
    """No rows, no tokens: shapes are those of the base, for a layer alone and for q, k and v together."""
    attention = build("triton").model.layers[0].self_attn
    for layer in (attention.q_proj, attention.k_proj, attention.o_proj):
        for leading in ((0,), (0, 5), (2, 0)):
            assert layer(torch.zeros(*leading, layer.in_features, device=DEVICE)).shape == (
                *leading,
                layer.out_features,
            )


def test_dropout_spares_evaluation_and_follows_the_seed():
    """Training steps differ by chance alone, and not in evaluation."""
    model = build("triton", dropout=0.5).train()
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(step(model)[0])
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs_of(model)).logits, build("dense")(**inputs_of(model)).logits)


def test_triton_without_a_gpu_is_refused(monkeypatch):
    """What was asked for runs or raises, and the error says what to do."""
    monkeypatch.setattr("moelora.kernels.fused.operators", lambda: None)
    model = tiny.model("llama", num_hidden_layers=1)
    config = MoELoRAConfig(backend="triton")
    with pytest.raises(RuntimeError, match=r"backend='triton' needs Triton and CUDA tensors.*use backend='auto'"):
        moelora.patch_model(model, num_experts=4, rank=3, config=config)(**tiny.inputs(model))


def test_triton_in_fp64_is_refused():
    """The kernels compute in 16 and 32 bits."""
    model = build("triton").double()
    with pytest.raises(RuntimeError, match=r"computes in .*got torch\.float64; use backend='auto'"):
        model(**inputs_of(model))
