"""Figures of a phase on storage that refuses them, or cuts a line short."""

from __future__ import annotations

from pathlib import Path

import pytest

from plad_dist.errors import RunFailed
from plad_dist.training.checkpoints.store import TrainState
from plad_dist.training.records.metrics_file import METRICS_FILE, read_metrics
from plad_dist.training.worker.metrics_log import MetricsLog


def state(step: int) -> TrainState:
    return TrainState(step, 4, 9, 1, "f", stage=3, optimizer="", dtype="")


def test_a_full_disk_ends_the_attempt_with_the_folder_of_the_figures_and_the_reason(tmp_path: Path) -> None:
    folder = tmp_path / "round-0"
    folder.mkdir()
    (folder / METRICS_FILE).symlink_to("/dev/full")
    log = MetricsLog(folder, 0, 3, None)
    with pytest.raises(RunFailed, match=r"round-0: cannot be written: .*No space left.*is kept"):
        log.write_step(state(1), {"loss": 1.0})
    with pytest.raises(RunFailed, match="No space left"):
        log.close()


def test_a_line_that_was_cut_short_takes_no_figures_of_the_next_attempt_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "round-0"
    for attempt in (1, 2):
        log = MetricsLog(folder, attempt, 3, None, attempt=attempt)
        log.write_step(state(attempt), {"loss": 1.0})
        log.close()
        path = folder / METRICS_FILE
        path.write_bytes(path.read_bytes() + b'{"time": 17')
    steps, _ = read_metrics(folder)
    assert [row["step"] for row in steps] == [1, 2]
