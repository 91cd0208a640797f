"""The smallest ball around points. Begin with enclosing_ball."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

TOLERANCE = 1e-9
"""Of the squared radius, relative to the best one: where the search ends."""

SAME = 1e-12
"""Points that differ by less, relative to their size, differ by rounding."""

MOST_STEPS = 10_000


def enclosing_ball(points_NS: Float[Tensor, "N S"]) -> tuple[Float[Tensor, " S"], Float[Tensor, ""]]:
    """Centre and radius of the smallest ball that holds all points, in fp64.

    The centre is a convex combination of points. Frank-Wolfe steps on its weights move it towards the farthest point,
    or away from the nearest one that it still rests on: Yildirim (2008), Two algorithms for the minimum enclosing ball
    problem, SIAM J. Optim. 19(3). The radius is the largest distance from the centre that was reached, so every point
    is inside however early the search ends.
    """
    exact_NS = points_NS.double()
    middle_S = exact_NS.mean(0)
    # thousands of steps on small arrays, where numpy costs a fraction of torch
    offset_S = _centre((exact_NS - middle_S).cpu().numpy(), SAME * float(exact_NS.abs().amax()))
    centre_S = middle_S + torch.as_tensor(offset_S).to(middle_S)
    return centre_S, (exact_NS - centre_S).square().sum(-1).amax().sqrt()


def _centre(points_NS: np.ndarray, least: float) -> np.ndarray:
    """The centre, unless the points are no more than `least` apart."""
    first = int(((points_NS - points_NS[0]) ** 2).sum(-1).argmax())
    second = int(((points_NS - points_NS[first]) ** 2).sum(-1).argmax())
    weight_N = np.zeros(len(points_NS))
    weight_N[[first, second]] = 1.0 if first == second else 0.5

    centre_S = weight_N @ points_NS
    for _ in range(MOST_STEPS):
        square_N = ((points_NS - centre_S) ** 2).sum(-1)
        mean_square = float(weight_N @ square_N)
        if mean_square <= least**2:
            break

        # how much farther than the mean the farthest is, and how much nearer the nearest that has weight
        far, near = int(square_N.argmax()), int(np.where(weight_N > 0, square_N, np.inf).argmin())
        excess, lack = square_N[far] / mean_square - 1, 1 - square_N[near] / mean_square
        if excess <= TOLERANCE and lack <= TOLERANCE:
            break
        if excess >= lack:
            step = excess / (2 * (1 + excess))
            weight_N *= 1 - step
            weight_N[far] += step
        else:
            whole = weight_N[near] / (1 - weight_N[near])
            step = min(lack / (2 * (1 - lack)), whole) if lack < 1 else whole
            weight_N *= 1 + step
            weight_N[near] = 0.0 if step == whole else weight_N[near] - step
        weight_N /= weight_N.sum()
        centre_S = weight_N @ points_NS
    return centre_S
