"""Storage: a folder on a file system or an object store, with atomic writes and put-if-absent."""

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
_COMMITTED_IS_KEPT = ". What is committed is kept"
_CHUNK_BYTES = 8 << 20
_CACHED_BYTES = 256 << 10  # fits into the second-level cache of a core


@dataclass(frozen=True)
class Claim:
    """Claim of one writer on a folder of a run.

    Attributes:
        folder: folder of the claims in the storage.
        number: number of the claim, counted from 1 without gaps.
        launch: identifies the command that the writer belongs to.
    """

    folder: str
    number: int
    launch: str


@dataclass(frozen=True)
class Storage:
    """A local or remote folder.

    Keys are paths relative to the folder. An operation that fails raises :class:`RunFailed` with
    the cause that the storage reports; only "not found" means that an object is absent. Credentials
    come from the environment and are never stored or pickled.

    Attributes:
        url: a path or a file://, s3://, gs:// or az:// URI.
        claim: claim of this command on the run in the folder (:mod:`plad_dist.data.claims`); None
            for a command that does not own the run.
    """

    url: str
    claim: Claim | None = None

    @cached_property
    def local_root(self) -> Path | None:
        """Folder on this machine's file system, or None for an object store."""
        parsed = urlparse(self.url)
        if parsed.scheme in ("", "file") or len(parsed.scheme) == 1:
            return Path(unquote(parsed.path) if parsed.scheme == "file" else self.url).absolute()
        if parsed.scheme not in _REMOTE_SCHEMES or not parsed.netloc:
            raise UserError(f"run.dir: {self.url!r}: expected a path or a file://, s3://, gs:// or az:// URI")
        if parsed.password or parsed.query:
            raise UserError("run.dir: a config must not contain secrets; pass credentials in the environment")
        return None

    @cached_property
    def _store(self) -> Any:
        if self.local_root is not None:
            return LocalStore(self.local_root, mkdir=True)
        try:
            return from_url(self.url)
        except BaseError as error:
            raise UserError(f"run.dir: {self.url}: {innermost_cause(error)}") from None

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "claim": self.claim}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def create(self, key: str, data: bytes) -> bool:
        """Write a new object in one atomic step. Return False, and write nothing, if it exists."""
        with self._failure_explained(key, "written"):
            if self.local_root is not None:
                return write_durably(self.local_root / key, data, os.link)
            try:
                # A multipart upload cannot be conditional, so large objects go in one request too.
                obstore.put(self._store, key, data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
        return True

    def replace(self, key: str, data: bytes) -> None:
        """Write an object atomically, overwriting an existing one."""
        with self._failure_explained(key, "written"):
            if self.local_root is not None:
                write_durably(self.local_root / key, data, os.replace)
                return
            obstore.put(self._store, key, data, mode="overwrite", use_multipart=False)

    def upload(self, key: str, file: Path) -> None:
        """Write an object of any size from a file, overwriting an existing one."""
        with self._failure_explained(key, "written"):
            if self.local_root is None:
                # S3 accepts at most 10,000 parts per multipart upload.
                obstore.put(self._store, key, file, chunk_size=max(_CHUNK_BYTES, file.stat().st_size // 9_000 + 1))
                return
            path = self.local_root / key
            make_folders(path.parent)
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            try:
                shutil.copyfile(file, temporary)
                fsync(temporary)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            fsync(path.parent)

    def download(self, key: str, file: Path) -> None:
        """Write the bytes of an object to a file."""
        with self._failure_explained(key, "read"), file.open("wb") as out:
            for chunk in obstore.get(self._store, key).stream(min_chunk_size=_CHUNK_BYTES):
                out.write(chunk)

    def checksum(self, key: str) -> str | None:
        """Return the hexadecimal XXH3 checksum of an object, or None if it does not exist.

        The object can be of any size: its bytes are streamed.
        """
        with self._failure_explained(key, "read"):
            digest = xxhash.xxh3_128()
            try:
                if self.local_root is not None:
                    return file_checksum(self.local_root / key)
                for chunk in obstore.get(self._store, key).stream(min_chunk_size=_CHUNK_BYTES):
                    digest.update(chunk)
            except (NotFoundError, FileNotFoundError):
                return None
            return digest.hexdigest()

    def delete_folder(self, folder: str) -> None:
        """Delete all objects in a folder and below it."""
        with self._failure_explained(folder, "deleted"):
            if self.local_root is not None:
                shutil.rmtree(self.local_root / folder, ignore_errors=True)
                return
            for page in obstore.list(self._store, f"{folder}/"):
                obstore.delete(self._store, [item["path"] for item in page])

    def delete(self, key: str) -> None:
        """Delete an object if it exists."""
        with self._failure_explained(key, "deleted"), contextlib.suppress(NotFoundError, FileNotFoundError):
            if self.local_root is not None:
                (self.local_root / key).unlink()
            else:
                obstore.delete(self._store, key)

    def read(self, key: str) -> bytes | None:
        """Return the bytes of an object, or None if it does not exist. Creates no folder."""
        with self._failure_explained(key, "read"):
            try:
                if self.local_root is not None:
                    return (self.local_root / key).read_bytes()
                return bytes(obstore.get(self._store, key).bytes())
            except (NotFoundError, FileNotFoundError, NotADirectoryError):
                return None

    def read_with_checksum(self, key: str) -> tuple[Any, str] | None:
        """Return an object as a buffer, and its XXH3 checksum; None if it does not exist.

        A local file is read and hashed in pieces that fit into the processor's cache.
        """
        if self.local_root is None:
            data = self.read(key)
            return None if data is None else (data, xxhash.xxh3_128_hexdigest(data))
        with self._failure_explained(key, "read"):
            try:
                with (self.local_root / key).open("rb", buffering=0) as file:
                    return _read_hashed(file)
            except (FileNotFoundError, NotADirectoryError):
                return None

    def view(self, key: str) -> Any:
        """Return the bytes of an object as a buffer, or None if it does not exist.

        The buffer of a local file is memory-mapped. The process is killed when it touches bytes
        that the file does not have any more, so only files that were checked before are viewed.
        """
        if self.local_root is None:
            return self.read(key)
        with self._failure_explained(key, "read"):
            try:
                with pa.memory_map(str(self.local_root / key)) as file:
                    return file.read_buffer()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def read_json(self, key: str) -> Any:
        """Return the parsed JSON document at a key, or None if it does not exist.

        Raises:
            RunFailed: the object is not valid JSON.
        """
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
        """Return the sizes in bytes of the objects directly in a folder, by name.

        Subfolders are listed with a trailing slash and size 0.
        """
        if self.local_root is not None and not (self.local_root / folder).is_dir():
            return {}
        with self._failure_explained(folder, "listed"):
            listing = obstore.list_with_delimiter(self._store, f"{folder}/" if folder else None, return_arrow=False)
        objects = {item["path"].rpartition("/")[2]: item["size"] for item in listing["objects"]}
        return objects | {f"{path.rstrip('/').rpartition('/')[2]}/": 0 for path in listing["common_prefixes"]}

    def move(self, key: str, target: str) -> bool:
        """Give an object another name. Return False if it does not exist.

        In an object store it is copied before it is deleted, so that a crash leaves both or the
        copy.
        """
        if self.local_root is None:
            data = self.read(key)
            if data is None:
                return False
            self.replace(target, data)
            self.delete(key)
            return True
        source, path = self.local_root / key, self.local_root / target
        with self._failure_explained(key, f"moved to {target}"):
            make_folders(path.parent)
            try:
                source.rename(path)
            except FileNotFoundError:
                return False
            fsync(path.parent, source.parent)
        return True

    def exists(self, path: str) -> bool:
        """Return True if a path is an object, or a folder that is not empty."""
        if self.local_root is not None:
            return (self.local_root / path).exists()
        return path.rpartition("/")[2] in self.sizes(path.rpartition("/")[0]) or bool(self.sizes(path))

    def check_writable(self) -> None:
        """Check that objects can be written and deleted, and that a second `create` is refused.

        Raises:
            UserError: the storage cannot hold a run.
        """
        key = f".writable-{uuid.uuid4().hex}"
        try:
            self.replace(key, b"")
            is_refused = not self.create(key, b"")
            self.delete(key)
        except RunFailed as error:
            cause = str(error).partition(": cannot be ")[2].partition(_COMMITTED_IS_KEPT)[0]
            raise UserError(f"run.dir: {self.url}: cannot be {cause}") from None
        if not is_refused:
            raise UserError(
                f"run.dir: {self.url}: the store overwrites existing objects although a conditional put forbids it, so "
                "two writers could overwrite each other; use a store that supports conditional puts"
            )

    @contextmanager
    def _failure_explained(self, key: str, participle: str) -> Iterator[None]:
        """Turn storage errors into a message that names the object, the operation and the cause."""
        try:
            yield
        except (BaseError, OSError) as error:
            raise RunFailed(
                f"{self.url}/{key}: cannot be {participle}: {innermost_cause(error)}{_COMMITTED_IS_KEPT}; "
                "fix the cause and run again"
            ) from None


def write_durably(path: Path, data: bytes, put: Callable[[Path, Path], None]) -> bool:
    """Write a file that exists completely or not at all, even after a power loss.

    The bytes are flushed to the disk before the file gets its name, because a shared file system
    may keep the writes of a node in that node's memory, where they are lost with the node.

    Args:
        put: gives the temporary file (first argument) its final name: `os.link` or `os.replace`.

    Returns:
        False if `put` refuses to overwrite an existing file.
    """
    make_folders(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
        fsync(temporary)
        put(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)
    return True


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


def _read_hashed(file: Any) -> tuple[Any, str]:
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
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


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
