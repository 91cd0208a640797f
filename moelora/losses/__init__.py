"""Losses: pure, unweighted functions of tensors. Begin with load_balance; those for unlearning stand in `options.py`.

Of those on routings:

All leave padding out (`valid_T`), count only the experts that a site can choose (finite logits), and are 0 where there
is one expert only. They are computed for each site and averaged by whoever calls them, never pooled over sites, where
one site's imbalance could hide behind another's.
"""

from moelora.losses.balance import importance as importance
from moelora.losses.balance import load_balance as load_balance
from moelora.losses.balance import uniform_cross_entropy as uniform_cross_entropy
from moelora.losses.contrastive_entropy import contrastive_entropy as contrastive_entropy
from moelora.losses.contrastive_entropy import contrastive_entropy_with_mlm as contrastive_entropy_with_mlm
from moelora.losses.entropy import mutual_information as mutual_information
from moelora.losses.entropy import token_entropy as token_entropy
from moelora.losses.gate import gate_cross_entropy as gate_cross_entropy
from moelora.losses.localized import localized_balance as localized_balance
from moelora.losses.options import option_uniform as option_uniform
from moelora.losses.options import random_own_option as random_own_option
from moelora.losses.preservation import preservation as preservation
from moelora.losses.rloo import leave_one_out as leave_one_out
from moelora.losses.rloo import rloo_surrogate as rloo_surrogate
from moelora.losses.rmu import control_vector as control_vector
from moelora.losses.rmu import rmu as rmu
from moelora.losses.rmu import rmu_retain as rmu_retain
from moelora.losses.sequences import gradient_ascent as gradient_ascent
from moelora.losses.sequences import npo as npo
from moelora.losses.sequences import sequence_nll as sequence_nll
from moelora.losses.sequences import sequence_total_nll as sequence_total_nll
from moelora.losses.sequences import simnpo as simnpo
from moelora.losses.specialization import routing_specialization as routing_specialization
from moelora.losses.support import over_budget as over_budget
from moelora.losses.support import target_k as target_k
from moelora.losses.z_loss import z_loss as z_loss
from moelora.plackett_luce import ordered_log_prob as ordered_log_prob
from moelora.plackett_luce import unordered_log_prob as unordered_log_prob

__all__ = [
    "contrastive_entropy",
    "contrastive_entropy_with_mlm",
    "control_vector",
    "gate_cross_entropy",
    "gradient_ascent",
    "importance",
    "leave_one_out",
    "load_balance",
    "localized_balance",
    "mutual_information",
    "npo",
    "option_uniform",
    "ordered_log_prob",
    "over_budget",
    "preservation",
    "random_own_option",
    "rloo_surrogate",
    "rmu",
    "rmu_retain",
    "routing_specialization",
    "sequence_nll",
    "sequence_total_nll",
    "simnpo",
    "target_k",
    "token_entropy",
    "uniform_cross_entropy",
    "unordered_log_prob",
    "z_loss",
]
