"""Training objectives as pure functions of sequence log-likelihoods.

``logp(y|x) = sum_t log P(y_t | x, y_<t)`` over the tokens of a response, in nats. The equations
write ``y+`` for the chosen and ``y-`` for the rejected response, and ``initial(y)`` for the
log-likelihood under the starting student. Every function of a loss returns one value for each pair,
without reduction. :func:`group_losses` reduces them to one value for each group.

Shape suffixes: B groups, P pairs, S responses of a micro-batch, A anchored responses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from plad_dist.config import Loss


def rank(chosen_P: Tensor, rejected_P: Tensor, margin: float | Tensor) -> Tensor:
    """Ranking calibration, ``max(0, margin - logp(y+) + logp(y-))``.

    Source: PLaD (Zhang et al. 2024, arXiv 2406.02886); SLiC (Zhao et al. 2022, arXiv 2210.00045).
    """
    return torch.relu(margin - chosen_P + rejected_P)


def margin_calibration(chosen_P: Tensor, rejected_P: Tensor, score_gap_P: Tensor, margin: float) -> Tensor:
    """Margin calibration, ``max(0, margin * (s(y+) - s(y-)) - logp(y+) + logp(y-))``, score ``s``.

    Source: PLaD (Zhang et al. 2024, arXiv 2406.02886); SLiC (Zhao et al. 2022, arXiv 2210.00045).
    """
    return rank(chosen_P, rejected_P, margin * score_gap_P)


def listwise(chosen_P: Tensor, rejected_P: Tensor, rank_gap_P: Tensor, margin: float) -> Tensor:
    """Listwise ranking, by the terms of a sum over the pairs of a list.

    ``sum_{i<j} max(0, margin * (j - i) - logp(y_i) + logp(y_j))``, where the best response is
    ``y_1`` and the rank gap of a pair is ``j - i``. :func:`group_losses` adds the terms. A list is
    not a row of a matrix, because lists differ in length and equal scores have no term.

    Source: BRIO (Liu et al. 2022, arXiv 2203.16804); SLiC (Zhao et al. 2022, arXiv 2210.00045).
    """
    return rank(chosen_P, rejected_P, margin * rank_gap_P.to(chosen_P))


def dpo(
    chosen_P: Tensor, rejected_P: Tensor, chosen_initial_P: Tensor, rejected_initial_P: Tensor, beta: float
) -> Tensor:
    """Direct preference optimization.

    ``-log sigmoid(beta * [(logp - initial)(y+) - (logp - initial)(y-)])``

    Source: DPO (Rafailov et al. 2023, arXiv 2305.18290).
    """
    return -logsigmoid(beta * ((chosen_P - chosen_initial_P) - (rejected_P - rejected_initial_P)))


def ipo(
    chosen_P: Tensor, rejected_P: Tensor, chosen_initial_P: Tensor, rejected_initial_P: Tensor, beta: float
) -> Tensor:
    """Identity preference optimization.

    ``([(logp - initial)(y+) - (logp - initial)(y-)] - 1 / (2 beta))^2``, where `beta` is the
    paper's tau.

    Source: IPO (Azar et al. 2023, arXiv 2310.12036).
    """
    gap_P = (chosen_P - chosen_initial_P) - (rejected_P - rejected_initial_P)
    return (gap_P - 1 / (2 * beta)) ** 2


def simpo(chosen_mean_P: Tensor, rejected_mean_P: Tensor, beta: float, margin: float) -> Tensor:
    """Simple preference optimization, of log-likelihoods that are means per token.

    ``-log sigmoid(beta * logp(y+)/|y+| - beta * logp(y-)/|y-| - margin)``; `margin` is the paper's
    gamma.

    Source: SimPO (Meng et al. 2024, arXiv 2405.14734).
    """
    return -logsigmoid(beta * (chosen_mean_P - rejected_mean_P) - margin)


def cpo(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> Tensor:
    """Contrastive preference optimization, ``-log sigmoid(beta * [logp(y+) - logp(y-)])``.

    The paper adds ``-logp(y+)``, which is `mle_weight: 1`.

    Source: CPO (Xu et al. 2024, arXiv 2401.08417).
    """
    return -logsigmoid(beta * (chosen_P - rejected_P))


def orpo(chosen_mean_P: Tensor, rejected_mean_P: Tensor, beta: float) -> Tensor:
    """Odds ratio preference optimization, of log-likelihoods that are means per token.

    ``-logp(y+)/|y+| - beta * log sigmoid(log odds(y+) - log odds(y-))``
    with ``odds = p / (1 - p)`` and ``p = exp(logp / |y|)``; `beta` is the paper's lambda.

    Source: ORPO (Hong et al. 2024, arXiv 2403.07691).
    """
    return -chosen_mean_P - beta * logsigmoid(_log_odds(chosen_mean_P) - _log_odds(rejected_mean_P))


def _log_odds(mean_P: Tensor) -> Tensor:
    """Return ``log p - log(1 - p)`` of ``p = exp(mean)``, finite even if p rounds to 1."""
    mean_P = mean_P.clamp(max=-torch.finfo(mean_P.dtype).eps)
    return mean_P - torch.log(-torch.expm1(mean_P))


def mle(chosen_P: Tensor) -> Tensor:
    """Negative log-likelihood, ``-logp(y+)``."""
    return -chosen_P


@dataclass(frozen=True, slots=True)
class Pairs:
    """The comparisons of a micro-batch, as indices into its responses S and its groups B.

    Attributes:
        chosen_P: response that should be likelier.
        rejected_P: response that should be less likely.
        group_P: group of the pair.
        rank_gap_P: distance of the two responses in a ranked list, 1 for a plain pair.
        score_gap_P: ``s(y+) - s(y-)``, NaN without scores.
        anchored_A: responses that the anchor, or the loss `mle`, makes likelier.
        group_A: group of each anchored response.
        groups: number of groups, B.
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
    """Return the loss of every group: the mean over its pairs (`listwise`: sum), plus the anchor.

    Args:
        logps_S: sequence log-likelihoods of all responses.
        lengths_S: tokens of the responses.
        initial_logps_S: sequence log-likelihoods under the starting student; only `dpo` and `ipo`
            use them.

    Returns:
        Losses ``[B]``.
    """
    means_S = logps_S / lengths_S
    anchor_logps_S = means_S if loss.name == "mle" and loss.length_normalize else logps_S
    anchors_B = _mean(mle(anchor_logps_S[pairs.anchored_A]), pairs.group_A, pairs.groups)
    if loss.name == "mle":
        return anchors_B
    if loss.per_token:
        logps_S, initial_logps_S = means_S, initial_logps_S / lengths_S
    losses_P = _pair_losses(loss, pairs, logps_S, initial_logps_S)
    reduce = _sum if loss.name == "listwise" else _mean
    return reduce(losses_P, pairs.group_P, pairs.groups) + loss.anchor * anchors_B


def _pair_losses(loss: Loss, pairs: Pairs, logps_S: Tensor, initial_logps_S: Tensor) -> Tensor:
    chosen_P, rejected_P = logps_S[pairs.chosen_P], logps_S[pairs.rejected_P]
    initial_P = initial_logps_S[pairs.chosen_P], initial_logps_S[pairs.rejected_P]
    match loss.name:
        case "rank":
            return rank(chosen_P, rejected_P, loss.margin)
        case "margin":
            return margin_calibration(chosen_P, rejected_P, pairs.score_gap_P, loss.margin)
        case "listwise":
            return listwise(chosen_P, rejected_P, pairs.rank_gap_P, loss.margin)
        case "dpo":
            return dpo(chosen_P, rejected_P, *initial_P, loss.strength)
        case "ipo":
            return ipo(chosen_P, rejected_P, *initial_P, loss.strength)
        case "simpo":
            return simpo(chosen_P, rejected_P, loss.strength, loss.margin)
        case "cpo":
            return cpo(chosen_P, rejected_P, loss.strength)
        case "orpo":
            return orpo(chosen_P, rejected_P, loss.strength)
        case "mle":
            raise AssertionError("the loss mle compares no pairs")


def _sum(values_P: Tensor, group_P: Tensor, groups: int) -> Tensor:
    """Return the sum over each group's values."""
    return values_P.new_zeros(groups).index_add(0, group_P, values_P)


def _mean(values_P: Tensor, group_P: Tensor, groups: int) -> Tensor:
    """Return the mean of each group's values, 0 for a group without values.

    Args:
        group_P: index of each value's group, from 0 to `groups` - 1.
    """
    counts_B = _sum(torch.ones_like(values_P), group_P, groups).clamp(min=1)
    return _sum(values_P, group_P, groups) / counts_B
