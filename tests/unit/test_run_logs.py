"""The log of a run: failures of its file are explained, and never shown as tracebacks."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from plad_dist.errors import RunFailed
from plad_dist.run_logs import TIMINGS, add_timing, log_to_run, read_timings
from plad_dist.rundir import RunDir
from plad_dist.timeline import StageTime


@pytest.fixture(autouse=True)
def no_other_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handlers that earlier tests left write to streams that pytest has closed."""
    monkeypatch.setattr(logging.getLogger("plad"), "handlers", [])


def test_a_log_that_cannot_be_opened_ends_the_command_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(RunFailed, match=r"logs: cannot be written: .*is kept"):
        log_to_run(RunDir.at(str(tmp_path)))


def test_a_line_that_a_full_disk_refuses_shows_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/plad.log").symlink_to("/dev/full")
    log_to_run(RunDir.at(str(tmp_path)))
    logging.getLogger("plad").error("a line")
    assert "Traceback" not in capsys.readouterr().err


def test_the_log_of_the_next_run_begins_although_the_last_lines_of_the_previous_one_are_lost(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name / "logs").mkdir(parents=True)
    (tmp_path / "first/logs/plad.log").symlink_to("/dev/full")
    log_to_run(RunDir.at(str(tmp_path / "first")))
    logging.getLogger("plad").error("a line")
    log_to_run(RunDir.at(str(tmp_path / "second")))
    logging.getLogger("plad").error("another line")
    assert "another line" in (tmp_path / "second/logs/plad.log").read_text()


def test_times_of_a_stage_add_up_over_commands(tmp_path: Path) -> None:
    run = RunDir.at(str(tmp_path))
    add_timing(run, "sample", StageTime(starting=60, waiting=5))
    add_timing(run, "pair", StageTime(computing=1))
    add_timing(run, "sample", StageTime(starting=40, computing=10))
    assert read_timings(run) == {"sample": StageTime(100, 10, 5), "pair": StageTime(computing=1)}


def test_damaged_times_count_as_missing(tmp_path: Path) -> None:
    run = RunDir.at(str(tmp_path))
    damaged = {"a": {"starting": "x"}, "b": {"sleeping": 1}, "c": 3, "d": None, "e": {"computing": 2}}
    run.storage.replace(TIMINGS, json.dumps(damaged).encode())
    assert read_timings(run) == {"e": StageTime(computing=2)}
    run.storage.replace(TIMINGS, b"[")
    assert read_timings(run) == {}
