"""Scores of single responses against hand-worked cases and the reference package."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from plad_dist.text_metrics import exact_match, repetition, rouge_l, rouge_n

TEXTS = st.lists(st.sampled_from(["a", "b", "c", "dd", "1"]), max_size=12).map(" ".join)


@pytest.mark.parametrize(
    ("reference", "text", "expected"),
    [
        ("count unread messages", "count unread messages", 1.0),
        ("count unread messages", "Count the messages!", 2 / 3),  # LCS 2 of 3 and 3
        ("the cat sat on the mat", "the cat on mat", 0.8),  # LCS 4: P 4/4, R 4/6
        ("a b c d", "d c b a", 0.25),  # order counts: LCS 1
        ("a b", "c d", 0.0),
        ("a b", "", 0.0),
    ],
)
def test_rouge_l_equals_hand_worked_values(reference: str, text: str, expected: float) -> None:
    assert rouge_l(reference, text) == pytest.approx(expected)


def test_rouge_l_reads_scripts_other_than_latin() -> None:
    assert rouge_l("число новых писем", "число писем") == pytest.approx(0.8)  # P 2/2, R 2/3
    assert rouge_l("未读邮件", "未读消息") == pytest.approx(0.5)  # characters count as words
    assert rouge_l("हिन्दी भाषा", "हिन्दी") == pytest.approx(2 / 3)


@given(TEXTS, TEXTS, st.sampled_from([1, 2]))
def test_rouge_n_equals_the_reference_package(reference: str, text: str, n: int) -> None:
    name = f"rouge{n}"
    expected = rouge_scorer.RougeScorer([name]).score(reference, text)[name].fmeasure
    assert rouge_n(reference, text, n) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("reference", "text", "n", "expected"),
    [
        ("the cat sat", "the cat ran", 1, 2 / 3),
        ("the cat sat", "the cat ran", 2, 0.5),
        ("the the cat", "the", 1, 0.5),  # counted as often as both texts have it: P 1/1, R 1/3
        ("one", "one", 2, 0.0),  # no bigram in either
    ],
)
def test_rouge_n_equals_hand_worked_values(reference: str, text: str, n: int, expected: float) -> None:
    assert rouge_n(reference, text, n) == pytest.approx(expected)


def test_exact_match_ignores_case_and_white_space_only() -> None:
    assert exact_match("Count  unread\nmessages", " count unread messages ") == 1.0
    assert exact_match("count unread messages", "count unread message") == 0.0


def test_repetition_is_the_share_of_repeated_trigrams() -> None:
    assert repetition("a b c d e") == 0.0
    assert repetition("a b c a b c") == pytest.approx(1 / 4)  # abc bca cab abc
    assert repetition("no no no no no no") == pytest.approx(3 / 4)
    assert repetition("no no no") == repetition("") == 0.0


def test_references_of_any_length_are_scored_in_bounded_time() -> None:
    started = time.process_time()
    text = "a b c d e " * 400_000
    assert rouge_l(text, text) == pytest.approx(1.0)
    assert rouge_n(text, text, 2) == pytest.approx(1.0)
    assert rouge_l("\u00e9 " * 1_000_000, "\u00e9 " * 1_000_000) == pytest.approx(1.0)
    assert time.process_time() - started < 10
