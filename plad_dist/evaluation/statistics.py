"""Figures over many prompts with 95% intervals: means, win rates, win rates at equal length,
calibration.

Arrays with the suffix ``_P`` hold one value per prompt, in prompt order, so that two systems can be
compared prompt by prompt; ``_PK`` holds one value per candidate of a prompt. The intervals cover
the choice of prompts. They do not cover how much another training seed would change a system.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from plad_dist.evaluation.document import ByLength, Interval, LengthClass, Reliability, ReliabilityBin
from plad_dist.text_metrics import Scores, wins

_SAME_LENGTH = 0.1  # share of the longer text up to which two lengths count as similar
_NEWTON_STEPS = 50
# Precisions of the priors that keep the fit finite. The prior on the system is much stronger: if
# length alone would explain the wins, they are attributed to length.
_PRIOR_SYSTEM, _PRIOR_LENGTH = 1.0, 1e-3


def bootstrap_mean(values: Scores, resamples: int, seed: int) -> Interval:
    """Return the mean with its 95% percentile bootstrap interval over prompts (Efron 1979).

    Resampling is done in chunks of about two million draws. Identical values give an interval of
    width zero.
    """
    values_P = np.asarray(values, dtype=np.float64)
    if values_P.ndim != 1 or values_P.size == 0 or np.isnan(values_P).any():
        raise ValueError(f"bootstrap_mean: expected a non-empty vector without NaN, got shape {values_P.shape}")
    count, rng = values_P.size, np.random.default_rng(seed)
    chunk = max(1, 2_000_000 // count)
    means = np.concatenate(
        [
            values_P[rng.integers(0, count, size=(min(chunk, resamples - start), count))].mean(axis=1)
            for start in range(0, resamples, chunk)
        ]
    )
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(value=float(values_P.mean()), low=float(low), high=float(high))


def mean_interval(values_P: Scores, resamples: int, seed: int) -> Interval | None:
    """Return the bootstrap mean of the values that are not NaN, or None if all are."""
    available = values_P[~np.isnan(values_P)]
    return bootstrap_mean(available, resamples, seed) if available.size else None


# -- win rates


def win_rate(scores_a: Scores, scores_b: Scores, resamples: int, seed: int) -> Interval:
    """Return the share of prompts on which a is better than b, ties counted half."""
    return bootstrap_mean(wins(np.asarray(scores_a, float), np.asarray(scores_b, float)), resamples, seed)


def length_controlled(wins_P: Scores, lengths_a: Scores, lengths_b: Scores) -> Interval:
    """Return the win rate of a over b at equal length, by a logistic regression on the difference
    of lengths.

    The model is `P(a wins) = sigmoid(system + weight * x)` with `x = tanh((length of a - length of
    b) / rms)`, where `rms` is the root mean square of the differences; the figure is
    `sigmoid(system)`. The idea is that of AlpacaEval 2 (Dubois et al. 2024), without its term for
    the difficulty of a prompt. Both coefficients have normal priors around 0, of precision 1 and
    0.001: a system that wins only where it is longer, or that is always longer, does not win here.
    The interval takes the spread of the scores from the residuals (Huber 1967), because ties vary
    less than coin flips, and from the priors, so that it is wide if the lengths cannot be separated
    from the system.
    """
    differences_P = np.asarray(lengths_a, dtype=np.float64) - np.asarray(lengths_b, dtype=np.float64)
    scale = float(np.sqrt(np.mean(differences_P**2)))
    x_P2 = np.stack(
        [np.ones_like(differences_P), np.tanh(differences_P / scale) if scale > 0 else differences_P], axis=1
    )
    precision = np.diag([_PRIOR_SYSTEM, _PRIOR_LENGTH])
    coefficients = np.zeros(2)
    for _ in range(_NEWTON_STEPS):
        expected_P = _sigmoid(x_P2 @ coefficients)
        slope = x_P2.T @ (np.asarray(wins_P, dtype=np.float64) - expected_P) - precision @ coefficients
        curvature = (x_P2 * (expected_P * (1.0 - expected_P))[:, None]).T @ x_P2 + precision
        # A full step may leave the region where the curvature is valid: limit it to 2.
        step = np.clip(np.linalg.solve(curvature, slope), -2.0, 2.0)
        coefficients = coefficients + step
        if np.abs(step).max() < 1e-9:
            break
    residual_P = np.asarray(wins_P, dtype=np.float64) - _sigmoid(x_P2 @ coefficients)
    inverse = np.linalg.inv(curvature)
    covariance = inverse @ ((x_P2 * residual_P[:, None] ** 2).T @ x_P2 + precision) @ inverse
    system, spread = coefficients[0], 1.96 * float(np.sqrt(covariance[0, 0]))
    low, value, high = _sigmoid(np.array([system - spread, system, system + spread])).tolist()
    return Interval(value=value, low=low, high=high)


def _sigmoid(x: Scores) -> Scores:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def by_length(wins_P: Scores, lengths_a: Scores, lengths_b: Scores, resamples: int, seed: int) -> ByLength:
    """Return the win rates of a over b on the prompts where a is shorter, of similar length (within
    10%), and longer.

    The win rate of a class without prompts is None.
    """
    a_P, b_P = np.asarray(lengths_a, dtype=np.float64), np.asarray(lengths_b, dtype=np.float64)
    similar_P = np.abs(a_P - b_P) <= _SAME_LENGTH * np.maximum(a_P, b_P)

    def length_class(mask_P: npt.NDArray[np.bool_]) -> LengthClass:
        rate = bootstrap_mean(wins_P[mask_P], resamples, seed) if mask_P.any() else None
        return LengthClass(prompts=int(mask_P.sum()), win_rate=rate)

    return ByLength(
        shorter=length_class(~similar_P & (a_P < b_P)),
        similar=length_class(similar_P),
        longer=length_class(~similar_P & (a_P > b_P)),
    )


# -- calibration


def rank_correlations(logps_PK: Scores, quality_PK: Scores) -> Scores:
    """Return Spearman's rank correlation of likelihood and quality over the candidates of each
    prompt.

    Ties have their mean rank. NaN for a prompt where either does not vary, or where fewer than two
    candidates have both.
    """
    return np.array([_spearman(*pair) for pair in zip(logps_PK, quality_PK, strict=True)], dtype=np.float64)


def _spearman(logps_K: Scores, quality_K: Scores) -> float:
    available_K = ~np.isnan(logps_K + quality_K)
    ranks = [_ranks(values[available_K]) for values in (logps_K, quality_K)]
    centred = [values - values.mean() if values.size else values for values in ranks]
    norms = [float(np.sqrt((values**2).sum())) for values in centred]
    if min(norms) == 0.0:
        return float("nan")
    return float((centred[0] * centred[1]).sum() / (norms[0] * norms[1]))


def _ranks(values_K: Scores) -> Scores:
    _, inverse, counts = np.unique(values_K, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank: Scores = (last - (counts - 1) / 2.0)[inverse]
    return mean_rank


def reliability(logps_PK: Scores, quality_PK: Scores, bins: int = 10) -> Reliability:
    """Return how reliable likelihoods are as preferences.

    Of two candidates of a prompt, the one that is likelier by `d` nats should be the better one
    with probability `sigmoid(d)`. The curve has bins over predicted probabilities of 0.5 to 1. The
    error is the expected calibration error (Naeini et al. 2015), None if no pair of candidates
    differs in quality.
    """
    predicted, observed = _ordered_pairs(logps_PK, quality_PK)
    if not predicted.size:
        return Reliability(curve=(), error=None)
    bin_of_pair = np.minimum(((predicted - 0.5) * 2 * bins).astype(int), bins - 1)
    curve = tuple(
        ReliabilityBin(
            predicted=float(predicted[bin_of_pair == number].mean()),
            observed=float(observed[bin_of_pair == number].mean()),
            pairs=int((bin_of_pair == number).sum()),
        )
        for number in range(bins)
        if (bin_of_pair == number).any()
    )
    error = sum(row.pairs * abs(row.predicted - row.observed) for row in curve) / predicted.size
    return Reliability(curve=curve, error=float(error))


def _ordered_pairs(logps_PK: Scores, quality_PK: Scores) -> tuple[Scores, Scores]:
    """Return, for every two candidates of a prompt that differ in quality, a prediction and an
    observation.

    The prediction is the probability that the likelier candidate is the better one. The observation
    is 1 if it is, 0 if not, 0.5 if both are equally likely.
    """
    first, second = np.triu_indices(logps_PK.shape[1], k=1)
    gaps = (logps_PK[:, first] - logps_PK[:, second]).ravel()
    advantages = (quality_PK[:, first] - quality_PK[:, second]).ravel()
    usable = ~np.isnan(gaps + advantages) & (np.abs(advantages) > 1e-9)
    gaps, advantages = gaps[usable], advantages[usable]
    observed = np.where(gaps == 0.0, 0.5, (gaps > 0) == (advantages > 0)).astype(np.float64)
    return _sigmoid(np.abs(gaps)), observed
