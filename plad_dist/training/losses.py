"""The objectives: pure functions of sequence log-likelihoods.

Shapes: B groups. `logp(y|x) = sum_t log P(y_t | x, y_<t)` over response tokens, in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plad_dist.config import Loss


def rank(chosen_B: Tensor, rejected_B: Tensor, margin: float) -> Tensor:
    """Ranking calibration, ``max(0, margin - logp(y+|x) + logp(y-|x))``.

    Source: PLaD (Zhang et al. 2024, arXiv 2406.02886); SLiC (Zhao et al. 2022, arXiv 2210.00045).
    """
    return torch.relu(margin - chosen_B + rejected_B)


def mle(chosen_B: Tensor) -> Tensor:
    """Negative log-likelihood, ``-logp(y+|x)``."""
    return -chosen_B


def group_losses(loss: Loss, logps_BK: Tensor, lengths_BK: Tensor) -> Tensor:
    """Loss of every group.

    Args:
        logps_BK: sequence log-likelihoods; column 0 is the chosen response, column 1 the rejected one where there is one.
        lengths_BK: response tokens.

    Returns:
        One loss per group, not reduced.
    """
    chosen_B = logps_BK[:, 0]
    anchor_B = mle(chosen_B)
    if loss.length_normalize:
        logps_BK = logps_BK / lengths_BK
        chosen_B = logps_BK[:, 0]
    if loss.name == "mle":
        return mle(chosen_B)
    return rank(chosen_B, logps_BK[:, 1], loss.margin) + loss.mle_weight * anchor_B
