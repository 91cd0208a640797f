"""A router that serves several projections counts once, whichever way activations are checkpointed."""

import pytest
import torch

import moelora
from moelora import AuxLosses, Learned, MoELoRAConfig
from moelora.testing import tiny


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_shared_routers_losses_count_once(family, reentrant):
    """Query, key and value share a router: loss and gradients with checkpointing are those without."""
    config = MoELoRAConfig(
        share_router=True, router=Learned(init_std=0.5), losses=AuxLosses(load_balance=0.5, z_loss=1.0)
    )
    model = moelora.patch_model(tiny.model(family), num_experts=4, rank=2, config=config).train()
    inputs = tiny.inputs(model)

    def step():
        model.zero_grad()
        torch.manual_seed(3)
        output = model(**inputs, labels=inputs["input_ids"])
        output.loss.backward()
        return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain, expected = step()
    # the name changed within transformers 5
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    again, got = step()

    assert len(model._moelora.routers()) < len(model._moelora.layers)
    torch.testing.assert_close(again.aux_loss, plain.aux_loss)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)
