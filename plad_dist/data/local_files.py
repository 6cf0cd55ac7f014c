"""Files of this machine's file systems: atomic durable writes, and reads that fail loudly.

Only "not found" means that a file is absent. Every other error of the file system is a failure,
which a caller must not take for absence.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash
from obstore.exceptions import BaseError

from plad_dist.errors import RunFailed

logger = logging.getLogger("plad")

COMMITTED_IS_KEPT = ". What is committed is kept"
CHUNK_BYTES = 8 << 20
_FOLDER_TRIES = 5  # against other processes that create and delete the same folder
_CACHED_BYTES = 256 << 10  # fits into the second-level cache of a core


@contextmanager
def failure_explained(name: str, participle: str) -> Iterator[None]:
    """Turn storage errors into a :class:`RunFailed` that names object, operation and cause."""
    try:
        yield
    except (BaseError, OSError) as error:
        raise RunFailed(
            f"{name}: cannot be {participle}: {innermost_cause(error)}{COMMITTED_IS_KEPT}; fix the cause and run again"
        ) from None


def write_durably(path: Path, data: bytes | Path, put: Callable[[Path, Path], None]) -> bool:
    """Write a file that exists completely or not at all, even after a power loss.

    The bytes are flushed to the disk before the file gets its name, because a shared file system
    may keep the writes of a node in that node's memory, where they are lost with the node.

    Another process may delete the folder at the same time: it is created again, so that no folder
    has to exist before a write, as in an object store.

    Args:
        data: content of the file, or a file to copy.
        put: gives the temporary file (first argument) its final name: `os.link` or `os.replace`.

    Returns:
        False if `put` refuses to overwrite a file that another writer made.
    """
    for tries_left in reversed(range(_FOLDER_TRIES)):
        try:
            make_folders(path.parent)
            return write_into_folder(path, data, put)
        except FileNotFoundError:
            if not tries_left:
                raise
    raise AssertionError("the last try returns or raises")


def write_into_folder(path: Path, data: bytes | Path, put: Callable[[Path, Path], None]) -> bool:
    """Write a file as :func:`write_durably` does, into a folder that must exist."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        if isinstance(data, Path):
            shutil.copyfile(data, temporary)
        else:
            with temporary.open("xb") as file:
                file.write(data)
        fsync(temporary)
        put(temporary, path)
    except FileExistsError:
        # A file server that repeats a request whose reply was lost finds the first link.
        if not path.samefile(temporary):
            return False
    finally:
        discard(temporary)
    fsync(path.parent)
    return True


def discard(temporary: Path) -> None:
    """Remove a temporary file, or log that it remains, which harms nothing."""
    for _ in range(2):
        try:
            temporary.unlink(missing_ok=True)
            return
        except OSError as error:
            failure = error
    logger.warning("%s: a temporary file that cannot be removed now: %s; delete it later", temporary, failure)


def make_folders(folder: Path) -> None:
    """Create a folder and its missing parents, each flushed to the disk in its own parent."""
    try:
        folder.mkdir()
    except FileNotFoundError:
        make_folders(folder.parent)
        with contextlib.suppress(FileExistsError):  # another writer was faster
            folder.mkdir()
    except FileExistsError:
        if not folder.is_dir():
            raise
        return
    fsync(folder.parent)


def path_mode(path: Path) -> int | None:
    """Return the mode of a file or folder; None if it does not exist. Raise any other error."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def is_folder(path: Path) -> bool:
    """Return True for a folder, False if there is none. Raise :class:`RunFailed` on any error."""
    mode = _explained_mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def is_file(path: Path) -> bool:
    """Return True for a file, False if there is none. Raise :class:`RunFailed` on any error."""
    mode = _explained_mode(path)
    return mode is not None and stat.S_ISREG(mode)


def _explained_mode(path: Path) -> int | None:
    with failure_explained(str(path), "read"):
        return path_mode(path)


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the sizes of the files in a folder, by name; subfolders have a slash and size 0."""
    sizes = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    status = entry.stat()
                except FileNotFoundError:  # deleted meanwhile
                    continue
                if stat.S_ISDIR(status.st_mode):
                    sizes[f"{entry.name}/"] = 0
                else:
                    sizes[entry.name] = status.st_size
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {name: sizes[name] for name in sorted(sizes)}


def delete_tree(folder: Path) -> None:
    """Delete a folder with all it contains, even while other processes delete or write there."""
    for tries_left in reversed(range(_FOLDER_TRIES)):
        try:
            shutil.rmtree(folder, onerror=_raise_unless_absent)
            return
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or not tries_left:
                raise


def _raise_unless_absent(_: Any, __: str, error: Any) -> None:
    """Let `shutil.rmtree` pass over what another process has deleted, and over nothing else."""
    if not isinstance(error[1], FileNotFoundError | NotADirectoryError):
        raise error[1]


def read_hashed(file: Any) -> tuple[Any, str]:
    """Return the bytes of an open file as a buffer, with their hexadecimal XXH3 checksum."""
    buffer, digest, end = pa.allocate_buffer(os.fstat(file.fileno()).st_size), xxhash.xxh3_128(), 0
    with memoryview(buffer) as view:
        while count := file.readinto(view[end : end + _CACHED_BYTES]):
            digest.update(view[end : end + count])
            end += count
    return buffer if end == len(buffer) else buffer.slice(0, end), digest.hexdigest()


def file_checksum(path: Path) -> str:
    """Return the hexadecimal XXH3 checksum of a file."""
    digest = xxhash.xxh3_128()
    for piece in file_pieces(path):
        digest.update(piece)
    return digest.hexdigest()


def file_pieces(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a file, a piece at a time."""
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            yield piece


def fsync(*paths: Path) -> None:
    """Flush files, or the entries of folders, to the disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Flush everything in a folder to the disk."""
    fsync(*folder.rglob("*"), folder)


def innermost_cause(error: Exception) -> str:
    """Return the innermost cause of a storage error, on one line of at most 300 characters."""
    text = " ".join(str(error).split())
    for cause in re.findall(r'(?:message|kind): "?([^,"{}]+)', text):
        if "error" not in cause.lower():
            text = f"{cause} ({text[:160]})"
            break
    return text[:300] or type(error).__name__
