"""What one call of the op has to compute, behind its checks. Begin with Problem."""

from typing import NamedTuple

from torch import Tensor

from moelora.kernels.gpu.finish_forward import Choice


class Index(NamedTuple):
    """Whose the rank rows are, for each of P projections of one input that have as many rows each.

    Attributes:
        owner_PR: int32 id of the expert that owns each row.
        scale_PE: fp32 scale of each expert.
        starts_PE, ranks_PE: int32 first row of each expert, and how many it has.
    """

    owner_PR: Tensor
    scale_PE: Tensor
    starts_PE: Tensor
    ranks_PE: Tensor


class Problem(NamedTuple):
    """P projections of one input, each a frozen base and R rank rows of E experts.

    Attributes:
        x_TD: the input, rows contiguous.
        bases: outputs of the bases, one for each projection; empty where the op computes them.
        weights_OD, biases_O: of frozen linear bases, in x's dtype, where the op computes them; `biases_O` may be empty.
        A_list, B_list: rank rows, any floating dtype.
        gates: fp32 weights (E, D) of the routers that are a part of the op: none, one for all projections, or one each.
        choice: how these choose.
        experts_QTK, weights_QTK: what acts, where no router is a part of the op.
        owners: whose the rows are.
        widest: rank of the largest expert.
        every_token: every token has an expert that acts.
        dropout: probability with which the experts miss an element of x.
        seed: of the dropout.
    """

    x_TD: Tensor
    bases: list[Tensor]
    weights_OD: list[Tensor]
    biases_O: list[Tensor]
    A_list: list[Tensor]
    B_list: list[Tensor]
    gates: list[Tensor]
    choice: Choice | None
    experts_QTK: Tensor | None
    weights_QTK: Tensor | None
    owners: Index
    widest: int
    every_token: bool
    dropout: float = 0.0
    seed: Tensor | None = None

    @property
    def rows(self) -> int:
        """Rank rows of a projection, R."""
        return self.A_list[0].shape[0]

    def out_width(self, projection: int) -> int:
        """Width of a projection's output, O."""
        return self.B_list[projection].shape[1]
