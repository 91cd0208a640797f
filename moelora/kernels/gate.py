"""A router that is a plain linear map, in a form that kernels fold into their pass over x. Begin with LinearGate."""

from typing import Literal, NamedTuple

from torch import Tensor

Combine = Literal["renormalized", "softmax", "constant", "unit"]
"""How the scores of the chosen experts become weights; `moelora.routers.learned` defines each."""


class LinearGate(NamedTuple):
    """Scores z = weight_ED x / temperature in fp32, of which the `top_k` best act, with weights by `combine`."""

    weight_ED: Tensor
    temperature: float
    top_k: int
    combine: Combine
