"""A phase that trains under faults on a cluster of namespaces, and checks of its results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file

from plad_dist.training.records.metrics_file import STARTS_FILE, read_metrics
from plad_dist.verify.run import verify
from tests.nodes import Cluster, Node, available, wait
from tests.numerics.workers import config_with_pairs, make_run, train

PHASE = "round-0"
WORKER, TRAINING, NURSERY = "ray::RayTrainWorker", "plad:train", "plad:nursery"  # names of processes
STEPS, EVERY = 160, 10  # of the phase, and between its checkpoints
_WHY = available()
MARKS = [
    pytest.mark.engine,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(_WHY is not None, reason=str(_WHY)),
]
# The learning rate is low, so that float error stays float error: at a high one, two runs that
# differ by a rounding part by per cents in their first steps, even without faults.
ROUND: dict[str, Any] = {"epochs": 1000, "batch_groups": 48, "optimizer": {"lr": 3e-4}}


class Recovery(NamedTuple):
    """Recovery from a fault.

    Attributes:
        seconds: from the fault to the first step of a later attempt.
        stopped_s: seconds between that step and the last one before it.
        lost_steps: number of repeated steps.
        parts: seconds by part.
    """

    seconds: float
    stopped_s: float
    lost_steps: int
    parts: dict[str, float]


class Training:
    """Command that trains a phase of its own run on one to two workers.

    Args:
        phase: keys of the phase that differ from `ROUND`.
        warm_starts: as in the `cluster` section.
        settings: further keys of the `training` section.
    """

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        steps: int = STEPS,
        every: int = EVERY,
        phase: dict[str, Any] | None = None,
        *,
        warm_starts: bool = True,
        **settings: Any,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.raw = config_with_pairs(folder, max_steps=steps, checkpoint_every=every, **(ROUND | (phase or {})))
        self.raw["training"] |= {"num_workers": [1, 2], "resize_check_s": 2} | settings
        self.run = make_run(self.raw)
        self._folder, self.log_file, self._warm_starts = folder, folder / "log", warm_starts
        self.start(cluster)

    def start(self, cluster: Cluster) -> None:
        """Start the command; call it again after the command has ended."""
        self.raw["cluster"] = {
            "address": cluster.address, "start_timeout_s": 300, "warm_starts": self._warm_starts,
        }  # fmt: skip
        path = self._folder / "run.yaml"
        path.write_text(yaml.safe_dump(self.raw))
        self.command: subprocess.Popen[bytes] = cluster.run("train", str(path), "--phase", PHASE, log=self.log_file)

    def log(self) -> str:
        return self.log_file.read_text()

    def all_rows(self) -> list[dict[str, Any]]:
        """Return the figures of all steps in the order of time, including repeated steps."""
        path = self.run.root / "events" / PHASE / "metrics.jsonl"
        rows = []
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                rows.append(json.loads(line))
            except ValueError:  # half written
                continue
        return [row for row in rows if "loss" in row]

    def rows(self) -> list[dict[str, Any]]:
        """Return the figures of each step, by the latest attempt that took it."""
        return read_metrics(self.run.root / "events" / PHASE)[0]

    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows()]

    def sizes(self) -> list[int]:
        """Return the sizes of the worker groups in order, without repetitions."""
        sizes = [row["workers"] for row in self.rows()]
        return [size for index, size in enumerate(sizes) if index == 0 or sizes[index - 1] != size]

    def last_step(self) -> int:
        rows = self.all_rows()
        return int(rows[-1]["step"]) if rows else 0

    def wait_for_steps(self, count: int) -> None:
        """Wait until the command has taken more steps."""
        goal = self.last_step() + count
        self.wait(lambda: self.last_step() >= goal, f"step {goal}")

    def recover(self, fault_at: float, workers: int) -> Recovery:
        """Wait for the first step of a later attempt at a size."""
        attempt = max(row["attempt"] for row in self.all_rows() if row["time"] <= fault_at)

        def rows_after() -> list[dict[str, Any]]:
            return [row for row in self.all_rows() if row["attempt"] > attempt and row["workers"] == workers]

        self.wait(rows_after, f"a step with {workers} workers")
        first = rows_after()[0]
        last = max((row for row in self.all_rows() if row["attempt"] <= attempt), key=lambda row: int(row["step"]))
        return Recovery(
            first["time"] - fault_at,
            first["time"] - last["time"],
            last["step"] - (first["step"] - 1),
            self._parts(first, fault_at),
        )

    def _parts(self, first: dict[str, Any], fault_at: float) -> dict[str, float]:
        """Return the parts of a recovery that led to a step."""

        def starts() -> list[dict[str, float]]:
            path = self.run.root / "events" / PHASE / STARTS_FILE
            lines = path.read_text().splitlines() if path.is_file() else []
            return [row["parts"] for row in map(json.loads, lines) if row["attempt"] == first["attempt"]]

        self.wait(starts, f"the start of attempt {first['attempt']}")
        (parts,) = starts()
        group = first["time"] - fault_at - sum(parts.values())
        return {"fault to Ray's worker": round(group, 1)} | {name: round(value, 1) for name, value in parts.items()}

    def finish(self) -> None:
        code = self.command.wait(timeout=1200)
        assert code == 0, self.log()[-4000:]

    def wait(self, condition: Any, description: str, seconds: float = 300) -> None:
        """Wait for a condition while the command runs; fail if the command ends first."""

        def is_met() -> Any:
            has_ended = self.command.poll() is not None
            met = condition()
            assert met or not has_ended, self.log()[-4000:]
            return met

        wait(is_met, seconds, f"{description}; {self.log_file}")


def kill_worker(node: Node) -> None:
    _signal_worker(node, signal.SIGKILL)


def freeze_worker(node: Node) -> None:
    _signal_worker(node, signal.SIGSTOP)


def thaw_worker(node: Node) -> None:
    _signal_worker(node, signal.SIGCONT)


def kill_training(node: Node) -> None:
    os.kill(node.processes(TRAINING)[0], signal.SIGKILL)


def freeze_training(node: Node) -> None:
    os.kill(node.processes(TRAINING)[0], signal.SIGSTOP)


def _signal_worker(node: Node, number: int) -> None:
    """Send a signal to the Ray worker of a rank, which is not the process that trains."""
    os.kill(node.processes(WORKER)[0], number)


def undisturbed_student(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the same phase trained without faults."""
    raw = config_with_pairs(folder, max_steps=STEPS, checkpoint_every=EVERY, **ROUND)
    run = make_run(raw)
    train(folder, raw, PHASE, 2)
    return load_file(run.model(PHASE) / "model.safetensors")


def resumed_steps(training: Training) -> list[int]:
    """Return the step from which each attempt started or resumed, in order."""
    folder = training.run.root / "events" / PHASE / "attempts"
    return [json.loads(path.read_text())["step"] or 0 for path in sorted(folder.glob("*.json"))]


def expect_same_student(training: Training, undisturbed: dict[str, torch.Tensor]) -> None:
    """Check that each step counts once, checkpoints are sound, and weights are equal.

    The weights may differ by float error.
    """
    steps = int(training.raw["training"]["round"]["max_steps"])
    assert [row["step"] for row in training.rows()] == list(range(1, steps + 1))
    checked, problems = verify(training.run.storage.url)
    # Only the checkpoints: the pairs were written by hand and lack their samples.
    (checkpoints,) = (item for item in checked if item.path == f"checkpoints/{PHASE}")
    assert [*problems, *checkpoints.problems] == []
    weights = load_file(training.run.model(PHASE) / "model.safetensors")
    for name, expected in undisturbed.items():
        difference = float((weights[name] - expected).norm() / expected.norm())
        assert difference <= 1e-4, f"{name}: {difference}"
