"""The spool: paid responses in uncommitted blocks, kept in storage so that none is paid for twice.

A spool is a folder beside the parts of its dataset, with one folder for each block. A flush writes
the new rows of a block as one small Arrow file, whose name sorts by time. Files carry a checksum
and the fingerprint of the dataset. A row with a negative `sample_index` is no response: it only
records money that was spent without one.

The spool of a committed block counts no more, because the part has its cost.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from plad_dist.data.dataset import Dataset
from plad_dist.data.parts import encode_part, open_part, part_name, read_header
from plad_dist.data.storage import Storage

logger = logging.getLogger("plad")

Row = dict[str, Any]  # one sample, by column
SampleKey = tuple[str, int]  # prompt_id, sample_index

FOLDER = "spool"
_FILE_NAME = re.compile(r"\d{20}-[0-9a-f]{8}-\d{6}\.arrow")
_READERS = 16


class Spool:
    """Paid responses for the blocks of a dataset, by this process and by earlier ones.

    A row has the columns of the dataset, and `prompt_tokens` and `cost`. A kill loses the rows that
    were added after the last :meth:`flush`. Every method may be called from any thread.
    """

    def __init__(self, dataset: Dataset, fingerprint: str) -> None:
        self._dataset, self._fingerprint = dataset, fingerprint
        self._schema = dataset.schema.append(pa.field("prompt_tokens", pa.int64(), nullable=False)).append(
            pa.field("cost", pa.float64(), nullable=False)
        )
        # Sorts by time: the first response to a prompt is the one that counts.
        self._prefix = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        self._rows: defaultdict[int, list[Row]] = defaultdict(list)  # not written yet, by block
        self._files_written = 0
        self._rows_lock, self._files_lock = threading.Lock(), threading.Lock()

    def load(self, block: int) -> tuple[dict[SampleKey, Row], float]:
        """Return the responses of a block, and the money that it cost beyond them.

        That money was spent on requests without a response, or on a second response to one prompt.
        The caller must not add the responses again.
        """
        # Without the lock, a flush could move rows between the two reads, and they would be missed.
        with self._files_lock:
            tables = _read_tables(self._dataset.storage, self._folder(block), self._fingerprint, self._schema)
            with self._rows_lock:
                unwritten = list(self._rows.get(block, ()))
        responses: dict[SampleKey, Row] = {}
        lost_cost = 0.0
        for row in (*(row for table in tables for row in table.to_pylist()), *unwritten):
            is_response = row["sample_index"] >= 0
            if not is_response or responses.setdefault((row["prompt_id"], row["sample_index"]), row) != row:
                lost_cost += row["cost"]
        return responses, lost_cost

    def add(self, block: int, *rows: Row) -> None:
        """Keep rows until the next flush. Rows that are added together are written together."""
        for row in rows:
            assert row.keys() == set(self._schema.names), sorted(row.keys() ^ set(self._schema.names))
        with self._rows_lock:
            self._rows[block].extend(rows)

    def problem(self, row: Row) -> str | None:
        """Return why the columns cannot hold a row, None if they can."""
        try:
            pa.Table.from_pylist([row], schema=self._schema).validate(full=True)
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            return str(error) or type(error).__name__
        return None

    def flush(self) -> None:
        """Write all rows that are not written yet.

        Rows that cannot be written stay for the next flush, and do not hold up other blocks.

        Raises:
            Exception: the first failure, after all blocks were tried; usually a `RunFailed` with
                the storage's reason.
        """
        failure: Exception | None = None
        with self._files_lock:
            with self._rows_lock:
                blocks = list(self._rows)
            for block in blocks:
                try:
                    self._flush_block(block)
                except Exception as error:  # noqa: BLE001 - raised after all blocks were tried
                    failure = failure or error
        if failure is not None:
            raise failure

    def _flush_block(self, block: int) -> None:
        with self._rows_lock:
            rows = list(self._rows.get(block, ()))
        if not rows:
            return
        # A name is never used twice, because a write that seems to have failed may have succeeded.
        name = f"{self._prefix}-{self._files_written:06d}.arrow"
        self._files_written += 1
        self._dataset.storage.create(f"{self._folder(block)}/{name}", self._encode(rows))
        with self._rows_lock:
            added_meanwhile = self._rows.pop(block, [])[len(rows) :]
            if added_meanwhile:
                self._rows[block] = added_meanwhile

    def discard(self, block: int) -> None:
        """Delete the rows of a committed block. Other blocks may be flushed meanwhile."""
        with self._rows_lock:
            self._rows.pop(block, None)
        storage, folder = self._dataset.storage, self._folder(block)
        with ThreadPoolExecutor(_READERS) as threads:
            list(threads.map(lambda name: storage.delete(f"{folder}/{name}"), storage.sizes(folder)))
        if storage.local_root is not None:
            # The folder is missing if nothing was spooled, and not empty if another attempt writes.
            with contextlib.suppress(OSError):
                (storage.local_root / folder).rmdir()
                (storage.local_root / folder).parent.rmdir()

    def _folder(self, block: int) -> str:
        return f"{self._dataset.path}/{FOLDER}/{block:05d}"

    def _encode(self, rows: list[Row]) -> bytes:
        table = pa.Table.from_pylist(rows, schema=self._schema)
        return encode_part(table, fingerprint=self._fingerprint, attempt=self._prefix, counts={})


def damaged_files(dataset: Dataset) -> Iterator[tuple[str, str]]:
    """Yield name and problem of every damaged file of the spool of uncommitted blocks."""
    storage = dataset.storage
    for folder in uncommitted_folders(dataset):
        for name in filter(_FILE_NAME.fullmatch, storage.sizes(folder)):
            data = storage.read(f"{folder}/{name}")
            try:
                if data is not None:
                    _decode(data, None, None)
            except (pa.ArrowException, OSError, ValueError) as error:
                yield f"{folder.removeprefix(f'{dataset.path}/')}/{name}", str(error)


def total_cost(dataset: Dataset, blocks: Collection[int] | None = None) -> float:
    """Return the money that the spooled rows of a dataset cost.

    Rows of every process and config count. Committed blocks do not, because their parts have their
    cost.

    Args:
        blocks: blocks to count; None for all.
    """
    return sum(
        sum(table["cost"].to_pylist())
        for folder in uncommitted_folders(dataset, blocks)
        for table in _read_tables(dataset.storage, folder)
    )


def uncommitted_folders(dataset: Dataset, blocks: Collection[int] | None = None) -> list[str]:
    """Return the folders of the spool whose blocks are not committed.

    Args:
        blocks: blocks to consider; None for all.
    """
    storage, spool = dataset.storage, f"{dataset.path}/{FOLDER}"
    names = storage.sizes(dataset.path)
    numbers = [name.rstrip("/") for name in storage.sizes(spool) if re.fullmatch(r"\d{5,}/", name)]
    counted = None if blocks is None else set(blocks)
    return [
        f"{spool}/{number}"
        for number in numbers
        if part_name(int(number)) not in names and (counted is None or int(number) in counted)
    ]


def _read_tables(
    storage: Storage, folder: str, fingerprint: str | None = None, schema: pa.Schema | None = None
) -> list[pa.Table]:
    """Return the readable files of a folder, oldest first.

    Args:
        fingerprint: if set, leave out files with another fingerprint.
        schema: if set, leave out files with other columns.
    """
    names = sorted(name for name in storage.sizes(folder) if _FILE_NAME.fullmatch(name))
    with ThreadPoolExecutor(_READERS) as threads:
        contents = list(threads.map(lambda name: storage.read(f"{folder}/{name}"), names))
    tables = []
    for name, data in zip(names, contents, strict=True):
        if data is None:
            continue  # its block was committed meanwhile
        try:
            tables.append(_decode(data, fingerprint, schema))
        except (pa.ArrowException, OSError, ValueError) as error:
            logger.warning("%s/%s/%s: ignored: %s", storage.url, folder, name, error)
    return tables


def _decode(data: bytes, fingerprint: str | None, schema: pa.Schema | None) -> pa.Table:
    header = read_header(data)
    table = open_part(data).read_all()
    table.validate(full=True)
    if "cost" not in table.column_names:
        raise ValueError("not a file of a spool")
    if fingerprint is not None and header.fingerprint != fingerprint:
        raise ValueError("written under another config or from other inputs")
    if schema is not None and not table.schema.equals(schema):
        raise ValueError("has other columns")
    return table
