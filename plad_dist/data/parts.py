"""Format of a part, the Arrow file of one block: its metadata, checksum and validation.

A part holds the rows of one block. The metadata of its schema states its origin: the fingerprint of
its inputs, the attempt that wrote it, and its counts.
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import xxhash

_PART_NAME = re.compile(r"part-(\d{5,})\.arrow")


class DamagedPart(ValueError):
    """The bytes of a part are missing or wrong. The message does not name the part."""


@dataclass(frozen=True, slots=True)
class Part:
    """One committed part, as the manifest and the journal list it.

    Attributes:
        name: file name, such as `part-00000.arrow`.
        rows: number of rows.
        bytes: size of the file.
        xxh3_128: hexadecimal XXH3 checksum of the file.
        counts: integers that add up over parts, such as errors, tokens, or dropped rows by reason.
    """

    name: str
    rows: int
    bytes: int
    xxh3_128: str
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PartHeader:
    """Origin and size of a part, as its file states them.

    Attributes:
        fingerprint: hash of the inputs of the rows; empty if the file has none.
        attempt: identifier of the attempt that wrote the part.
        counts: as in :class:`Part`.
        rows: number of rows.
    """

    fingerprint: str
    attempt: str
    counts: dict[str, int]
    rows: int


def part_name(block: int) -> str:
    """Return the file name of a block's part."""
    return f"part-{block:05d}.arrow"


def part_block(name: str) -> int | None:
    """Return the block of a part by its file name, or None if the name is not that of a part."""
    match = _PART_NAME.fullmatch(name)
    return int(match[1]) if match else None


def encode_part(table: pa.Table, *, fingerprint: str, attempt: str, counts: dict[str, int]) -> bytes:
    """Return the Arrow IPC file of a table, with its origin in the schema's metadata."""
    metadata = {
        "plad.fingerprint": fingerprint,
        "plad.attempt": attempt,
        "plad.counts": json.dumps(counts),
    }
    table = table.replace_schema_metadata(metadata)
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def open_part(data: Any) -> Any:
    """Return the Arrow reader of a part. Raise :class:`DamagedPart` if it is not an Arrow file."""
    try:
        return pa.ipc.open_file(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(error) from None


def read_header(data: Any) -> PartHeader:
    """Return origin and size of a part. Raise :class:`DamagedPart` if it is not an Arrow file."""
    reader = open_part(data)
    try:
        metadata = {key.decode(): value.decode() for key, value in (reader.schema.metadata or {}).items()}
        rows = sum(reader.get_batch(index).num_rows for index in range(reader.num_record_batches))
        counts = json.loads(metadata.get("plad.counts", "{}"))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(error) from None
    return PartHeader(metadata.get("plad.fingerprint", ""), metadata.get("plad.attempt", ""), counts, rows)


def check_part(part: Part, data: Any) -> None:
    """Raise :class:`DamagedPart` unless the bytes have the committed size and checksum."""
    if len(data) != part.bytes:
        raise DamagedPart(f"damaged: it has {len(data):,} bytes, {part.bytes:,} were committed")
    if part_checksum(data) != part.xxh3_128:
        raise DamagedPart("damaged: its checksum differs from the manifest's")


def part_checksum(data: Any) -> str:
    """Return the hexadecimal XXH3 checksum of a part."""
    return xxhash.xxh3_128_hexdigest(data)


def _unreadable(error: Exception) -> DamagedPart:
    return DamagedPart(f"damaged: not a readable Arrow file ({str(error).rstrip('.')})")
