"""Workers that are killed at named points of a checkpoint's commit, and what must hold when training has gone on."""

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
from plad_dist.training.checkpoints import saving as module
from plad_dist.training.checkpoints.saving import Checkpoints
from plad_dist.training.checkpoints.store import CheckpointStore, TrainState
from plad_dist.training.records.metrics_file import read_metrics
from plad_dist.verify.repair import repair
from plad_dist.verify.run import verify
from tests.numerics.workers import config_with_pairs, losses, make_run, start, train, train_phase

PHASE, EVERY, STEPS = "round-0", 5, 15


def begun(folder: Path, **round_: Any) -> tuple[dict[str, Any], RunDir]:
    raw = config_with_pairs(folder, **({"max_steps": STEPS, "checkpoint_every": EVERY} | round_))
    return raw, make_run(raw)


def undisturbed_run(folder: Path) -> RunDir:
    """The same phase at two workers with nothing happening to it."""
    raw, run = begun(folder)
    train(folder, raw, PHASE, 2)
    return run


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return load_file(run.model(PHASE) / "model.safetensors")


def steps(run: RunDir) -> list[int]:
    return [row["step"] for row in read_metrics(run.root / "events" / PHASE)[0]]


def first_step_of_last_attempt(run: RunDir) -> int:
    """What is trained again gives the same figures: where an attempt went on tells whether it used a checkpoint."""
    rows = read_metrics(run.root / "events" / PHASE)[0]
    return min(int(row["step"]) for row in rows if row["attempt"] == max(row["attempt"] for row in rows))


def store(run: RunDir) -> CheckpointStore:
    return CheckpointStore(run.storage, PHASE, None)


def wrong_with_checkpoints(run: RunDir) -> list[str]:
    """What `plad verify` says of them."""
    return [
        line for item in verify(run.storage.url)[0] if item.path.startswith("checkpoints") for line in item.problems
    ]


def die_when(owner: Any, name: str, when: Callable[..., bool], *, after: bool) -> None:
    """Kill this process at a call of a method."""
    real = getattr(owner, name)

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        now = when(self, *arguments)
        if now and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(self, *arguments, **named)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, call)


def at_second_save(_: Any, engine: Any, state: TrainState, *rest: Any) -> bool:
    return state.step == 2 * EVERY


def in_second_folder(_: Any, key: str, *rest: Any, ending: str) -> bool:
    return f"step-{2 * EVERY:08d}" in key and key.endswith(ending)


# Where a worker dies, which one, and what it is told to die at.
POINTS: dict[str, tuple[int, Callable[[], None]]] = {
    "before anything is written": (1, partial(die_when, Checkpoints, "save", at_second_save, after=False)),
    "when it is staged and not carried": (0, partial(die_when, Checkpoints, "save", at_second_save, after=True)),
    "between the ranks: one has carried nothing": (
        1, partial(die_when, Storage, "upload", partial(in_second_folder, ending=".pt"), after=False),
    ),
    "between the ranks: one has not said that it is done": (
        1, partial(die_when, Storage, "replace", partial(in_second_folder, ending="rank-00001.json"), after=False),
    ),
    "before the marker": (0, partial(die_when, Storage, "create", partial(in_second_folder, ending="state.json"), after=False)),
    "after the marker": (0, partial(die_when, Storage, "create", partial(in_second_folder, ending="state.json"), after=True)),
    "while old ones are pruned": (
        0, partial(die_when, Storage, "delete_folder", lambda self, folder: True, after=False),
    ),
}  # fmt: skip


def commit_before_the_next_step() -> None:
    """In this process. Else a step that is to have a checkpoint has none where the one before is still on its way."""
    Checkpoints.busy = property(lambda self: bool(self.drain()))  # type: ignore[assignment, method-assign]


def train_and_die(point: str, raw: dict[str, Any], phase: str, stop: int) -> None:
    commit_before_the_next_step()
    rank, arm = POINTS[point]
    if dist.get_rank() == rank:
        arm()
    train_phase(raw, phase, stop)


def killed_at(point: str, tmp_path: Path, undisturbed: RunDir) -> None:
    """A worker dies at a point of a commit: it costs no more than the interval, and the student is the same bit by bit."""
    raw, run = begun(tmp_path, keep_checkpoints=1)
    processes = start(tmp_path, raw, PHASE, 2, work=partial(train_and_die, point))
    rank, _ = POINTS[point]
    processes[rank].join(timeout=200)
    for process in processes:
        process.kill()
        process.join()
    assert processes[rank].exitcode == -signal.SIGKILL, (tmp_path / f"worker-{rank}.log").read_text()[-2000:]
    left, damaged = store(run).newest()
    assert not damaged, "a checkpoint is whole or not there"
    assert left is not None
    assert left.state.step >= EVERY
    train(tmp_path, raw, PHASE, 2)
    assert first_step_of_last_attempt(run) == left.state.step + 1
    assert losses(run, PHASE) == losses(undisturbed, PHASE)
    assert steps(run) == list(range(1, STEPS + 1))
    for name, expected in weights(undisturbed).items():
        assert torch.equal(weights(run)[name], expected), name
    assert wrong_with_checkpoints(run) == []
    assert len(list((run.root / "checkpoints" / PHASE).glob("step-*/state.json"))) == 1


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def alter(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def lose(file: Path) -> None:
    file.unlink()


def left_out_when(harm: Callable[[Path], None], tmp_path: Path, undisturbed: RunDir) -> None:
    """A damaged newest checkpoint is left out, the one before is used, and the student is the same bit by bit."""
    raw, run = begun(tmp_path)
    train(tmp_path, raw, PHASE, 2, stop=EVERY)
    train(tmp_path, raw, PHASE, 2, stop=EVERY + 2)
    (file,) = (run.root / "checkpoints" / PHASE / f"step-{EVERY + 2:08d}").rglob("*rank_1_*optim_states.pt")
    harm(file)
    (problem,) = wrong_with_checkpoints(run)
    assert file.name in problem
    assert "resumes from the one before" in problem
    train(tmp_path, raw, PHASE, 2)
    assert first_step_of_last_attempt(run) == EVERY + 1
    assert losses(run, PHASE) == losses(undisturbed, PHASE)
    repair(run.storage.url, verify(run.storage.url)[0])
    assert wrong_with_checkpoints(run) == []


def die_while_resharding(raw: dict[str, Any], phase: str, stop: int) -> None:
    def killed(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    module.load_resharded = killed
    train_phase(raw, phase, stop)


def resized_in_the_middle(tmp_path: Path, undisturbed: RunDir) -> None:
    """From 2 to 1, where it is killed while it loads, to 3."""
    raw, run = begun(tmp_path)
    train(tmp_path, raw, PHASE, 2, stop=4)
    (process,) = start(tmp_path, raw, PHASE, 1, work=die_while_resharding)
    process.join(timeout=200)
    assert process.exitcode == -signal.SIGKILL
    train(tmp_path, raw, PHASE, 1, stop=9)
    train(tmp_path, raw, PHASE, 3)
    assert losses(run, PHASE) == pytest.approx(losses(undisturbed, PHASE), rel=1e-4)
    assert steps(run) == list(range(1, STEPS + 1))
    assert [row["workers"] for row in read_metrics(run.root / "events" / PHASE)[0]] == [2] * 4 + [1] * 5 + [3] * 6
    found = weights(run)
    for name, expected in weights(undisturbed).items():
        assert float((found[name] - expected).norm() / expected.norm()) <= 1e-4, name


CASES = ("several sub-groups", "muon", "adapters", "offloaded")


def resized_with(case: str, tmp_path: Path) -> None:
    """Other states and layouts of the optimizer change their size in the middle."""
    changes: dict[str, Any] = {"optimizer": {"name": "muon", "lr": 1e-2, "adam_lr": 5e-3}} if case == "muon" else {}
    found = {}
    for name, plan in (("straight", [(2, 0)]), ("resized", [(2, 4), (1, 8), (2, 0)])):
        folder = tmp_path / name
        folder.mkdir()
        raw, run = begun(folder, max_steps=10, **changes)
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
        found[name] = run
    assert losses(found["resized"], PHASE) == pytest.approx(losses(found["straight"], PHASE), rel=1e-4)
