"""What routers, detectors and unlearning do, in numbers: pure functions. Begin with expert_load for routings.

`routing` measures routings, `continual` a sequence of tasks, `unlearning` and `tofu` what is left after a request,
`detection` a gate's scores, `intervals` how sure any of them is. The intervals but the bootstrap's, and
`forget_quality`, need SciPy.
"""

from moelora.metrics.continual import average_accuracy as average_accuracy
from moelora.metrics.continual import backward_transfer as backward_transfer
from moelora.metrics.continual import final_accuracy as final_accuracy
from moelora.metrics.continual import forgetting as forgetting
from moelora.metrics.continual import forgetting_since_trained as forgetting_since_trained
from moelora.metrics.continual import forward_transfer as forward_transfer
from moelora.metrics.continual import persistence_loss as persistence_loss
from moelora.metrics.detection import auroc as auroc
from moelora.metrics.detection import benign_fire_rate_at_forget_recall as benign_fire_rate_at_forget_recall
from moelora.metrics.detection import forget_miss_rate_at_benign as forget_miss_rate_at_benign
from moelora.metrics.intervals import Interval as Interval
from moelora.metrics.intervals import auroc_interval as auroc_interval
from moelora.metrics.intervals import bootstrap_interval as bootstrap_interval
from moelora.metrics.intervals import clopper_pearson as clopper_pearson
from moelora.metrics.intervals import seeds_interval as seeds_interval
from moelora.metrics.routing import agreement as agreement
from moelora.metrics.routing import effective_support as effective_support
from moelora.metrics.routing import expert_load as expert_load
from moelora.metrics.routing import routing_entropy as routing_entropy
from moelora.metrics.routing import specialisation as specialisation
from moelora.metrics.tofu import conditional_probability as conditional_probability
from moelora.metrics.tofu import forget_quality as forget_quality
from moelora.metrics.tofu import forget_truth_ratio as forget_truth_ratio
from moelora.metrics.tofu import kept_truth_ratio as kept_truth_ratio
from moelora.metrics.tofu import model_utility as model_utility
from moelora.metrics.tofu import option_probability as option_probability
from moelora.metrics.tofu import released_truth_ratio as released_truth_ratio
from moelora.metrics.tofu import rouge_l_recall as rouge_l_recall
from moelora.metrics.tofu import truth_ratio as truth_ratio
from moelora.metrics.unlearning import U2R as U2R
from moelora.metrics.unlearning import Accuracy as Accuracy
from moelora.metrics.unlearning import Unlearned as Unlearned
from moelora.metrics.unlearning import choice_accuracy as choice_accuracy
from moelora.metrics.unlearning import pooled as pooled
from moelora.metrics.unlearning import u2r as u2r

__all__ = [
    "U2R",
    "Accuracy",
    "Interval",
    "Unlearned",
    "agreement",
    "auroc",
    "auroc_interval",
    "average_accuracy",
    "backward_transfer",
    "benign_fire_rate_at_forget_recall",
    "bootstrap_interval",
    "choice_accuracy",
    "clopper_pearson",
    "conditional_probability",
    "effective_support",
    "expert_load",
    "final_accuracy",
    "forget_miss_rate_at_benign",
    "forget_quality",
    "forget_truth_ratio",
    "forgetting",
    "forgetting_since_trained",
    "forward_transfer",
    "kept_truth_ratio",
    "model_utility",
    "option_probability",
    "persistence_loss",
    "pooled",
    "released_truth_ratio",
    "rouge_l_recall",
    "routing_entropy",
    "seeds_interval",
    "specialisation",
    "truth_ratio",
    "u2r",
]
