"""The log of a run: failures of its file are explained, and never shown as tracebacks."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from plad_dist.errors import RunFailed
from plad_dist.run_logs import log_to_run
from plad_dist.rundir import RunDir


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
