"""Files of a checkpoint in memory: each is read once, and hashed while it is read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from plad_dist.training.checkpoints.store import Checkpoint, CheckpointStore


class MemoryFiles:
    """Files of one checkpoint in the memory of this process.

    A library that needs paths opens them through links, and can map them without a second copy.
    """

    def __init__(self) -> None:
        self._files: dict[str, BinaryIO] = {}

    def read(self, store: CheckpointStore, checkpoint: Checkpoint, names: Iterable[str]) -> str | None:
        """Read files of a checkpoint; return the first one whose checksum has changed, or None."""
        for name in names:
            self._files[name] = os.fdopen(os.memfd_create(name, os.MFD_CLOEXEC), "wb")
            if (problem := store.copy_problem(checkpoint, name, self._files[name])) is not None:
                return problem
        return None

    def link_into(self, folder: Path) -> None:
        """Create links to the files in a folder, which serve until :meth:`close`."""
        for name, file in self._files.items():
            (folder / name).symlink_to(f"/proc/{os.getpid()}/fd/{file.fileno()}")

    def close(self) -> None:
        """Free the memory, except that of tensors which still map it."""
        while self._files:
            self._files.popitem()[1].close()
