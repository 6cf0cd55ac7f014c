"""Collapse watch of a round: checkpoints of real workers, probed by a real engine."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.conftest import plad, tiny_config, write_config, write_prompts

pytestmark = [pytest.mark.engine, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Address of a cluster with more cores than the trainer takes."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    yield cluster.address
    cluster.shutdown()
    ray.shutdown()


def watched_run(folder: Path, address: str, watch: dict[str, Any]) -> tuple[Path, subprocess.CompletedProcess[str]]:
    write_prompts(folder)
    raw = tiny_config(folder)
    raw["cluster"] = {"address": address}
    raw["training"] |= {"num_workers": 1, "watch": {"prompts": 8} | watch}
    raw["training"]["round"] |= {"epochs": 1000, "max_steps": 2500, "checkpoint_every": 20}
    del raw["training"]["seqkd"]
    config = write_config(folder, raw)
    command = plad("run", str(config), timeout=1500)
    return folder / "run", command


def test_checkpoints_are_probed_while_training_continues(tmp_path: Path, address: str) -> None:
    root, command = watched_run(
        tmp_path, address,
        {"min_end_share": None, "max_length_ratio": None, "max_repetition": None, "min_win_rate": None},
    )  # fmt: skip
    assert command.returncode == 0, command.stderr[-4000:]
    record = json.loads((root / "events/round-0/collapse.json").read_text())
    assert record["probes"], command.stderr[-4000:]
    assert record["collapse"] is None
    steps = [probe["step"] for probe in record["probes"]]
    assert steps == sorted(set(steps))
    assert all(step % 20 == 0 for step in steps)
    assert all(0 < probe["tokens"] <= 8 for probe in record["probes"])
    assert "watch round-0: step" in command.stderr
    assert "Responses of the student during" in (root / "eval/round-0/report.html").read_text()


def test_a_collapse_ends_the_round_early_and_names_the_bound(tmp_path: Path, address: str) -> None:
    """No student can meet these bounds, so there is no sound checkpoint either."""
    root, command = watched_run(tmp_path, address, {"min_win_rate": 1.0, "max_length_ratio": 1e-3})
    assert command.returncode == 1, command.stderr[-4000:]
    assert "max_length_ratio" in command.stderr
    assert "Traceback" not in command.stderr
    assert not (root / "models/round-0").exists()
    metrics = (root / "events/round-0/metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[-1])["step"] < 2500
