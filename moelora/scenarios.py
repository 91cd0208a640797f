"""Which expert is good for which scenario, and whether the router finds it: a table. Begin with cross_scenario.

table = moelora.cross_scenario(model, {"babble": babble, "music": music}, word_error_rate)
print(table)
table.to_csv("scenarios.csv")
"""

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moelora.mixture import disabled, find_mixture, use_experts

BASE, ROUTED = "(base)", "(routed)"
"""Names of the two rows that are no expert's."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class CrossScenario:
    """A measure of every expert alone on every scenario's data; `str` of it is a Markdown table.

    Axes of its own: S scenarios.

    Attributes:
        experts: names of the experts, the rows.
        scenarios: names of the scenarios, the columns.
        values_ES: the measure with one expert at weight 1.
        base_S: the same for the base model.
        routed_S: the same for the model as it is, with its router.
    """

    experts: tuple[str, ...]
    scenarios: tuple[str, ...]
    values_ES: Float[Tensor, "E S"]
    base_S: Float[Tensor, " S"]
    routed_S: Float[Tensor, " S"]

    def rows(self) -> list[tuple[str, list[float]]]:
        """Name and values of each row: the experts', then the base's and the routed model's."""
        values = [*self.values_ES.tolist(), self.base_S.tolist(), self.routed_S.tolist()]
        return list(zip((*self.experts, BASE, ROUTED), values, strict=True))

    def to_csv(self, path: "str | Path") -> None:
        """Write the table as CSV, with all digits."""
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("expert", *self.scenarios))
            writer.writerows((name, *map(repr, values)) for name, values in self.rows())

    def __str__(self) -> str:
        head = [_line(("expert", *self.scenarios)), _line(("---", *("---:" for _ in self.scenarios)))]
        return "\n".join(head + [_line((name, *(f"{value:.4g}" for value in values))) for name, values in self.rows()])


def cross_scenario(
    model: nn.Module, scenarios: Mapping[str, Any], evaluate: Callable[[nn.Module, Any], float]
) -> CrossScenario:
    """Measure each expert alone, the base and the routed model on each scenario's data.

    As in adapter-based audio-visual speech recognition (arXiv 2502.01709), where adapters for scenarios of noise are
    tried on each other's. An expert that is best in a column that is not its own, or a router behind the best expert,
    is what to look for.

    Args:
        model: a patched model, in evaluation mode if `evaluate` expects it.
        scenarios: name to whatever `evaluate` takes.
        evaluate: from the model and one scenario's data to a number, such as a loss or an error rate. It is called
            once for each cell.

    Raises:
        ValueError: if the model is not patched or there is no scenario.
    """
    _, mixture = find_mixture(model)
    if not scenarios:
        raise ValueError("there is no scenario to measure; pass a mapping from names to data")

    rows = []
    for name in mixture.names:
        with use_experts(model, name):
            rows.append(_measured(model, scenarios, evaluate))
    with disabled(model):
        base = _measured(model, scenarios, evaluate)
    routed = _measured(model, scenarios, evaluate)
    return CrossScenario(
        experts=tuple(mixture.names),
        scenarios=tuple(scenarios),
        values_ES=torch.tensor(rows, dtype=torch.float64),
        base_S=torch.tensor(base, dtype=torch.float64),
        routed_S=torch.tensor(routed, dtype=torch.float64),
    )


def missed(table: CrossScenario, *, larger_is_better: bool = False) -> Float[Tensor, " S"]:
    """How much worse the routed model is in each scenario than the best single expert; negative where it is better.

    Args:
        table: of all experts and scenarios.
        larger_is_better: True for an accuracy, False for a loss or an error rate.
    """
    sign = 1.0 if larger_is_better else -1.0
    return (sign * table.values_ES).amax(dim=0) - sign * table.routed_S


def _measured(
    model: nn.Module, scenarios: Mapping[str, Any], evaluate: Callable[[nn.Module, Any], float]
) -> list[float]:
    return [float(evaluate(model, data)) for data in scenarios.values()]


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
