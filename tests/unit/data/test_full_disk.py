"""A file system that is full at commit, finish, repair, upload and the commit of a model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_faults_of_a_full_disk_end_with_the_reason_and_room_lets_the_run_finish_with_the_same_bytes(
    tmp_path: Path,
) -> None:
    folders = [tmp_path / "small", tmp_path / "large"]
    for folder in folders:
        folder.mkdir()
    namespace = ["unshare", "--map-root-user", "--mount"]
    try:
        probe = subprocess.run([*namespace, "mount", "-t", "tmpfs", "tmpfs", str(folders[0])], check=False)
    except FileNotFoundError:
        pytest.skip("needs `unshare`")
    if probe.returncode:
        pytest.skip("needs the right to mount in a namespace of its own")
    command = [*namespace, sys.executable, "-m", "tests.unit.data.full_disk", *map(str, folders)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-3000:]
    assert "the disk was full at each stage" in child.stdout
