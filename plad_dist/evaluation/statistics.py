"""Figures over many prompts, with 95% intervals: means, win rates, win rates at equal length, calibration.

Arrays with the suffix ``_P`` hold one value for each prompt, in prompt order, so that two systems can be compared prompt by
prompt; ``_PK`` holds one for each of a prompt's K candidates. The intervals are over prompts: they do not cover how much
another training seed would change a system.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from plad_dist.text_metrics import Scores, wins

_SAME_LENGTH = 0.1  # share of the longer text up to which two lengths are called similar
_NEWTON_STEPS = 50
# Strengths of the priors that keep the fit finite. The one on the system is the stronger by far: where length alone
# would explain the wins, it is taken to explain them.
_PRIOR_SYSTEM, _PRIOR_LENGTH = 1.0, 1e-3


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


def bootstrap_mean(values: Scores, resamples: int, seed: int) -> Interval:
    """Mean with its 95% percentile bootstrap interval over prompts (Efron 1979).

    Resampling is done in chunks of about two million draws. Values that are all alike give an interval of no width.
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
    return _interval(float(values_P.mean()), means)


def _interval(value: float, resampled: Scores) -> Interval:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(value, float(low), float(high))


# ----------------------------------------------------------------------------------------------------------- win rates


def win_rate(scores_a: Scores, scores_b: Scores, resamples: int, seed: int) -> Interval:
    """How often a beats b on the same prompt, ties counted half, with its bootstrap interval."""
    return bootstrap_mean(wins(np.asarray(scores_a, float), np.asarray(scores_b, float)), resamples, seed)


def length_controlled(wins_P: Scores, lengths_a: Scores, lengths_b: Scores) -> Interval:
    """The win rate of a over b at equal length, by a logistic regression on the difference of lengths.

    `P(a wins) = sigmoid(system + weight * x)`, `x = tanh((length of a - length of b) / their root mean square)`; the figure is
    `sigmoid(system)`. The idea is that of AlpacaEval 2 (Dubois et al. 2024), without its term for a prompt's difficulty. Both
    coefficients have normal priors around 0, of precision 1 and 0.001: a system that wins only where it is longer, or is always
    longer, does not win here. The interval takes the spread of the scores from the residuals (Huber 1967), since ties vary less than
    coins do, and from the priors, so that it is wide where the lengths cannot be told from the system.
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
        # A full step may leap out of the region where the curve is seen: no coefficient moves by more than 2 at once.
        step = np.clip(np.linalg.solve(curvature, slope), -2.0, 2.0)
        coefficients = coefficients + step
        if np.abs(step).max() < 1e-9:
            break
    residual_P = np.asarray(wins_P, dtype=np.float64) - _sigmoid(x_P2 @ coefficients)
    inverse = np.linalg.inv(curvature)
    covariance = inverse @ ((x_P2 * residual_P[:, None] ** 2).T @ x_P2 + precision) @ inverse
    system, spread = coefficients[0], 1.96 * float(np.sqrt(covariance[0, 0]))
    low, value, high = _sigmoid(np.array([system - spread, system, system + spread])).tolist()
    return Interval(value, low, high)


def _sigmoid(x: Scores) -> Scores:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def by_length(
    wins_P: Scores, lengths_a: Scores, lengths_b: Scores, resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Win rates of a over b where a is shorter, of similar length (within a tenth), and longer; null where no prompt is."""
    a_P, b_P = np.asarray(lengths_a, dtype=np.float64), np.asarray(lengths_b, dtype=np.float64)
    similar_P = np.abs(a_P - b_P) <= _SAME_LENGTH * np.maximum(a_P, b_P)
    found = {}
    for name, mask_P in (
        ("shorter", ~similar_P & (a_P < b_P)),
        ("similar", similar_P),
        ("longer", ~similar_P & (a_P > b_P)),
    ):
        rate = bootstrap_mean(wins_P[mask_P], resamples, seed).to_json() if mask_P.any() else None
        found[name] = {"prompts": int(mask_P.sum()), "win_rate": rate}
    return found


# --------------------------------------------------------------------------------------------------------- calibration


def rank_correlations(logps_PK: Scores, quality_PK: Scores) -> Scores:
    """Spearman's rank correlation of likelihood and quality within each prompt's candidates, ties at their mean rank.

    NaN for a prompt where either does not vary, or where fewer than two candidates have both.
    """
    return np.array([_spearman(*pair) for pair in zip(logps_PK, quality_PK, strict=True)], dtype=np.float64)


def _spearman(logps_K: Scores, quality_K: Scores) -> float:
    known = ~np.isnan(logps_K + quality_K)
    ranks = [_ranks(values[known]) for values in (logps_K, quality_K)]
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


def reliability(logps_PK: Scores, quality_PK: Scores, bins: int = 10) -> dict[str, Any]:
    """How far likelihoods can be believed as preferences: of two candidates of a prompt, the one that is likelier by `d` nats
    should be the better one with probability `sigmoid(d)`.

    Returns `curve`, a list of bins (`predicted`, `observed`, `pairs`) over predicted probabilities of 0.5 to 1, and `error`, the
    expected calibration error (Naeini et al. 2015), null where no pair of candidates differs in quality.
    """
    predicted, observed = _ordered_pairs(logps_PK, quality_PK)
    if not predicted.size:
        return {"curve": [], "error": None}
    places = np.minimum(((predicted - 0.5) * 2 * bins).astype(int), bins - 1)
    curve = [
        {
            "predicted": float(predicted[places == place].mean()),
            "observed": float(observed[places == place].mean()),
            "pairs": int((places == place).sum()),
        }
        for place in range(bins)
        if (places == place).any()
    ]
    error = sum(row["pairs"] * abs(row["predicted"] - row["observed"]) for row in curve) / predicted.size
    return {"curve": curve, "error": float(error)}


def _ordered_pairs(logps_PK: Scores, quality_PK: Scores) -> tuple[Scores, Scores]:
    """For every two candidates of a prompt that differ in quality: the probability that the likelier is better, and whether
    it is. Equally likely ones count half."""
    first, second = np.triu_indices(logps_PK.shape[1], k=1)
    gaps = (logps_PK[:, first] - logps_PK[:, second]).ravel()
    better = (quality_PK[:, first] - quality_PK[:, second]).ravel()
    known = ~np.isnan(gaps + better) & (np.abs(better) > 1e-9)
    gaps, better = gaps[known], better[known]
    observed = np.where(gaps == 0.0, 0.5, (gaps > 0) == (better > 0)).astype(np.float64)
    return _sigmoid(np.abs(gaps)), observed
