"""A model that vLLM lacks, sampled by a fleet whose engine is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from plad_dist.config_file import parse_config
from plad_dist.data.prompts import prepare
from plad_dist.progress import Progress
from plad_dist.rundir import RunDir
from plad_dist.sampling.stage import sample
from tests.tiny import sampling_config
from tests.tiny_generators import make_generator

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def run_of(folder: Path, model: Path, *, kills: bool) -> tuple[list[dict[str, Any]], list[int]]:
    """Sample a student and return its rows, and the engine processes that were killed."""
    folder.mkdir()
    raw = sampling_config(folder, 160, max_tokens=120)
    raw["student"]["path"] = str(model)
    # In float64, no sum depends on the rows of the batch by more than the scores are rounded.
    raw["sampling"]["student"] = {"max_tokens": 120, "engine": {"max_num_seqs": 16, "dtype": "float64"}}
    config = parse_config(raw, "test")
    run = RunDir.of(config)
    prepare(config, run.storage)
    killed: list[int] = []
    output = folder / "run/samples/student/round-0"

    def kill() -> None:
        deadline = time.monotonic() + 200
        while len(list(output.glob("part-*.arrow"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        for process in psutil.Process().children(recursive=True):
            if process.cmdline()[:1] == ["plad:engine"]:
                killed.append(process.pid)
                os.kill(process.pid, signal.SIGKILL)

    if kills:
        threading.Thread(target=kill, daemon=True).start()
    sample(config, run, Progress(), roles=["student"])
    return run.samples("student").read().to_pylist(), killed


def test_a_fleet_whose_engine_is_killed_samples_the_rows_of_an_undisturbed_one(tmp_path: Path) -> None:
    model = make_generator(tmp_path / "t5", "t5")
    expected, _ = run_of(tmp_path / "undisturbed", model, kills=False)
    rows, killed = run_of(tmp_path / "killed", model, kills=True)
    assert killed
    assert not any(row["error"] for row in expected)
    assert len({row["num_tokens"] for row in expected}) > 1
    assert [row["token_ids"] for row in rows] == [row["token_ids"] for row in expected]
    assert [row["text"] for row in rows] == [row["text"] for row in expected]
    assert [row["logprob"] for row in rows] == pytest.approx([row["logprob"] for row in expected], abs=1e-3)
