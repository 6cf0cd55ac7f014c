"""Temporary folders on a local disk that are locked by their process, and removed after it dies."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
import uuid
from pathlib import Path


class ScratchDir:
    """New folder that is locked as long as this process lives; removes those of dead processes.

    Args:
        parent: folder to create it in; None for the system's folder for temporary files.
        prefix: start of its name, and of the names of the folders to clean up.
    """

    def __init__(self, parent: str | None, prefix: str) -> None:
        folder = Path(parent or tempfile.gettempdir())
        folder.mkdir(parents=True, exist_ok=True)
        for earlier in folder.glob(f"{prefix}*/"):
            with contextlib.suppress(OSError), _lock_of(earlier).open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(earlier, ignore_errors=True)
                _lock_of(earlier).unlink()
        self.path = folder / f"{prefix}{uuid.uuid4().hex}"
        # Locked before it exists, or another process could remove it as that of a dead one.
        self._lock = _lock_of(self.path).open("a")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path.mkdir()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the folder with its contents."""
        shutil.rmtree(self.path, ignore_errors=True)
        _lock_of(self.path).unlink(missing_ok=True)
        self._lock.close()


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")
