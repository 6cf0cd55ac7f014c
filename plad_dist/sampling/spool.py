"""Answered rows of blocks that are not committed yet, kept in storage so that nothing paid is asked again after a kill."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import xxhash

from plad_dist.data.storage import Storage
from plad_dist.data.store import Dataset, part_name

logger = logging.getLogger("plad")

Row = dict[str, Any]

FOLDER = "spool"
_OBJECT = re.compile(r"\d{20}-[0-9a-f]{8}-\d{6}\.arrow")
_READERS = 16


class Spool:
    """The rows that one attempt got for blocks of a dataset, and those that earlier attempts left.

    A row has the dataset's columns, `prompt_tokens` and `cost`. Rows go to storage with :meth:`flush`, as one small Arrow
    file per block; a kill loses what was added since. Every method may be called from any thread.
    """

    def __init__(self, dataset: Dataset, fingerprint: str) -> None:
        self._dataset, self._fingerprint = dataset, fingerprint
        self._schema = dataset.schema.append(pa.field("prompt_tokens", pa.int64(), nullable=False)).append(
            pa.field("cost", pa.float64(), nullable=False)
        )
        # Sorts by time: of two answers to one prompt, the first is kept.
        self._attempt = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        self._rows: defaultdict[int, list[Row]] = defaultdict(list)
        self._written = 0
        self._buffer, self._objects = threading.Lock(), threading.Lock()

    def load(self, block: int) -> tuple[dict[tuple[str, int], Row], float]:
        """What was answered of a block, by prompt_id and sample_index, and the money that was spent on it without an answer, or for
        a second one.

        These rows are not to be added again.
        """
        with self._objects:  # or a flush could carry rows from where they were not looked for yet to where they were
            tables = _tables(self._dataset.storage, self._folder(block), self._fingerprint, self._schema)
            with self._buffer:
                unwritten = list(self._rows.get(block, ()))
        found: dict[tuple[str, int], Row] = {}
        lost = 0.0
        for row in (*(row for table in tables for row in table.to_pylist()), *unwritten):
            if row["sample_index"] < 0 or found.setdefault((row["prompt_id"], row["sample_index"]), row) != row:
                lost += row["cost"]
        return found, lost

    def add(self, block: int, row: Row) -> None:
        """Keep a row until the next flush. One with a negative sample_index is no answer: it only says what was spent."""
        assert row.keys() == set(self._schema.names), sorted(row.keys() ^ set(self._schema.names))
        with self._buffer:
            self._rows[block].append(row)

    def flush(self) -> None:
        """Write what is not written yet. Rows that could not be written stay for the next time.

        Raises what went wrong first, :class:`RunFailed` with the storage's reason as a rule, when all blocks were tried.
        """
        failure: Exception | None = None
        with self._objects:
            with self._buffer:
                blocks = list(self._rows)
            for block in blocks:
                with self._buffer:
                    rows = list(self._rows.get(block, ()))
                if not rows:
                    continue
                # A name is never used twice: a write that seems to have failed may have succeeded.
                name = f"{self._attempt}-{self._written:06d}.arrow"
                self._written += 1
                try:
                    self._dataset.storage.create(f"{self._folder(block)}/{name}", self._encode(rows))
                except Exception as error:  # noqa: BLE001 - a block must not hold up the others
                    failure = failure or error
                    continue
                with self._buffer:
                    left = self._rows.pop(block, [])[len(rows) :]
                    if left:
                        self._rows[block] = left
        if failure is not None:
            raise failure

    def discard(self, block: int) -> None:
        """Forget a block that is committed. Meanwhile other blocks are flushed."""
        with self._buffer:
            self._rows.pop(block, None)
        storage, folder = self._dataset.storage, self._folder(block)
        with ThreadPoolExecutor(_READERS) as threads:
            list(threads.map(lambda name: storage.delete(f"{folder}/{name}"), storage.sizes(folder)))
        if storage.local_root is not None:
            with contextlib.suppress(OSError):  # another attempt has just written there, or nobody ever did
                (storage.local_root / folder).rmdir()
                (storage.local_root / folder).parent.rmdir()

    def _folder(self, block: int) -> str:
        return f"{self._dataset.path}/{FOLDER}/{block:05d}"

    def _encode(self, rows: list[Row]) -> bytes:
        table = pa.Table.from_pylist(rows, schema=self._schema)
        facts = {"plad.fingerprint": self._fingerprint, "plad.xxh3_128": _checksum(table)}
        sink = io.BytesIO()
        with pa.ipc.new_file(sink, table.schema.with_metadata(facts)) as writer:
            writer.write_table(table.replace_schema_metadata(facts))
        return sink.getvalue()


def total_cost(dataset: Dataset, of: Collection[int] | None = None) -> float:
    """What the spooled rows of a dataset cost, of every attempt and config. Committed blocks count for themselves.

    Args:
        of: blocks that count; None for all.
    """
    storage, spool = dataset.storage, f"{dataset.path}/{FOLDER}"
    committed = storage.sizes(dataset.path)
    blocks = [name.rstrip("/") for name in storage.sizes(spool) if re.fullmatch(r"\d{5,}/", name)]
    wanted = None if of is None else set(of)
    return sum(
        sum(table["cost"].to_pylist())
        for block in blocks
        if part_name(int(block)) not in committed and (wanted is None or int(block) in wanted)
        for table in _tables(storage, f"{spool}/{block}")
    )


def _tables(
    storage: Storage, folder: str, fingerprint: str | None = None, schema: pa.Schema | None = None
) -> list[pa.Table]:
    """The readable objects of a folder, oldest first; where given, only those of a fingerprint and a schema."""
    names = sorted(name for name in storage.sizes(folder) if _OBJECT.fullmatch(name))
    with ThreadPoolExecutor(_READERS) as threads:
        objects = list(threads.map(lambda name: storage.read(f"{folder}/{name}"), names))
    tables = []
    for name, data in zip(names, objects, strict=True):
        if data is None:
            continue  # its block has been committed in the meantime
        try:
            tables.append(_decode(data, fingerprint, schema))
        except (pa.ArrowException, OSError, ValueError) as error:
            logger.warning("%s/%s/%s: left out: %s", storage.url, folder, name, error)
    return tables


def _decode(data: bytes, fingerprint: str | None, schema: pa.Schema | None) -> pa.Table:
    table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
    facts = table.schema.metadata or {}
    table.validate(full=True)
    if facts.get(b"plad.xxh3_128", b"").decode() != _checksum(table) or "cost" not in table.column_names:
        raise ValueError("damaged, or not a file of a spool")
    if fingerprint is not None and facts.get(b"plad.fingerprint", b"").decode() != fingerprint:
        raise ValueError("made by another config or other inputs")
    if schema is not None and not table.schema.equals(schema):
        raise ValueError("it has other columns")
    return table


def _checksum(table: pa.Table) -> str:
    """Of the rows, since Arrow's files have none."""
    return xxhash.xxh3_128_hexdigest(json.dumps(table.to_pylist()).encode())
