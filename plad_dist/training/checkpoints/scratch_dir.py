"""Folders on a disk of this node for what is under way: those of processes that were killed are removed by the next one."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
import uuid
from pathlib import Path


class ScratchDir:
    """A new folder that is locked while this process lives. Those that dead processes have left are removed.

    Args:
        place: where, None for the system's place for temporary files.
        prefix: of its name, and of the names of those that are removed.
    """

    def __init__(self, place: str | None, prefix: str) -> None:
        folder = Path(place or tempfile.gettempdir())
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{prefix}*/"):
            with contextlib.suppress(OSError), _lock_of(left).open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
                _lock_of(left).unlink()
        self.path = folder / f"{prefix}{uuid.uuid4().hex}"
        # Before the folder is there, or another process could take it for one that was left.
        self._lock = _lock_of(self.path).open("a")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path.mkdir()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        _lock_of(self.path).unlink(missing_ok=True)
        self._lock.close()


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")
