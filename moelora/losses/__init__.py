"""Losses on routings: pure, unweighted functions of one site's tensors. Begin with load_balance.

All leave padding out (`valid_T`), count only the experts that a site can choose (finite logits), and are 0 where there
is one expert only. They are computed for each site and averaged by whoever calls them, never pooled over sites, where
one site's imbalance could hide behind another's.
"""

from moelora.losses.balance import importance as importance
from moelora.losses.balance import load_balance as load_balance
from moelora.losses.balance import uniform_cross_entropy as uniform_cross_entropy
from moelora.losses.entropy import mutual_information as mutual_information
from moelora.losses.gate import gate_cross_entropy as gate_cross_entropy
from moelora.losses.z_loss import z_loss as z_loss

__all__ = [
    "gate_cross_entropy",
    "importance",
    "load_balance",
    "mutual_information",
    "uniform_cross_entropy",
    "z_loss",
]
