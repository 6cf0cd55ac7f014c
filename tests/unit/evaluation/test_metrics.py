"""Scores worked by hand, intervals that cover, and a verdict that says what the numbers say."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

from plad_dist.evaluation.metrics import compare, score_system
from plad_dist.evaluation.statistics import bootstrap_mean, win_rate
from plad_dist.evaluation.verdict import verdict
from plad_dist.text_metrics import Output, exact_match, repetition, rouge_l

TEMPERATURES = {"greedy": 0.0, "sampled": 1.0, "t0.5": 0.5}
WORDS = [f"w{i}" for i in range(40)]
INITIAL_LOGPS: list[str | None] = [" ".join(random.Random(i).choices(WORDS, k=6)) for i in range(150)]


def outputs_right_in(share: float, seed: int, endless: float = 0.0) -> list[Output]:
    """Outputs of which every word is the reference's with probability `share`, else one that is never right."""
    rng = random.Random(seed)
    texts = [" ".join(w if rng.random() < share else "wrong" for w in str(r).split()) for r in INITIAL_LOGPS]
    return [Output(text, 6, rng.random() >= endless) for text in texts]


def compare_shares(shares: dict[tuple[str, str], float], **more: Any) -> dict[str, Any]:
    outputs = {key: outputs_right_in(share, seed) for seed, (key, share) in enumerate(shares.items())}
    return compare(outputs, INITIAL_LOGPS, temperatures=TEMPERATURES, resamples=300, seed=1, **more)


def row(metrics: dict[str, Any], system: str, decoding: str) -> dict[str, Any]:
    return next(r for r in metrics["systems"] if (r["system"], r["decoding"]) == (system, decoding))


def sentence(metrics: dict[str, Any], about: str) -> str:
    return next(s for s in metrics["verdict"] if about in s)


# ------------------------------------------------------------------------------------------------------- one response


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
def test_rouge_l_equals_what_is_worked_by_hand(reference: str, text: str, expected: float) -> None:
    assert rouge_l(reference, text) == pytest.approx(expected)


def test_rouge_l_reads_scripts_other_than_latin() -> None:
    assert rouge_l("число новых писем", "число писем") == pytest.approx(0.8)  # P 2/2, R 2/3
    assert rouge_l("未读邮件", "未读消息") == pytest.approx(0.5)  # characters count as words
    assert rouge_l("हिन्दी भाषा", "हिन्दी") == pytest.approx(2 / 3)


def test_exact_match_ignores_case_and_white_space_only() -> None:
    assert exact_match("Count  unread\nmessages", " count unread messages ") == 1.0
    assert exact_match("count unread messages", "count unread message") == 0.0


def test_repetition_is_the_share_of_repeated_trigrams() -> None:
    assert repetition("a b c d e") == 0.0
    assert repetition("a b c a b c") == pytest.approx(1 / 4)  # abc bca cab abc
    assert repetition("no no no no no no") == pytest.approx(3 / 4)
    assert repetition("no no no") == repetition("") == 0.0


# -------------------------------------------------------------------------------------------------------- many prompts


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


def test_bootstrap_is_repeatable_also_over_several_chunks() -> None:
    values = np.random.default_rng(2).random(30_000)  # 66 resamples to a chunk
    assert bootstrap_mean(values, 100, 5) == bootstrap_mean(values, 100, 5)
    assert bootstrap_mean(values, 100, 5) != bootstrap_mean(values, 100, 6)


def test_bootstrap_refuses_nothing_and_nan() -> None:
    for values in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="bootstrap_mean"):
            bootstrap_mean(np.array(values), 100, 0)


def test_win_rate_counts_ties_half() -> None:
    interval = win_rate(np.array([0.9, 0.5, 0.1, 1.0]), np.array([0.1, 0.5, 0.9, 0.0]), 200, 0)
    assert interval.value == pytest.approx((1 + 0.5 + 0 + 1) / 4)


def test_win_rate_takes_rounding_for_a_tie() -> None:
    assert win_rate(np.array([0.1 + 0.2]), np.array([0.3]), 100, 0).value == 0.5


def test_win_rate_of_a_biased_case_lies_above_one_half() -> None:
    rng = np.random.default_rng(4)
    b = rng.random(300)
    interval = win_rate(b + rng.normal(0.1, 0.1, 300), b, 500, 0)
    assert interval.low > 0.5
    assert win_rate(b, b, 500, 0).to_json() == {"value": 0.5, "low": 0.5, "high": 0.5}


def test_score_system_keeps_prompt_order_and_marks_missing_references() -> None:
    outputs = [Output("a b", 2, True), Output("x", 9, False), Output("y", 1, True)]
    scores = score_system(["a b", None, "  "], outputs)
    assert scores.rouge_l[0] == 1.0
    assert np.isnan(scores.rouge_l[1:]).all()
    assert scores.tokens.tolist() == [2, 9, 1]
    assert scores.finished.tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="2 references but 3 outputs"):
        score_system(["a", "b"], outputs)


# ---------------------------------------------------------------------------------------------------------- comparison


def test_compare_orders_systems_and_compares_like_with_like() -> None:
    shares = {
        ("plad", "sampled"): 0.8,
        ("plad", "greedy"): 0.8,
        ("warmup", "greedy"): 0.6,
        ("warmup", "sampled"): 0.3,
        ("warmup", "t0.5"): 0.5,
    }
    metrics = compare_shares(shares)
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert [r["system"] for r in metrics["systems"]] == ["warmup", "warmup", "warmup", "plad", "plad"]
    assert row(metrics, "warmup", "greedy")["win_rate_vs_warmup"] is None
    assert row(metrics, "warmup", "sampled")["win_rate_vs_warmup"] is None
    scores = {k: score_system(INITIAL_LOGPS, outputs_right_in(s, i)) for i, (k, s) in enumerate(shares.items())}
    for system, decoding, baseline in (("plad", "greedy", "greedy"), ("warmup", "t0.5", "sampled")):
        expected = win_rate(scores[system, decoding].rouge_l, scores["warmup", baseline].rouge_l, 300, 1)
        assert row(metrics, system, decoding)["win_rate_vs_warmup"] == expected.to_json()
    assert row(metrics, "plad", "sampled")["rouge_l"]["value"] == pytest.approx(
        scores["plad", "sampled"].rouge_l.mean()
    )
    assert row(metrics, "warmup", "t0.5")["temperature"] == 0.5
    assert metrics["plad_vs_seqkd"] == {}


def test_compare_takes_the_hottest_decoding_where_none_is_called_sampled() -> None:
    outputs = {(s, d): outputs_right_in(0.5, 0) for s in ("plad", "warmup") for d in ("cool", "hot")}
    metrics = compare(outputs, INITIAL_LOGPS, temperatures={"cool": 0.3, "hot": 0.9}, resamples=100, seed=0)
    assert metrics["main_decoding"] == "hot"


def test_compare_refuses_a_decoding_without_temperature_and_nothing_at_all() -> None:
    with pytest.raises(ValueError, match="hot"):
        compare({("plad", "hot"): outputs_right_in(1, 0)}, INITIAL_LOGPS, temperatures={}, resamples=100, seed=0)
    with pytest.raises(ValueError, match="nothing to compare"):
        compare({}, INITIAL_LOGPS, temperatures={}, resamples=100, seed=0)


def test_without_references_quality_is_null_and_lengths_stay() -> None:
    outputs = {(s, "sampled"): [Output("a b c", 3, True)] * 4 for s in ("warmup", "seqkd", "plad")}
    metrics = compare(outputs, [None, None, "", None], temperatures=TEMPERATURES, resamples=100, seed=0)
    plad = row(metrics, "plad", "sampled")
    assert plad["rouge_l"] is plad["exact_match"] is plad["win_rate_vs_warmup"] is None
    assert plad["tokens_mean"]["value"] == 3.0
    assert metrics["plad_vs_seqkd"] == {"sampled": None}
    assert metrics["prompts_with_reference"] == 0
    assert len(metrics["verdict"]) == 3
    assert "No prompt has a reference" in metrics["verdict"][0]
    assert "PLaD 3.0" in metrics["verdict"][1]


def test_prompts_without_reference_do_not_count_for_quality() -> None:
    outputs = {("plad", "sampled"): [Output("a", 1, True)] * 3, ("warmup", "sampled"): [Output("b", 5, True)] * 3}
    metrics = compare(outputs, ["a", None, "b"], temperatures=TEMPERATURES, resamples=100, seed=0)
    assert row(metrics, "plad", "sampled")["rouge_l"]["value"] == 0.5
    assert row(metrics, "plad", "sampled")["win_rate_vs_warmup"]["value"] == 0.5
    assert metrics["prompts_with_reference"] == 2


# ------------------------------------------------------------------------------------------------------------- verdict


def test_verdict_says_that_plad_helped() -> None:
    metrics = compare_shares({("plad", "sampled"): 0.8, ("seqkd", "sampled"): 0.5, ("warmup", "sampled"): 0.3})
    assert sentence(metrics, "Calibration").startswith("Calibration improved the student (sampled)")
    assert "lower end is above 50%" in sentence(metrics, "Calibration")
    assert "more than plain distillation" in sentence(metrics, "sequence-level KD")
    assert "sampled ahead" in sentence(metrics, "sequence-level KD")


def test_verdict_says_how_often_nothing_changed() -> None:
    """A win rate that counts ties half hides them."""
    metrics = compare_shares({("plad", "sampled"): 0.6, ("warmup", "sampled"): 0.5})
    ties = metrics["judges"]["rouge_l"]["comparisons"][0]["ties"]
    better = metrics["judges"]["rouge_l"]["comparisons"][0]["win_rate"]["value"] - ties / 2
    told = f"it is better on {100 * better:.0f}, worse on {100 * (1 - better - ties):.0f}, level on {100 * ties:.0f}."
    assert told in sentence(metrics, "Calibration")
    assert 0 < ties < 1


def test_verdict_says_that_plad_harmed() -> None:
    metrics = compare_shares({("plad", "sampled"): 0.3, ("seqkd", "sampled"): 0.6, ("warmup", "sampled"): 0.8})
    assert sentence(metrics, "Calibration").startswith("Calibration made the student worse")
    assert "upper end is below 50%" in sentence(metrics, "Calibration")
    assert "less than plain distillation" in sentence(metrics, "sequence-level KD")
    assert "sampled behind" in sentence(metrics, "sequence-level KD")


def test_verdict_calls_a_tie_a_tie() -> None:
    metrics = compare_shares({(s, d): 0.5 for s in ("plad", "seqkd", "warmup") for d in ("greedy", "sampled")})
    assert "no clear difference" in sentence(metrics, "Calibration")
    assert "No advantage of PLaD" in sentence(metrics, "sequence-level KD")
    assert sentence(metrics, "sequence-level KD").count("a tie") == 2


def test_verdict_tells_when_the_decodings_disagree() -> None:
    shares = {("plad", "greedy"): 0.8, ("plad", "sampled"): 0.4, ("seqkd", "greedy"): 0.4, ("seqkd", "sampled"): 0.8}
    metrics = compare_shares({**shares, ("warmup", "greedy"): 0.3, ("warmup", "sampled"): 0.3})
    assert "depends on the decoding" in sentence(metrics, "sequence-level KD")


def test_verdict_admits_that_there_is_no_control() -> None:
    metrics = compare_shares({("plad", "sampled"): 0.8, ("warmup", "sampled"): 0.3})
    assert "cannot tell whether preferences added anything" in sentence(metrics, "no sequence-level KD")
    assert 3 <= len(metrics["verdict"]) <= 6


@pytest.mark.parametrize(
    ("cooler", "expected"),
    [
        (0.95, "no more than sharpening"),
        (0.8, "may all be sharpening"),
        (0.65, "most of its gain"),
        (0.35, "less than half of its gain"),
    ],
)
def test_verdict_says_how_much_of_the_gain_is_sharpening(cooler: float, expected: str) -> None:
    metrics = compare_shares({("plad", "sampled"): 0.8, ("warmup", "sampled"): 0.3, ("warmup", "t0.5"): cooler})
    assert expected in sentence(metrics, "temperature")


def test_verdict_holds_the_gain_against_greedy_outputs_too() -> None:
    """The coolest decoding is the one that takes most of a gain in sampled quality."""
    shares = {("plad", "sampled"): 0.8, ("warmup", "sampled"): 0.3, ("warmup", "t0.5"): 0.5}
    ahead = compare_shares(shares)
    behind = compare_shares({**shares, ("warmup", "greedy"): 0.95, ("plad", "greedy"): 0.95})
    assert "stays ahead" in sentence(ahead, "lower temperatures")
    assert "no more than sharpening" in sentence(behind, "temperature alone")
    assert "at temperature 0:" in sentence(behind, "temperature alone")
    assert "no temperature plays a part" not in sentence(behind, "temperature alone")
    better = compare_shares({**shares, ("warmup", "greedy"): 0.6, ("plad", "greedy"): 0.95, ("plad", "sampled"): 0.55})
    assert "greedy, where no temperature plays a part, PLaD gains" in sentence(better, "temperature alone")


def test_verdict_on_the_control_is_that_of_the_main_decoding() -> None:
    shares = {("plad", "greedy"): 0.8, ("seqkd", "greedy"): 0.4, ("warmup", "greedy"): 0.3}
    tied = {(s, "sampled"): 0.5 for s in ("plad", "seqkd", "warmup")}
    said = sentence(compare_shares({**shares, **tied}), "sequence-level KD")
    assert said.startswith("No advantage of PLaD over plain distillation is shown (sampled)")
    assert "greedy ahead" in said


def test_verdict_has_no_sharpening_to_explain_without_a_gain() -> None:
    metrics = compare_shares({("plad", "sampled"): 0.3, ("warmup", "sampled"): 0.3, ("warmup", "t0.5"): 0.5})
    assert "no gain to explain" in sentence(metrics, "temperatures")


def test_verdict_warns_where_there_is_no_capacity_gap() -> None:
    gap = compare_shares({("teacher", "sampled"): 0.9, ("warmup", "sampled"): 0.4, ("plad", "sampled"): 0.5})
    none = compare_shares({("teacher", "sampled"): 0.4, ("warmup", "sampled"): 0.4, ("plad", "sampled"): 0.5})
    assert sentence(gap, "capacity gap").startswith("There is a capacity gap")
    assert verdict(none)[0].startswith("Warning: no capacity gap")


def test_verdict_does_not_praise_what_is_worse_under_another_decoding() -> None:
    shares = {("plad", "sampled"): 0.6, ("warmup", "sampled"): 0.3, ("plad", "greedy"): 0.3, ("warmup", "greedy"): 0.6}
    assert sentence(compare_shares(shares), "warm-up student").startswith(
        "Calibration made the student better under one decoding and worse under another"
    )


@pytest.mark.parametrize(("after", "word"), [(0.78, "rose"), (0.5, "fell"), (0.69, "did not clearly change")])
def test_verdict_reports_held_out_ranking(after: float, word: str) -> None:
    ranking = {
        "before": {"pair_accuracy": 0.68, "chosen_logp": -10.0, "rejected_logp": -12.0},
        "after": {"pair_accuracy": after, "chosen_logp": -11.0, "rejected_logp": -15.0},
        "seqkd": {"pair_accuracy": 0.7, "chosen_logp": -9.0, "rejected_logp": -10.0},
        "pairs": 512,
    }
    metrics = compare_shares({("plad", "sampled"): 0.5, ("warmup", "sampled"): 0.5}, ranking=ranking)
    said = sentence(metrics, "512 held-out pairs")
    assert word in said
    assert "70.0% for sequence-level KD" in said
    assert "likelihood displacement" in said


def test_verdict_survives_an_empty_ranking() -> None:
    for ranking in (None, {}, {"before": None, "after": None, "pairs": 0}):
        metrics = compare_shares({("plad", "sampled"): 0.5, ("warmup", "sampled"): 0.5}, ranking=ranking)
        assert not any("held-out pairs" in s for s in metrics["verdict"])


def test_verdict_warns_of_outputs_that_never_end() -> None:
    outputs = {("warmup", "sampled"): outputs_right_in(0.5, 0), ("plad", "sampled"): outputs_right_in(0.5, 1, 0.4)}
    metrics = compare(outputs, INITIAL_LOGPS, temperatures=TEMPERATURES, resamples=100, seed=0)
    warning = sentence(metrics, "end-of-sequence")
    assert warning.startswith("Warning")
    assert "PLaD sampled" in warning
    assert "warm-up student" not in warning
    assert verdict(metrics) == metrics["verdict"]
