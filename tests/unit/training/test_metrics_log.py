"""Figures of a phase on storage that refuses them."""

from __future__ import annotations

from pathlib import Path

import pytest

from plad_dist.errors import RunFailed
from plad_dist.training.checkpoints.store import TrainState
from plad_dist.training.records.metrics_file import METRICS_FILE
from plad_dist.training.worker.metrics_log import MetricsLog


def test_a_full_disk_ends_the_attempt_with_the_folder_of_the_figures_and_the_reason(tmp_path: Path) -> None:
    folder = tmp_path / "round-0"
    folder.mkdir()
    (folder / METRICS_FILE).symlink_to("/dev/full")
    log = MetricsLog(folder, 0, 3, None)
    with pytest.raises(RunFailed, match=r"round-0: cannot be written: .*No space left.*is kept"):
        log.write_step(TrainState(1, 4, 9, 1, "f", stage=3, optimizer="", dtype=""), {"loss": 1.0})
    with pytest.raises(RunFailed, match="No space left"):
        log.close()
