"""Decisions of a training worker without an engine: best step, patience, export, learning rate."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from plad_dist.config import Optimizer, Phase
from plad_dist.training.agreement import StoppedError
from plad_dist.training.checkpoints.store import TrainState
from plad_dist.training.records.collapse import CheckpointProbe, CollapseRecord
from plad_dist.training.worker.divergence import Divergence, find_gradient_divergence
from plad_dist.training.worker.export_choice import choose_export
from plad_dist.training.worker.heldout import is_out_of_patience, with_evaluation
from plad_dist.training.worker.schedule import learning_rate_factor

STATE = TrainState(10, 80, 1000, 2, "f")
PHASE = Phase(evaluate_every=5, patience=2, best_by="loss", export="best")


def figures(loss: float) -> dict[str, float]:
    return {"loss": loss, "chosen_logp": -1.0, "pair_accuracy": 0.5}


def test_the_lowest_loss_is_the_best_and_later_evaluations_count_against_patience() -> None:
    state, is_best = with_evaluation(STATE, figures(2.0), PHASE)
    assert (is_best, state.best, state.best_step, state.evaluated) == (True, -2.0, 10, 10)
    state, is_best = with_evaluation(replace(state, step=15), figures(2.0), PHASE)
    assert (is_best, state.stale, is_out_of_patience(state, PHASE)) == (False, 1, False)
    state, is_best = with_evaluation(replace(state, step=20), figures(3.0), PHASE)
    assert (is_best, state.best_step, is_out_of_patience(state, PHASE)) == (False, 10, True)
    state, is_best = with_evaluation(replace(state, step=25), figures(1.0), PHASE)
    assert (is_best, state.best_step, state.stale) == (True, 25, 0)


@pytest.mark.parametrize(("step", "loss"), [(0, 1.0), (10, math.nan)])
def test_neither_the_start_nor_a_loss_that_is_not_a_number_is_the_best(step: int, loss: float) -> None:
    state, is_best = with_evaluation(replace(STATE, step=step), figures(loss), PHASE)
    assert (is_best, state.best, state.stale, state.evaluated) == (False, None, 0, step)


def test_a_phase_without_patience_never_runs_out_of_it() -> None:
    assert not is_out_of_patience(replace(STATE, stale=100), Phase(evaluate_every=5))


def job(export: str = "last") -> Any:
    return SimpleNamespace(name="round-0", phase=Phase(evaluate_every=5, export=export))  # type: ignore[arg-type]


def collapse(sound: int | None) -> CollapseRecord:
    return CollapseRecord("f", CheckpointProbe(0, 5.0, 1.0, 0.0), sound=sound, collapse="it never ends")


def test_the_present_weights_are_exported_unless_the_best_ones_are_another_steps() -> None:
    best_before, best_now = replace(STATE, best_step=5), replace(STATE, best_step=10)
    assert choose_export(job(), best_before, None).step is None
    assert choose_export(job("best"), best_before, None).step == 5
    assert choose_export(job("best"), best_now, None).step is None


def test_the_latest_sound_checkpoint_is_exported_after_a_collapse() -> None:
    choice = choose_export(job("best"), replace(STATE, best_step=8), collapse(sound=5))
    assert (choice.step, choice.quality) == (5, "latest sound")
    with pytest.raises(StoppedError, match=r"it never ends; no sound checkpoint is left.*training\.watch"):
        choose_export(job(), STATE, collapse(sound=None))


def test_a_divergence_names_the_figure_the_checkpoint_and_some_groups() -> None:
    assert find_gradient_divergence(1.5, ["a"]) is None
    divergence = find_gradient_divergence(math.inf, [f"group-{number}" for number in range(12)])
    assert divergence is not None
    message = divergence.message("round-0", 7, 5)
    assert (
        "round-0: step 7: the gradient norm is inf. The step was not taken. Kept: the checkpoint of step 5" in message
    )
    assert "group-9" in message
    assert "group-10" not in message
    assert message.endswith("...")
    assert "no checkpoint yet" in Divergence("x", []).message("round-0", 1, None)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1 / 3, 2 / 3, 1.0, 1.0]),
        ("linear", [1 / 3, 2 / 3, 1.0, 0.55]),
        ("cosine", [1 / 3, 2 / 3, 1.0, 0.55]),
    ],
)
def test_the_learning_rate_warms_up_and_decays_to_a_tenth(schedule: Any, factors: list[float]) -> None:
    optimizer = Optimizer(schedule=schedule, warmup_share=0.2)
    actual = [learning_rate_factor(optimizer, step, 10) for step in (0, 1, 2, 6)]
    assert actual == pytest.approx(factors)
    last = learning_rate_factor(optimizer, 10, 10)
    assert last == pytest.approx(1.0 if schedule == "constant" else 0.1)
