"""A tiny mixture to train in tests: experts that do something, routers that decide."""

import torch

import moelora
from moelora import AuxLosses, Learned, MoELoRAConfig
from moelora.testing import tiny


def random_mixture(family="llama", *, losses: AuxLosses, router=None, experts=True, **options):
    """Four random experts and their routers, in training mode; `experts` says which experts are trained."""
    config = MoELoRAConfig(router=router or Learned(top_k=2, init_std=0.5), losses=losses)
    model = moelora.patch_model(tiny.model(family, **options), num_experts=4, rank=2, config=config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".bank." in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    moelora.set_trainable(model, routers=True, experts=experts)
    return model.train()
