"""Heat maps: the right numbers in the right cells, names on the axes, nothing of pyplot."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

import moelora
from moelora.plots import heat_map, layer_heat_map, token_heat_map


def cells(image) -> Any:
    """The values that an image shows."""
    return image.get_array().filled(torch.nan)


def names(ticks) -> list[str]:
    """What an axis is labelled with."""
    return [label.get_text() for label in ticks]


def test_layers_by_experts(tmp_path):
    """Rows are layers, columns experts; a perceptually uniform map from 0; a colour bar; a PNG."""
    values_LE = torch.tensor([[0.75, 0.25, 0.0], [0.1, 0.2, 0.7]])
    figure = layer_heat_map(values_LE, experts=["math", "code", "law"], title="load")
    axes, bar = figure.axes

    (image,) = axes.images
    assert torch.equal(torch.tensor(cells(image)), values_LE.double())
    assert (image.get_cmap().name, image.get_clim()) == ("viridis", (0.0, 0.75))
    assert names(axes.get_xticklabels()) == ["math", "code", "law"]
    assert names(axes.get_yticklabels()) == ["0", "1"]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("expert", "layer", "load")
    assert bar.get_ylabel() == "share of the routing"
    assert [text.get_text() for text in axes.texts] == ["0.75", "0.25", "0", "0.1", "0.2", "0.7"]
    assert [text.get_color() for text in axes.texts][:2] == ["black", "white"], "readable on bright and on dark"
    figure.savefig(tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_tokens_by_experts():
    """Tokens run to the right."""
    values_TE = torch.tensor([[1.0, 0.0], [0.5, -0.5], [0.0, torch.nan]], requires_grad=True)
    axes = token_heat_map(values_TE, tokens=["two", "plus", "two"], experts=["math", "code"]).axes[0]

    assert cells(axes.images[0]).shape == (2, 3)
    assert names(axes.get_xticklabels()) == ["two", "plus", "two"]
    assert axes.images[0].get_clim() == (-0.5, 1.0)
    assert len(axes.texts) == 5, "what is no number is left blank"


def test_large_and_empty_maps_are_readable():
    """Many rows get some of their names and no numbers in the cells; all zeros are a dark map."""
    figure = heat_map(torch.rand(90, 120), limits=(0.0, 1.0))
    assert len(figure.axes[0].get_yticks()) <= 40
    assert not figure.axes[0].texts
    FigureCanvasAgg(figure).draw()
    assert heat_map(torch.zeros(2, 2)).axes[0].images[0].get_clim() == (0.0, 1.0)


def test_a_wrong_number_of_names():
    """Says how many there are."""
    with pytest.raises(ValueError, match="3 columns need as many names, got 2"):
        layer_heat_map(torch.zeros(2, 3), experts=["a", "b"])
    with pytest.raises(ValueError, match="2 rows need as many names, got 1"):
        layer_heat_map(torch.zeros(2, 3), layers=["a"])


def test_pyplot_is_not_imported():
    """A figure needs no window and leaves no state behind."""
    code = "import sys, moelora.plots; assert 'matplotlib.pyplot' not in sys.modules"
    root = Path(moelora.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=60)
