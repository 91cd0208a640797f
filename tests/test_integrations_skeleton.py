"""A model from its config: the same answers about structure as the real one, without its memory."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import moelora
from moelora.integrations.skeleton import VALUE, cheap_projections, skeleton
from moelora.testing import tiny


def config_of(family: str, folder, **overrides) -> str:
    """The folder of a tiny model's config."""
    model = tiny.model(family, **overrides)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_skeleton_resolves_like_the_model(family, tmp_path):
    """The same table and the same groups, in every family."""
    made = skeleton(config_of(family, tmp_path))

    with cheap_projections():
        ours = moelora.resolve_targets(made)

    real = moelora.resolve_targets(tiny.model(family))
    assert str(ours) == str(real)
    assert ours.groups == real.groups


def test_parameters_take_no_memory(tmp_path):
    """Each is one number; tied ones stay one parameter; the modules are those of the model."""
    made: Any = skeleton(config_of("gpt2", tmp_path))
    real = tiny.model("gpt2")

    assert {n: p.shape for n, p in made.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(p.untyped_storage().nbytes() == 4 for p in made.parameters())
    assert made.lm_head.weight is made.transformer.wte.weight
    assert nn.Linear(2, 2).weight.untyped_storage().nbytes() == 16, "modules made later are real again"


def test_a_cheap_projection_is_the_product(tmp_path):
    """With and without a bias; a real weight is multiplied as ever."""
    generator = torch.Generator().manual_seed(0)
    x, bias = torch.randn(3, 5, 8, generator=generator), torch.randn(4, generator=generator)
    one, real = torch.tensor(VALUE).expand(4, 8), torch.randn(4, 8, generator=generator)

    for weight in (one, real):
        expected = [F.linear(x, weight.contiguous()), F.linear(x, weight.contiguous(), bias)]
        with cheap_projections():
            ours = [F.linear(x, weight), F.linear(x, weight, bias)]
        torch.testing.assert_close(ours, expected)
