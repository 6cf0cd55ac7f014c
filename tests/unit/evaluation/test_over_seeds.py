"""Figures over seeds: hand-worked means, and intervals that cover the seed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from plad_dist.evaluation.document import HeldoutFigures, Ranking
from plad_dist.evaluation.over_seeds import FinishedRun, VariantFigures, _interval, over_seeds
from plad_dist.evaluation.report.tables import seeds_table
from plad_dist.evaluation.scores import score_system
from plad_dist.systems import System
from plad_dist.text_metrics import Output


def finished_run(references: list[str | None], correlation_gain: list[float], **responses: list[str]) -> FinishedRun:
    """Return a run without files. Responses by `<system>` (main decoding) or `greedy_<system>`."""
    run = object.__new__(FinishedRun)
    run.references = references
    run.prompts = [f"prompt {number}" for number in range(len(references))]
    run.scores = {}
    for key, texts in responses.items():
        prefix, _, name = key.rpartition("_")
        outputs = [Output(text, len(text.split()), "cut" not in text) for text in texts]
        run.scores[System.parse(name), f"{prefix}_" if prefix else ""] = score_system(references, outputs)
    before, after = (HeldoutFigures(pair_accuracy=share, chosen_logp=-1.0, rejected_logp=-2.0) for share in (0.5, 0.75))
    run.ranking = Ranking(before=before, after=after, pairs=4)
    run.correlation_gain = np.array(correlation_gain)
    return run


def test_a_figure_is_the_mean_over_seeds_of_the_mean_over_prompts() -> None:
    first = finished_run(["a b", "c d"], [0.5, np.nan], plad=["a b", "x"], warmup=["a", "x"], seqkd=["a b", "c d cut"])
    second = finished_run(["a b", None], [0.1, 0.3], plad=["a b", "x"], warmup=["x", "x"], seqkd=["a b", "x"])
    means = {name: interval.value for name, interval in over_seeds([first, second]).items()}
    assert means["rouge_l_plad"] == pytest.approx((0.5 + 1.0) / 2), "a prompt without reference does not count"
    assert means["win_rate_vs_warmup"] == pytest.approx((0.75 + 1.0) / 2)
    assert means["win_rate_vs_seqkd"] == pytest.approx((0.25 + 0.5) / 2)
    assert means["rouge_l_gain_over_warmup"] == pytest.approx(((1 - 2 / 3) / 2 + 1.0) / 2)
    assert means["no_eos_share_seqkd"] == pytest.approx((0.5 + 0.0) / 2)
    assert means["calibration_gain"] == pytest.approx((0.5 + 0.2) / 2)
    assert means["pair_accuracy_gain"] == pytest.approx(0.25)
    assert not any(name.startswith("greedy_") for name in means)


def interval(*runs: FinishedRun) -> tuple[float, float]:
    """Return the value and the half width of a win rate."""
    rate = over_seeds(runs)["win_rate_vs_warmup"]
    assert rate.high - rate.value == pytest.approx(rate.value - rate.low)
    return rate.value, rate.high - rate.value


def test_the_interval_covers_how_much_seeds_differ() -> None:
    """Each seed alone is certain, so only the choice of seeds counts: Student's t with 1 degree."""
    good = finished_run(["a"] * 50, [0.0] * 50, plad=["a"] * 50, warmup=["x"] * 50)
    tied = finished_run(["a"] * 50, [0.0] * 50, plad=["a"] * 50, warmup=["a"] * 50)
    assert interval(good) == (1.0, 0.0)
    value, half = interval(good, tied)
    assert value == 0.75
    assert half == pytest.approx(12.706 * 0.25 * math.sqrt(2) / math.sqrt(2))


def test_seeds_that_share_their_prompts_do_not_count_as_more_prompts() -> None:
    responses = {"plad": ["a", "x"] * 50, "warmup": ["x", "a"] * 50}
    runs = [finished_run(["a"] * 100, [0.0] * 100, **responses) for _ in range(4)]
    _, half = interval(runs[0])
    assert half == pytest.approx(1.959964 * 0.5 / 10)
    assert interval(*runs)[1] == pytest.approx(half), "identical responses to identical prompts"
    for number, run in enumerate(runs):
        run.prompts = [f"{prompt} of {number}" for prompt in run.prompts]
    assert interval(*runs)[1] == pytest.approx(half / 2), "four times as many prompts"


@pytest.mark.parametrize("seeds", [2, 3, 12])
def test_intervals_cover_the_truth_in_95_of_100_cases(seeds: int) -> None:
    """Simulated figures with a known mean, noise of seeds, and noise of shared prompts."""
    rng, covered = np.random.default_rng(3), 0
    for _ in range(400):
        prompts_P = rng.normal(size=60)
        figures = []
        for _ in range(seeds):
            values_P = 0.5 + prompts_P + rng.normal(scale=0.2) + rng.normal(size=60)
            run = finished_run([None] * 60, list(values_P), plad=["a"] * 60)
            figures.append(run.figures()["calibration_gain"])
        simulated = _interval(figures)
        covered += simulated.low <= 0.5 <= simulated.high
    assert covered >= 0.93 * 400


def test_a_figure_that_a_seed_lacks_is_left_out() -> None:
    runs = [
        finished_run(["a"], [0.0], plad=["a"], warmup=["x"], greedy_plad=["a"], greedy_warmup=["a"]),
        finished_run(["a"], [0.0], plad=["a"], warmup=["x"]),
    ]
    assert "greedy_win_rate_vs_warmup" in over_seeds(runs[:1])
    assert "greedy_win_rate_vs_warmup" not in over_seeds(runs)


def test_the_table_has_a_row_for_each_variant() -> None:
    run = finished_run(["a"], [0.0], plad=["a"], warmup=["x"])
    table = seeds_table([VariantFigures("default", 3, over_seeds([run])), VariantFigures("empty", 3, {})])
    cells = [list(column.cells) for column in table.columns]
    assert [str(cell[0]) for cell in cells[:3]] == ["default", "100.0 [100.0, 100.0]", "100.0 [100.0, 100.0]"]
    assert str(cells[-1][0]) == "0.00 [0.00, 0.00]"
    assert [str(cell[1]) for cell in cells[1:]] == ["–"] * 6


def test_an_entry_of_the_study_file_has_its_figures_beside_its_name() -> None:
    run = finished_run(["a"], [0.0], plad=["a"], warmup=["x"])
    entry = VariantFigures("default", 1, over_seeds([run])).to_json()
    assert (entry["variant"], entry["seeds"]) == ("default", 1)
    assert entry["rouge_l_plad"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_a_ranking_that_was_not_measured_before_the_round_gives_no_gain() -> None:
    run = finished_run(["a"], [0.0], plad=["a"], warmup=["x"])
    run.ranking = Ranking(pairs=4)
    assert "pair_accuracy_gain" not in over_seeds([run])
