"""Progress lines."""

from __future__ import annotations

import logging
import time

import pytest

from plad_dist.progress import Progress
from plad_dist.timeline import Activity


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "plad"]


def wait_for_lines(caplog: pytest.LogCaptureFixture, count: int) -> list[str]:
    until = time.monotonic() + 30
    while len(lines(caplog)) < count and time.monotonic() < until:
        time.sleep(0.05)
    return lines(caplog)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    logger = logging.getLogger("plad")
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, "plad")
    return caplog


def test_silent_step_still_logs_its_activity_and_its_age(log: pytest.LogCaptureFixture) -> None:
    progress = Progress(every_s=0.1)
    with progress.timed("train round-0", Activity.STARTING):
        assert wait_for_lines(log, 2)[1].startswith("train round-0: starting, ")
        progress.enter(Activity.WAITING)
        count = len(lines(log))
        assert wait_for_lines(log, count + 2)[-1].startswith("train round-0: waiting, ")
    after = len(lines(log))
    time.sleep(1.2)
    assert len(lines(log)) == after


def test_step_that_reports_is_not_interrupted(log: pytest.LogCaptureFixture) -> None:
    progress = Progress(every_s=4.0)
    with progress.timed("pair", Activity.COMPUTING):
        until = time.monotonic() + 6.5
        while time.monotonic() < until:
            progress.say("a line")
            time.sleep(0.02)
    assert [line for line in lines(log) if "so far" in line] == []


def test_seconds_of_a_step_are_told_apart_by_activity() -> None:
    progress = Progress()
    with progress.timed("sample", Activity.STARTING) as clock:
        progress.enter(Activity.COMPUTING)
    spent = clock.read()
    assert spent.starting > 0
    assert spent.computing > 0
    assert spent.waiting == 0
