"""Pictures of routings, as matplotlib figures (extra `viz`). Begin with layer_heat_map.

    figure = layer_heat_map(load_LE, experts=moelora.expert_names(model))
    figure.savefig("load.png")

A figure belongs to whoever asked for it: nothing is shown, and no state of pyplot is touched.
"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

WRITTEN = 16
"""Up to so many columns, numbers are written into the cells."""


def layer_heat_map(
    values_LE: Float[Tensor, "L E"],
    *,
    experts: Sequence[str] | None = None,
    layers: Sequence[str] | None = None,
    **style: Any,
) -> Figure:
    """Layers (or sites) by experts: which expert is used where. Style as in `heat_map`."""
    style = {"x_label": "expert", "y_label": "layer", "value_label": "share of the routing"} | style
    return heat_map(values_LE, rows=layers, columns=experts, **style)


def token_heat_map(
    values_TE: Float[Tensor, "T E"],
    *,
    tokens: Sequence[str] | None = None,
    experts: Sequence[str] | None = None,
    **style: Any,
) -> Figure:
    """Tokens by experts, with time running to the right: who acts on which word. Style as in `heat_map`."""
    style = {"x_label": "token", "y_label": "expert", "value_label": "weight"} | style
    return heat_map(values_TE.T, rows=experts, columns=tokens, **style)


def heat_map(
    values_YX: Float[Tensor, "Y X"],
    *,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    x_label: str = "",
    y_label: str = "",
    value_label: str = "",
    title: str = "",
    limits: tuple[float, float] | None = None,
) -> Figure:
    """A matrix as colours, dark for low and bright for high, with its numbers where there is room.

    Args:
        values_YX: on any device; NaN stays blank.
        rows, columns: names; numbers from 0 where they are not given.
        x_label, y_label, value_label, title: what is shown; the value label stands at the colour bar.
        limits: values of the darkest and brightest colour; by default 0 and the largest value.

    Raises:
        ValueError: if there are more or fewer names than rows or columns.
    """
    values = values_YX.detach().cpu().double().numpy()
    height, width = values.shape
    for what, names, count in (("rows", rows, height), ("columns", columns, width)):
        if names is not None and len(names) != count:
            raise ValueError(f"{count} {what} need as many names, got {len(names)}")
    low, high = limits or (min(0.0, float(_largest(-values)) * -1), float(_largest(values)) or 1.0)

    size = (min(3.0 + 0.55 * width, 16.0), min(1.8 + 0.35 * height, 12.0))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="viridis", vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    # the names of some rows and columns, where not all can be read
    for set_ticks, names, count, room in ((axes.set_xticks, columns, width, 40), (axes.set_yticks, rows, height, 40)):
        places = range(0, count, -(-count // room))
        set_ticks(list(places), [str(place) if names is None else names[place] for place in places])
    if columns is not None:
        axes.tick_params(axis="x", rotation=45)
        for label in axes.get_xticklabels():
            label.set(horizontalalignment="right", rotation_mode="anchor")
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    figure.colorbar(image, ax=axes, label=value_label)

    if width <= WRITTEN:
        middle = (low + high) / 2
        for row in range(height):
            for column in range(width):
                value = values[row, column]
                if value == value:
                    colour = "black" if value > middle else "white"
                    axes.text(column, row, f"{value:.2g}", ha="center", va="center", size=8, color=colour)
    return figure


def _largest(values: Any) -> float:
    """The largest value that is a number; 0 if there is none."""
    return max((value for value in values.flatten().tolist() if value == value), default=0.0)
