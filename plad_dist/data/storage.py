"""Storage: a folder on a file system or an object store, with atomic writes and put-if-absent."""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlparse

import obstore
import pyarrow as pa
import xxhash
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, NotFoundError
from obstore.store import LocalStore, from_url

from plad_dist.data.local_files import (
    CHUNK_BYTES,
    COMMITTED_IS_KEPT,
    delete_tree,
    failure_explained,
    file_pieces,
    file_sizes,
    fsync,
    innermost_cause,
    make_folders,
    path_mode,
    read_hashed,
    write_durably,
)
from plad_dist.errors import RunFailed, UserError

_REMOTE_SCHEMES = ("s3", "gs", "az")
_ABSENT = (NotFoundError, FileNotFoundError, NotADirectoryError)  # any other error is a failure
_PUT_SECONDS, _PUT_BYTES_PER_SECOND = 30, 1 << 20  # a put may take this time, and that of its bytes
_CLIENT_OPTIONS = {
    "allow_http", "allow_invalid_certificates", "connect_timeout", "default_content_type", "http1_only", "http2_only",
    "pool_idle_timeout", "pool_max_idle_per_host", "proxy_ca_certificate", "proxy_excludes", "proxy_url", "timeout",
    "user_agent",
}  # fmt: skip
_CREATE_TRIES, _CREATE_PATIENCE_S, _LONGEST_PAUSE_S = 10, 180.0, 15.0


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

    @cached_property
    def _stores_for_puts(self) -> dict[tuple[int, bool], Any]:
        return {}

    def _store_for(self, size: int, *, retried: bool) -> Any:
        """Return the store for a put of a number of bytes, whose timeout grows with them.

        Args:
            retried: the store repeats failed requests. A conditional put must not be repeated
                there, because the repetition finds the object of the first try.
        """
        # A power of two times the shortest timeout, so that there are few stores.
        seconds = _PUT_SECONDS << (size // (_PUT_SECONDS * _PUT_BYTES_PER_SECOND)).bit_length()
        key = (seconds, retried)
        if key not in self._stores_for_puts:
            retries: Any = {} if retried else {"retry_config": {"max_retries": 0}}
            options: Any = {"timeout": f"{seconds}s", **_client_options(urlparse(self.url).scheme)}
            self._stores_for_puts[key] = from_url(self.url, client_options=options, **retries)
        return self._stores_for_puts[key]

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "claim": self.claim}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def create(self, key: str, data: bytes) -> bool:
        """Write a new object in one atomic step. Return False, and write nothing, if it exists."""
        with self._failure_explained(key, "written"):
            if self.local_root is not None:
                return write_durably(self.local_root / key, data, os.link)
            return self._create_remote(key, data)

    def _create_remote(self, key: str, data: bytes) -> bool:
        """Put an object unless it exists, and try again where the outcome is not known.

        A store reports a conflict both for an object that exists and for another put at the same
        time, which may leave no object. So the object is read: if there is none, the put is tried
        again. If it is the object of this call, and an earlier try ended without a clear reply,
        that try has succeeded.
        """
        is_unknown, until = False, time.monotonic() + _CREATE_PATIENCE_S
        store = self._store_for(len(data), retried=False)
        for number in range(_CREATE_TRIES):
            try:
                # A multipart upload cannot be conditional, so large objects go in one request too.
                obstore.put(store, key, data, mode="create", use_multipart=False)
                return True
            except AlreadyExistsError as error:
                existing = self.read(key)
                if existing is not None:
                    return is_unknown and existing == data
                failure: BaseError = error
            except GenericError as error:  # a timeout, a lost connection, or an error of the server
                is_unknown, failure = True, error
            if time.monotonic() > until:
                break
            time.sleep(random.random() * min(_LONGEST_PAUSE_S, 0.2 * 2**number))  # noqa: S311 - no secret
        if is_unknown and self.read(key) == data:
            return True
        raise failure

    def replace(self, key: str, data: bytes) -> None:
        """Write an object atomically, overwriting an existing one."""
        with self._failure_explained(key, "written"):
            if self.local_root is not None:
                write_durably(self.local_root / key, data, os.replace)
                return
            store = self._store_for(len(data), retried=True)
            obstore.put(store, key, data, mode="overwrite", use_multipart=False)

    def upload(self, key: str, file: Path) -> None:
        """Write an object of any size from a file, overwriting an existing one."""
        with self._failure_explained(key, "written"):
            if self.local_root is None:
                # S3 accepts at most 10,000 parts per multipart upload.
                obstore.put(self._store, key, file, chunk_size=max(CHUNK_BYTES, file.stat().st_size // 9_000 + 1))
                return
            write_durably(self.local_root / key, file, os.replace)

    def download(self, key: str, file: Path) -> None:
        """Write the bytes of an object to a file."""
        with self._failure_explained(key, "read"), file.open("wb") as out:
            for chunk in obstore.get(self._store, key).stream(min_chunk_size=CHUNK_BYTES):
                out.write(chunk)

    def checksum(self, key: str) -> str | None:
        """Return the hexadecimal XXH3 checksum of an object, or None if it does not exist.

        The object can be of any size: its bytes are streamed.
        """
        return self._hash(key, lambda _: None)

    def copy_hashed(self, key: str, out: BinaryIO) -> str | None:
        """Write an object to an open file, and return its checksum like :meth:`checksum`.

        Each byte is read once.
        """
        digest = self._hash(key, out.write)
        out.flush()
        return digest

    def _hash(self, key: str, take: Callable[[Any], object]) -> str | None:
        """Return the checksum of an object, or None; pass each of its pieces to a function."""
        with self._failure_explained(key, "read"):
            digest = xxhash.xxh3_128()
            try:
                for piece in self._pieces(key):
                    digest.update(piece)
                    take(piece)
            except _ABSENT:
                return None
            return digest.hexdigest()

    def _pieces(self, key: str) -> Iterator[Any]:
        if self.local_root is not None:
            return file_pieces(self.local_root / key)
        return iter(obstore.get(self._store, key).stream(min_chunk_size=CHUNK_BYTES))

    def delete_folder(self, folder: str) -> None:
        """Delete all objects in a folder and below it."""
        with self._failure_explained(folder, "deleted"):
            if self.local_root is not None:
                delete_tree(self.local_root / folder)
                return
            for page in obstore.list(self._store, f"{folder}/"):
                for item in page:
                    self.delete(item["path"])

    def delete(self, key: str) -> None:
        """Delete an object if it exists."""
        with self._failure_explained(key, "deleted"), contextlib.suppress(*_ABSENT):
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
            except _ABSENT:
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
                    return read_hashed(file)
            except _ABSENT:
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
            except _ABSENT:
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
        with self._failure_explained(folder, "listed"):
            if self.local_root is not None:
                return file_sizes(self.local_root / folder)
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
            except _ABSENT:
                return False
            fsync(path.parent, source.parent)
        return True

    def exists(self, path: str) -> bool:
        """Return True if a path is an object, or a folder that is not empty.

        Only the second is told from a listing, which can be stale.
        """
        if self.local_root is not None:
            with self._failure_explained(path, "read"):
                return path_mode(self.local_root / path) is not None
        with self._failure_explained(path, "read"):
            try:
                obstore.head(self._store, path)
            except _ABSENT:
                return bool(self.sizes(path))
        return True

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
            with contextlib.suppress(RunFailed):
                self.delete(key)
            cause = str(error).partition(": cannot be ")[2].partition(COMMITTED_IS_KEPT)[0]
            raise UserError(f"run.dir: {self.url}: cannot be {cause}") from None
        if not is_refused:
            raise UserError(
                f"run.dir: {self.url}: the store overwrites existing objects although a conditional put forbids it, so "
                "two writers could overwrite each other; use a store that supports conditional puts"
            )

    def _failure_explained(self, key: str, participle: str) -> AbstractContextManager[None]:
        return failure_explained(f"{self.url}/{key}", participle)


def _client_options(scheme: str) -> dict[str, str]:
    """Return the options of HTTP clients in the environment, such as `AWS_ALLOW_HTTP`.

    A store reads them by itself only if no option is given to it.
    """
    prefix = {"s3": "aws", "gs": "google", "az": "azure"}[scheme]
    values = {name.lower(): value for name, value in os.environ.items()}
    return {option: values[name] for option in _CLIENT_OPTIONS if (name := f"{prefix}_{option}") in values}
