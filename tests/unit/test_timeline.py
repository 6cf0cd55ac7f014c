"""Clocks of stages and of starts."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest

from plad_dist.timeline import Activity, StageClock, StageTime, StartClock, parts_text


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `time.monotonic()` advance by a second with each call."""
    seconds = itertools.count(100.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))


def test_every_second_of_a_stage_counts_for_one_activity(clock: Any) -> None:
    stage = StageClock(Activity.STARTING)
    stage.enter(Activity.COMPUTING)
    stage.enter(Activity.WAITING)
    stage.enter(Activity.COMPUTING)
    assert stage.read() == StageTime(starting=1, computing=2, waiting=1)
    assert stage.read().total == 5


def test_parts_of_a_start_add_up_to_its_duration(clock: Any) -> None:
    start = StartClock(began=97.0)
    start.end("workers", at=98.5)
    start.end("process")
    start.end("imports")
    start.end("imports")
    assert start.parts == {"workers": 1.5, "process": 1.5, "imports": 2.0}
    assert parts_text(start.parts) == "5.0 s: workers 1.5, process 1.5, imports 2.0"
