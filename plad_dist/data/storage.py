"""A folder on a file system or an object store, with the few operations that the product needs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import obstore
import pyarrow as pa
import xxhash
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError
from obstore.store import LocalStore, from_url

from plad_dist.errors import RunFailed, UserError

_REMOTE_SCHEMES = ("s3", "gs", "az")
_PIECE = 8 << 20


@dataclass(frozen=True)
class Storage:
    """A folder, local or remote. Cheap to pickle; credentials come from the environment and are never kept.

    Every operation raises :class:`RunFailed` with the storage's own reason where it cannot be carried out.

    Attributes:
        url: a path or a file://, s3://, gs:// or az:// URI.
    """

    url: str

    @cached_property
    def local_root(self) -> Path | None:
        """The folder on this machine's file system, or None for an object store."""
        parsed = urlparse(self.url)
        if parsed.scheme in ("", "file") or len(parsed.scheme) == 1:
            return Path(unquote(parsed.path) if parsed.scheme == "file" else self.url).expanduser().absolute()
        if parsed.scheme not in _REMOTE_SCHEMES or not parsed.netloc:
            raise UserError(f"run.dir: {self.url!r}: expected a path or a file://, s3://, gs:// or az:// URI")
        if parsed.password or parsed.query:
            raise UserError("run.dir: secrets are not kept in configs; give credentials through the environment")
        return None

    @cached_property
    def _store(self) -> Any:
        if self.local_root is not None:
            return LocalStore(self.local_root, mkdir=True)
        try:
            return from_url(self.url)
        except BaseError as error:
            raise UserError(f"run.dir: {self.url}: {reason(error)}") from None

    def __getstate__(self) -> dict[str, str]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__dict__.update(state)

    def create(self, key: str, data: bytes) -> bool:
        """Write a new object in one atomic step. Returns False, and writes nothing, where there already is one."""
        with self._explained(key, "written"):
            if self.local_root is not None:
                return write_durably(self.local_root / key, data, os.link)
            try:
                # A multipart upload cannot be conditional, so large objects go in one request too.
                obstore.put(self._store, key, data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
        return True

    def replace(self, key: str, data: bytes) -> None:
        """Write an object atomically, over the old one if there is one."""
        with self._explained(key, "written"):
            if self.local_root is not None:
                write_durably(self.local_root / key, data, os.replace)
                return
            obstore.put(self._store, key, data, mode="overwrite", use_multipart=False)

    def upload(self, key: str, file: Path) -> None:
        """Write an object of any size from a file, over the old one if there is one."""
        with self._explained(key, "written"):
            if self.local_root is None:
                # S3 takes ten thousand parts of one object.
                obstore.put(self._store, key, file, chunk_size=max(_PIECE, file.stat().st_size // 9_000 + 1))
                return
            path = self.local_root / key
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            try:
                shutil.copyfile(file, temporary)
                sync(temporary)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            sync(path.parent)

    def download(self, key: str, file: Path) -> None:
        """Write an object into a file."""
        with self._explained(key, "read"), file.open("wb") as out:
            for piece in obstore.get(self._store, key).stream(min_chunk_size=_PIECE):
                out.write(piece)

    def checksum(self, key: str) -> str | None:
        """Hexadecimal XXH3 checksum of an object of any size, None where there is none."""
        with self._explained(key, "read"):
            digest = xxhash.xxh3_128()
            try:
                if self.local_root is not None:
                    return file_checksum(self.local_root / key)
                for piece in obstore.get(self._store, key).stream(min_chunk_size=_PIECE):
                    digest.update(piece)
            except (NotFoundError, FileNotFoundError):
                return None
            return digest.hexdigest()

    def delete_folder(self, folder: str) -> None:
        """Remove all objects in a folder and below it."""
        with self._explained(folder, "deleted"):
            if self.local_root is not None:
                shutil.rmtree(self.local_root / folder, ignore_errors=True)
                return
            for page in obstore.list(self._store, f"{folder}/"):
                obstore.delete(self._store, [item["path"] for item in page])

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""
        with self._explained(key, "deleted"), contextlib.suppress(NotFoundError, FileNotFoundError):
            if self.local_root is not None:
                (self.local_root / key).unlink()
            else:
                obstore.delete(self._store, key)

    def read(self, key: str) -> bytes | None:
        """The bytes of an object, None where there is none. Makes no folder."""
        with self._explained(key, "read"):
            try:
                if self.local_root is not None:
                    return (self.local_root / key).read_bytes()
                return bytes(obstore.get(self._store, key).bytes())
            except (NotFoundError, FileNotFoundError, NotADirectoryError):
                return None

    def view(self, key: str) -> Any:
        """The bytes of an object as a buffer, memory-mapped where it is a local file; None where there is none."""
        if self.local_root is None:
            return self.read(key)
        with self._explained(key, "read"):
            try:
                with pa.memory_map(str(self.local_root / key)) as file:
                    return file.read_buffer()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def read_json(self, key: str) -> Any:
        """The decoded JSON object, None where there is none. Raises :class:`RunFailed` where it is damaged."""
        data = self.read(key)
        if data is None:
            return None
        try:
            return json.loads(data)
        except ValueError as error:
            raise RunFailed(
                f"{self.url}/{key}: not valid JSON ({error}); restore it or delete it to redo the stage"
            ) from None

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of the objects directly in a folder, by name; folders in it have a trailing slash and no bytes."""
        if self.local_root is not None and not (self.local_root / folder).is_dir():
            return {}
        with self._explained(folder, "listed"):
            listing = obstore.list_with_delimiter(self._store, f"{folder}/" if folder else None, return_arrow=False)
        found = {item["path"].rpartition("/")[2]: item["size"] for item in listing["objects"]}
        return found | {f"{path.rstrip('/').rpartition('/')[2]}/": 0 for path in listing["common_prefixes"]}

    def holds(self, path: str) -> bool:
        """Whether there is an object or a folder with something in it at a path."""
        if self.local_root is not None:
            return (self.local_root / path).exists()
        return path.rpartition("/")[2] in self.sizes(path.rpartition("/")[0]) or bool(self.sizes(path))

    def check_writable(self) -> None:
        """Raise :class:`UserError` unless an object can be written and removed, and a second `create` is refused."""
        key = f".writable-{uuid.uuid4().hex}"
        try:
            self.replace(key, b"")
            refused = not self.create(key, b"")
            self.delete(key)
        except RunFailed as error:
            cause = str(error).partition(": cannot be ")[2].partition(". What is committed")[0]
            raise UserError(f"run.dir: {self.url}: cannot be {cause}") from None
        if not refused:
            raise UserError(
                f"run.dir: {self.url}: does not refuse to create an object that is there (conditional put), without "
                "which two writers could overwrite one another; use a store that does"
            )

    @contextmanager
    def _explained(self, key: str, done: str) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError) as error:
            raise RunFailed(
                f"{self.url}/{key}: cannot be {done}: {reason(error)}. What is committed is kept; run again when it can be."
            ) from None


def write_durably(path: Path, data: bytes, put: Callable[[Path, Path], None]) -> bool:
    """Write a file that is whole or not there, also after a loss of power. False where `put` finds one there.

    The bytes are on the disk before they get their name: file systems that several nodes share may keep what a lost node
    has written in that node's memory.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
        sync(temporary)
        put(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
    return True


def file_checksum(path: Path) -> str:
    """Hexadecimal XXH3 checksum of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def sync(*paths: Path) -> None:
    """Wait until files, or the names in folders, are on the disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_tree(folder: Path) -> None:
    """Wait until all that is in a folder is on the disk."""
    sync(*folder.rglob("*"), folder)


def reason(error: Exception) -> str:
    """The innermost cause that a store gives, on one line."""
    text = " ".join(str(error).split())
    for inner in re.findall(r'(?:message|kind): "?([^,"{}]+)', text):
        if "error" not in inner.lower():
            text = f"{inner} ({text[:160]})"
            break
    return text[:300] or type(error).__name__
