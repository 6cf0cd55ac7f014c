"""Files of a prompt source: paths, glob patterns and folders of parts, local or remote."""

from __future__ import annotations

import fnmatch
import glob
import logging
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import obstore
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import from_url

from plad_dist.data.local_files import innermost_cause
from plad_dist.errors import UserError

logger = logging.getLogger("plad")

_SCHEMES = ("s3", "gs", "az")
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
# Names in a folder that is no plain folder of parts, with what to do about it.
_NOT_PARTS = {
    "_temporary": "a job is still writing it, or failed; wait for the job or repeat it",
    "_delta_log": "it is a Delta table, whose files include deleted rows; export its rows",
    ".hoodie": "it is a Hudi table, whose files include replaced rows; export its rows",
    "state.json": "`save_to_disk` wrote it; read it with `type: dataset`",
    "dataset_dict.json": "`save_to_disk` wrote it; read it with `type: dataset`",
}


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a prompt source.

    Attributes:
        path: path or URI.
        is_part: the file was found in a folder of parts, in which some can be empty.
        columns: values that the names of Hive's `key=value` folders give to all of its rows.
    """

    path: str
    is_part: bool = False
    columns: dict[str, str | None] = field(default_factory=dict)


def expand(patterns: list[str], key: str) -> list[SourceFile]:
    """Return the files that the paths, patterns and folders name, each once.

    Args:
        key: config section of the patterns, for messages.

    Raises:
        UserError: a pattern matches no file, or something that cannot be read.
    """
    files: dict[Any, SourceFile] = {}
    for pattern in patterns:
        is_remote = "://" in pattern
        try:
            matches = _remote_files(pattern, key) if is_remote else _local_files(pattern, key)
        except OSError as error:
            raise UserError(f"{key}.paths: {error.filename or pattern}: cannot be read: {error.strerror}") from None
        if not matches:
            raise UserError(f"{key}.paths: no file matches {pattern!r}")
        for file in matches:
            first = files.setdefault(file.path if is_remote else _identity(file.path), file)
            if first is not file:
                other = "is named twice" if first.path == file.path else f"is the same file as {first.path}"
                _log_once(f"{key}.paths: {file.path} {other}; it is read once")
    return list(files.values())


def _identity(path: str) -> tuple[int, int] | str:
    status = Path(path).stat()
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


def local_bytes(files: list[SourceFile]) -> int | None:
    """Return the total size of the files in bytes, or None if a file is on an object store."""
    if any("://" in file.path for file in files):
        return None
    return sum(Path(file.path).stat().st_size for file in files)


@cache
def _log_once(message: str) -> None:
    """Log a warning, unless it was logged before: a command can look up its files several times."""
    logger.warning("%s", message)


# -- local


def _local_files(pattern: str, key: str) -> list[SourceFile]:
    path = Path(pattern)
    if _exists(path) or not glob.has_magic(pattern):
        if path.is_dir():
            return _parts(_in_folder(path, key), str(path), key)
        _check_readable(path, key)
        return [SourceFile(str(path))]
    _check_matched_folders(path, key)
    names = sorted(glob.glob(str(path), recursive=True))
    if path.name == "**":  # matches folders by its nature, and the files in them too
        names = [name for name in names if not Path(name).is_dir()]
    for name in names:
        _check_readable(Path(name), key)
    return [SourceFile(name) for name in names]


def _exists(path: Path) -> bool:
    """Return True if a path exists; False also if a folder above it cannot be entered."""
    try:
        return path.exists()
    except OSError:
        return False


def _check_readable(path: Path, key: str) -> None:
    """Raise :class:`UserError` if a path is no file that can be read."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        problem = f"is a link to {path.readlink()}, which does not exist" if path.is_symlink() else ""
        raise UserError(
            f"{key}.paths: {path}: {problem or 'no such prompts file'}; correct the path or restore the file"
        ) from None
    except OSError as error:
        raise UserError(f"{key}.paths: {path}: cannot be read: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        raise UserError(
            f"{key}.paths: {path}: is a folder, matched by a pattern for files; give the path of the folder itself, or "
            "a pattern that matches the files in it"
        )
    if not stat.S_ISREG(mode):
        raise UserError(
            f"{key}.paths: {path}: is no regular file (a pipe, socket or device), which could be read only once; write "
            "its content to a file"
        )
    if not os.access(path, os.R_OK):
        raise UserError(f"{key}.paths: {path}: no permission to read it; change the permissions of the file")


def _check_matched_folders(pattern: Path, key: str) -> None:
    """Raise :class:`UserError` if a folder on the way to a match cannot be read.

    `glob` passes over such a folder, and so over all the files in it.
    """
    for child in (pattern, *pattern.parents):
        if child.parent == child or not glob.has_magic(str(child)):
            break
        for folder in map(Path, glob.glob(str(child.parent), recursive=True)):
            # `**` also matches files, which are none of the folders on the way.
            if child.parent.name != "**" and folder.is_symlink() and not _exists(folder):
                _check_readable(folder, key)
            _check_folder(folder, key, os.R_OK | os.X_OK if glob.has_magic(child.name) else os.X_OK)


def _check_folder(folder: Path, key: str, access: int = os.R_OK | os.X_OK) -> None:
    if folder.is_dir() and not os.access(folder, access):
        raise UserError(f"{key}.paths: {folder}: no permission to list this folder; change its permissions")
    if access & os.R_OK and folder.is_dir():
        with os.scandir(folder) as entries:  # raises what `glob` passes over, such as a stale handle
            for _ in entries:
                pass


def _in_folder(folder: Path, key: str, above: tuple[Path, ...] = ()) -> Iterator[str]:
    """Yield the paths of all files in a folder and its subfolders, relative to it, in order."""
    real = folder.resolve()
    if real in above:
        raise UserError(f"{key}.paths: {folder}: is a link to a folder that contains it; remove the link")
    _check_folder(folder, key)
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{key}.paths: {folder}: cannot be listed: {error.strerror}") from None
    for entry in entries:
        if entry.is_dir() and entry.name not in _NOT_PARTS and not _is_hidden(entry.name):
            yield from (f"{entry.name}/{name}" for name in _in_folder(entry, key, (*above, real)))
        else:
            if not _is_hidden(entry.name):
                _check_readable(entry, key)
            yield entry.name


# -- folders of parts


def _parts(names: Iterable[str], folder: str, key: str) -> list[SourceFile]:
    """Return the files of a folder of parts, as Spark, Hive and others write them.

    Args:
        names: paths of all files in the folder, relative to it.
    """
    parts = []
    for name in names:
        *parents, file = name.split("/")
        for part in (*parents, file):
            if part in _NOT_PARTS:
                raise UserError(f"{key}.paths: {folder}: has {part}: {_NOT_PARTS[part]}")
        if not any(map(_is_hidden, (*parents, file))):
            pairs = [parent.split("=", 1) for parent in parents if "=" in parent]
            columns = {unquote(k): None if value == _HIVE_NULL else unquote(value) for k, value in pairs}
            parts.append(SourceFile(f"{folder.rstrip('/')}/{name}", is_part=True, columns=columns))
    if not parts:
        raise UserError(
            f"{key}.paths: {folder}: the folder has no file to read; names that begin with '_' or '.' do not count"
        )
    return parts


def _is_hidden(name: str) -> bool:
    """Return True for names of markers, checksums and metadata, which hold no rows."""
    return name.startswith(("_", ".")) or name.endswith((".crc", "_$folder$"))


# -- object stores


def _remote_files(pattern: str, key: str) -> list[SourceFile]:
    """Return the objects that match a pattern, or that are in a folder.

    As on a file system, `*` matches within one folder and `**` across folders.
    """
    store, path, root = open_store(pattern, key)
    try:
        if not glob.has_magic(path):
            return _object_or_folder(store, path, pattern, key)
        folder = path[: path.index(next(letter for letter in path if letter in "*?["))].rpartition("/")[0]
        matches = _matching(_listed(store, folder), path, root, key)
    except BaseError as error:
        raise UserError(
            f"{pattern}: cannot be listed: {innermost_cause(error)}; credentials are taken from the environment"
        ) from None
    return [SourceFile(f"{root}/{name}") for name in matches]


def _object_or_folder(store: Any, path: str, url: str, key: str) -> list[SourceFile]:
    if not path.endswith("/"):
        try:
            obstore.head(store, path)
            return [SourceFile(url)]
        except (NotFoundError, FileNotFoundError):
            pass
    folder = path.rstrip("/") + "/"
    listed = (name for name in _listed(store, folder.rstrip("/")) if name.startswith(folder))
    names = sorted((name.removeprefix(folder) for name in listed), key=lambda name: name.split("/"))
    if not names:
        raise UserError(f"{key}.paths: {url}: no such prompts file; correct the path or restore the file")
    return _parts(names, url, key)


def _listed(store: Any, folder: str) -> Iterator[str]:
    """Yield the paths of all objects in a folder, without the markers of empty folders."""
    for page in obstore.list(store, folder or None):
        yield from (item["path"] for item in page if not item["path"].endswith("/"))


def _matching(names: Iterable[str], pattern: str, root: str, key: str) -> list[str]:
    patterns = {pattern, pattern.replace("**/", "")}
    depth = pattern.count("/")
    matches = []
    for name in names:
        if "**" not in pattern and name.count("/") != depth:
            parent = "/".join(name.split("/")[: depth + 1])
            if name.count("/") > depth and fnmatch.fnmatchcase(parent, pattern):
                raise UserError(
                    f"{key}.paths: {root}/{parent}: is a folder, matched by a pattern for files; give the path of the "
                    "folder itself, or a pattern that matches the files in it"
                )
        elif any(fnmatch.fnmatchcase(name, each) for each in patterns):
            matches.append(name)
    return sorted(matches)


def open_store(url: str, key: str = "prompts") -> tuple[Any, str, str]:
    """Return the store of a URI, the path in the store, and the URI of the store.

    Raises:
        UserError: the URI or the environment for it is invalid.
    """
    scheme, _, location = url.partition("://")
    bucket, _, path = location.partition("/")
    if scheme not in _SCHEMES or not bucket or not path or "@" in bucket:
        raise UserError(
            f"{key}.paths: {url!r}: expected a path, or s3://, gs:// or az:// with a bucket and a path in the bucket"
        )
    root = f"{scheme}://{bucket}"
    try:
        return from_url(root), path, root
    except BaseError as error:
        raise UserError(f"{key}.paths: {root}: {innermost_cause(error)}") from None
