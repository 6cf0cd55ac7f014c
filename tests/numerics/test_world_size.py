"""Identical students at any number of workers and after a resume, with real DeepSpeed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from plad_dist.rundir import RunDir
from tests.numerics.workers import config_with_pairs, losses, make_run, train

pytestmark = pytest.mark.engine
PHASE = "round-0"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDir]:
    """Rounds of 20 steps at 1, 2 and 3 workers, and at 2 workers with a resume after 10 steps."""
    runs = {}
    for name, workers, stop in (("1", 1, 0), ("2", 2, 0), ("3", 3, 0), ("resumed", 2, 10)):
        folder = tmp_path_factory.mktemp(f"world-{name}")
        raw: dict[str, Any] = config_with_pairs(folder)  # several micro-batches a step, and empty ones at three workers
        run = make_run(raw)
        if stop:
            train(folder, raw, PHASE, workers, stop)
        train(folder, raw, PHASE, workers)
        runs[name] = run
    return runs


def test_losses_are_the_same_at_one_two_and_three_workers(runs: dict[str, RunDir]) -> None:
    at_one = losses(runs["1"], PHASE)
    assert len(at_one) == 20
    assert at_one[-1] < at_one[0]
    for workers in ("2", "3"):
        assert losses(runs[workers], PHASE) == pytest.approx(at_one, rel=1e-4)


def test_a_resumed_run_ends_with_identical_weights(runs: dict[str, RunDir]) -> None:
    assert losses(runs["resumed"], PHASE) == losses(runs["2"], PHASE)
    straight = load_file(runs["2"].model(PHASE) / "model.safetensors")
    resumed = load_file(runs["resumed"].model(PHASE) / "model.safetensors")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
