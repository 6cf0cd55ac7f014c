"""Training as the driver sees it."""

from __future__ import annotations

import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from plad_dist.config_file import parse_config
from plad_dist.progress import Progress
from plad_dist.rundir import RunDir
from plad_dist.training.driver import stage
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

    monkeypatch.setattr("ray.train.torch.TorchTrainer", Trainer)
    monkeypatch.setattr(stage, "_open_mailbox", lambda progress, waiting: nullcontext())
    before = signal.getsignal(signal.SIGINT)
    stage._fit([plan_phase("round-0", config, run)], config, run, Progress())
    assert signal.getsignal(signal.SIGINT) is before
