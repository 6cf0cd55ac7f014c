"""The power fails at any call, and unflushed names are lost: nothing acknowledged is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from plad_dist.data import local_files
from plad_dist.data.claims import claim_run, latest_number, read_claim
from plad_dist.data.models import model_fingerprint, model_problems
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed
from plad_dist.verify.parts import check_dataset
from tests.power_loss import Loss, PowerRecord
from tests.unit.data.test_faults import another_config, damage, dataset, run
from tests.unit.data.test_model_commit import make

Promise = Callable[[str], None]


def repair(root: Path, promise: Promise = lambda what: None) -> None:
    data = dataset(root)
    manifest = data.manifest()
    if bad := check_dataset(data).bad:
        data.reopen(manifest, bad)
        promise("damaged")
    run(root, promise)


def redo(root: Path, promise: Promise = lambda what: None) -> None:
    dataset(root).set_aside_unless("f")
    run(root, promise)


def check_promises(root: Path, loss: Loss, sound: dict[str, bytes]) -> None:
    for name in loss.promised:
        path = root / "a/d" / name
        assert path.exists(), (loss.time, name)
        if name in sound:
            assert path.read_bytes() == sound[name], (loss.time, name)


@pytest.mark.parametrize(
    ("before", "command"),
    [(None, run), (damage, repair), (another_config, redo)],
    ids=["commit", "repair", "set aside"],
)
def test_faults_of_the_power_lose_nothing_that_was_acknowledged(
    tmp_path: Path, before: Callable[[Path], None] | None, command: Callable[..., None]
) -> None:
    root = tmp_path / "run"
    root.mkdir()
    if before is not None:
        before(root)
    old = {path.read_bytes() for path in root.glob("a/d/part-*.arrow")}
    record = PowerRecord(root)
    with record.recording():
        command(root, record.promise)
    sound = {path.name: path.read_bytes() for path in root.glob("a/d/part-*.arrow")}
    count = 0
    for loss in record.losses():
        count += 1
        check_promises(root, loss, sound)
        command(root)
        assert check_dataset(dataset(root)).problems == [], loss
        assert dataset(root).read()["x"].to_pylist() == [f"row {block}" for block in range(2) for _ in range(30)]
        kept = {path.read_bytes() for path in root.glob("a/d/**/*") if path.is_file()}
        assert old <= kept, (loss, "what was set aside is kept")
    assert count > 10


def test_faults_of_the_power_undo_no_claim(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    claim_run(storage, "run")
    record = PowerRecord(tmp_path)
    with record.recording():
        claim = claim_run(storage, "run")
        record.promise(claim.launch)
    for loss in record.losses():
        number = latest_number(storage, claim.folder)
        assert number in (1, 2), loss
        if claim.launch in loss.promised:
            assert read_claim(storage, claim.folder, 2)["launch"] == claim.launch, loss
        assert claim_run(storage, "run").number == number + 1, loss


@pytest.mark.parametrize("before", [None, "old"])
def test_faults_of_the_power_leave_a_whole_model_or_none(tmp_path: Path, before: str | None) -> None:
    root = tmp_path / "run"
    root.mkdir()
    final = root / "models/a"
    if before is not None:
        make(final, before, 2.0)
    record = PowerRecord(root)
    with record.recording():
        make(final)
        record.promise("model")
    for loss in record.losses():
        assert not final.exists() or model_problems(final) == [], loss
        if "model" in loss.promised:
            assert model_fingerprint(final) == "f", loss
        if before is not None and (not final.exists() or model_fingerprint(final) != before):
            (replaced,) = (root / "models/replaced").iterdir()
            assert (model_fingerprint(replaced), model_problems(replaced)) == (before, []), loss
        make(final)
        assert (model_fingerprint(final), model_problems(final)) == ("f", []), loss


def test_a_flush_that_is_left_out_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without these flushes of files, or of folders, the tests above fail."""
    flush = local_files.fsync
    for is_left_out in (Path.is_file, Path.is_dir):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        monkeypatch.setattr(
            local_files, "fsync", lambda *paths, out=is_left_out: flush(*[path for path in paths if not out(path)])
        )
        with pytest.raises((AssertionError, RunFailed)):
            test_faults_of_the_power_lose_nothing_that_was_acknowledged(tmp_path, None, run)
