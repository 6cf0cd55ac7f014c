"""Every call of the file system fails once while a checkpoint is carried to the storage."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed
from plad_dist.training.checkpoints.attempts import claim
from plad_dist.training.checkpoints.saving import Checkpoints
from plad_dist.training.checkpoints.store import CheckpointStore, TrainState
from tests.file_faults import each_fault, temporaries
from tests.unit.data.test_faults import outcome, restore


class _Engine:
    """Writes what DeepSpeed would: files of a rank in the folder of the attempt."""

    def save_checkpoint(self, folder: str, tag: str, **_: object) -> None:
        target = Path(folder) / tag
        target.mkdir(parents=True)
        torch.save({"weights": torch.ones(9)}, target / "zero_pp_rank_0_mp_rank_00_optim_states.pt")


@pytest.fixture(scope="module", autouse=True)
def _one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    rendezvous = tmp_path_factory.mktemp("rendezvous") / "file"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def save(root: Path, staging: Path, *steps: int) -> None:
    """Save the checkpoints of steps in one attempt, of which the newest is kept."""
    storage = Storage(str(root))
    attempt = claim(storage, "checkpoints/p/owner", "launch")
    checkpoints = Checkpoints(CheckpointStore(storage, "p", "f"), attempt, 1, str(staging))
    try:
        for step in steps:
            checkpoints.save(_Engine(), TrainState(step, 8, 99, 1, "f"))
            checkpoints.settle()
    finally:
        checkpoints.close()


def sound_steps(root: Path) -> list[int]:
    store = CheckpointStore(Storage(str(root)), "p", "f")
    steps = []
    for step in store.steps():
        checkpoint = store.at(step)
        if checkpoint is not None:
            assert store.size_problem(checkpoint) or store.checksum_problem(checkpoint) is None
            steps.append(step)
    return steps


def test_faults_at_every_call_that_carries_a_checkpoint_leave_the_one_before_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    root, staging, state = tmp_path / "run", tmp_path / "staging", tmp_path / "before"
    save(state, staging, 1)
    for faults in each_fault(root):
        restore(state, root)
        ended = outcome(faults, lambda root: save(root, staging, 2), root)
        assert ended in ("done", "failed", "killed")
        if ended != "killed":
            assert temporaries(root) == [], faults.hit
        newest, damaged = CheckpointStore(Storage(str(root)), "p", "f").newest()
        assert newest is not None
        assert damaged == {}
        assert sound_steps(root)
        if ended == "done":
            assert newest.state.step == 2
        save(root, staging, 2, 3)
        assert sound_steps(root) == [3], faults.hit


@pytest.mark.parametrize("size", [1, 200_000])
def test_a_full_staging_disk_is_named_and_a_lost_connection_stays_one(tmp_path: Path, size: int) -> None:
    """Torch names neither file nor cause, and its words depend on the size."""
    attempt = claim(Storage(str(tmp_path)), "checkpoints/p/owner", "launch")
    checkpoints = Checkpoints(CheckpointStore(Storage(str(tmp_path)), "p", "f"), attempt, 1, str(tmp_path / "staging"))

    def full(*_: object, **__: object) -> None:
        torch.save({"weights": torch.ones(size)}, "/dev/full")

    def cut_off(*_: object, **__: object) -> None:
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(RunFailed, match=r"staging/.*step-00000001: cannot be written: .* free .*kept.*staging_dir"):
        checkpoints.save(SimpleNamespace(save_checkpoint=full), TrainState(1, 8, 99, 1, "f"))
    with pytest.raises(RuntimeError, match=r"^Connection closed by peer$"):
        checkpoints.save(SimpleNamespace(save_checkpoint=cut_off), TrainState(1, 8, 99, 1, "f"))
    checkpoints.close()
