"""The verdict states what the figures show, whatever their sign."""

from __future__ import annotations

import pytest

from plad_dist.evaluation.document import HeldoutFigures, Ranking
from plad_dist.evaluation.metrics import compare
from plad_dist.evaluation.verdict import verdict
from plad_dist.systems import PLAD, WARMUP, System
from tests.unit.evaluation.comparisons import (
    REFERENCES,
    TEMPERATURES,
    compare_shares,
    outputs_right_in,
    sentence,
)


def figures(accuracy: float, chosen: float, rejected: float) -> HeldoutFigures:
    return HeldoutFigures(pair_accuracy=accuracy, chosen_logp=chosen, rejected_logp=rejected)


# -- PLaD against baselines


def test_verdict_states_that_plad_helped() -> None:
    metrics = compare_shares({("plad", "sampled"): 0.8, ("seqkd", "sampled"): 0.5, ("warmup", "sampled"): 0.3})
    assert sentence(metrics, "Calibration").startswith("Calibration improved the student (sampled)")
    assert "entirely above 50%" in sentence(metrics, "Calibration")
    assert "better than plain distillation" in sentence(metrics, "sequence-level KD")
    assert "sampled ahead" in sentence(metrics, "sequence-level KD")


def test_verdict_states_how_often_nothing_changed() -> None:
    """A win rate that counts ties half hides them."""
    metrics = compare_shares({("plad", "sampled"): 0.6, ("warmup", "sampled"): 0.5})
    comparison = metrics.judges["rouge_l"].comparisons[0]
    ties, better = comparison.ties, comparison.win_rate.value - comparison.ties / 2
    expected = f"better on {100 * better:.0f}, worse on {100 * (1 - better - ties):.0f} and level on {100 * ties:.0f}."
    assert expected in sentence(metrics, "Calibration")
    assert 0 < ties < 1


def test_verdict_states_that_plad_harmed() -> None:
    metrics = compare_shares({("plad", "sampled"): 0.3, ("seqkd", "sampled"): 0.6, ("warmup", "sampled"): 0.8})
    assert sentence(metrics, "Calibration").startswith("Calibration made the student worse")
    assert "entirely below 50%" in sentence(metrics, "Calibration")
    assert "worse than plain distillation" in sentence(metrics, "sequence-level KD")
    assert "sampled behind" in sentence(metrics, "sequence-level KD")


def test_verdict_calls_a_tie_a_tie() -> None:
    metrics = compare_shares({(s, d): 0.5 for s in ("plad", "seqkd", "warmup") for d in ("greedy", "sampled")})
    assert "no clear difference" in sentence(metrics, "Calibration")
    assert "PLaD shows no advantage" in sentence(metrics, "sequence-level KD")
    assert sentence(metrics, "sequence-level KD").count("tied") == 2


def test_verdict_states_that_the_decodings_disagree() -> None:
    shares = {("plad", "greedy"): 0.8, ("plad", "sampled"): 0.4, ("seqkd", "greedy"): 0.4, ("seqkd", "sampled"): 0.8}
    metrics = compare_shares({**shares, ("warmup", "greedy"): 0.3, ("warmup", "sampled"): 0.3})
    assert "depends on the decoding" in sentence(metrics, "sequence-level KD")


def test_verdict_states_that_the_control_is_missing() -> None:
    metrics = compare_shares({("plad", "sampled"): 0.8, ("warmup", "sampled"): 0.3})
    assert "cannot show whether preferences add anything" in sentence(metrics, "no sequence-level KD")
    assert 3 <= len(metrics.verdict) <= 6


def test_verdict_on_the_control_is_that_of_the_main_decoding() -> None:
    shares = {("plad", "greedy"): 0.8, ("seqkd", "greedy"): 0.4, ("warmup", "greedy"): 0.3}
    tied = {(s, "sampled"): 0.5 for s in ("plad", "seqkd", "warmup")}
    control = sentence(compare_shares({**shares, **tied}), "sequence-level KD")
    assert control.startswith("PLaD shows no advantage over plain distillation (sampled)")
    assert "greedy ahead" in control


def test_verdict_does_not_praise_a_student_that_is_worse_under_another_decoding() -> None:
    shares = {("plad", "sampled"): 0.6, ("warmup", "sampled"): 0.3, ("plad", "greedy"): 0.3, ("warmup", "greedy"): 0.6}
    assert sentence(compare_shares(shares), "warm-up student").startswith(
        "Calibration made the student better under one decoding and worse under another"
    )


@pytest.mark.parametrize(
    ("share", "effect"),
    [(0.8, "improved the student"), (0.2, "made the student worse"), (0.5, "made no clear difference")],
)
def test_verdict_states_the_gain_of_a_later_round(share: float, effect: str) -> None:
    shares = {("plad", "sampled"): share, ("round-0", "sampled"): 0.5, ("warmup", "sampled"): 0.5}
    gain = sentence(compare_shares(shares, previous=System("plad", 0)), "This round")
    assert gain.startswith(f"This round {effect}: the win rate against the student of round 0 is")
    assert "This round" not in " ".join(compare_shares(shares).verdict)


# -- sharpening, capacity gap, likelihoods


@pytest.mark.parametrize(
    ("cooler", "expected"),
    [
        (0.95, "its gain is only sharpening"),
        (0.8, "may be only sharpening"),
        (0.65, "most of its gain"),
        (0.35, "less than half of its gain"),
    ],
)
def test_verdict_states_how_much_of_the_gain_is_sharpening(cooler: float, expected: str) -> None:
    metrics = compare_shares({("plad", "sampled"): 0.8, ("warmup", "sampled"): 0.3, ("warmup", "t0.5"): cooler})
    assert expected in sentence(metrics, "temperature")


def test_verdict_compares_the_gain_with_greedy_outputs_too() -> None:
    """The coolest decoding explains most of a gain in sampled quality."""
    shares = {("plad", "sampled"): 0.8, ("warmup", "sampled"): 0.3, ("warmup", "t0.5"): 0.5}
    ahead = compare_shares(shares)
    behind = compare_shares({**shares, ("warmup", "greedy"): 0.95, ("plad", "greedy"): 0.95})
    assert "stays ahead" in sentence(ahead, "lower temperatures")
    assert "its gain is only sharpening" in sentence(behind, "temperature alone")
    assert "at temperature 0:" in sentence(behind, "temperature alone")
    assert "temperature plays no part" not in sentence(behind, "temperature alone")
    better = compare_shares({**shares, ("warmup", "greedy"): 0.6, ("plad", "greedy"): 0.95, ("plad", "sampled"): 0.55})
    assert "under greedy, where temperature plays no part, PLaD gains" in sentence(better, "temperature alone")


def test_verdict_has_no_sharpening_to_explain_without_a_gain() -> None:
    metrics = compare_shares({("plad", "sampled"): 0.3, ("warmup", "sampled"): 0.3, ("warmup", "t0.5"): 0.5})
    assert "no gain for lower temperatures to explain" in sentence(metrics, "temperatures")


def test_verdict_warns_of_a_missing_capacity_gap() -> None:
    gap = compare_shares({("teacher", "sampled"): 0.9, ("warmup", "sampled"): 0.4, ("plad", "sampled"): 0.5})
    no_gap = compare_shares({("teacher", "sampled"): 0.4, ("warmup", "sampled"): 0.4, ("plad", "sampled"): 0.5})
    assert sentence(gap, "capacity gap").startswith("There is a capacity gap")
    assert verdict(no_gap)[0].startswith("Warning: no capacity gap")


@pytest.mark.parametrize(("after", "change"), [(0.78, "rose"), (0.5, "fell"), (0.69, "did not clearly change")])
def test_verdict_reports_the_ranking_of_held_out_pairs(after: float, change: str) -> None:
    ranking = Ranking(
        before=figures(0.68, -10.0, -12.0),
        after=figures(after, -11.0, -15.0),
        seqkd=figures(0.7, -9.0, -10.0),
        pairs=512,
    )
    metrics = compare_shares({("plad", "sampled"): 0.5, ("warmup", "sampled"): 0.5}, ranking=ranking)
    ranked = sentence(metrics, "512 held-out pairs")
    assert change in ranked
    assert "70.0% for sequence-level KD" in ranked
    assert "likelihood displacement" in ranked


@pytest.mark.parametrize("ranking", [None, Ranking(pairs=0), Ranking(seqkd=figures(0.7, -9.0, -10.0), pairs=512)])
def test_verdict_does_not_need_a_ranking(ranking: Ranking | None) -> None:
    metrics = compare_shares({("plad", "sampled"): 0.5, ("warmup", "sampled"): 0.5}, ranking=ranking)
    assert not any("held-out pairs" in sentence for sentence in metrics.verdict)


# -- warnings


def test_verdict_warns_of_outputs_that_never_end() -> None:
    outputs = {(WARMUP, "sampled"): outputs_right_in(0.5, 0), (PLAD, "sampled"): outputs_right_in(0.5, 1, 0.4)}
    metrics = compare(outputs, REFERENCES, temperatures=TEMPERATURES, resamples=100, seed=0)
    warning = sentence(metrics, "end-of-sequence")
    assert warning.startswith("Warning")
    assert "PLaD sampled" in warning
    assert "warm-up student" not in warning
    assert verdict(metrics) == metrics.verdict
