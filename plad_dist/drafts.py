"""Drafts: runs that take over products of other runs, assembled in hidden folders of their own.

A command that takes over products fills ``.begun-<number of its claim>`` in the run directory with
links and copies. The draft's `run.yaml` is written last and makes it complete. Then the items move
to their places, `run.yaml` last. A command that finds the draft of an earlier one finishes the
moves if the draft is complete, and otherwise removes it.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from plad_dist.data.claims import RUN_CLAIMS, check_owned
from plad_dist.data.local_files import fsync, fsync_tree, write_durably
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed

RUN_FILE = "run.yaml"
_DRAFT = ".begun-"
_ABANDONED = ".abandoned-"


def has_content(root: Path) -> bool:
    """Return True if a folder has anything but hidden files and claims on it."""
    return any(not name.startswith(".") and name != RUN_CLAIMS for name in _names(root))


def complete_draft(storage: Storage) -> str | None:
    """Return the name of a complete draft whose `run.yaml` is not in its place yet, or None."""
    root = storage.local_root
    if root is None or storage.read(RUN_FILE) is not None:
        return None
    with failures_explained(root, storage):
        drafts = [name for name in sorted(_names(root)) if name.startswith(_DRAFT)]
    return next((name for name in drafts if storage.read(f"{name}/{RUN_FILE}") is not None), None)


def new_draft(storage: Storage) -> Path:
    """Return the folder of this command's draft, which does not exist yet."""
    assert storage.local_root is not None
    assert storage.claim is not None
    return storage.local_root / f"{_DRAFT}{storage.claim.number:05d}"


def complete(draft: Path, document: bytes, storage: Storage) -> None:
    """Make a filled draft complete.

    Args:
        document: content of its `run.yaml`.
    """
    fsync_tree(draft)
    fsync(draft.parent)
    check_owned(storage)
    write_durably(draft / RUN_FILE, document, os.link)


def settle_drafts(storage: Storage) -> None:
    """Finish the moves of a complete draft, and remove all others.

    Raises:
        RunFailed: the storage failed, or a later command has claimed the run.
    """
    root = storage.local_root
    if root is None:
        return
    finished = complete_draft(storage)
    with failures_explained(root, storage):
        if finished is not None:
            _put_in_place(root / finished, root, storage)
        for name in _names(root):
            if name.startswith(_DRAFT):
                check_owned(storage)
                # In one step, so that its command, if it is alive, cannot complete half a draft.
                abandoned = root / f"{_ABANDONED}{uuid.uuid4().hex}"
                (root / name).rename(abandoned)
                shutil.rmtree(abandoned)
            elif name.startswith(_ABANDONED):  # by a command that died while it removed the draft
                shutil.rmtree(root / name)


def _put_in_place(draft: Path, root: Path, storage: Storage) -> None:
    for name in sorted(_names(draft)):
        if name != RUN_FILE:
            check_owned(storage)
            (draft / name).rename(root / name)
    fsync(root)
    check_owned(storage)
    storage.create(RUN_FILE, (draft / RUN_FILE).read_bytes())


@contextmanager
def failures_explained(root: Path, storage: Storage) -> Iterator[None]:
    """Turn errors of the file system into a message that says what was kept.

    The draft of a superseded command vanishes under its hands, which is no error of the storage.
    """
    try:
        yield
    except OSError as error:
        check_owned(storage)
        raise RunFailed(
            f"{root}: products of another run cannot be taken over: {error}. Both runs keep what is committed; fix the "
            "cause and run again"
        ) from None


def _names(folder: Path) -> list[str]:
    try:
        return [item.name for item in folder.iterdir()]
    except FileNotFoundError:
        return []
