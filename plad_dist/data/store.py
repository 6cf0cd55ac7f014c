"""Exactly-once datasets on a file system or an object store.

A dataset is a folder of parts and a manifest. Part ``k`` is the output of block ``k``, a fixed range of prompt rows, and
appears by one atomic put-if-absent: whoever commits first wins, a later attempt learns that it lost and drops its work.
The manifest is written last and makes the dataset complete. Storage is the only source of truth: a writer may die at any
instruction and the next one goes on from the names that are there.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import obstore
import pyarrow as pa
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError
from obstore.store import LocalStore, from_url

from plad_dist.errors import RunFailed, UserError

MANIFEST = "manifest.json"
_PART = re.compile(r"part-(\d{5,})\.arrow")
_REMOTE_SCHEMES = ("s3", "gs", "az")


@dataclass(frozen=True)
class Storage:
    """A folder, local or remote, with the few operations that the product needs. Cheap to pickle.

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
        if parsed.scheme not in _REMOTE_SCHEMES:
            raise UserError(f"run.dir: {self.url!r}: expected a path or a file://, s3://, gs:// or az:// URI")
        return None

    @cached_property
    def _store(self) -> Any:
        if self.local_root is not None:
            return LocalStore(self.local_root, mkdir=True)
        return from_url(self.url)

    def __getstate__(self) -> dict[str, str]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__dict__.update(state)

    def create(self, key: str, data: bytes) -> bool:
        """Write a new object in one atomic step. Returns False, and writes nothing, where there already is one."""
        try:
            # A multipart upload cannot be conditional, so large objects go in one request too.
            obstore.put(self._store, key, data, mode="create", use_multipart=False)
        except AlreadyExistsError:
            return False
        return True

    def replace(self, key: str, data: bytes) -> None:
        """Write an object atomically, over the old one if there is one."""
        obstore.put(self._store, key, data, mode="overwrite", use_multipart=False)

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""
        if self.local_root is not None:
            (self.local_root / key).unlink(missing_ok=True)
            return
        with contextlib.suppress(NotFoundError, FileNotFoundError):
            obstore.delete(self._store, key)

    def read(self, key: str) -> bytes | None:
        """The bytes of an object, None where there is none. Makes no folder."""
        try:
            if self.local_root is not None:
                return (self.local_root / key).read_bytes()
            return bytes(obstore.get(self._store, key).bytes())
        except (NotFoundError, FileNotFoundError, NotADirectoryError):
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

    def names(self, folder: str) -> list[str]:
        """Names of the objects directly in a folder."""
        if self.local_root is not None:
            path = self.local_root / folder
            return [entry.name for entry in path.iterdir() if entry.is_file()] if path.is_dir() else []
        listing = obstore.list_with_delimiter(self._store, f"{folder}/")
        return [item["path"].rpartition("/")[2] for item in listing["objects"]]

    def check_writable(self) -> None:
        """Raise :class:`UserError` unless an object can be written and removed."""
        try:
            obstore.put(self._store, ".writable", b"", mode="overwrite")
            obstore.delete(self._store, ".writable")
        except (BaseError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"run.dir: {self.url}: cannot be written: {reason}") from None


@dataclass(frozen=True)
class Part:
    """One committed part as the manifest lists it."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a complete dataset holds.

    Attributes:
        fingerprint: what the rows were made of and from.
        facts: counts and times that the stage found worth keeping.
    """

    fingerprint: str
    parts: list[Part]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    def to_json(self) -> bytes:
        return json.dumps({"version": 1, "rows": self.rows, **asdict(self)}, indent=1).encode()


@dataclass(frozen=True)
class Dataset:
    """A dataset folder inside a run directory.

    Attributes:
        storage: the run directory.
        path: folder of the dataset in it, such as ``samples/teacher/round-0``.
        schema: columns of every part.
    """

    storage: Storage
    path: str
    schema: pa.Schema

    # -- writing

    def commit(self, block: int, table: pa.Table, *, fingerprint: str, attempt: str) -> Part | None:
        """Commit a block's rows as one part. Returns None, having changed nothing, if the block is committed already."""
        data = _encode(table.cast(self.schema), {"fingerprint": fingerprint, "attempt": attempt})
        name = part_name(block)
        if not self.storage.create(f"{self.path}/{name}", data):
            return None
        return Part(name, table.num_rows, len(data), hashlib.sha256(data).hexdigest())

    def finish(self, blocks: int, *, fingerprint: str, facts: dict[str, Any], known: Iterable[Part] = ()) -> Manifest:
        """Write the manifest over blocks ``0 .. blocks-1``, all of which must be committed.

        Args:
            known: parts that this process saw committed; only the others are read, for their checksums.
        """
        by_name = {part.name: part for part in known}
        names = [part_name(block) for block in range(blocks)]
        with ThreadPoolExecutor(8) as threads:
            parts = list(threads.map(lambda name: by_name.get(name) or self._inspect(name, fingerprint), names))
        manifest = Manifest(fingerprint, parts, facts)
        self.storage.replace(f"{self.path}/{MANIFEST}", manifest.to_json())
        return manifest

    def _inspect(self, name: str, fingerprint: str) -> Part:
        data = self.storage.read(f"{self.path}/{name}")
        if data is None:
            raise RunFailed(
                f"{self.storage.url}/{self.path}/{name}: committed earlier, now gone. Run again to redo its block."
            )
        reader = _open(data, f"{self.path}/{name}")
        found = (reader.schema.metadata or {}).get(b"plad.fingerprint", b"").decode()
        if found != fingerprint:
            raise UserError(
                f"{self.storage.url}/{self.path}/{name}: made by another config or other inputs "
                f"(fingerprint {found[:12] or 'none'}, expected {fingerprint[:12]}). Use another run.dir."
            )
        rows = sum(reader.get_batch(index).num_rows for index in range(reader.num_record_batches))
        return Part(name, rows, len(data), hashlib.sha256(data).hexdigest())

    # -- reading

    def committed(self) -> set[int]:
        """Blocks that are committed, from the names alone."""
        matches = (_PART.fullmatch(name) for name in self.storage.names(self.path))
        return {int(match[1]) for match in matches if match}

    def manifest(self) -> Manifest | None:
        """The manifest, None while the dataset is not complete."""
        raw = self.storage.read_json(f"{self.path}/{MANIFEST}")
        if raw is None:
            return None
        try:
            return Manifest(raw["fingerprint"], [Part(**part) for part in raw["parts"]], raw["facts"])
        except (KeyError, TypeError) as error:
            raise RunFailed(
                f"{self.storage.url}/{self.path}/{MANIFEST}: not a manifest of this version ({error})"
            ) from None

    def read_block(self, block: int) -> pa.Table:
        """The rows of one committed block, memory-mapped where the part is a local file."""
        return self._read_part(part_name(block))

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows of a complete dataset, memory-mapped where it is local. Raises :class:`RunFailed` if incomplete."""
        manifest = self.manifest()
        if manifest is None:
            raise RunFailed(
                f"{self.storage.url}/{self.path}: not complete, it has no {MANIFEST}. Run the stage that makes it."
            )
        tables = [self._read_part(part.name) for part in manifest.parts]
        table = pa.concat_tables(tables) if tables else self.schema.empty_table()
        return table.select(columns) if columns is not None else table

    def _read_part(self, name: str) -> pa.Table:
        key = f"{self.path}/{name}"
        if self.storage.local_root is not None:
            path = self.storage.local_root / key
            try:
                source: Any = pa.memory_map(str(path))
            except FileNotFoundError:
                raise RunFailed(
                    f"{path}: missing. Delete {MANIFEST} beside it and run again to redo its block."
                ) from None
        else:
            source = self.storage.read(key)
            if source is None:
                raise RunFailed(f"{self.storage.url}/{key}: missing.")
        table = _open(source, key).read_all()
        return table.replace_schema_metadata(None)


def part_name(block: int) -> str:
    """File name of a block's part."""
    return f"part-{block:05d}.arrow"


def _encode(table: pa.Table, facts: dict[str, str]) -> bytes:
    """The Arrow IPC file of a table, with facts about its origin in the schema's metadata."""
    table = table.replace_schema_metadata({f"plad.{key}": value for key, value in facts.items()})
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _open(source: Any, name: str) -> Any:
    try:
        return pa.ipc.open_file(source)
    except pa.ArrowInvalid as error:
        raise RunFailed(
            f"{name}: damaged, not a readable Arrow file ({error}). Delete it and the {MANIFEST} beside it, then run again."
        ) from None
