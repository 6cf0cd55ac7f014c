"""The comparison: like is compared with like, and missing references give null figures."""

from __future__ import annotations

import json

import numpy as np
import pytest

from plad_dist.evaluation.metrics import compare
from plad_dist.evaluation.scores import score_system
from plad_dist.evaluation.statistics import win_rate
from plad_dist.systems import PLAD, SEQKD, WARMUP, System
from plad_dist.text_metrics import Output
from tests.unit.evaluation.comparisons import (
    REFERENCES,
    TEMPERATURES,
    compare_shares,
    outputs_right_in,
    row_of,
)


def test_score_system_keeps_prompt_order_and_marks_missing_references() -> None:
    outputs = [Output("a b", 2, True), Output("x", 9, False), Output("y", 1, True)]
    scores = score_system(["a b", None, "  "], outputs)
    assert scores.rouge_l[0] == 1.0
    assert np.isnan(scores.rouge_l[1:]).all()
    assert scores.tokens.tolist() == [2, 9, 1]
    assert scores.finished.tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="2 references but 3 outputs"):
        score_system(["a", "b"], outputs)


def test_compare_orders_systems_and_compares_like_with_like() -> None:
    shares = {
        ("plad", "sampled"): 0.8,
        ("plad", "greedy"): 0.8,
        ("warmup", "greedy"): 0.6,
        ("warmup", "sampled"): 0.3,
        ("warmup", "t0.5"): 0.5,
    }
    metrics = compare_shares(shares)
    raw = metrics.to_json()
    assert json.loads(json.dumps(raw, allow_nan=False)) == raw
    assert [str(row.system) for row in metrics.systems] == ["warmup", "warmup", "warmup", "plad", "plad"]
    assert row_of(metrics, "warmup", "greedy").win_rate_vs_warmup is None
    assert row_of(metrics, "warmup", "sampled").win_rate_vs_warmup is None
    scores = {k: score_system(REFERENCES, outputs_right_in(s, i)) for i, (k, s) in enumerate(shares.items())}
    for system, decoding, baseline in (("plad", "greedy", "greedy"), ("warmup", "t0.5", "sampled")):
        expected = win_rate(scores[system, decoding].rouge_l, scores["warmup", baseline].rouge_l, 300, 1)
        assert row_of(metrics, system, decoding).win_rate_vs_warmup == expected
    rouge_l = row_of(metrics, "plad", "sampled").rouge_l
    assert rouge_l is not None
    assert rouge_l.value == pytest.approx(scores["plad", "sampled"].rouge_l.mean())
    assert row_of(metrics, "warmup", "t0.5").temperature == 0.5
    assert metrics.plad_vs_seqkd == {}


def test_students_of_earlier_rounds_stand_between_the_control_and_the_student() -> None:
    names = ("plad", "round-1", "teacher", "seqkd", "round-0", "warmup")
    metrics = compare_shares({(name, "sampled"): 0.5 for name in names}, previous=System("plad", 1))
    ordered = ["teacher", "warmup", "seqkd", "round-0", "round-1", "plad"]
    assert [row["system"] for row in metrics.to_json()["systems"]] == ordered
    assert metrics.to_json()["previous"] == "round-1"
    assert metrics.gain_of_round is not None


def test_compare_takes_the_hottest_decoding_if_none_is_called_sampled() -> None:
    outputs = {(s, d): outputs_right_in(0.5, 0) for s in (PLAD, WARMUP) for d in ("cool", "hot")}
    metrics = compare(outputs, REFERENCES, temperatures={"cool": 0.3, "hot": 0.9}, resamples=100, seed=0)
    assert metrics.main_decoding == "hot"


def test_compare_refuses_a_decoding_without_temperature_and_an_empty_comparison() -> None:
    with pytest.raises(ValueError, match="hot"):
        compare({(PLAD, "hot"): outputs_right_in(1, 0)}, REFERENCES, temperatures={}, resamples=100, seed=0)
    with pytest.raises(ValueError, match="nothing to compare"):
        compare({}, REFERENCES, temperatures={}, resamples=100, seed=0)


def test_without_references_quality_is_null_and_lengths_remain() -> None:
    outputs = {(s, "sampled"): [Output("a b c", 3, True)] * 4 for s in (WARMUP, SEQKD, PLAD)}
    metrics = compare(outputs, [None, None, "", None], temperatures=TEMPERATURES, resamples=100, seed=0)
    plad = row_of(metrics, "plad", "sampled")
    assert plad.rouge_l is plad.exact_match is plad.win_rate_vs_warmup is None
    assert plad.tokens_mean.value == 3.0
    assert metrics.plad_vs_seqkd == {"sampled": None}
    assert metrics.prompts_with_reference == 0
    assert len(metrics.verdict) == 3
    assert "No prompt has a reference" in metrics.verdict[0]
    assert "PLaD 3.0" in metrics.verdict[1]


def test_prompts_without_reference_do_not_count_for_quality() -> None:
    outputs = {(PLAD, "sampled"): [Output("a", 1, True)] * 3, (WARMUP, "sampled"): [Output("b", 5, True)] * 3}
    metrics = compare(outputs, ["a", None, "b"], temperatures=TEMPERATURES, resamples=100, seed=0)
    raw = metrics.to_json()["systems"][1]
    assert raw["rouge_l"]["value"] == 0.5
    assert raw["win_rate_vs_warmup"]["value"] == 0.5
    assert metrics.prompts_with_reference == 2
