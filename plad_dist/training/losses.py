"""The objectives: pure functions of sequence log-likelihoods.

``logp(y|x) = sum_t log P(y_t | x, y_<t)`` over response tokens, in nats. Shapes: P pairs, B groups, K ranked responses.
Every function gives one loss for each pair or group, not reduced.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from plad_dist.config import Loss


def rank(chosen_P: Tensor, rejected_P: Tensor, margin: float | Tensor) -> Tensor:
    """Ranking calibration, ``max(0, margin - logp(y+|x) + logp(y-|x))``.

    Source: PLaD (Zhang et al. 2024, arXiv 2406.02886); SLiC (Zhao et al. 2022, arXiv 2210.00045).
    """
    return torch.relu(margin - chosen_P + rejected_P)


def margin_calibration(chosen_P: Tensor, rejected_P: Tensor, score_gap_P: Tensor, margin: float) -> Tensor:
    """Margin calibration, ``max(0, margin * (s(y+) - s(y-)) - logp(y+|x) + logp(y-|x))`` with a score ``s``.

    Source: PLaD (Zhang et al. 2024, arXiv 2406.02886); SLiC (Zhao et al. 2022, arXiv 2210.00045).
    """
    return rank(chosen_P, rejected_P, margin * score_gap_P)


def listwise(ranked_BK: Tensor, margin: float) -> Tensor:
    """Ranking of whole lists, ``sum_{i<j} max(0, margin * (j - i) - logp_i + logp_j)``, the best response first.

    Source: BRIO (Liu et al. 2022, arXiv 2203.16804); SLiC (Zhao et al. 2022, arXiv 2210.00045).
    """
    better, worse = torch.triu_indices(ranked_BK.shape[1], ranked_BK.shape[1], offset=1)
    hinges_BP = rank(ranked_BK[:, better], ranked_BK[:, worse], margin * (worse - better).to(ranked_BK))
    return hinges_BP.sum(1)


def dpo(
    chosen_P: Tensor, rejected_P: Tensor, chosen_initial_P: Tensor, rejected_initial_P: Tensor, beta: float
) -> Tensor:
    """``-log sigmoid(beta * [(logp - logp_ref)(y+) - (logp - logp_ref)(y-)])``.

    Source: Direct Preference Optimization (Rafailov et al. 2023, arXiv 2305.18290).
    """
    return -logsigmoid(beta * ((chosen_P - chosen_initial_P) - (rejected_P - rejected_initial_P)))


def ipo(
    chosen_P: Tensor, rejected_P: Tensor, chosen_initial_P: Tensor, rejected_initial_P: Tensor, beta: float
) -> Tensor:
    """``([(logp - logp_ref)(y+) - (logp - logp_ref)(y-)] - 1 / (2 beta))^2``; beta is the paper's tau.

    Source: Identity Preference Optimization (Azar et al. 2023, arXiv 2310.12036).
    """
    gap_P = (chosen_P - chosen_initial_P) - (rejected_P - rejected_initial_P)
    return (gap_P - 1 / (2 * beta)) ** 2


def simpo(chosen_mean_P: Tensor, rejected_mean_P: Tensor, beta: float, margin: float) -> Tensor:
    """``-log sigmoid(beta * logp(y+)/|y+| - beta * logp(y-)/|y-| - margin)``: takes means per token.

    Source: SimPO (Meng et al. 2024, arXiv 2405.14734); the margin is the paper's gamma.
    """
    return -logsigmoid(beta * (chosen_mean_P - rejected_mean_P) - margin)


def cpo(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> Tensor:
    """``-log sigmoid(beta * [logp(y+) - logp(y-)])``; the paper adds ``-logp(y+)``, which is `mle_weight: 1`.

    Source: Contrastive Preference Optimization (Xu et al. 2024, arXiv 2401.08417).
    """
    return -logsigmoid(beta * (chosen_P - rejected_P))


def orpo(chosen_mean_P: Tensor, rejected_mean_P: Tensor, beta: float) -> Tensor:
    """``-logp(y+)/|y+| - beta * log sigmoid(log odds(y+) - log odds(y-))``, where ``odds = p / (1 - p)`` and
    ``p = exp(logp / |y|)``: takes means per token. beta is the paper's lambda.

    Source: ORPO (Hong et al. 2024, arXiv 2403.07691).
    """
    return -chosen_mean_P - beta * logsigmoid(_log_odds(chosen_mean_P) - _log_odds(rejected_mean_P))


def _log_odds(mean_P: Tensor) -> Tensor:
    """``log p - log(1 - p)`` of ``p = exp(mean)``, finite also where p rounds to 1."""
    mean_P = mean_P.clamp(max=-torch.finfo(mean_P.dtype).eps)
    return mean_P - torch.log(-torch.expm1(mean_P))


def mle(chosen_P: Tensor) -> Tensor:
    """Negative log-likelihood, ``-logp(y+|x)``."""
    return -chosen_P


@dataclass(frozen=True, slots=True)
class Pairs:
    """What is compared in a micro-batch. S responses are those of all its B groups, one after the other.

    Attributes:
        chosen_P, rejected_P: responses of each pair.
        group_P: the group that it belongs to.
        rank_gap_P: how many ranks lie between the two, 1 for a plain pair.
        score_gap_P: s(y+) - s(y-), NaN where there are no scores.
        anchored_A, group_A: responses that the anchor and `mle` raise, and the group of each.
        groups: B.
    """

    chosen_P: Tensor
    rejected_P: Tensor
    group_P: Tensor
    rank_gap_P: Tensor
    score_gap_P: Tensor
    anchored_A: Tensor
    group_A: Tensor
    groups: int


def group_losses(loss: Loss, pairs: Pairs, logps_S: Tensor, lengths_S: Tensor, initial_logps_S: Tensor) -> Tensor:
    """Loss of every group: the mean over its pairs (`listwise`: the sum), and the anchor.

    Args:
        logps_S: sequence log-likelihoods of all responses.
        lengths_S: response tokens.
        initial_logps_S: sequence log-likelihoods by the starting student; only `dpo` and `ipo` look at them.
    """
    means_S = logps_S / lengths_S
    raised_S = means_S if loss.name == "mle" and loss.length_normalize else logps_S
    losses_B = _mean(mle(raised_S[pairs.anchored_A]), pairs.group_A, pairs.groups)
    if loss.name == "mle":
        return losses_B
    if loss.per_token:
        logps_S, initial_logps_S = means_S, initial_logps_S / lengths_S
    losses_P = _pair_losses(loss, pairs, logps_S, initial_logps_S)
    ranking_B = _sum(losses_P, pairs.group_P, pairs.groups)
    if loss.name != "listwise":
        ranking_B = ranking_B / _counts(losses_P, pairs.group_P, pairs.groups)
    return ranking_B + loss.anchor * losses_B


def _pair_losses(loss: Loss, pairs: Pairs, logps_S: Tensor, initial_logps_S: Tensor) -> Tensor:
    chosen_P, rejected_P = logps_S[pairs.chosen_P], logps_S[pairs.rejected_P]
    initial_logps = initial_logps_S[pairs.chosen_P], initial_logps_S[pairs.rejected_P]
    match loss.name:
        case "rank":
            return rank(chosen_P, rejected_P, loss.margin)
        case "margin":
            return margin_calibration(chosen_P, rejected_P, pairs.score_gap_P, loss.margin)
        case "listwise":  # the terms of the sum in `listwise`
            return rank(chosen_P, rejected_P, loss.margin * pairs.rank_gap_P.to(chosen_P))
        case "dpo":
            return dpo(chosen_P, rejected_P, *initial_logps, loss.strength)
        case "ipo":
            return ipo(chosen_P, rejected_P, *initial_logps, loss.strength)
        case "simpo":
            return simpo(chosen_P, rejected_P, loss.strength, loss.margin)
        case "cpo":
            return cpo(chosen_P, rejected_P, loss.strength)
        case "orpo":
            return orpo(chosen_P, rejected_P, loss.strength)
        case "mle":
            raise AssertionError("mle compares nothing")


def _sum(values_P: Tensor, group_P: Tensor, groups: int) -> Tensor:
    return values_P.new_zeros(groups).index_add(0, group_P, values_P)


def _counts(values_P: Tensor, group_P: Tensor, groups: int) -> Tensor:
    return _sum(torch.ones_like(values_P), group_P, groups).clamp(min=1)


def _mean(values_P: Tensor, group_P: Tensor, groups: int) -> Tensor:
    return _sum(values_P, group_P, groups) / _counts(values_P, group_P, groups)
