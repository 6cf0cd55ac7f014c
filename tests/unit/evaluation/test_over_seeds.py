"""Figures over seeds: hand-worked means, intervals that cover the seed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from plad_dist.evaluation.metrics import score_system
from plad_dist.evaluation.over_seeds import Finished, _interval, over_seeds, seeds_table
from plad_dist.text_metrics import Output


def finished(references: list[str | None], correlation_gain: list[float], **answers: list[str]) -> Finished:
    """A run without its files. Answers by `<system>` (sampled) or `greedy_<system>`."""
    run = object.__new__(Finished)
    run.references = references
    run.prompts = [f"prompt {number}" for number in range(len(references))]
    run.scores = {}
    for key, texts in answers.items():
        prefix, _, system = key.rpartition("_")
        outputs = [Output(text, len(text.split()), "cut" not in text) for text in texts]
        run.scores[system, f"{prefix}_" if prefix else ""] = score_system(references, outputs)
    run.ranking = {"before": {"pair_accuracy": 0.5}, "after": {"pair_accuracy": 0.75}, "pairs": 4}
    run.correlation_gain = np.array(correlation_gain)
    return run


def test_a_figure_is_the_mean_over_seeds_of_the_mean_over_prompts() -> None:
    first = finished(["a b", "c d"], [0.5, np.nan], plad=["a b", "x"], warmup=["a", "x"], seqkd=["a b", "c d cut"])
    second = finished(["a b", None], [0.1, 0.3], plad=["a b", "x"], warmup=["x", "x"], seqkd=["a b", "x"])
    found = {name: interval.value for name, interval in over_seeds([first, second]).items()}
    assert found["rouge_l_plad"] == pytest.approx((0.5 + 1.0) / 2), "a prompt without reference does not count"
    assert found["win_rate_vs_warmup"] == pytest.approx((0.75 + 1.0) / 2)
    assert found["win_rate_vs_seqkd"] == pytest.approx((0.25 + 0.5) / 2)
    assert found["rouge_l_gain_over_warmup"] == pytest.approx(((1 - 2 / 3) / 2 + 1.0) / 2)
    assert found["no_eos_share_seqkd"] == pytest.approx((0.5 + 0.0) / 2)
    assert found["calibration_gain"] == pytest.approx((0.5 + 0.2) / 2)
    assert found["pair_accuracy_gain"] == pytest.approx(0.25)
    assert not any(name.startswith("greedy_") for name in found)


def interval(*runs: Finished) -> tuple[float, float]:
    """Value and half width of a win rate."""
    found = over_seeds(runs)["win_rate_vs_warmup"]
    assert found.high - found.value == pytest.approx(found.value - found.low)
    return found.value, found.high - found.value


def test_the_interval_covers_how_much_seeds_differ() -> None:
    """Each seed alone is certain; what is left is which seeds were drawn, by Student's t with one degree of freedom."""
    good = finished(["a"] * 50, [0.0] * 50, plad=["a"] * 50, warmup=["x"] * 50)
    tied = finished(["a"] * 50, [0.0] * 50, plad=["a"] * 50, warmup=["a"] * 50)
    assert interval(good) == (1.0, 0.0)
    value, half = interval(good, tied)
    assert value == 0.75
    assert half == pytest.approx(12.706 * 0.25 * math.sqrt(2) / math.sqrt(2))


def test_seeds_that_share_their_prompts_do_not_count_as_more_prompts() -> None:
    answers = {"plad": ["a", "x"] * 50, "warmup": ["x", "a"] * 50}
    runs = [finished(["a"] * 100, [0.0] * 100, **answers) for _ in range(4)]
    _, half = interval(runs[0])
    assert half == pytest.approx(1.959964 * 0.5 / 10)
    assert interval(*runs)[1] == pytest.approx(half), "the same answers to the same prompts"
    for number, run in enumerate(runs):
        run.prompts = [f"{prompt} of {number}" for prompt in run.prompts]
    assert interval(*runs)[1] == pytest.approx(half / 2), "four times as many prompts"


@pytest.mark.parametrize("seeds", [2, 3, 12])
def test_intervals_cover_the_truth_as_often_as_they_say(seeds: int) -> None:
    """Simulated win rates whose true mean is known, with noise of seeds and of prompts that all seeds share."""
    rng, covered = np.random.default_rng(3), 0
    for _ in range(400):
        prompts_P = rng.normal(size=60)
        figures = []
        for _ in range(seeds):
            values_P = 0.5 + prompts_P + rng.normal(scale=0.2) + rng.normal(size=60)
            run = finished([None] * 60, list(values_P), plad=["a"] * 60)
            figures.append(run.figures()["calibration_gain"])
        found = _interval(figures)
        covered += found.low <= 0.5 <= found.high
    assert covered >= 0.93 * 400


def test_only_figures_of_all_seeds_are_given() -> None:
    runs = [
        finished(["a"], [0.0], plad=["a"], warmup=["x"], greedy_plad=["a"], greedy_warmup=["a"]),
        finished(["a"], [0.0], plad=["a"], warmup=["x"]),
    ]
    assert "greedy_win_rate_vs_warmup" in over_seeds(runs[:1])
    assert "greedy_win_rate_vs_warmup" not in over_seeds(runs)


def test_the_table_has_a_row_for_each_variant() -> None:
    row: dict[str, Any] = {"variant": "default", "seeds": 3}
    run = finished(["a"], [0.0], plad=["a"], warmup=["x"])
    table = seeds_table([row | {name: each.to_json() for name, each in over_seeds([run]).items()}, row])
    cells = [list(column.cells) for column in table.columns]
    assert [str(cell[0]) for cell in cells[:3]] == ["default", "100.0 [100.0, 100.0]", "100.0 [100.0, 100.0]"]
    assert str(cells[-1][0]) == "0.00 [0.00, 0.00]"
    assert [str(cell[1]) for cell in cells[1:]] == ["–"] * 6
