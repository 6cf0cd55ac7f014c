"""Folders of dead processes are removed, and nothing that belongs to someone else."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from plad_dist.training.checkpoints.scratch_dir import ScratchDir

PREFIX = "plad-checkpoint-"
HEX = "0123456789abcdef" * 2


def test_only_folders_that_it_made_are_removed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    for name in (f"{PREFIX}backup-of-monday", f"{PREFIX}{HEX}", f"{PREFIX}{HEX}0", "victim"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.pt").write_text("precious")
    (tmp_path / f"{PREFIX}backup-of-monday.lock").touch()
    link = tmp_path / f"{PREFIX}{HEX[::-1]}"
    link.symlink_to(victim)
    (tmp_path / f"{link.name}.lock").touch()
    linked_lock = tmp_path / f"{PREFIX}{'a' * 32}"
    linked_lock.mkdir()
    (tmp_path / f"{linked_lock.name}.lock").symlink_to(tmp_path / "made-through-a-link")
    before = {path.name for path in tmp_path.iterdir()}
    with ScratchDir(str(tmp_path), PREFIX):
        assert before <= {path.name for path in tmp_path.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == before
    assert (victim / "weights.pt").read_text() == "precious"
    assert not (tmp_path / "made-through-a-link").exists()


def test_the_folder_of_a_dead_process_is_removed_and_that_of_a_live_one_kept(tmp_path: Path) -> None:
    with ScratchDir(str(tmp_path), PREFIX) as live:
        code = "import sys, os\nfrom plad_dist.training.checkpoints.scratch_dir import ScratchDir\n"
        code += "scratch = ScratchDir(sys.argv[1], sys.argv[2])\n(scratch.path / 'file').touch()\nos._exit(0)"
        subprocess.run([sys.executable, "-c", code, str(tmp_path), PREFIX], check=True)
        assert len(list(tmp_path.glob(f"{PREFIX}*.lock"))) == 2
        with ScratchDir(str(tmp_path), PREFIX) as newest:
            assert {path for path in tmp_path.iterdir() if path.is_dir()} == {live, newest}
    assert not list(tmp_path.iterdir())


def test_only_this_user_can_read_it(tmp_path: Path) -> None:
    with ScratchDir(str(tmp_path), PREFIX) as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE(folder.with_name(f"{folder.name}.lock").stat().st_mode) == 0o600


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import uuid

    name = uuid.UUID(hex=HEX)
    monkeypatch.setattr(uuid, "uuid4", lambda: name)
    (tmp_path / f"{PREFIX}{HEX}.lock").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match=r"."):
        ScratchDir(str(tmp_path), PREFIX)
    assert not (tmp_path / "target").exists()
