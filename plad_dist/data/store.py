"""Exactly-once datasets on a file system or an object store.

A dataset is a folder of parts and a manifest. Part ``k`` is the output of block ``k``, a fixed range of prompt rows, and
appears by one atomic put-if-absent: whoever commits first wins, a later attempt learns that it lost and drops its work.
The manifest is written last and makes the dataset complete. Storage is the only source of truth: a writer may die at any
instruction and the next one goes on from the names that are there.

A journal beside the parts keeps what the manifest will say of them (rows, bytes, checksum, counts), so that going on with a
hundred thousand parts reads a few small objects and not one part. It only saves work: what it lacks is read from the parts.
"""

from __future__ import annotations

import io
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pyarrow as pa
import xxhash

from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed, UserError

logger = logging.getLogger("plad")

MANIFEST = "manifest.json"
JOURNAL = "journal"
DAMAGED = "damaged"
_PART = re.compile(r"part-(\d{5,})\.arrow")
_READERS = 16
_JOURNAL_PARTS, _JOURNAL_SECONDS = 2048, 30.0


class DamagedManifest(RunFailed):
    """A manifest is not what it should be. Storage that does not answer is no damage."""


class DamagedPart(ValueError):
    """The bytes of a part are not what they should be. The message says in what way, not which part."""


@dataclass(frozen=True, slots=True)
class Part:
    """One committed part as the manifest lists it.

    Attributes:
        xxh3_128: hexadecimal XXH3 checksum of the file.
        counts: what adds up over parts, such as errors, tokens, or drops by reason.
    """

    name: str
    rows: int
    bytes: int
    xxh3_128: str
    counts: dict[str, int] = field(default_factory=dict)


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

    @property
    def contents(self) -> str:
        """Hash of what the parts hold: two datasets made of the same may still differ, where engines round otherwise."""
        return xxhash.xxh3_128_hexdigest("".join(part.xxh3_128 for part in self.parts).encode())

    def count(self, name: str) -> int:
        """Sum of one count over all parts."""
        return sum(part.counts.get(name, 0) for part in self.parts)

    def to_json(self) -> bytes:
        """One line for each part: quick to write and read where there are hundreds of thousands."""
        head = {"version": 2, "rows": self.rows, "fingerprint": self.fingerprint, "facts": self.facts}
        lines = [json.dumps({name: getattr(part, name) for name in Part.__slots__}) for part in self.parts]
        return (json.dumps(head)[:-1] + ', "parts": [\n' + ",\n".join(lines) + "\n]}\n").encode()


def _checked_part(raw: Any) -> Part:
    """A part as a manifest lists it. Raises :class:`TypeError` where it is none."""
    part = Part(**raw)
    if not (
        isinstance(part.name, str) and isinstance(part.rows, int) and isinstance(part.bytes, int)
        and isinstance(part.xxh3_128, str) and isinstance(part.counts, dict)
    ):  # fmt: skip
        raise TypeError(part.name)
    return part


Facts = dict[str, Any] | Callable[[Sequence[Part]], dict[str, Any]]


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

    @property
    def url(self) -> str:
        """Path or URI of the folder."""
        return f"{self.storage.url}/{self.path}"

    # -- writing

    def commit(
        self, block: int, table: pa.Table, *, fingerprint: str, attempt: str, counts: dict[str, int] | None = None
    ) -> tuple[Part, bool]:
        """Commit a block's rows as one part.

        Returns:
            The block's part, and whether this attempt wrote it. If another attempt was first, nothing is changed and the
            part is the other's.
        """
        facts = {"fingerprint": fingerprint, "attempt": attempt, "counts": json.dumps(counts or {})}
        data = _encode(table.cast(self.schema), facts)
        name = part_name(block)
        if self.storage.create(f"{self.path}/{name}", data):
            return Part(name, table.num_rows, len(data), _checksum(data), counts or {}), True
        # A lost answer to our own request, tried again, finds our own part there.
        there, other = self._inspect(name, fingerprint)
        return there, other == attempt

    def finish(self, blocks: int, *, fingerprint: str, facts: Facts, known: Iterable[Part] = ()) -> Manifest:
        """Write the manifest over blocks ``0 .. blocks-1``, all of which must be committed, and drop the journal.

        Args:
            facts: or a function that makes them of all parts; where it raises, nothing is written.
            known: parts that this process saw committed or found in the journal; the others are read.
        """
        by_name = {part.name: part for part in known}
        names = [part_name(block) for block in range(blocks)]
        unknown = [name for name in names if name not in by_name]
        with ThreadPoolExecutor(_READERS) as threads:
            by_name.update(
                (part.name, part) for part, _ in threads.map(lambda n: self._inspect(n, fingerprint), unknown)
            )
        parts = [by_name[name] for name in names]
        manifest = Manifest(fingerprint, parts, facts(parts) if callable(facts) else facts)
        self.storage.replace(f"{self.path}/{MANIFEST}", manifest.to_json())
        _parts.cache_clear()
        for name in self.storage.sizes(f"{self.path}/{JOURNAL}"):
            self.storage.delete(f"{self.path}/{JOURNAL}/{name}")
        return manifest

    def committed_parts(self) -> dict[int, Part]:
        """Every committed block with its part. Reads the parts that the journal does not know."""
        found = self.committed()
        unknown = [block for block, part in found.items() if part is None]
        with ThreadPoolExecutor(_READERS) as threads:
            read = threads.map(lambda block: self._inspect(part_name(block))[0], unknown)
            return {block: part for block, part in found.items() if part} | dict(zip(unknown, read, strict=True))

    def find(self, block: int, fingerprint: str) -> Part | None:
        """A block's part, None where it is not committed. Raises :class:`UserError` for one of another origin."""
        name = part_name(block)
        data = self.storage.read(f"{self.path}/{name}")
        return self._inspected(name, data, fingerprint)[0] if data is not None else None

    def origin(self, block: int) -> str:
        """Fingerprint of what a committed block was made of."""
        name = part_name(block)
        with self._refused_if_damaged(name):
            return part_facts(self.storage.view(f"{self.path}/{name}"))[0].fingerprint

    def _inspect(self, name: str, fingerprint: str | None = None) -> tuple[Part, str]:
        """A committed part from its bytes, and the attempt that wrote it."""
        data = self.storage.read(f"{self.path}/{name}")
        if data is None:
            raise RunFailed(f"{self.url}/{name}: committed earlier, now gone. Run again: its block alone is redone.")
        return self._inspected(name, data, fingerprint)

    def _inspected(self, name: str, data: bytes, fingerprint: str | None) -> tuple[Part, str]:
        with self._refused_if_damaged(name):
            facts, rows = part_facts(data)
        if fingerprint is not None and facts.fingerprint != fingerprint:
            raise UserError(
                f"{self.url}/{name}: made by another config or other inputs "
                f"(fingerprint {facts.fingerprint[:12] or 'none'}, expected {fingerprint[:12]}). Use another run.dir."
            )
        return Part(name, rows, len(data), _checksum(data), facts.counts), facts.attempt

    # -- reading

    def committed(self, fingerprint: str | None = None) -> dict[int, Part | None]:
        """Every committed block with its part, None where the journal does not know it. Reads names, never rows.

        Args:
            fingerprint: what the journal says of parts made of anything else is not believed.
        """
        return self._committed(fingerprint)[0]

    def resume(self, fingerprint: str) -> dict[int, Part | None]:
        """As :meth:`committed`, for the writer that goes on: the journal forgets parts that are gone, which will be others.

        Raises :class:`UserError` where what is committed was made of something else.
        """
        found, journaled = self._committed(fingerprint)
        if journaled - {part_name(block) for block in found}:
            self.rewrite_journal(fingerprint, (part for part in found.values() if part))
        if found:
            self.find(min(found), fingerprint)
        return found

    def _committed(self, fingerprint: str | None) -> tuple[dict[int, Part | None], set[str]]:
        """Committed blocks, and the names of all parts that the journal knows."""
        sizes = self.storage.sizes(self.path)
        known = {part.name: part for part in self.journaled(fingerprint)} if f"{JOURNAL}/" in sizes else {}
        found: dict[int, Part | None] = {}
        for name, size in sizes.items():
            if (block := part_block(name)) is not None:
                part = known.get(name)
                # Another size than was committed: whatever happened to the part, the journal no longer speaks of it.
                found[block] = part if part is not None and part.bytes == size else None
        return found, set(known)

    def journaled(self, fingerprint: str | None = None) -> Iterator[Part]:
        """What the journal says of parts, the latest last. Pages that cannot be read say nothing."""
        folder = f"{self.path}/{JOURNAL}"
        names = sorted(name for name in self.storage.sizes(folder) if name.endswith(".json"))  # by time
        with ThreadPoolExecutor(_READERS) as threads:
            for data in threads.map(lambda name: self.storage.read(f"{folder}/{name}"), names):
                try:
                    page = json.loads(data or b"")
                    found = [Part(*row) for row in page["parts"]] if fingerprint in (None, page["fingerprint"]) else []
                except (ValueError, KeyError, TypeError):
                    continue
                yield from found

    def rewrite_journal(self, fingerprint: str, parts: Iterable[Part]) -> None:
        """Let the journal say this and no more."""
        folder = f"{self.path}/{JOURNAL}"
        old = self.storage.sizes(folder)
        journal = Journal(self, fingerprint)
        for part in parts:
            journal.add(part)
        journal.flush()
        for name in old:
            self.storage.delete(f"{folder}/{name}")

    def reopen(self, manifest: Manifest | None, bad: Collection[str]) -> list[str]:
        """Make the dataset incomplete, without its bad parts, which go to `damaged/`: the next run makes them anew.

        Args:
            manifest: of a complete dataset; a journal keeps what it says of the sound parts. None where there is none.
            bad: names of parts, and of the manifest where it is the damaged one.

        Returns:
            Those of `bad` that were there and were moved.
        """
        if manifest is not None:
            self.rewrite_journal(manifest.fingerprint, (part for part in manifest.parts if part.name not in bad))
        moved = []
        for name in sorted(bad):
            data = self.storage.read(f"{self.path}/{name}")
            if data is not None:
                self.storage.replace(f"{self.path}/{DAMAGED}/{name}.{uuid.uuid4().hex[:8]}", data)
                self.storage.delete(f"{self.path}/{name}")
                moved.append(name)
        self.storage.delete(f"{self.path}/{MANIFEST}")
        _parts.cache_clear()
        return moved

    def set_aside_unless(self, fingerprint: str) -> None:
        """Reopen a complete dataset that was made of something else: it is to be made anew as a whole."""
        manifest = self.manifest()
        if manifest is not None and manifest.fingerprint != fingerprint:
            self.reopen(None, [part.name for part in manifest.parts])

    def manifest(self) -> Manifest | None:
        """The manifest, None while the dataset is not complete. Raises :class:`DamagedManifest`."""
        data = self.storage.read(f"{self.path}/{MANIFEST}")
        if data is None:
            return None
        try:
            raw = json.loads(data)
            parts = [_checked_part(part) for part in raw["parts"]]
            return Manifest(str(raw["fingerprint"]), parts, dict(raw["facts"]))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            why = error.msg if isinstance(error, json.JSONDecodeError) else "not a manifest of this version"
            raise DamagedManifest(
                f"{self.url}/{MANIFEST}: damaged: {why}. The checksums of the parts are lost with it: put it back from a copy, if "
                "there is one"
            ) from None

    def require(self, made_by: str) -> Manifest:
        """The manifest. Raises :class:`UserError` naming the command that makes the dataset where it is not complete."""
        manifest = self.manifest()
        if manifest is None:
            raise UserError(f"{self.url}: not complete yet; run `plad {made_by}` first")
        return manifest

    def read_block(self, block: int, check: bool = True) -> pa.Table:
        """The rows of one block of a complete dataset, memory-mapped where the part is a local file.

        Args:
            check: of its bytes against the manifest, which reads all of them.

        Raises :class:`RunFailed` where the part is not the one that was committed.
        """
        return self._read_part(_parts(self)[block], check)

    def blocks(self) -> Iterator[pa.Table]:
        """The rows of a complete dataset, a block after the other; only one is held."""
        for part in _parts(self):
            yield self._read_part(part)

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows of a complete dataset that is small, memory-mapped where it is local.

        A map for each part is open: a process may have some 65,000. Raises :class:`RunFailed` if incomplete.
        """
        with ThreadPoolExecutor(_READERS) as threads:
            tables = list(threads.map(self._read_part, _parts(self)))
        table = pa.concat_tables(tables) if tables else self.schema.empty_table()
        return table.select(columns) if columns is not None else table

    def _read_part(self, part: Part, check: bool = True) -> pa.Table:
        data = self.storage.view(f"{self.path}/{part.name}")
        with self._refused_if_damaged(part.name):
            if data is None:
                raise DamagedPart("missing")
            if check:
                check_part(part, data)
            return open_part(data).read_all().replace_schema_metadata(None)

    @contextmanager
    def _refused_if_damaged(self, name: str) -> Iterator[None]:
        """Say which part is damaged, and what to do."""
        try:
            yield
        except DamagedPart as error:
            raise RunFailed(
                f"{self.url}/{name}: {error}. Nothing was overwritten. `plad verify {self.storage.url} "
                "--repair` sets bad parts aside; run again then, and their blocks alone are redone."
            ) from None


@lru_cache(maxsize=32)
def _parts(dataset: Dataset) -> list[Part]:
    """Parts of a complete dataset, which do not change any more."""
    manifest = dataset.manifest()
    if manifest is None:
        raise RunFailed(
            f"{dataset.storage.url}/{dataset.path}: not complete, it has no {MANIFEST}. Run the stage that makes it."
        )
    return manifest.parts


class Journal:
    """Remembers committed parts in storage while a dataset is not complete.

    One writer uses one journal. Losing its last seconds costs a read of the parts in question, nothing else.
    """

    def __init__(self, dataset: Dataset, fingerprint: str) -> None:
        self._dataset, self._fingerprint = dataset, fingerprint
        # Sorts by time: what a later writer says of a part holds.
        self._prefix = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        self._parts: list[Part] = []
        self._written, self._last = 0, time.monotonic()

    def add(self, part: Part) -> None:
        """Remember a part that was committed."""
        self._parts.append(part)
        if len(self._parts) >= _JOURNAL_PARTS or time.monotonic() - self._last >= _JOURNAL_SECONDS:
            self.keep()

    def keep(self) -> None:
        """Write what is not written yet, if that can be: nothing that is committed depends on it."""
        try:
            self.flush()
        except RunFailed as error:
            logger.warning("what is committed could not be noted yet: %s", error)
            self._last = time.monotonic()

    def flush(self) -> None:
        """Write what is not written yet. Raises :class:`RunFailed` where it cannot be written; it stays for the next time."""
        if self._parts:
            rows = [[part.name, part.rows, part.bytes, part.xxh3_128, part.counts] for part in self._parts]
            key = f"{self._dataset.path}/{JOURNAL}/{self._prefix}-{self._written:06d}.json"
            page = {"fingerprint": self._fingerprint, "parts": rows}
            self._written += 1
            self._dataset.storage.replace(key, json.dumps(page).encode())
            self._parts = []
        self._last = time.monotonic()


# ------------------------------------------------------------------------------------------------------ parts as bytes


@dataclass(frozen=True)
class PartFacts:
    """What a part says of its own origin."""

    fingerprint: str
    attempt: str
    counts: dict[str, int]


def part_name(block: int) -> str:
    """File name of a block's part."""
    return f"part-{block:05d}.arrow"


def part_block(name: str) -> int | None:
    """The block of a part's file name, None for other names."""
    match = _PART.fullmatch(name)
    return int(match[1]) if match else None


def part_facts(data: Any) -> tuple[PartFacts, int]:
    """Origin and rows of a part from its bytes. Raises :class:`DamagedPart` where it is no whole Arrow file."""
    reader = open_part(data)
    try:
        metadata = {key.decode(): value.decode() for key, value in (reader.schema.metadata or {}).items()}
        rows = sum(reader.get_batch(index).num_rows for index in range(reader.num_record_batches))
        counts = json.loads(metadata.get("plad.counts", "{}"))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(error) from None
    return PartFacts(metadata.get("plad.fingerprint", ""), metadata.get("plad.attempt", ""), counts), rows


def check_part(part: Part, data: Any) -> None:
    """Raise :class:`DamagedPart` unless the bytes are those that the manifest lists."""
    if len(data) != part.bytes:
        raise DamagedPart(f"damaged: it has {len(data):,} bytes, {part.bytes:,} were committed")
    if _checksum(data) != part.xxh3_128:
        raise DamagedPart("damaged: its checksum is not that of the manifest")


def open_part(data: Any) -> Any:
    """A part's Arrow reader. Raises :class:`DamagedPart` where it is none."""
    try:
        return pa.ipc.open_file(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(error) from None


def _unreadable(error: Exception) -> DamagedPart:
    return DamagedPart(f"damaged: not a readable Arrow file ({str(error).rstrip('.')})")


def _checksum(data: Any) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def _encode(table: pa.Table, facts: dict[str, str]) -> bytes:
    """The Arrow IPC file of a table, with facts about its origin in the schema's metadata."""
    table = table.replace_schema_metadata({f"plad.{key}": value for key, value in facts.items()})
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()
