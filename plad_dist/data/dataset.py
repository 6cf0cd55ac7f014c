"""Exactly-once datasets: the commit of a part, resume, and the manifest that completes them.

A dataset is a folder of parts and a manifest. The commit protocol:

- Part `k` is the output of block `k`, a fixed range of prompt rows. It appears by one atomic
  put-if-absent (:meth:`plad_dist.data.storage.Storage.create`). The first commit wins; a later
  attempt learns that it lost, drops its work and takes the committed part.
- The metadata of a part states the fingerprint of its inputs, the attempt that wrote it, and its
  checksum. An attempt whose successful put was reported as failed therefore recognises its own
  part, a part of other inputs is refused, and so is one that has changed before any journal or
  manifest listed it.
- A journal beside the parts lists the committed parts with rows, size, checksum and counts
  (:mod:`plad_dist.data.journal`). It only saves reads. An entry is used only if the part exists and
  has the journaled size.
- The manifest is written last, over all blocks, and makes the dataset complete. Just before, the
  names and sizes of the parts are listed again, and the writer must still own the run
  (:mod:`plad_dist.data.claims`). Then the journal is deleted.

Storage is the only source of truth. A writer can die at any instruction; the next writer resumes
from the names of the committed parts.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa

from plad_dist.data.claims import check_owned
from plad_dist.data.journal import JOURNAL, Journal, delete_journal, read_journal, rewrite_journal
from plad_dist.data.manifest import MANIFEST, Manifest
from plad_dist.data.parts import (
    DamagedPart,
    Part,
    check_part,
    encode_part,
    open_part,
    part_block,
    part_checksum,
    part_name,
    read_header,
)
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed, UserError

logger = logging.getLogger("plad")

DAMAGED = "damaged"
_READ_THREADS = 16

DatasetFacts = dict[str, Any] | Callable[[Sequence[Part]], dict[str, Any]]


@dataclass(frozen=True)
class Dataset:
    """A dataset folder inside a run directory.

    Attributes:
        storage: the run directory.
        path: folder of the dataset in the run directory, such as `samples/teacher/round-0`.
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
        """Commit the rows of a block as one part.

        Args:
            fingerprint: hash of everything that decides the rows.
            attempt: identifier of this attempt, unique among all attempts at the block.
            counts: integers that add up over parts.

        Returns:
            The part of the block, and True if this attempt wrote it. If another attempt was first,
            nothing is changed and the part is that of the other attempt.

        Raises:
            UserError: the committed part has another fingerprint.
            RunFailed: the storage failed, the committed part is damaged, or another command has
                claimed the run.
        """
        data = encode_part(table.cast(self.schema), fingerprint=fingerprint, attempt=attempt, counts=counts or {})
        name = part_name(block)
        check_owned(self.storage)  # a late part of another config would be in its successor's way
        if self.storage.create(f"{self.path}/{name}", data):
            return Part(name, table.num_rows, len(data), part_checksum(data), counts or {}), True
        # If the response to our own successful put was lost, its retry finds our own part.
        part, writer = self._read_committed(name, fingerprint)
        return part, writer == attempt

    def finish(
        self, blocks: int, *, fingerprint: str, facts: DatasetFacts, known_parts: Iterable[Part] = ()
    ) -> Manifest:
        """Write the manifest over blocks `0 .. blocks-1` and delete the journal.

        Args:
            blocks: number of blocks. All of them must be committed.
            fingerprint: fingerprint of the dataset. The parts that are read must have it.
            facts: facts of the manifest, or a function that derives them from all parts. If the
                function raises, nothing is written.
            known_parts: parts that this process committed or read from the journal. The other parts
                are read from storage.

        Raises:
            UserError: a part, or an existing manifest, has another fingerprint.
            RunFailed: a part is missing or damaged, or another command has claimed the run.
        """
        by_name = {part.name: part for part in known_parts}
        names = [part_name(block) for block in range(blocks)]
        unknown = [name for name in names if name not in by_name]
        with ThreadPoolExecutor(_READ_THREADS) as threads:
            by_name.update(
                (part.name, part)
                for part, _ in threads.map(lambda name: self._read_committed(name, fingerprint), unknown)
            )
        parts = [by_name[name] for name in names]
        manifest = Manifest(fingerprint, parts, facts(parts) if callable(facts) else facts)
        self._check_again(parts, fingerprint)
        check_owned(self.storage)
        self.storage.replace(f"{self.path}/{MANIFEST}", manifest.to_json())
        _parts.cache_clear()
        delete_journal(self.storage, self._journal_folder)
        return manifest

    def _check_again(self, parts: Sequence[Part], fingerprint: str) -> None:
        """Check that the parts of a manifest still exist and that no others were added.

        A part that the listing lacks, which can be stale, is read.

        Raises:
            UserError: a part, or an existing manifest, has another fingerprint.
            RunFailed: a part is missing, or has other bytes than it had.
        """
        existing = self.manifest()
        if existing is not None and existing.fingerprint != fingerprint:
            raise self._other_inputs(MANIFEST, existing.fingerprint, fingerprint)
        sizes = self.storage.sizes(self.path)
        for part in parts:
            if sizes.get(part.name) == part.bytes:
                continue
            if self._read_committed(part.name, fingerprint)[0] != part:
                raise RunFailed(
                    f"{self.url}/{part.name}: has changed since it was committed as {part.bytes:,} bytes, so the "
                    "manifest was not written. Every part is kept. Another command may be at work on the run: let only "
                    "one run, then run again"
                )
        for name in sorted(sizes.keys() - {part.name for part in parts}):
            if part_block(name) is not None:
                self._read_committed(name, fingerprint)

    def resume(self, fingerprint: str) -> dict[int, Part | None]:
        """Return the committed blocks, as :meth:`committed` does, for a writer that continues.

        Entries of parts that no longer exist are removed from the journal, because the new parts of
        their blocks will have other bytes.

        Raises:
            UserError: the first committed part has another fingerprint.
        """
        parts, journaled_names = self._committed(fingerprint)
        if journaled_names - {part_name(block) for block in parts}:
            self.rewrite_journal(fingerprint, (part for part in parts.values() if part))
        if parts:
            self.find(min(parts), fingerprint)
        return parts

    def reopen(self, manifest: Manifest | None, bad: Collection[str]) -> list[str]:
        """Make the dataset incomplete and move its bad parts to `damaged/`.

        The manifest is removed. The next run redoes the blocks of the bad parts and keeps the other
        parts. A command that dies on the way leaves a manifest that lists moved parts, so that
        `plad verify --repair` continues.

        Args:
            manifest: manifest whose parts, without the bad ones, replace the journal. None leaves
                the journal unchanged: for a dataset without a readable manifest, or to drop all
                parts.
            bad: file names of the bad parts, and that of the manifest if it is damaged.

        Returns:
            The names in `bad` that existed and were moved.

        Raises:
            RunFailed: the storage failed, or another command has claimed the run.
        """
        check_owned(self.storage)
        if manifest is not None:
            self.rewrite_journal(manifest.fingerprint, (part for part in manifest.parts if part.name not in bad))
        moved = []
        for name in sorted(bad):
            target = f"{self.path}/{DAMAGED}/{name}.{uuid.uuid4().hex[:8]}"
            if self.storage.move(f"{self.path}/{name}", target):
                logger.warning("%s/%s: set aside as %s", self.url, name, target)
                moved.append(name)
        self.storage.delete(f"{self.path}/{MANIFEST}")
        _parts.cache_clear()
        return moved

    def set_aside_unless(self, fingerprint: str) -> None:
        """Reopen a complete dataset of another fingerprint without its parts, so that it is redone.

        The parts are moved to `damaged/`.
        """
        manifest = self.manifest()
        if manifest is not None and manifest.fingerprint != fingerprint:
            self.reopen(None, [part.name for part in manifest.parts])

    # -- journal

    @property
    def _journal_folder(self) -> str:
        return f"{self.path}/{JOURNAL}"

    def journal(self, fingerprint: str) -> Journal:
        """Return a new writer of the journal."""
        return Journal(self.storage, self._journal_folder, fingerprint)

    def journaled(self, fingerprint: str | None = None) -> Iterator[Part]:
        """Yield the journaled parts, the latest entry of a part last; see :func:`read_journal`."""
        return read_journal(self.storage, self._journal_folder, fingerprint)

    def rewrite_journal(self, fingerprint: str, parts: Iterable[Part]) -> None:
        """Replace the whole journal by the given parts."""
        rewrite_journal(self.storage, self._journal_folder, fingerprint, parts)

    # -- committed parts

    def committed(self, fingerprint: str | None = None) -> dict[int, Part | None]:
        """Return every committed block with its part, or with None if the journal lacks the part.

        Reads names and the journal, never rows.

        Args:
            fingerprint: use only journal entries of this fingerprint.
        """
        return self._committed(fingerprint)[0]

    def committed_parts(self) -> dict[int, Part]:
        """Return every committed block with its part. Reads the parts that the journal lacks."""
        parts = self.committed()
        unknown = [block for block, part in parts.items() if part is None]
        with ThreadPoolExecutor(_READ_THREADS) as threads:
            read = threads.map(lambda block: self._read_committed(part_name(block))[0], unknown)
            return {block: part for block, part in parts.items() if part} | dict(zip(unknown, read, strict=True))

    def _committed(self, fingerprint: str | None) -> tuple[dict[int, Part | None], set[str]]:
        """Return the committed blocks with their parts, and the names of all journaled parts."""
        sizes = self.storage.sizes(self.path)
        has_journal = f"{JOURNAL}/" in sizes
        journaled = {part.name: part for part in self.journaled(fingerprint)} if has_journal else {}
        parts: dict[int, Part | None] = {}
        for name, size in sizes.items():
            if (block := part_block(name)) is not None:
                part = journaled.get(name)
                # A part of another size is not the journaled one, whatever happened to it.
                parts[block] = part if part is not None and part.bytes == size else None
        return parts, set(journaled)

    def find(self, block: int, fingerprint: str) -> Part | None:
        """Return the part of a block, or None if it is not committed. Reads the part.

        Raises:
            UserError: the part has another fingerprint.
            RunFailed: the part is damaged.
        """
        name = part_name(block)
        data = self.storage.read(f"{self.path}/{name}")
        return self._describe(name, data, fingerprint)[0] if data is not None else None

    def read_committed(self, block: int, fingerprint: str) -> pa.Table:
        """Return the rows of a committed block, checked by the checksum that its part states.

        Raises:
            UserError: the part has another fingerprint.
            RunFailed: the part is missing or damaged.
        """
        name = part_name(block)
        data = self._read_existing(name)
        self._describe(name, data, fingerprint)
        return open_part(data).read_all().replace_schema_metadata(None)

    def origin(self, block: int) -> str:
        """Return the fingerprint of a committed block."""
        name = part_name(block)
        with self._damage_explained(name):
            return read_header(self._read_existing(name)).fingerprint

    def _read_committed(self, name: str, fingerprint: str | None = None) -> tuple[Part, str]:
        """Read a committed part and return its description and the attempt that wrote it."""
        return self._describe(name, self._read_existing(name), fingerprint)

    def _read_existing(self, name: str) -> bytes:
        data = self.storage.read(f"{self.path}/{name}")
        if data is None:
            raise RunFailed(f"{self.url}/{name}: missing, although it was committed; run again to redo its block")
        return data

    def _describe(self, name: str, data: bytes, fingerprint: str | None) -> tuple[Part, str]:
        with self._damage_explained(name):
            header = read_header(data)
        if fingerprint is not None and header.fingerprint != fingerprint:
            raise self._other_inputs(name, header.fingerprint, fingerprint)
        return Part(name, header.rows, len(data), part_checksum(data), header.counts), header.attempt

    def _other_inputs(self, name: str, actual: str, expected: str) -> UserError:
        return UserError(
            f"{self.url}/{name}: made by another config or from other inputs (fingerprint {actual[:12] or 'none'}, "
            f"expected {expected[:12]}); use another run.dir"
        )

    # -- reading

    def manifest(self) -> Manifest | None:
        """Return the manifest, or None while the dataset is incomplete.

        Raises:
            DamagedManifest: the manifest cannot be parsed.
        """
        data = self.storage.read(f"{self.path}/{MANIFEST}")
        return None if data is None else Manifest.from_json(data, f"{self.url}/{MANIFEST}")

    def complete_as(self, fingerprint: str) -> Manifest | None:
        """Return the manifest, or None while the dataset is incomplete.

        Raises:
            UserError: the dataset is complete with another fingerprint.
        """
        manifest = self.manifest()
        if manifest is not None and manifest.fingerprint != fingerprint:
            raise UserError(
                f"{self.url}: complete, but made by another config or from other inputs (fingerprint "
                f"{manifest.fingerprint[:12]}, expected {fingerprint[:12]}). Nothing was changed; restore them, or use "
                "another run.dir"
            )
        return manifest

    def require(self, command: str) -> Manifest:
        """Return the manifest.

        Args:
            command: the `plad` command that writes the dataset, for the message.

        Raises:
            UserError: the dataset is incomplete.
        """
        manifest = self.manifest()
        if manifest is None:
            raise UserError(f"{self.url}: not complete yet; run `plad {command}` first")
        return manifest

    def read_block(self, block: int, check: bool = True) -> pa.Table:
        """Return the rows of one block of a complete dataset.

        Args:
            check: read the whole part and compare its size and checksum with the manifest. Without
                it, a local part is memory-mapped; only for a part that was checked before, since
                this process is killed if the file is cut short or its disk fails.

        Raises:
            RunFailed: the dataset is incomplete, or the part is missing or damaged.
        """
        return self._read_part(_parts(self)[block], check)

    def blocks(self) -> Iterator[pa.Table]:
        """Yield the rows of a complete dataset, one block in memory at a time."""
        for part in _parts(self):
            yield self._read_part(part)

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return all rows of a small complete dataset.

        Raises:
            RunFailed: the dataset is incomplete, or a part is missing or damaged.
        """
        with ThreadPoolExecutor(_READ_THREADS) as threads:
            tables = list(threads.map(self._read_part, _parts(self)))
        table = pa.concat_tables(tables) if tables else self.schema.empty_table()
        return table.select(columns) if columns is not None else table

    def _read_part(self, part: Part, check: bool = True) -> pa.Table:
        key = f"{self.path}/{part.name}"
        if check:
            data, checksum = self.storage.read_with_checksum(key) or (None, "")
        else:
            data = self.storage.view(key)
        with self._damage_explained(part.name):
            if data is None:
                raise DamagedPart("missing")
            if check:
                check_part(part, len(data), checksum)
            return open_part(data).read_all().replace_schema_metadata(None)

    @contextmanager
    def _damage_explained(self, name: str) -> Iterator[None]:
        """Turn :class:`DamagedPart` into a message that names the part and the remedy."""
        try:
            yield
        except DamagedPart as error:
            raise RunFailed(
                f"{self.url}/{name}: {error}. Nothing was overwritten. `plad verify {self.storage.url} --repair` "
                "sets bad parts aside; run again after that to redo only their blocks"
            ) from None


@lru_cache(maxsize=32)
def _parts(dataset: Dataset) -> list[Part]:
    """Return the parts of a complete dataset, which never change."""
    manifest = dataset.manifest()
    if manifest is None:
        raise RunFailed(f"{dataset.url}: not complete: it has no {MANIFEST}; run the stage that writes it")
    return manifest.parts
