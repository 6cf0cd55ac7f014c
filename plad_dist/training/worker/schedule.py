"""Learning rate schedules."""

from __future__ import annotations

import math

from plad_dist.config import Optimizer


def learning_rate_factor(optimizer: Optimizer, step: int, steps: int) -> float:
    """Return the share of the peak learning rate at a step.

    The rate rises linearly during the warm-up. Then it stays at the peak, or falls to a tenth of it
    along a line or a half cosine.

    Args:
        step: number of steps taken before.
        steps: number of steps of the phase.
    """
    warmup = round(optimizer.warmup_share * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    match optimizer.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - 0.9 * progress
        case "cosine":
            return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
