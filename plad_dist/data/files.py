"""Prompt files as streams of records: JSON Lines, CSV, Parquet or Arrow, local or remote.

No file is held in memory, except one that is a JSON array: text is read line by line, and tables in
batches. Files are read, never memory-mapped, because a mapped file that is cut short kills the
process. Every batch is validated, because offsets in a damaged or crafted file can point anywhere.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import obstore
import pyarrow as pa
import pyarrow.parquet as pq
from obstore.exceptions import BaseError

from plad_dist.data.local_files import innermost_cause
from plad_dist.data.source_files import open_store
from plad_dist.errors import RunFailed, UserError, excerpt

Record = tuple[int, str, dict[str, Any]]  # row counted from 0, location for messages, columns

_MAX_LINE_BYTES = 64 << 20  # a longer line means that the file does not have one row per line
_MAX_ARRAY_BYTES = 512 << 20  # an array is read as a whole, and takes several times its size in memory
_BATCH_ROWS = 1024
_BUFFER_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_HALF_SURROGATE = "contains half of a surrogate pair, which is not valid Unicode"


def records(file: str, columns: list[str] | None) -> Iterator[Record]:
    """Yield the records of a file. Its suffix decides the format.

    Args:
        columns: the needed columns, or None for all. A table that has all of them is read in these
            columns only.

    Raises:
        UserError: the format is unknown, or the file is truncated or not readable.
        RunFailed: an object store failed.
    """
    suffix = _suffix(file)
    with _readable(file, suffix):
        match suffix:
            case ".json" | ".json.gz" if _is_array(file):
                yield from _json_array(file)
            case ".jsonl" | ".json" | ".jsonl.gz" | ".json.gz":
                yield from _json_lines(file)
            case ".csv" | ".csv.gz":
                yield from _csv_rows(file, columns)
            case ".parquet":
                with _opened_for_arrow(file) as source:
                    yield from _table_rows(file, _parquet_batches(file, source, columns))
            case ".arrow":
                with _opened_for_arrow(file) as source:
                    yield from _table_rows(file, _arrow_batches(file, source, columns))
            case _:
                raise UserError(
                    f"{file}: unknown format {suffix!r}; expected .jsonl, .json or .csv (each also with .gz), .parquet "
                    "or .arrow"
                )


@contextmanager
def _readable(file: str, suffix: str) -> Iterator[None]:
    """Turn errors of readers into messages that name the file."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        cause = str(error).rstrip(". ") or "its end is missing"
        raise UserError(
            f"{file}: not a readable {suffix[1:]} file: {cause}; check that it is complete and in this format"
        ) from None
    except BaseError as error:
        raise RunFailed(f"{file}: cannot be read: {innermost_cause(error)}; fix the cause and run again") from None


def is_table(file: str) -> bool:
    """Return True for a format of Arrow, in whose structs null stands for a missing key."""
    return _suffix(file) in (".parquet", ".arrow")


def _suffix(file: str) -> str:
    path = Path(file.lower())
    return Path(path.stem).suffix + path.suffix if path.suffix == ".gz" else path.suffix


# -- opening files


class _RemoteFile(io.RawIOBase):
    """Raw file over an object, for the buffered readers of the standard library and of pyarrow."""

    def __init__(self, url: str) -> None:
        store, path, _ = open_store(url)
        self._reader = obstore.open_reader(store, path, buffer_size=8 * _BUFFER_BYTES)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = memoryview(self._reader.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._reader.seek(offset, whence))

    def tell(self) -> int:
        return int(self._reader.tell())


def _open(file: str) -> BinaryIO:
    return io.BufferedReader(_RemoteFile(file), _BUFFER_BYTES) if "://" in file else Path(file).open("rb")


@contextmanager
def _opened_bytes(file: str) -> Iterator[Any]:
    """Yield a file that is open for reading its bytes, decompressed."""
    with _open(file) as raw, gzip.open(raw) if file.lower().endswith(".gz") else raw as stream:
        yield stream


@contextmanager
def _opened_for_arrow(file: str) -> Iterator[Any]:
    """Yield an open pyarrow file."""
    if "://" in file:
        with _open(file) as stream:
            yield pa.PythonFile(stream, mode="r")
    else:
        with pa.OSFile(file) as source:
            yield source


# -- formats


def _lines(file: str) -> Iterator[tuple[int, str]]:
    """Yield number (counted from 1) and text of every line, with its line end."""
    with _opened_bytes(file) as stream:
        number = 0
        while line := stream.readline(_MAX_LINE_BYTES):
            number += 1
            if len(line) == _MAX_LINE_BYTES:
                raise UserError(f"{file}:{number}: longer than {_MAX_LINE_BYTES >> 20} MB; expected one row per line")
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            try:
                yield number, line.decode()
            except UnicodeDecodeError as error:
                location = f"{file}:{number}"
                raise UserError(f"{location}: not UTF-8 text ({error.reason}); convert the file to UTF-8") from None


def _json_lines(file: str) -> Iterator[Record]:
    for number, line in _lines(file):
        if not line.strip():
            continue
        location = f"{file}:{number}"
        expected = "expected one JSON object per line"
        if number == 1 and line.strip() in ("[", "{"):
            kind = "array; give it the suffix .json" if line.strip() == "[" else "object; write it on one line"
            expected += f". The file looks like one {kind}"
        record = _parsed(line, location, expected)
        if isinstance(record, list) and number == 1:
            raise UserError(
                f"{location}: expected a JSON object, got list; a file that is one array needs the suffix .json"
            )
        yield number - 1, location, _checked(record, location, has_surrogates=_has_surrogates(line))


def _is_array(file: str) -> bool:
    """Return True if the first character of a file opens a JSON array, which may be one long
    line."""
    with _opened_bytes(file) as stream:
        start = stream.read(_BUFFER_BYTES).removeprefix(_BYTE_ORDER_MARK).lstrip()
        while not start and (chunk := stream.read(_BUFFER_BYTES)):
            start = chunk.lstrip()
    return bool(start.startswith(b"["))


def _json_array(file: str) -> Iterator[Record]:
    """Yield the items of a file that is one JSON array."""
    with _opened_bytes(file) as stream:
        data = stream.read(_MAX_ARRAY_BYTES + 1)
    if len(data) > _MAX_ARRAY_BYTES:
        raise UserError(
            f"{file}: a JSON array of more than {_MAX_ARRAY_BYTES >> 20:,} MB, which is read as a whole; convert it to "
            "JSON Lines, one object per line"
        )
    try:
        text = data.removeprefix(_BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason}); convert the file to UTF-8") from None
    items = _parsed(text, file, "expected one JSON array of objects, or one JSON object per line")
    has_surrogates = _has_surrogates(text)  # of the whole text, which is searched once
    del data, text
    for row, record in enumerate(items):
        location = f"{file}: item {row} (counted from 0)"
        yield row, location, _checked(record, location, has_surrogates=has_surrogates)


def parse_json(text: str) -> Any:
    """Return the value of a JSON text, such as the arguments of a call.

    Raises:
        ValueError: the text is not valid JSON or Unicode, or an object in it has a key twice.
    """
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if _has_surrogates(text) and not _is_unicode(value):
        raise ValueError(_HALF_SURROGATE)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError(f"the key {_first_repeated(key for key, _ in pairs)!r} is given twice in one object")
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_object)  # made once: it costs as much as to parse a short row


def _first_repeated(names: Iterable[str]) -> str | None:
    """Return the first name that occurred before, None if there is none."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _parsed(text: str, location: str, expected: str) -> Any:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{location}: not valid JSON: {error.msg} at {place}; {expected}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location}: not valid JSON: {error}; {expected}") from None


def _has_surrogates(text: str) -> bool:
    """Return True if a JSON text has escapes for surrogates, which may be without their pair."""
    return "\\ud" in text or "\\uD" in text


def _checked(record: Any, location: str, *, has_surrogates: bool) -> dict[str, Any]:
    """Return a record that is an object of valid Unicode."""
    if has_surrogates and not _is_unicode(record):
        raise UserError(f"{location}: {_HALF_SURROGATE}; fix the text")
    if not isinstance(record, dict):
        raise UserError(f"{location}: expected a JSON object, got {type(record).__name__}")
    return record


def _is_unicode(record: Any) -> bool:
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _csv_rows(file: str, needed: list[str] | None) -> Iterator[Record]:
    csv.field_size_limit(_MAX_LINE_BYTES)
    reader = csv.reader((line for _, line in _lines(file)), strict=True)
    try:
        header = next(reader, [])
        if len(header) == 1 and header != needed:
            _check_separator(header[0], file)
        # A column without a name, such as an index, cannot be used, so it may be there twice.
        if (name := _first_repeated(filter(None, header))) is not None:
            raise UserError(f"{file}: header: the column {name!r} is given twice; rename or remove one of the two")
        row, number = 0, reader.line_num + 1
        for fields in reader:
            location, number = f"{file}:{number}", reader.line_num + 1  # a field can have several lines
            if not fields:
                continue
            if len(fields) != len(header):
                raise UserError(
                    f"{location}: has {len(fields)} fields, the header has {len(header)} columns; put a field that has "
                    "a comma or a line end between double quotes, and double the quotes in it"
                )
            yield row, location, dict(zip(header, fields, strict=True))
            row += 1
    except csv.Error as error:
        raise UserError(f"{file}:{reader.line_num}: not valid CSV: {error}") from None


def _check_separator(header: str, file: str) -> None:
    """Raise :class:`UserError` if no comma separates the names of a header."""
    separator = next((character for character in ";\t|" if character in header), None)
    if separator is not None:
        raise UserError(
            f"{file}: header: is separated by {separator!r}, got {excerpt(header)}; save the file with commas"
        )


def _parquet_batches(file: str, source: Any, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    # Without `pre_buffer`, which would read the columns of a whole row group ahead.
    table = pq.ParquetFile(source, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    _check_names(table.schema_arrow, file)
    selected = _columns_to_read(columns, table.schema_arrow.names)
    return cast(Iterator[pa.RecordBatch], table.iter_batches(_BATCH_ROWS, columns=selected))


def _arrow_batches(file: str, source: Any, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    """Return the batches of a file in either IPC format; `datasets` writes the stream format."""
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    opened = pa.ipc.open_file if is_file else pa.ipc.open_stream
    reader = opened(source)
    _check_names(reader.schema, file)
    selected = _columns_to_read(columns, reader.schema.names) or reader.schema.names
    source.seek(0)
    indices = [reader.schema.get_field_index(name) for name in selected]
    reader = opened(source, options=pa.ipc.IpcReadOptions(included_fields=indices))
    batches = (reader.get_batch(index) for index in range(reader.num_record_batches)) if is_file else reader
    return (batch.select(selected) for batch in batches)


def check_arrow_file(file: str) -> None:
    """Check a local Arrow file in full before a library maps it into memory.

    Raises:
        UserError: the file is truncated, damaged or not an Arrow file.
    """
    with _readable(file, ".arrow"), _opened_for_arrow(file) as source:
        for batch in _arrow_batches(file, source, None):
            batch.validate(full=True)


def _check_names(schema: Any, file: str, parent: str = "") -> None:
    """Raise :class:`UserError` if a schema, or a struct in it, has a name twice."""
    if (name := _first_repeated(field.name for field in schema)) is not None:
        place = f" in {parent!r}" if parent else ""
        raise UserError(f"{file}: schema: the column {name!r} is given twice{place}; rename or remove one of the two")
    for field in schema:
        kind = field.type
        while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            kind = kind.value_type
        if pa.types.is_struct(kind):
            _check_names(kind, file, f"{parent}.{field.name}" if parent else field.name)


def _columns_to_read(needed: list[str] | None, existing: list[str]) -> list[str] | None:
    """Return the needed columns, or None for all columns if one is missing.

    The records then have all existing columns, which the error about the missing one lists.
    """
    return needed if needed is not None and set(needed) <= set(existing) else None


def _table_rows(file: str, batches: Iterable[pa.RecordBatch]) -> Iterator[Record]:
    row = 0
    for batch in batches:
        batch.validate(full=True)
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            try:
                records = batch.slice(start, _BATCH_ROWS).to_pylist()
            except (ValueError, OverflowError) as error:  # such as a date that Python does not have
                raise UserError(f"{_row_location(file, row)}, or one after it: cannot be read: {error}") from None
            for record in records:
                yield row, _row_location(file, row), record
                row += 1


def _row_location(file: str, row: int) -> str:
    return f"{file}: row {row} (counted from 0)"
