"""What a text is like at each patched site: the second moments of the inputs there. Begin with gather."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moelora.continual.covariance import InputCovariance
from moelora.continual.examples import model_inputs
from moelora.mixture import disabled, find_mixture
from moelora.site_inputs import evaluating, listen


@torch.no_grad()
def gather(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, InputCovariance]:
    """The `InputCovariance` of every patched site over these batches, by the site's path.

    The model runs as its base (`moelora.disabled`), in evaluation mode; padding is left out. Sites that read the same
    input, as q, k and v do, share one object. Each takes D x D numbers in fp64, where the site's weights are: for an
    MLP of width 11008 that is 1 GB a layer, so patch fewer sites where that is too much.

    Args:
        model: a patched model.
        batches: of examples (`Collate`) or other keyword arguments of the model's forward, on any device.

    Raises:
        ValueError: for no batch, or inputs that are not finite.
    """
    root, mixture = find_mixture(model)
    covariances: dict[str, InputCovariance] = {}
    own: dict[str, InputCovariance] = {}
    for path, layer in mixture.layers.items():
        if path not in covariances:
            own[path] = InputCovariance(layer.in_features, device=layer.bank.A_frozen_RD.device)
            alike = [path] if layer.siblings is None else [other.site for other in layer.siblings.layers]
            covariances |= dict.fromkeys(alike, own[path])

    def hear(site: str, x_TD: Tensor) -> None:
        if site in own:
            try:
                own[site].update(x_TD)
            except ValueError as error:
                raise ValueError(f"at {site}: {error}") from error

    device = next(root.parameters()).device
    heard = 0
    with evaluating(root), disabled(root), listen(root, hear):
        for batch in batches:
            root(**{name: _moved(value, device) for name, value in model_inputs(batch).items()})
            heard += 1
    if not heard:
        raise ValueError("there is no batch to gather from; is the list of texts empty?")
    return {path: covariances[path] for path in mixture.layers}


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
