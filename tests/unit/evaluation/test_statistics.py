"""Figures over prompts against hand-worked cases, and what win rates at equal length must not be taken in by."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from plad_dist.evaluation.statistics import by_length, length_controlled, rank_correlations, reliability
from plad_dist.text_metrics import rouge_n

WORDS = st.lists(st.sampled_from(["a", "b", "c", "dd", "1"]), max_size=12).map(" ".join)
NAN = float("nan")


@given(WORDS, WORDS, st.sampled_from([1, 2]))
def test_rouge_n_is_that_of_the_package(reference: str, text: str, n: int) -> None:
    name = f"rouge{n}"
    expected = rouge_scorer.RougeScorer([name]).score(reference, text)[name].fmeasure
    assert rouge_n(reference, text, n) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("reference", "text", "n", "expected"),
    [
        ("the cat sat", "the cat ran", 1, 2 / 3),
        ("the cat sat", "the cat ran", 2, 0.5),
        ("the the cat", "the", 1, 0.5),  # counted as often as both have it: P 1/1, R 1/3
        ("one", "one", 2, 0.0),  # no bigram in either
    ],
)
def test_rouge_n_by_hand(reference: str, text: str, n: int, expected: float) -> None:
    assert rouge_n(reference, text, n) == pytest.approx(expected)


# --------------------------------------------------------------------------------------------------------- equal length


def judged(
    prompts: int, seed: int, longer_by: float, win: float, by_length_alone: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Wins and lengths of two systems; b's responses have 60 to 140 characters."""
    rng = np.random.default_rng(seed)
    b = rng.uniform(60, 140, prompts)
    a = b + rng.normal(longer_by, 30, prompts)
    wins = (a > b).astype(float) if by_length_alone else (rng.random(prompts) < win).astype(float)
    return wins, a, b


def test_a_student_that_only_writes_longer_does_not_win_at_equal_length() -> None:
    wins, a, b = judged(500, 1, longer_by=40, win=0, by_length_alone=True)
    assert wins.mean() > 0.85
    found = length_controlled(wins, a, b)
    assert found.low <= 0.5
    assert abs(found.value - 0.5) < 0.1


def test_nor_does_one_that_is_always_longer_and_always_wins() -> None:
    b = np.random.default_rng(2).uniform(60, 140, 500)
    found = length_controlled(np.ones(500), b + 50, b)
    assert found.low < 0.3, "nothing tells the system from its length"
    assert found.value == pytest.approx(0.5, abs=0.01)


def test_one_that_is_better_at_any_length_wins_at_equal_length_too() -> None:
    wins, a, b = judged(800, 3, longer_by=30, win=0.7, by_length_alone=False)
    found = length_controlled(wins, a, b)
    assert found.low > 0.5
    assert found.value == pytest.approx(wins.mean(), abs=0.08)


def test_where_all_lengths_are_equal_it_is_the_win_rate() -> None:
    wins = np.array([1.0] * 600 + [0.0] * 300 + [0.5] * 100)
    found = length_controlled(wins, np.full(1000, 5.0), np.full(1000, 5.0))
    assert found.value == pytest.approx(0.65, abs=0.002)


def test_ties_make_the_interval_no_wider_than_they_are() -> None:
    """Of 500 prompts 60 are won, 10 lost and the rest tied: a clear win, at equal length too."""
    wins = np.array([1.0] * 60 + [0.0] * 10 + [0.5] * 430)
    a, b = np.random.default_rng(0).uniform(60, 140, (2, 500))
    found = length_controlled(wins, a, b)
    assert found.value == pytest.approx(0.55, abs=0.01)
    assert 0.53 < found.low < found.high < 0.57


def test_the_interval_holds_what_it_promises() -> None:
    """Of 300 draws of 200 prompts, some 95% of the intervals have the truth in them."""
    rng, held = np.random.default_rng(5), 0
    for _ in range(300):
        a, b = rng.uniform(60, 140, (2, 200))
        found = length_controlled((rng.random(200) < 0.6).astype(float), a, b)
        held += found.low <= 0.6 <= found.high
    assert 0.92 <= held / 300 <= 0.98


def test_the_other_system_wins_the_rest() -> None:
    wins, a, b = judged(400, 4, longer_by=20, win=0.6, by_length_alone=False)
    there, back = length_controlled(wins, a, b), length_controlled(1 - wins, b, a)
    assert there.value + back.value == pytest.approx(1.0, abs=1e-6)


def test_win_rates_by_length_are_counted_by_hand() -> None:
    found = by_length(
        np.array([1.0, 0.0, 1.0, 0.5]),
        np.array([50.0, 50.0, 104.0, 200.0]),
        np.array([100.0, 100.0, 100.0, 100.0]),
        100,
        0,
    )
    assert {name: (row["prompts"], row["win_rate"] and row["win_rate"]["value"]) for name, row in found.items()} == {
        "shorter": (2, 0.5),
        "similar": (1, 1.0),
        "longer": (1, 0.5),
    }


# ---------------------------------------------------------------------------------------------------------- calibration


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


def test_likelihoods_that_mean_what_they_say_are_reliable() -> None:
    rng = random.Random(0)
    logps, quality = [], []
    for _ in range(20_000):
        gap = rng.uniform(-4, 4)
        logps.append([gap, 0.0])
        quality.append([1.0, 0.0] if rng.random() < 1 / (1 + math.exp(-gap)) else [0.0, 1.0])
    found = reliability(np.array(logps), np.array(quality))
    assert found["error"] < 0.02
    overconfident = reliability(5 * np.array(logps), np.array(quality))
    assert overconfident["error"] > 0.1


def test_reliability_by_hand() -> None:
    """Four pairs 2 nats apart, three of them right: 0.881 was promised, 0.75 kept."""
    found = reliability(np.array([[2.0, 0.0]] * 4), np.array([[1.0, 0.0]] * 3 + [[0.0, 1.0]]))
    assert found["curve"] == [{"predicted": pytest.approx(0.8808, abs=1e-4), "observed": 0.75, "pairs": 4}]
    assert found["error"] == pytest.approx(0.1308, abs=1e-4)


def test_candidates_of_equal_quality_say_nothing_of_reliability() -> None:
    assert reliability(np.array([[2.0, 0.0]]), np.array([[1.0, 1.0]])) == {"curve": [], "error": None}
