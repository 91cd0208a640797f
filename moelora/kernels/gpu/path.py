"""Which way a mixture takes on a GPU, from shapes alone. Begin with path_of."""

from typing import Literal

from moelora.kernels.gpu.tiles import rule

Path = Literal["dense", "sorted", "picked"]


def path_of(tokens: int, rows: int, top_k: int, *, keeps: bool, dropout: float) -> Path:
    """The path for T tokens and R rank rows of which each token meets those of K experts.

    Args:
        tokens, rows, top_k: T, R and K.
        keeps: whether a backward pass will want the values of the rank rows. The picked path leaves none, and the other
            two are told apart without T, so that what is kept has one shape.
        dropout: dropout is the dense path's.
    """
    if not keeps and not dropout and tokens <= rule("picked_tokens"):
        return "picked"
    return "sorted" if not dropout and rows > rule("dense_rows_per_slot") * top_k else "dense"
