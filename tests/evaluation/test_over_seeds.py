"""Figures over seeds: hand-worked means, intervals that cover the seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from plad_dist.evaluation.metrics import Output, score_system
from plad_dist.evaluation.over_seeds import Finished, over_seeds, seeds_table


def finished(references: list[str | None], correlation_gain: list[float], **answers: list[str]) -> Finished:
    """A run without its files. Answers by `<system>` (sampled) or `greedy_<system>`."""
    run = object.__new__(Finished)
    run.references = references
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


def test_the_interval_covers_how_much_seeds_differ() -> None:
    """Each seed alone is certain; what is left is which seeds were drawn."""
    good = finished(["a"] * 50, [0.0] * 50, plad=["a"] * 50, warmup=["x"] * 50)
    bad = finished(["a"] * 50, [0.0] * 50, plad=["x"] * 50, warmup=["a"] * 50)
    alone = over_seeds([good])["win_rate_vs_warmup"]
    assert (alone.low, alone.value, alone.high) == (1.0, 1.0, 1.0)
    both = over_seeds([good, bad])["win_rate_vs_warmup"]
    assert (both.low, both.value, both.high) == (0.0, 0.5, 1.0)


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
    assert table.row_count == 2
