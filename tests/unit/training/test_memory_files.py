"""Files of a checkpoint in memory are read once and opened by path; damage is found on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from plad_dist.data.local_files import file_checksum
from plad_dist.data.storage import Storage
from plad_dist.training.checkpoints.memory_files import MemoryFiles
from plad_dist.training.checkpoints.store import Checkpoint, CheckpointStore, TrainState


@pytest.fixture
def written(tmp_path: Path) -> tuple[CheckpointStore, Checkpoint]:
    folder = tmp_path / "run" / "checkpoint"
    folder.mkdir(parents=True)
    files = {}
    for name in ("a.pt", "b.pt"):
        torch.save({"weights": torch.arange(5000.0), "name": name}, folder / name)
        files[name] = ((folder / name).stat().st_size, file_checksum(folder / name))
    storage = Storage(str(tmp_path / "run"))
    return CheckpointStore(storage, "p", None), Checkpoint(TrainState(1, 1, 1, 1, "f"), "checkpoint", files)


def test_files_in_memory_outlive_those_in_the_storage(
    tmp_path: Path, written: tuple[CheckpointStore, Checkpoint]
) -> None:
    store, checkpoint = written
    memory = MemoryFiles()
    assert memory.read(store, checkpoint, checkpoint.files) is None
    store.storage.delete_folder("checkpoint")
    memory.link_into(tmp_path)
    loaded = {name: torch.load(tmp_path / name, mmap=True) for name in checkpoint.files}
    memory.close()
    assert not (tmp_path / "a.pt").exists(), "the links end with the files"
    for name, content in loaded.items():
        assert content["name"] == name
        assert torch.equal(content["weights"], torch.arange(5000.0)), "what is mapped stays"


def test_an_altered_or_missing_file_is_named(written: tuple[CheckpointStore, Checkpoint]) -> None:
    store, checkpoint = written
    file = store.storage.local_root / "checkpoint" / "b.pt"  # type: ignore[operator]
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    memory = MemoryFiles()
    assert "b.pt: damaged: its checksum has changed" in str(memory.read(store, checkpoint, checkpoint.files))
    memory.close()
    file.unlink()
    assert "b.pt: damaged" in str(memory.read(store, checkpoint, ["b.pt"]))
    assert memory.read(store, checkpoint, ["a.pt"]) is None
    memory.close()
