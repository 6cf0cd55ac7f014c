"""Temporary folders on a local disk that are locked by their process, and removed after it dies.

The parent may be shared with other users, so only folders that this module has made are removed: a
folder with a name of the form that it gives, its lock beside it, both the user's own, and no links.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path


class ScratchDir:
    """New folder that is locked as long as this process lives; removes those of dead processes.

    Only this user can read it.

    Args:
        parent: folder to create it in; None for the system's folder for temporary files.
        prefix: start of its name, and of the names of the folders to clean up.
    """

    def __init__(self, parent: str | None, prefix: str) -> None:
        folder = Path(parent or tempfile.gettempdir())
        folder.mkdir(parents=True, exist_ok=True)
        ours = re.compile(rf"{re.escape(prefix)}[0-9a-f]{{32}}")
        for earlier in folder.glob(f"{prefix}*"):
            if (
                ours.fullmatch(earlier.name)
                and _is_own(earlier, stat.S_ISDIR)
                and _is_own(_lock_of(earlier), stat.S_ISREG)
            ):
                _remove_if_abandoned(earlier)
        self.path = folder / f"{prefix}{uuid.uuid4().hex}"
        # Locked before it exists, or another process could remove it as that of a dead one.
        self._lock = _open_lock(_lock_of(self.path), os.O_CREAT | os.O_EXCL)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path.mkdir(mode=0o700)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the folder with its contents."""
        if self._lock < 0:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        _lock_of(self.path).unlink(missing_ok=True)
        os.close(self._lock)
        self._lock = -1


def _remove_if_abandoned(folder: Path) -> None:
    """Remove a folder whose process no longer holds its lock."""
    with contextlib.suppress(OSError):
        lock = _open_lock(_lock_of(folder))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            _lock_of(folder).unlink()
        finally:
            os.close(lock)


def _is_own(path: Path, is_kind: Callable[[int], bool]) -> bool:
    """Return True if a path is of a kind, is no link, and belongs to this user."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return is_kind(status.st_mode) and status.st_uid == os.geteuid()


def _open_lock(path: Path, flags: int = 0) -> int:
    return os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")
