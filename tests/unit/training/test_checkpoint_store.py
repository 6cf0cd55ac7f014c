"""Committed checkpoints: every altered bit is found, and a damaged one is set aside and kept."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import xxhash

from plad_dist.data.sealed import sealed_json
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed
from plad_dist.training.checkpoints.store import CheckpointStore, DamagedCheckpoint, TrainState
from plad_dist.verify.models import check_checkpoints
from tests.unit.data.test_checksums import flips


def commit(storage: Storage, step: int) -> None:
    """Commit a checkpoint of one small file."""
    folder = f"checkpoints/p/step-{step:08d}"
    storage.replace(f"{folder}/attempt-00001/z.pt", b"weights" * 9)
    files = {"z.pt": (63, xxhash.xxh3_128_hexdigest(b"weights" * 9))}
    document = {"state": asdict(TrainState(step, 8, 99, 1, "f")), "attempt": "attempt-00001", "files": files}
    assert storage.create(f"{folder}/state.json", sealed_json(json.dumps(document, indent=1)))


def problems(storage: Storage) -> list[str]:
    return [problem for result in check_checkpoints(storage, ["p"]) for problem in result.problems]


def test_every_flipped_bit_of_a_checkpoint_is_found(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    commit(storage, 3)
    assert problems(storage) == []
    for path in (file for file in tmp_path.rglob("*") if file.is_file()):
        original = path.read_bytes()
        for altered in flips(original, samples=20):
            path.write_bytes(altered)
            assert len(problems(storage)) == 1, path
        path.write_bytes(original)
    assert problems(storage) == []


def test_a_damaged_checkpoint_is_set_aside_under_a_name_of_its_own_each_time(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    store = CheckpointStore(storage, "p", None)
    commit(storage, 3)
    folder = tmp_path / "checkpoints/p/step-00000003"
    store.set_aside(3)
    commit(storage, 3)
    store.set_aside(3)
    assert len(list(folder.glob("state.json.damaged-*"))) == 2
    assert store.at(3) is None
    with pytest.raises(RunFailed, match=r"every checkpoint is damaged \(those of the steps 3 were set aside\)"):
        store.newest()
    commit(storage, 3)
    newest, damaged = store.newest()
    assert newest is not None
    assert (newest.state.step, damaged) == (3, {})


def test_a_state_with_another_step_than_was_committed_is_damaged(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    commit(storage, 3)
    path = tmp_path / "checkpoints/p/step-00000003/state.json"
    path.write_text(path.read_text().replace('"step": 3', '"step": 7'))
    with pytest.raises(DamagedCheckpoint, match=r"state\.json: damaged: its checksum is wrong"):
        CheckpointStore(storage, "p", None).at(3)
