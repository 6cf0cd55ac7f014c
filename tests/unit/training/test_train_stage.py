"""Training from the driver's side, without workers."""

from __future__ import annotations

import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from ray.train import ControllerError

from plad_dist.config_file import parse_config
from plad_dist.errors import RunFailed
from plad_dist.progress import Progress
from plad_dist.rundir import RunDir
from plad_dist.training.driver import launch, trainer
from plad_dist.training.driver.launch import SavedProgress
from plad_dist.training.plan import plan_phase
from tests.numerics.workers import config_with_pairs, make_run


def test_ctrl_c_still_works_after_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train sets a handler of its own and leaves it."""
    raw = config_with_pairs(tmp_path)
    make_run(raw)
    config = parse_config(raw, "test")
    run = RunDir.of(config)

    class Trainer:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def fit(self) -> None:
            signal.signal(signal.SIGINT, lambda *_: None)

    monkeypatch.setattr(trainer, "Trainer", Trainer)
    monkeypatch.setattr(launch, "warm_workers", lambda config: nullcontext())
    monkeypatch.setattr(launch, "open_mailbox", lambda progress, last_phase, max_restarts: nullcontext())
    before = signal.getsignal(signal.SIGINT)
    launch.fit([plan_phase("round-0", config, run)], config, run, Progress())
    assert signal.getsignal(signal.SIGINT) is before


def test_a_controller_is_restarted_until_ten_starts_in_a_row_bring_no_new_checkpoint() -> None:
    nothing, something = SavedProgress("round-0", "no checkpoint"), SavedProgress("round-0", "step 5")
    starts = launch._StartLimit(nothing)
    error = ControllerError(ValueError("the rendezvous failed"))
    assert all(starts.may_restart_after(error, nothing) for _ in range(9))
    assert starts.may_restart_after(error, something), "there is a new checkpoint"
    assert [starts.may_restart_after(error, something) for _ in range(9)] == [True] * 8 + [False]


def test_a_controller_that_our_own_code_ended_is_not_restarted() -> None:
    saved = SavedProgress("round-0", "no checkpoint")
    error = ControllerError(RunFailed("waited 600 s for room for 4 workers"))
    assert not launch._StartLimit(saved).may_restart_after(error, saved)
