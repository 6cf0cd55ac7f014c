"""Figures over prompts against hand-worked cases, and win rates that length alone cannot raise."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from plad_dist.evaluation.document import Interval, Reliability, ReliabilityBin
from plad_dist.evaluation.statistics import (
    bootstrap_mean,
    by_length,
    length_controlled,
    rank_correlations,
    reliability,
    win_rate,
)

NAN = float("nan")


# -- means and win rates


def test_bootstrap_interval_covers_the_true_mean_about_19_times_in_20() -> None:
    rng = np.random.default_rng(0)
    intervals = [bootstrap_mean(rng.exponential(2.0, size=100), 400, seed) for seed in range(200)]
    covered = np.mean([i.low <= 2.0 <= i.high for i in intervals])
    assert 0.88 <= covered <= 0.99


def test_bootstrap_interval_has_the_width_of_the_normal_one_for_many_values() -> None:
    values = np.random.default_rng(1).normal(5.0, 1.0, size=2000)
    interval = bootstrap_mean(values, 2000, 3)
    assert interval.value == pytest.approx(values.mean())
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(2000), rel=0.1)


def test_bootstrap_is_repeatable_over_several_chunks() -> None:
    values = np.random.default_rng(2).random(30_000)  # 66 resamples to a chunk
    assert bootstrap_mean(values, 100, 5) == bootstrap_mean(values, 100, 5)
    assert bootstrap_mean(values, 100, 5) != bootstrap_mean(values, 100, 6)


def test_bootstrap_refuses_an_empty_vector_and_nan() -> None:
    for values in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="bootstrap_mean"):
            bootstrap_mean(np.array(values), 100, 0)


def test_win_rate_counts_ties_half() -> None:
    interval = win_rate(np.array([0.9, 0.5, 0.1, 1.0]), np.array([0.1, 0.5, 0.9, 0.0]), 200, 0)
    assert interval.value == pytest.approx((1 + 0.5 + 0 + 1) / 4)


def test_win_rate_treats_a_rounding_difference_as_a_tie() -> None:
    assert win_rate(np.array([0.1 + 0.2]), np.array([0.3]), 100, 0).value == 0.5


def test_win_rate_of_a_better_system_is_above_one_half() -> None:
    rng = np.random.default_rng(4)
    b = rng.random(300)
    interval = win_rate(b + rng.normal(0.1, 0.1, 300), b, 500, 0)
    assert interval.low > 0.5
    assert win_rate(b, b, 500, 0) == Interval(value=0.5, low=0.5, high=0.5)


# -- equal length


def simulated_wins(
    prompts: int, seed: int, longer_by: float, win: float, by_length_alone: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the wins of a, and the lengths of a and b; b's responses have 60 to 140 characters."""
    rng = np.random.default_rng(seed)
    b = rng.uniform(60, 140, prompts)
    a = b + rng.normal(longer_by, 30, prompts)
    wins = (a > b).astype(float) if by_length_alone else (rng.random(prompts) < win).astype(float)
    return wins, a, b


def test_a_student_that_only_writes_longer_does_not_win_at_equal_length() -> None:
    wins, a, b = simulated_wins(500, 1, longer_by=40, win=0, by_length_alone=True)
    assert wins.mean() > 0.85
    rate = length_controlled(wins, a, b)
    assert rate.low <= 0.5
    assert abs(rate.value - 0.5) < 0.1


def test_a_student_that_is_always_longer_and_always_wins_does_not_win_at_equal_length() -> None:
    b = np.random.default_rng(2).uniform(60, 140, 500)
    rate = length_controlled(np.ones(500), b + 50, b)
    assert rate.low < 0.3, "nothing tells the system from its length"
    assert rate.value == pytest.approx(0.5, abs=0.01)


def test_a_student_that_is_better_at_any_length_wins_at_equal_length_too() -> None:
    wins, a, b = simulated_wins(800, 3, longer_by=30, win=0.7, by_length_alone=False)
    rate = length_controlled(wins, a, b)
    assert rate.low > 0.5
    assert rate.value == pytest.approx(wins.mean(), abs=0.08)


def test_if_all_lengths_are_equal_the_rate_is_the_win_rate() -> None:
    wins = np.array([1.0] * 600 + [0.0] * 300 + [0.5] * 100)
    rate = length_controlled(wins, np.full(1000, 5.0), np.full(1000, 5.0))
    assert rate.value == pytest.approx(0.65, abs=0.002)


def test_ties_do_not_widen_the_interval() -> None:
    """A system with 60 wins, 10 losses and 430 ties clearly wins at equal length."""
    wins = np.array([1.0] * 60 + [0.0] * 10 + [0.5] * 430)
    a, b = np.random.default_rng(0).uniform(60, 140, (2, 500))
    rate = length_controlled(wins, a, b)
    assert rate.value == pytest.approx(0.55, abs=0.01)
    assert 0.53 < rate.low < rate.high < 0.57


def test_the_interval_covers_the_truth_in_95_of_100_cases() -> None:
    """About 95% of the intervals of 300 draws of 200 prompts contain the truth."""
    rng, covered = np.random.default_rng(5), 0
    for _ in range(300):
        a, b = rng.uniform(60, 140, (2, 200))
        rate = length_controlled((rng.random(200) < 0.6).astype(float), a, b)
        covered += rate.low <= 0.6 <= rate.high
    assert 0.92 <= covered / 300 <= 0.98


def test_the_win_rates_of_both_systems_add_up_to_one() -> None:
    wins, a, b = simulated_wins(400, 4, longer_by=20, win=0.6, by_length_alone=False)
    forward, backward = length_controlled(wins, a, b), length_controlled(1 - wins, b, a)
    assert forward.value + backward.value == pytest.approx(1.0, abs=1e-6)


def test_win_rates_by_length_equal_hand_worked_values() -> None:
    rates = by_length(
        np.array([1.0, 0.0, 1.0, 0.5]),
        np.array([50.0, 50.0, 104.0, 200.0]),
        np.array([100.0, 100.0, 100.0, 100.0]),
        100,
        0,
    )
    classes = (rates.shorter, rates.similar, rates.longer)
    assert [(row.prompts, row.win_rate and row.win_rate.value) for row in classes] == [(2, 0.5), (1, 1.0), (1, 0.5)]


# -- calibration


@pytest.mark.parametrize(
    ("logps", "quality", "expected"),
    [
        ([1.0, 2.0, 3.0], [0.1, 0.2, 0.3], 1.0),
        ([1.0, 2.0, 3.0], [0.3, 0.2, 0.1], -1.0),
        ([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0], 0.8),  # 1 - 6 * 2 / (4 * 15)
        ([1.0, 2.0, 3.0], [1.0, 1.0, 2.0], math.sqrt(3) / 2),  # ranks 1.5, 1.5, 3
        ([1.0, NAN, 3.0], [1.0, 9.0, 2.0], 1.0),
    ],
)
def test_rank_correlation_by_hand(logps: list[float], quality: list[float], expected: float) -> None:
    assert rank_correlations(np.array([logps]), np.array([quality]))[0] == pytest.approx(expected)


def test_candidates_that_do_not_differ_have_no_rank_correlation() -> None:
    assert np.isnan(rank_correlations(np.array([[1.0, 2.0], [1.0, 1.0]]), np.array([[3.0, 3.0], [1.0, 2.0]]))).all()


def test_likelihoods_that_predict_the_better_response_are_reliable() -> None:
    rng = random.Random(0)
    logps, quality = [], []
    for _ in range(20_000):
        gap = rng.uniform(-4, 4)
        logps.append([gap, 0.0])
        quality.append([1.0, 0.0] if rng.random() < 1 / (1 + math.exp(-gap)) else [0.0, 1.0])
    error = reliability(np.array(logps), np.array(quality)).error
    assert error is not None
    assert error < 0.02
    overconfident = reliability(5 * np.array(logps), np.array(quality)).error
    assert overconfident is not None
    assert overconfident > 0.1


def test_reliability_by_hand() -> None:
    """Four pairs 2 nats apart, three of them right: predicted 0.881, observed 0.75."""
    figures = reliability(np.array([[2.0, 0.0]] * 4), np.array([[1.0, 0.0]] * 3 + [[0.0, 1.0]]))
    assert figures.curve == (ReliabilityBin(predicted=figures.curve[0].predicted, observed=0.75, pairs=4),)
    assert figures.curve[0].predicted == pytest.approx(0.8808, abs=1e-4)
    assert figures.error == pytest.approx(0.1308, abs=1e-4)


def test_candidates_of_equal_quality_have_no_reliability() -> None:
    assert reliability(np.array([[2.0, 0.0]]), np.array([[1.0, 1.0]])) == Reliability(curve=(), error=None)
