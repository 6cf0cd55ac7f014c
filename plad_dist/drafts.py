"""Drafts: runs that take over products of other runs, assembled in hidden folders of their own.

A command that takes over products fills ``.begun-<number of its claim>`` in the run directory with
links and copies. The draft's `run.yaml` is written last and makes it complete. Then the items move
to their places, `run.yaml` last. A command that finds the draft of an earlier one finishes the
moves if the draft is complete, and otherwise removes it. A draft is removed by a rename to
`.abandoned-*` first, so that a command that was frozen meanwhile cannot complete what is left.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from plad_dist.data.claims import RUN_CLAIMS, check_owned
from plad_dist.data.local_files import failure_explained, fsync, fsync_tree, write_into_folder
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed

RUN_FILE = "run.yaml"
_DRAFT = ".begun-"
_ABANDONED = ".abandoned-"


def has_content(root: Path) -> bool:
    """Return True if a folder has anything but hidden files and claims on it."""
    return any(not name.startswith(".") and name != RUN_CLAIMS for name in _names(root))


def complete_draft(storage: Storage) -> str | None:
    """Return the name of a complete draft whose `run.yaml` is not in its place yet, or None.

    The latest one, which is that of the command that owns the run if it has one.
    """
    root = storage.local_root
    if root is None or storage.read(RUN_FILE) is not None:
        return None
    with failure_explained(str(root), "listed"):
        drafts = sorted(filter(_is_draft, _names(root)), key=_claim_number, reverse=True)
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

    Raises:
        FileNotFoundError: a later command has removed the draft.
    """
    fsync_tree(draft)
    fsync(draft.parent)
    check_owned(storage)
    write_into_folder(draft / RUN_FILE, document, os.link)


def remove_draft(draft: Path) -> None:
    """Remove a draft, which holds only links and copies, unless another command has removed it.

    What cannot be deleted now harms nothing, and is deleted by the next command.
    """
    abandoned = draft.with_name(f"{_ABANDONED}{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        draft.rename(abandoned)
    shutil.rmtree(abandoned, ignore_errors=True)


def settle_drafts(storage: Storage) -> None:
    """Finish the moves of a complete draft, and remove all others.

    Raises:
        RunFailed: the storage failed, or a later command has claimed the run.
    """
    root = storage.local_root
    if root is None:
        return
    finished = complete_draft(storage)
    if finished is not None:
        with failures_explained(root, storage):
            _put_in_place(root / finished, root, storage)
    with failure_explained(str(root), "cleared of unfinished drafts"):
        for name in _names(root):
            if _is_draft(name):
                check_owned(storage)
                remove_draft(root / name)
            elif name.startswith(_ABANDONED):  # by a command that died while it removed the draft
                shutil.rmtree(root / name, ignore_errors=True)
    check_owned(storage)  # a later command may have removed the draft that this one has completed


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


def _is_draft(name: str) -> bool:
    return name.startswith(_DRAFT)


def _claim_number(name: str) -> int:
    return int(number) if (number := name.removeprefix(_DRAFT)).isdecimal() else 0


def _names(folder: Path) -> list[str]:
    try:
        return [item.name for item in folder.iterdir()]
    except FileNotFoundError:
        return []
