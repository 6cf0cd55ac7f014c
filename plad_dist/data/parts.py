"""Format of a part, the Arrow file of one block: its metadata, checksum and validation.

A part holds the rows of one block. The metadata of its schema states its origin: the fingerprint of
its inputs, the attempt that wrote it, and its counts. `plad.xxh3_128` is the checksum of the whole
file with the 32 digits of the checksum replaced by zeros, in both places where an Arrow file has
its schema. A part that no manifest or journal lists is checked by it.
"""

from __future__ import annotations

import io
import json
import re
import struct
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import xxhash

from plad_dist.data.sealed import ZEROS

_CHECKSUM = "plad.xxh3_128"
_SCHEMA_START = 16  # after the magic bytes, a marker and the length of the schema's message
_END_BYTES = 10  # the length of the footer and the magic bytes
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
    """Return the Arrow IPC file of a table, with its origin and checksum in the metadata."""
    placeholder = uuid.uuid4().hex
    metadata = {
        "plad.fingerprint": fingerprint,
        "plad.attempt": attempt,
        "plad.counts": json.dumps(counts),
        _CHECKSUM: placeholder,
    }
    table = table.replace_schema_metadata(metadata)
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with sink.getbuffer() as data:
        places = _places_of(placeholder.encode(), data)
        digest = _checksum_without(places, data).encode()
        for start in places:
            data[start : start + len(digest)] = digest
    return sink.getvalue()


def open_part(data: Any) -> Any:
    """Return the Arrow reader of a part. Raise :class:`DamagedPart` if it is not an Arrow file."""
    try:
        return pa.ipc.open_file(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(error) from None


def read_header(data: Any) -> PartHeader:
    """Return origin and size of a part, checked by the checksum that the part states.

    Raises:
        DamagedPart: the bytes are not an Arrow file, or do not have the checksum.
    """
    reader = open_part(data)
    try:
        metadata = {key.decode(): value.decode() for key, value in (reader.schema.metadata or {}).items()}
        if _CHECKSUM not in metadata:
            raise DamagedPart(f"damaged: it does not state its checksum ({_CHECKSUM})")
        digest = metadata[_CHECKSUM].encode()
        view = memoryview(data)
        if len(digest) != len(ZEROS) or _checksum_without(_places_of(digest, view), view).encode() != digest:
            raise DamagedPart("damaged: its checksum differs from the one that it states")
        rows = sum(reader.get_batch(index).num_rows for index in range(reader.num_record_batches))
        counts = json.loads(metadata.get("plad.counts", "{}"))
    except DamagedPart:
        raise
    except (pa.ArrowException, OSError, ValueError, struct.error) as error:
        raise _unreadable(error) from None
    return PartHeader(metadata.get("plad.fingerprint", ""), metadata.get("plad.attempt", ""), counts, rows)


def _places_of(digest: bytes, data: memoryview) -> tuple[int, int]:
    """Return the offsets of a checksum in the two schemas of an Arrow file.

    The file begins with its schema in a message and ends with its schema in the footer. Either is
    preceded or followed by its length.

    Raises:
        ValueError: a schema lacks the checksum.
    """
    (schema_bytes,) = struct.unpack_from("<i", data, _SCHEMA_START - 4)
    (footer_bytes,) = struct.unpack_from("<i", data, len(data) - _END_BYTES)
    footer_start = len(data) - _END_BYTES - footer_bytes
    if not 0 < footer_bytes <= footer_start or not 0 < schema_bytes <= footer_start:
        raise ValueError("the lengths of its schemas are wrong")
    first = bytes(data[_SCHEMA_START : _SCHEMA_START + schema_bytes]).index(digest)
    last = bytes(data[footer_start : len(data) - _END_BYTES]).index(digest)
    return _SCHEMA_START + first, footer_start + last


def _checksum_without(places: Sequence[int], data: memoryview) -> str:
    """Return the hexadecimal XXH3 checksum of a file whose digits of it count as zeros."""
    digest, end = xxhash.xxh3_128(), 0
    for start in places:
        digest.update(data[end:start])
        digest.update(ZEROS)
        end = start + len(ZEROS)
    digest.update(data[end:])
    return digest.hexdigest()


def check_part(part: Part, size: int, checksum: str) -> None:
    """Raise :class:`DamagedPart` unless a file has the committed size and checksum."""
    if size != part.bytes:
        raise DamagedPart(f"damaged: it has {size:,} bytes, {part.bytes:,} were committed")
    if checksum != part.xxh3_128:
        raise DamagedPart("damaged: its checksum differs from the manifest's")


def part_checksum(data: Any) -> str:
    """Return the hexadecimal XXH3 checksum of a part."""
    return xxhash.xxh3_128_hexdigest(data)


def _unreadable(error: Exception) -> DamagedPart:
    return DamagedPart(f"damaged: not a readable Arrow file ({str(error).rstrip('.')})")
