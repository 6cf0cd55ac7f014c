"""Two real commands on one run: the later one finishes it, the earlier one ends within seconds."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import plad, write_config
from tests.tiny import sampling_config

pytestmark = [pytest.mark.engine, pytest.mark.timeout(2400)]

_HANG_S = 300  # far longer than to look at the claim, and to stop actors that still start, and Ray


class Command:
    """`plad sample` in a process of its own."""

    def __init__(self, config: Path, log: Path) -> None:
        self._log = log
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from plad_dist.cli import main; main()", "sample", str(config)],
            stdout=subprocess.DEVNULL,
            stderr=log.open("ab"),
            cwd=log.parent,
            start_new_session=True,
        )

    @property
    def log(self) -> str:
        return self._log.read_text()


def wait(condition: Callable[[], bool], command: Command, seconds: float = 900) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert command.process.poll() is None, command.log[-3000:]
        assert time.monotonic() < deadline, command.log[-3000:]
        time.sleep(0.1)


def test_of_two_runs_the_later_one_finishes_and_the_earlier_one_ends_within_seconds(tmp_path: Path) -> None:
    raw = sampling_config(tmp_path, 120, block_size=16, max_tokens=8)
    config = write_config(tmp_path, raw)
    assert plad("prepare", str(config)).returncode == 0
    commands = [first := Command(config, tmp_path / "first.log")]
    try:
        wait(lambda: "sample: begins" in first.log, first)
        refused = plad("sample", str(config), "run.seed=6", cwd=tmp_path)
        assert refused.returncode == 2, refused.stderr
        assert "belongs to another config" in refused.stderr
        assert first.process.poll() is None, "a refused command ends nobody"
        commands.append(second := Command(config, tmp_path / "second.log"))
        wait((tmp_path / "run" / "claims" / "00003.json").exists, second)
        assert first.process.wait(timeout=_HANG_S) == 1, first.log[-3000:]
        assert "another command, `plad sample` on " in first.log
        assert f"process {second.process.pid}), has taken over the run" in first.log
        assert "Traceback" not in first.log
        assert second.process.wait(timeout=1800) == 0, second.log[-3000:]
    finally:
        for command in commands:
            command.process.kill()
    verified = plad("verify", str(tmp_path / "run"))
    assert verified.returncode == 0, verified.stdout
    assert "nothing is wrong" in verified.stdout
