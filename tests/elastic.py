"""A phase that trains on a cluster of namespaces while things happen to it, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from plad_dist.training.records.metrics_file import read_metrics
from plad_dist.verify.run import verify
from tests.nodes import Cluster, Node, available, wait
from tests.numerics.workers import config_with_pairs, make_run, train

PHASE = "round-0"
_WHY = available()
MARKS = [
    pytest.mark.engine,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(_WHY is not None, reason=str(_WHY)),
]
# At a learning rate at which float error stays float error: where a run tears through its first steps, two that differ by a rounding
# part by per cents before they meet again, whatever happens to them.
ROUND: dict[str, Any] = {"epochs": 1000, "batch_groups": 48, "optimizer": {"lr": 3e-4}}


class Training:
    """A command that trains a phase of a run of its own, on one to two workers.

    Args:
        phase: what is different from the round of these tests.
        settings: of the `training` section.
    """

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        steps: int,
        every: int,
        phase: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.raw = config_with_pairs(folder, max_steps=steps, checkpoint_every=every, **(ROUND | (phase or {})))
        self.raw["training"] |= {"num_workers": [1, 2], "resize_check_s": 2} | settings
        self.run = make_run(self.raw)
        self._folder, self.log_file = folder, folder / "log"
        self.start(cluster)

    def start(self, cluster: Cluster) -> None:
        """Run the command, again where it has ended."""
        self.raw["cluster"] = {"address": cluster.address, "start_timeout_s": 300}
        path = self._folder / "run.yaml"
        path.write_text(yaml.safe_dump(self.raw))
        self.command: subprocess.Popen[bytes] = cluster.run("train", str(path), "--phase", PHASE, log=self.log_file)

    def log(self) -> str:
        return self.log_file.read_text()

    def all_rows(self) -> list[dict[str, Any]]:
        """Figures of all steps in the order in which they were taken, those that were taken twice too."""
        path = self.run.root / "events" / PHASE / "metrics.jsonl"
        rows = []
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                rows.append(json.loads(line))
            except ValueError:  # half written
                continue
        return [row for row in rows if "loss" in row]

    def rows(self) -> list[dict[str, Any]]:
        """Figures of the steps that count."""
        return read_metrics(self.run.root / "events" / PHASE)[0]

    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows()]

    def sizes(self) -> list[int]:
        """Numbers of workers, one for each change."""
        sizes = [row["workers"] for row in self.rows()]
        return [size for index, size in enumerate(sizes) if index == 0 or sizes[index - 1] != size]

    def last_step(self) -> int:
        rows = self.all_rows()
        return int(rows[-1]["step"]) if rows else 0

    def wait_for_steps(self, count: int) -> None:
        """So many steps more than now."""
        goal = self.last_step() + count
        self.wait(lambda: self.last_step() >= goal, f"step {goal}")

    def recover(self, blow: float, workers: int) -> tuple[float, int]:
        """Seconds from a blow to the first step of a later attempt at a size, and how many steps were taken twice."""
        attempt = max(row["attempt"] for row in self.all_rows() if row["time"] <= blow)

        def after() -> list[dict[str, Any]]:
            return [row for row in self.all_rows() if row["attempt"] > attempt and row["workers"] == workers]

        self.wait(after, f"a step with {workers} workers")
        first = after()[0]
        last = max(row["step"] for row in self.all_rows() if row["attempt"] <= attempt)
        return first["time"] - blow, last - (first["step"] - 1)

    def finish(self) -> None:
        code = self.command.wait(timeout=1200)
        assert code == 0, self.log()[-4000:]

    def wait(self, condition: Any, what: str, seconds: float = 300) -> None:
        """While the command runs."""

        def found() -> Any:
            ended = self.command.poll() is not None
            met = condition()
            assert met or not ended, self.log()[-4000:]
            return met

        wait(found, seconds, f"{what}; {self.log_file}")


def kill_worker(node: Node) -> None:
    _tell_worker(node, signal.SIGKILL)


def freeze_worker(node: Node) -> None:
    _tell_worker(node, signal.SIGSTOP)


def thaw_worker(node: Node) -> None:
    _tell_worker(node, signal.SIGCONT)


def _tell_worker(node: Node, number: int) -> None:
    """Send a signal to the process of the training worker on a node."""
    os.kill(node.processes("ray::RayTrainWorker")[0], number)


def undisturbed_student(folder: Path, steps: int, every: int) -> dict[str, torch.Tensor]:
    """The student of the same phase with nothing happening to it."""
    raw = config_with_pairs(folder, max_steps=steps, checkpoint_every=every, **ROUND)
    run = make_run(raw)
    train(folder, raw, PHASE, 2)
    return load_file(run.model(PHASE) / "model.safetensors")


def begun_at(training: Training) -> list[int]:
    """The step that each attempt went on from, in order."""
    folder = training.run.root / "events" / PHASE / "attempts"
    return [json.loads(path.read_text())["step"] or 0 for path in sorted(folder.glob("*.json"))]


def expect_the_same(training: Training, undisturbed: dict[str, torch.Tensor]) -> None:
    """Every step once, sound checkpoints, and weights that differ by float error alone."""
    steps = int(training.raw["training"]["round"]["max_steps"])
    assert [row["step"] for row in training.rows()] == list(range(1, steps + 1))
    checked, problems = verify(training.run.storage.url)
    kept = [
        item for item in checked if item.path == f"checkpoints/{PHASE}"
    ]  # its pairs were made by hand, without samples
    assert len(kept) == 1
    assert [*problems, *kept[0].problems] == []
    found = load_file(training.run.model(PHASE) / "model.safetensors")
    for name, expected in undisturbed.items():
        difference = float((found[name] - expected).norm() / expected.norm())
        assert difference <= 1e-4, f"{name}: {difference}"
