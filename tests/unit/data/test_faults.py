"""Every call of the file system fails once, or the process dies at it: nothing is lost.

A command that meets a fault finishes, or ends with the reason and what was kept. It moves nothing
sound and leaves no temporary file. The next command finishes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from plad_dist.data.claims import claim_run, latest_number, read_claim
from plad_dist.data.dataset import Dataset
from plad_dist.data.models import model_fingerprint, model_problems
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed
from plad_dist.verify.parts import check_dataset
from tests.file_faults import KILL, Faults, Kill, each_fault, temporaries
from tests.unit.data.test_model_commit import make

SCHEMA = pa.schema([("x", pa.string())])


@pytest.fixture(autouse=True)
def _without_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands that meet no fault run fast."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def dataset(root: Path) -> Dataset:
    return Dataset(Storage(str(root)), "a/d", SCHEMA)


def rows(block: int) -> pa.Table:
    return pa.table({"x": [f"row {block}"] * 30}, schema=SCHEMA)


def run(root: Path, promise: Callable[[str], None] = lambda what: None) -> None:
    """Commit two blocks and the manifest, as a driver does, from whatever state there is.

    Args:
        promise: gets the name of each file that is acknowledged.
    """
    data = dataset(root)
    if data.manifest() is not None:
        return
    journal, parts = data.journal("f"), data.resume("f")
    for block in range(2):
        if block not in parts:
            parts[block], _ = data.commit(block, rows(block), fingerprint="f", attempt="a", counts={"n": 1})
            journal.add(parts[block])
            promise(f"part-{block:05d}.arrow")
    journal.try_flush()
    data.finish(2, fingerprint="f", facts={}, known_parts=[part for part in parts.values() if part])
    promise("manifest.json")


def repair(root: Path) -> None:
    data = dataset(root)
    manifest = data.manifest()
    if bad := check_dataset(data).bad:
        data.reopen(manifest, bad)
    run(root)


def damage(root: Path) -> None:
    run(root)
    path = root / "a/d/part-00001.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def another_config(root: Path) -> None:
    data = dataset(root)
    for block in range(2):
        data.commit(block, rows(block + 5), fingerprint="old", attempt="a")
    data.finish(2, fingerprint="old", facts={})


def redo(root: Path) -> None:
    dataset(root).set_aside_unless("f")
    run(root)


def interrupted(root: Path) -> None:
    data = dataset(root)
    part, _ = data.commit(1, rows(1), fingerprint="f", attempt="z", counts={"n": 1})
    data.rewrite_journal("f", [part])


def is_finished(root: Path) -> None:
    data = dataset(root)
    assert check_dataset(data).problems == []
    assert data.read()["x"].to_pylist() == [f"row {block}" for block in range(2) for _ in range(30)]
    assert data.require("x").count("n") == 2


def restore(state: Path, root: Path) -> None:
    """Bring a run directory into a state again."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(state, root)


def outcome(faults: Faults, command: Callable[[Path], object], root: Path) -> str:
    """Return how a command ended under a fault; anything but a `RunFailed` is raised."""
    try:
        with faults.injected():
            command(root)
    except Kill:
        return "killed"
    except RunFailed as error:
        is_explained = "is kept" in str(error) or "Nothing was overwritten" in str(error)
        return "failed" if is_explained else f"failed without what was kept: {error}"
    return "done"


@pytest.mark.parametrize(
    ("before", "command"),
    [(None, run), (interrupted, run), (damage, repair), (another_config, redo)],
    ids=["commit", "resume", "repair", "set aside"],
)
def test_faults_at_every_call_lose_no_committed_part(
    tmp_path: Path, before: Callable[[Path], None] | None, command: Callable[[Path], None]
) -> None:
    root, state = tmp_path / "run", tmp_path / "before"
    state.mkdir()
    if before is not None:
        before(state)
    for faults in each_fault(root):
        restore(state, root)
        sound = (root / "a/d/part-00000.arrow").read_bytes() if before is damage else None
        ended = outcome(faults, command, root)
        assert ended in ("done", "failed", "killed")
        if ended != "killed":
            assert temporaries(root) == [], faults.hit
        kept = {path.name: path.read_bytes() for path in root.glob("a/d/part-*.arrow")}
        command(root)
        is_finished(root)
        if before is not another_config:
            changed = [name for name, data in kept.items() if (root / "a/d" / name).read_bytes() != data]
            assert changed in ([], ["part-00001.arrow"] if before is damage else []), faults.hit
        if sound is not None:
            assert (root / "a/d/part-00000.arrow").read_bytes() == sound
            assert len(list((root / "a/d/damaged").iterdir())) == 1, "the bad part is kept"
        if before is another_config:
            assert len(list((root / "a/d/damaged").iterdir())) == 2, "its parts are kept"


def test_faults_at_every_call_of_a_claim_leave_a_later_claim_possible(tmp_path: Path) -> None:
    root = tmp_path / "run"
    for faults in each_fault(root):
        shutil.rmtree(root, ignore_errors=True)
        storage = Storage(str(root))
        claim_run(storage, "run")
        ended = outcome(faults, lambda root: claim_run(Storage(str(root)), "run"), root)
        assert ended in ("done", "failed", "killed")
        if ended != "killed":
            assert temporaries(root) == [], faults.hit
        claim = claim_run(storage, "run")
        assert claim.number in ((2, 3) if faults.hit else (3,))
        assert latest_number(storage, claim.folder) == claim.number
        assert read_claim(storage, claim.folder, claim.number)["launch"] == claim.launch


@pytest.mark.parametrize("before", [None, "old"])
def test_faults_at_every_call_of_the_commit_of_a_model_leave_a_whole_model(tmp_path: Path, before: str | None) -> None:
    root, state = tmp_path / "run", tmp_path / "before"
    final = root / "models/a"
    state.mkdir()
    if before is not None:
        make(state / "models/a", before, 2.0)
    for faults in each_fault(root):
        restore(state, root)
        ended = outcome(faults, lambda _: make(final), root)
        assert ended in ("done", "failed", "killed")
        if ended != "killed":
            assert temporaries(root) == [], faults.hit
        assert final.exists() is False or model_problems(final) == []
        if before is not None and model_fingerprint(final) != before:
            (replaced,) = (root / "models/replaced").iterdir()
            assert model_fingerprint(replaced) == before, "it is kept"
        make(final)
        assert (model_fingerprint(final), model_problems(final)) == ("f", [])


@pytest.mark.parametrize("command", ["upload", "move", "delete_folder", "replace"])
def test_faults_at_every_call_of_an_operation_leave_the_old_or_the_new_state(tmp_path: Path, command: str) -> None:
    root, source = tmp_path / "run", tmp_path / "file"
    source.write_bytes(b"new" * 1000)
    operations: dict[str, Callable[[Storage], object]] = {
        "upload": lambda storage: storage.upload("c/d/x", source),
        "replace": lambda storage: storage.replace("c/d/x", source.read_bytes()),
        "move": lambda storage: storage.move("a/x", "c/d/x"),
        "delete_folder": lambda storage: storage.delete_folder("a"),
    }
    for faults in each_fault(root):
        shutil.rmtree(root, ignore_errors=True)
        storage = Storage(str(root))
        storage.replace("a/x", b"new" * 1000)
        ended = outcome(faults, lambda root: operations[command](Storage(str(root))), root)
        assert ended in ("done", "failed", "killed")
        if ended != "killed":
            assert temporaries(root) == [], faults.hit
        assert storage.read("c/d/x") in (None, source.read_bytes())
        if command == "move":
            assert (storage.read("a/x") is None) == (storage.read("c/d/x") is not None)
        if ended == "failed":
            operations[command](storage)
        if faults.hit is None or ended == "failed":
            assert storage.read("c/d/x") == (None if command == "delete_folder" else source.read_bytes())
            assert storage.exists("a") == (command != "delete_folder")


def test_a_kill_is_not_handled_as_an_error(tmp_path: Path) -> None:
    assert outcome(Faults(tmp_path, 1, KILL), run, tmp_path) == "killed"
