"""The log of a run: failures of its file are explained, and never shown as tracebacks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from plad_dist.errors import RunFailed
from plad_dist.run_logs import log_to_run
from plad_dist.rundir import RunDir


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    logger = logging.getLogger("plad")
    before = list(logger.handlers)
    yield
    logger.handlers = before


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
