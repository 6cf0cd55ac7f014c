"""Workers that die at named points of a checkpoint's commit, and checks after the resume."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from plad_dist.data.storage import Storage
from plad_dist.rundir import RunDir
from plad_dist.training.checkpoints import resuming as module
from plad_dist.training.checkpoints.saving import Checkpoints
from plad_dist.training.checkpoints.store import CheckpointStore, TrainState
from plad_dist.training.records.metrics_file import read_metrics
from plad_dist.verify.repair import repair
from plad_dist.verify.run import verify
from tests.numerics.workers import config_with_pairs, losses, make_run, start, train, train_phase

PHASE, EVERY, STEPS = "round-0", 5, 15


def prepared_run(folder: Path, **round_: Any) -> tuple[dict[str, Any], RunDir]:
    """Return the config and the directory of a run that is ready to train."""
    raw = config_with_pairs(folder, **({"max_steps": STEPS, "checkpoint_every": EVERY} | round_))
    return raw, make_run(raw)


def undisturbed_run(folder: Path) -> RunDir:
    """Train the phase at two workers without faults."""
    raw, run = prepared_run(folder)
    train(folder, raw, PHASE, 2)
    return run


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return load_file(run.model(PHASE) / "model.safetensors")


def steps(run: RunDir) -> list[int]:
    return [row["step"] for row in read_metrics(run.root / "events" / PHASE)[0]]


def first_step_of_last_attempt(run: RunDir) -> int:
    """Return the first step of the last attempt, which shows the checkpoint that it resumed from.

    The losses cannot show it, because repeated steps give the same figures.
    """
    rows = read_metrics(run.root / "events" / PHASE)[0]
    return min(int(row["step"]) for row in rows if row["attempt"] == max(row["attempt"] for row in rows))


def store(run: RunDir) -> CheckpointStore:
    return CheckpointStore(run.storage, PHASE, None)


def checkpoint_problems(run: RunDir) -> list[str]:
    """Return the problems of the checkpoints that `plad verify` reports."""
    return [
        line for item in verify(run.storage.url)[0] if item.path.startswith("checkpoints") for line in item.problems
    ]


def die_when(owner: Any, name: str, when: Callable[..., bool], *, after: bool) -> None:
    """Kill this process before or after a call of a method."""
    real = getattr(owner, name)

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        is_due = when(self, *arguments)
        if is_due and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(self, *arguments, **named)
        if is_due:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, call)


def at_second_save(_: Any, engine: Any, state: TrainState, *_rest: Any) -> bool:
    return state.step == 2 * EVERY


def in_second_folder(_: Any, key: str, *_rest: Any, ending: str) -> bool:
    return f"step-{2 * EVERY:08d}" in key and key.endswith(ending)


# The point at which a worker dies, its rank, and the function that arms it.
POINTS: dict[str, tuple[int, Callable[[], None]]] = {
    "before anything is written": (1, partial(die_when, Checkpoints, "save", at_second_save, after=False)),
    "staged and not uploaded": (0, partial(die_when, Checkpoints, "save", at_second_save, after=True)),
    "between the ranks: one has uploaded nothing": (
        1, partial(die_when, Storage, "upload", partial(in_second_folder, ending=".pt"), after=False),
    ),
    "between the ranks: one has not listed its files": (
        1, partial(die_when, Storage, "replace", partial(in_second_folder, ending="rank-00001.json"), after=False),
    ),
    "before the commit": (
        0, partial(die_when, Storage, "create", partial(in_second_folder, ending="state.json"), after=False),
    ),
    "after the commit": (
        0, partial(die_when, Storage, "create", partial(in_second_folder, ending="state.json"), after=True),
    ),
    "while old checkpoints are pruned": (
        0, partial(die_when, Storage, "delete_folder", lambda self, folder: True, after=False),
    ),
}  # fmt: skip


def commit_before_the_next_step() -> None:
    """Commit every checkpoint of this process before the next step.

    Otherwise a step gets no checkpoint while the previous one is still being uploaded.
    """
    Checkpoints.is_uploading = property(lambda self: bool(self.drain()))  # type: ignore[assignment, method-assign]


def train_and_die(point: str, raw: dict[str, Any], phase: str, stop: int) -> None:
    commit_before_the_next_step()
    rank, arm = POINTS[point]
    if dist.get_rank() == rank:
        arm()
    train_phase(raw, phase, stop)


def killed_at(point: str, tmp_path: Path, undisturbed: RunDir) -> None:
    """Kill a worker at a point of a commit; expect an identical student and few lost steps."""
    raw, run = prepared_run(tmp_path, keep_checkpoints=1)
    processes = start(tmp_path, raw, PHASE, 2, work=partial(train_and_die, point))
    rank, _ = POINTS[point]
    processes[rank].join(timeout=200)
    for process in processes:
        process.kill()
        process.join()
    assert processes[rank].exitcode == -signal.SIGKILL, (tmp_path / f"worker-{rank}.log").read_text()[-2000:]
    newest, damaged = store(run).newest()
    assert not damaged, "a checkpoint is committed completely or not at all"
    assert newest is not None
    assert newest.state.step >= EVERY
    train(tmp_path, raw, PHASE, 2)
    assert first_step_of_last_attempt(run) == newest.state.step + 1
    assert losses(run, PHASE) == losses(undisturbed, PHASE)
    assert steps(run) == list(range(1, STEPS + 1))
    for name, expected in weights(undisturbed).items():
        assert torch.equal(weights(run)[name], expected), name
    assert checkpoint_problems(run) == []
    assert len(list((run.root / "checkpoints" / PHASE).glob("step-*/state.json"))) == 1


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def alter(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def lose(file: Path) -> None:
    file.unlink()


def skipped_when_damaged(damage: Callable[[Path], None], tmp_path: Path, undisturbed: RunDir) -> None:
    """Damage the newest checkpoint: the one before it is used, and the student is identical."""
    raw, run = prepared_run(tmp_path)
    train(tmp_path, raw, PHASE, 2, stop=EVERY)
    train(tmp_path, raw, PHASE, 2, stop=EVERY + 2)
    (file,) = (run.root / "checkpoints" / PHASE / f"step-{EVERY + 2:08d}").rglob("*rank_1_*optim_states.pt")
    damage(file)
    (problem,) = checkpoint_problems(run)
    assert file.name in problem
    assert "resumes from the one before" in problem
    train(tmp_path, raw, PHASE, 2)
    assert first_step_of_last_attempt(run) == EVERY + 1
    assert losses(run, PHASE) == losses(undisturbed, PHASE)
    repair(run.storage.url, verify(run.storage.url)[0])
    assert checkpoint_problems(run) == []


def die_while_resharding(raw: dict[str, Any], phase: str, stop: int) -> None:
    """Train a phase, and die when a checkpoint of another size is loaded."""

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    module.load_resharded = die
    train_phase(raw, phase, stop)


def resized_in_the_middle(tmp_path: Path, undisturbed: RunDir) -> None:
    """Resize from 2 workers to 1, with a death while the checkpoint is loaded, then to 3."""
    raw, run = prepared_run(tmp_path)
    train(tmp_path, raw, PHASE, 2, stop=4)
    (process,) = start(tmp_path, raw, PHASE, 1, work=die_while_resharding)
    process.join(timeout=200)
    assert process.exitcode == -signal.SIGKILL
    train(tmp_path, raw, PHASE, 1, stop=9)
    train(tmp_path, raw, PHASE, 3)
    assert losses(run, PHASE) == pytest.approx(losses(undisturbed, PHASE), rel=1e-4)
    assert steps(run) == list(range(1, STEPS + 1))
    assert [row["workers"] for row in read_metrics(run.root / "events" / PHASE)[0]] == [2] * 4 + [1] * 5 + [3] * 6
    resized = weights(run)
    for name, expected in weights(undisturbed).items():
        assert float((resized[name] - expected).norm() / expected.norm()) <= 1e-4, name


CASES = ("several sub-groups", "muon", "adapters", "offloaded")


def resized_with(case: str, tmp_path: Path) -> None:
    """Resize other states and layouts of the optimizer in the middle of a phase."""
    changes: dict[str, Any] = {"optimizer": {"name": "muon", "lr": 1e-2, "adam_lr": 5e-3}} if case == "muon" else {}
    runs = {}
    for name, plan in (("straight", [(2, 0)]), ("resized", [(2, 4), (1, 8), (2, 0)])):
        folder = tmp_path / name
        folder.mkdir()
        raw, run = prepared_run(folder, max_steps=10, **changes)
        settings = json.loads(Path(raw["training"]["deepspeed"]).read_text())
        if case == "several sub-groups":
            settings["zero_optimization"]["sub_group_size"] = 2000
        if case == "offloaded":
            settings["zero_optimization"] |= {
                "offload_optimizer": {"device": "cpu"},
                "offload_param": {"device": "cpu"},
            }
        Path(raw["training"]["deepspeed"]).write_text(json.dumps(settings))
        if case == "adapters":
            raw["training"]["lora"] = {"r": 4, "alpha": 8}
        for workers, stop in plan:
            train(folder, raw, PHASE, workers, stop=stop)
        runs[name] = run
    assert losses(runs["resized"], PHASE) == pytest.approx(losses(runs["straight"], PHASE), rel=1e-4)
