"""How much the estimators of a router's gradient scatter: RLOO and plain REINFORCE. Begin with main.

    python -m benchmarks.quality.variance

Five experts, three drawn for each of 64 tokens, random losses of the sets; M samples a step, many steps.
"""

import torch
from torch import Tensor

from moelora.losses import leave_one_out, ordered_log_prob

EXPERTS, CHOSEN, STEPS = 5, 3, 20_000


def spread(samples: int, *, baseline: bool, generator: torch.Generator) -> tuple[float, float]:
    """Standard deviation of a component of the estimated gradient, and its largest distance from the exact mean."""
    logits_E = torch.randn(EXPERTS, generator=generator)
    # a loss for each set of three, by the sum of its experts' own numbers and a part of its own
    own_E = torch.rand(EXPERTS, generator=generator)
    gumbel_SME = -torch.log(-torch.log(torch.rand(STEPS, samples, EXPERTS, generator=generator)))
    experts_SMK = (logits_E + gumbel_SME).topk(CHOSEN, dim=-1).indices
    loss_SM = 2.0 + own_E[experts_SMK].sum(-1)
    weight_SM = leave_one_out(loss_SM) if baseline else loss_SM / samples

    leaf_SE = logits_E.expand(STEPS * samples, EXPERTS).clone().requires_grad_()
    log_prob_N = ordered_log_prob(leaf_SE, experts_SMK.flatten(0, 1))
    (score_NE,) = torch.autograd.grad(log_prob_N.sum(), leaf_SE)
    gradient_SE = (weight_SM[..., None] * score_NE.view(STEPS, samples, EXPERTS)).sum(1)
    return gradient_SE.std(0).mean().item(), gradient_SE.mean(0).abs().max().item()


def main() -> None:
    """Print a table."""
    print("| M | RLOO | REINFORCE | ratio |\n|---|---|---|---|")
    for samples in (2, 4, 8, 16):
        rows: list[Tensor] = []
        for seed in range(5):
            made = [
                spread(samples, baseline=baseline, generator=torch.Generator().manual_seed(seed))[0]
                for baseline in (True, False)
            ]
            rows.append(torch.tensor(made))
        rloo, plain = torch.stack(rows).mean(0).tolist()
        print(f"| {samples} | {rloo:.3f} | {plain:.3f} | {plain / rloo:.1f} |")


if __name__ == "__main__":
    main()
