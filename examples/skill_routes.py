"""Where the routers send what: counted while a mixture answers, and drawn as a heat map. Begin with Routes."""

from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

import moelora
from clinc import DOMAINS, Batch
from moelora.routing import dense_weights


class Routes:
    """Routing weight by layer, true domain and expert, and how often the own expert of a domain comes first."""

    def __init__(self, model: Any) -> None:
        self.num_layers = model.config.num_hidden_layers
        experts = len(moelora.expert_names(model))
        self.weight_LGE = torch.zeros(self.num_layers, len(DOMAINS), experts)
        self.first = self.tokens = self.votes = self.utterances = 0

    def add(self, recording: Any, batch: Batch) -> None:
        """Count one batch."""
        real_T = batch.inputs["attention_mask"].flatten().bool()
        domain_T = batch.domain_B.repeat_interleave(batch.inputs["input_ids"].shape[1])[real_T]
        row_T = torch.arange(len(batch.label_B)).repeat_interleave(batch.inputs["input_ids"].shape[1])[real_T]
        vote_BE = torch.zeros(len(batch.label_B), self.weight_LGE.shape[2])
        for site, routing in recording.items():
            weight_TE = dense_weights(routing, self.weight_LGE.shape[2])[real_T]
            self.weight_LGE[layer_of(site)].index_add_(0, domain_T, weight_TE)
            vote_BE.index_add_(0, row_T, weight_TE)
            self.first += int((weight_TE.argmax(-1) == domain_T).sum())
            self.tokens += len(domain_T)
        self.votes += int((vote_BE.argmax(-1) == batch.domain_B).sum())
        self.utterances += len(batch.label_B)

    @property
    def token_agreement(self) -> float:
        """How often, over tokens and projections, the first choice is the expert of the true domain."""
        return self.first / self.tokens

    @property
    def vote_agreement(self) -> float:
        """How often the expert with the most weight over an utterance's tokens and projections is the true domain's."""
        return self.votes / self.utterances

    def shares(self) -> Tensor:
        """Share of the routing weight that an expert gets, by layer and true domain: rows sum to 1."""
        return self.weight_LGE / self.weight_LGE.sum(-1, keepdim=True)


def layer_of(site: str) -> int:
    """The layer of a site such as "encoder.layer.3.attention.self.query"."""
    return int(site.split("encoder.layer.")[1].split(".")[0])


def draw_heat_map(routes: Routes, path: Path) -> None:
    """Left, by layer: how much of a domain's tokens its own expert gets. Right, in the last layer: who gets what."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shares_LGE = routes.shares()
    own_LE = shares_LGE.diagonal(dim1=1, dim2=2)
    names = [domain.replace("_", " ") for domain in DOMAINS]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained", width_ratios=(1, 1.15))
    layers = [str(layer) for layer in range(1, routes.num_layers + 1)]
    draw_shares(left, own_LE, layers, names)
    left.set(xlabel="expert", ylabel="layer", title="share of its own domain's tokens, by layer")
    image = draw_shares(right, shares_LGE[-1], names, names)
    right.set(xlabel="expert", ylabel="true domain", title="share of every domain's tokens, in the last layer")
    figure.colorbar(image, ax=right, label="share of the routing weight (chance: 0.1)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_shares(axes: Any, values: Tensor, rows: list[str], columns: list[str]) -> Any:
    """A matrix of shares, with the larger ones written in as percent."""
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    for row, column in (values >= 0.05).nonzero().tolist():
        value = values[row, column].item()
        color = "black" if value > 0.6 else "white"
        axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", size=8, color=color)
    return image
