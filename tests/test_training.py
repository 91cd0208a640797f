"""Training: gradients and losses are the same with checkpointing and accumulation, and nothing is trained in vain."""

import copy
import warnings

import pytest
import torch
from random_mixture import random_mixture

import moelora
from moelora import AuxLosses, Learned, MoELoRAConfig
from moelora.tape import CALLS_BEFORE_BACKWARD
from moelora.testing import tiny

BALANCED = AuxLosses(load_balance=0.5, z_loss=0.1, importance=0.1)


def _patched(family="llama", *, losses=BALANCED, **options):
    return random_mixture(family, losses=losses, **options)


def _gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _loss_and_gradients(model, inputs):
    model.zero_grad()
    torch.manual_seed(3)  # of the model's dropout, and of noisy routers
    output = model(**inputs, labels=inputs["input_ids"])
    output.loss.backward()
    return output, _gradients(model)


def _enable_checkpointing(model, *, reentrant):
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    try:
        enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    except TypeError:
        enable({"use_reentrant": reentrant})


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "qwen3_moe", "zamba2"])
def test_checkpointing_changes_no_loss_and_no_gradient(family, reentrant):
    """A layer's forward runs twice; its routing counts once, and its gradient arrives."""
    model = _patched(family)
    inputs = tiny.inputs(model)
    plain, expected = _loss_and_gradients(model, inputs)

    _enable_checkpointing(model, reentrant=reentrant)
    output, got = _loss_and_gradients(model, inputs)

    torch.testing.assert_close(output.loss, plain.loss)
    torch.testing.assert_close(output.aux_loss, plain.aux_loss)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            got[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_trains_routers_alone():
    """Frozen experts, and a loss on the routings only: its gradient must find the second pass."""
    model = _patched(experts=False, losses=AuxLosses(z_loss=1.0, load_balance=0.0))
    inputs = tiny.inputs(model)
    _, expected = _loss_and_gradients(model, inputs)
    _enable_checkpointing(model, reentrant=True)
    for _ in range(2):
        _, got = _loss_and_gradients(model, inputs)
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)
    assert all(".router." in name for name in expected)


def test_the_loss_is_in_the_models_own_loss():
    """output.loss is the language model's loss plus the weighted losses; aux_loss gives the same number."""
    model = _patched()
    inputs = tiny.inputs(model)
    output = model(**inputs, labels=inputs["input_ids"])
    aux = moelora.aux_loss(model)

    silent = copy.deepcopy(model)
    silent._moelora.hooks.losses = AuxLosses(load_balance=0.0)
    language = silent(**inputs, labels=inputs["input_ids"]).loss

    torch.testing.assert_close(output.loss, language + aux)
    torch.testing.assert_close(output.aux_loss, aux.detach())
    assert aux > 0


def test_padding_does_not_count():
    """Longer padding, another token in it: the same loss."""
    model = _patched()
    inputs = tiny.inputs(model, length=7)
    padded = {
        "input_ids": torch.cat([inputs["input_ids"], torch.full((2, 5), 3)], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.zeros(2, 5, dtype=torch.long)], 1),
    }

    short = model(**inputs, labels=inputs["input_ids"]).aux_loss
    long = model(**padded, labels=padded["input_ids"]).aux_loss

    torch.testing.assert_close(short, long)


def test_evaluation_keeps_no_routings():
    """In evaluation nothing is gathered, the loss is the model's own, and aux_loss says why it has none."""
    model = _patched().eval()
    inputs = tiny.inputs(model)
    with torch.no_grad():
        output = model(**inputs, labels=inputs["input_ids"])

    assert "aux_loss" not in output
    assert not model._moelora.tape.records
    with pytest.raises(ValueError, match="training mode"):
        moelora.aux_loss(model)


def test_accumulated_calls_weigh_as_their_tokens():
    """With Trainer's token count, the losses of the parts add up to one mean over the step."""
    model = _patched(losses=AuxLosses(z_loss=1.0, load_balance=0.0))
    inputs = tiny.inputs(model, batch=4)
    del inputs["attention_mask"]
    labels = inputs["input_ids"]
    items = labels[:, 1:].numel()
    whole = model(**inputs, labels=labels, num_items_in_batch=items)
    whole.loss.backward()
    expected = _gradients(model)
    model.zero_grad()

    for rows in (slice(0, 3), slice(3, 4)):
        part = model(input_ids=labels[rows], labels=labels[rows], num_items_in_batch=items)
        part.loss.backward()

    for name, gradient in _gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_a_plain_loop_learns():
    """Twenty steps of a plain loop lower the loss, with routers alone and with both."""
    for experts in (False, True):
        model = _patched(experts=experts, losses=AuxLosses())
        inputs = tiny.inputs(model, batch=4)
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        values = []
        for _ in range(20):
            optimiser.zero_grad()
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            loss.backward()
            optimiser.step()
            values.append(loss.item())
        assert values[-1] < values[0] - 0.01
        assert not any(p.requires_grad for name, p in model.named_parameters() if ".base." in name)


def test_what_gets_no_gradient_is_named_after_the_first_step():
    """A trainable tensor that nothing leads to is warned of once, by name."""
    model = _patched()
    model.register_parameter("forgotten", torch.nn.Parameter(torch.zeros(3)))
    inputs = tiny.inputs(model)
    _loss_and_gradients(model, inputs)

    with pytest.warns(UserWarning, match="1 trainable tensors got no gradient .* forgotten"):
        _loss_and_gradients(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _loss_and_gradients(model, inputs)


def test_constant_weights_leave_the_router_without_gradient_and_say_so():
    """With constant weights and no loss on the routings, routers learn nothing: the warning names them."""
    model = _patched(router=Learned(top_k=2, combine="constant"), losses=AuxLosses(load_balance=0.0))
    inputs = tiny.inputs(model)
    _loss_and_gradients(model, inputs)

    with pytest.warns(UserWarning, match=r"8 trainable tensors got no gradient .*router\.weight_ED"):
        _loss_and_gradients(model, inputs)


def test_noise_is_the_same_in_the_second_pass():
    """Noisy top-k under checkpointing: the gradient is that of the choice that was made."""
    model = _patched(router=Learned(top_k=2, noisy=True, init_std=0.5))
    inputs = tiny.inputs(model)
    _, expected = _loss_and_gradients(model, inputs)
    _enable_checkpointing(model, reentrant=False)
    _, got = _loss_and_gradients(model, inputs)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_free_balancing_moves_once_per_call(checkpointing):
    """The bias moves by its speed towards the experts with too few tokens, and only when a training call has ended."""
    model = _patched(
        router=Learned(top_k=1, combine="unit", balance_bias_speed=0.1), losses=AuxLosses(load_balance=0.0)
    )
    if checkpointing:
        _enable_checkpointing(model, reentrant=False)
    inputs = tiny.inputs(model)
    site = next(iter(model._moelora.layers))
    router = model._moelora.layers[site].router
    with moelora.record(model) as recording:
        _loss_and_gradients(model, inputs)
    experts_T = recording[site].experts_TK[recording.valid(site)][:, 0]
    load_E = torch.bincount(experts_T, minlength=4).float()
    assert not router.balance_bias_E.any()

    model.eval()(**inputs)

    torch.testing.assert_close(router.balance_bias_E, 0.1 * torch.sign(load_E.mean() - load_E))


def test_a_shared_router_learns_from_all_its_sites():
    """One router for q, k and v decides once per call, and its gradient is that of all three."""
    config = MoELoRAConfig(share_router=True, router=Learned(init_std=0.5), losses=BALANCED)
    model = moelora.patch_model(tiny.model("llama"), num_experts=3, rank=2, config=config).train()
    layers = model._moelora.layers
    q, k, o = (layers[f"model.layers.0.self_attn.{name}_proj"] for name in "qko")
    assert q.router is k.router
    assert q.router is not o.router
    assert len(model._moelora.routers()) == 4

    with moelora.record(model) as recording:
        _, got = _loss_and_gradients(model, tiny.inputs(model))

    paths = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    logits = [recording[path].logits_TE for path in paths]
    assert all(scores is not None and logits[0] is not None and torch.equal(logits[0], scores) for scores in logits)
    assert sum(name.endswith("router.weight_ED") for name in got) == 4
    _enable_checkpointing(model, reentrant=False)
    _, again = _loss_and_gradients(model, tiny.inputs(model))
    for name, gradient in got.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6)


def test_lora_dropout_acts_in_training_only():
    """The experts' input is dropped in training, the router's never."""
    config = MoELoRAConfig(dropout=0.5, router=Learned(init_std=0.5))
    model = _patched()
    dropped = moelora.patch_model(tiny.model("llama"), num_experts=4, rank=2, config=config)
    dropped.load_state_dict(model.state_dict())
    inputs = tiny.inputs(model)

    with torch.no_grad():
        assert torch.equal(dropped.eval()(**inputs).logits, model.eval()(**inputs).logits)
        assert not torch.equal(dropped.train()(**inputs).logits, model.train()(**inputs).logits)


def test_bf16_base_trains_fp32_experts():
    """Trainable rows and routers are fp32 masters beside a bf16 base."""
    model = moelora.patch_model(tiny.model("llama").to(torch.bfloat16), num_experts=2, rank=2).train()
    inputs = tiny.inputs(model)
    output, got = _loss_and_gradients(model, inputs)

    assert output.logits.dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in got.values())
    assert len(got) == 8 * 3


def test_autocast_routes_in_fp32():
    """Under autocast the router's scores stay fp32 and the choice is that without autocast."""
    model = _patched().eval()
    inputs = tiny.inputs(model)
    with moelora.record(model) as recording, torch.autocast("cpu", torch.bfloat16):
        model(**inputs)

    scores = [routing.logits_TE for routing in recording.values()]
    assert all(logits_TE is not None and logits_TE.dtype == torch.float32 for logits_TE in scores)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("together", [False, True])
def test_two_calls_before_backward(reentrant, together):
    """Both calls' losses reach the routers, whether backward comes once for both or once for each."""
    model = _patched()
    batches = [tiny.inputs(model, seed=seed) for seed in (1, 2)]

    def run():
        model.zero_grad()
        torch.manual_seed(3)
        losses = [model(**inputs, labels=inputs["input_ids"]).loss for inputs in batches]
        for loss in [torch.stack(losses).sum()] if together else losses:
            loss.backward()
        return _gradients(model)

    expected = run()
    _enable_checkpointing(model, reentrant=reentrant)
    got = run()

    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_two_calls_with_other_settings_before_backward(reentrant):
    """The second pass of a call sees the call's own ids; where it cannot be told which call it is, it says so."""
    model = moelora.patch_model(tiny.model("llama"), num_experts=3, rank=2, router="given").train()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".bank." in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    inputs = tiny.inputs(model)

    def losses():
        model.zero_grad()
        found = []
        for expert in ("expert0", "expert2"):
            with moelora.given_experts(model, expert):
                found.append(model(**inputs, labels=inputs["input_ids"]).loss)
        return found

    for loss in losses():
        loss.backward()
    expected = _gradients(model)
    _enable_checkpointing(model, reentrant=reentrant)
    for loss in losses():
        loss.backward()
    for name, gradient in _gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)

    with pytest.raises(ValueError, match="one backward pass goes through calls with different"):
        torch.stack(losses()).sum().backward()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_calls_without_backward_do_not_pile_up():
    """Under reentrant checkpointing only so many calls are kept, and a backward pass that comes too late says so."""
    model = _patched()
    _enable_checkpointing(model, reentrant=True)
    inputs = tiny.inputs(model)
    calls = [model(**inputs, labels=inputs["input_ids"]).loss for _ in range(CALLS_BEFORE_BACKWARD + 1)]

    assert all(len(waiting) <= CALLS_BEFORE_BACKWARD for waiting in model._moelora.tape.leaves.values())
    calls[-1].backward()
    with pytest.raises(ValueError, match="more than 16 calls"):
        calls[0].backward()
