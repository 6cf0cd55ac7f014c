"""Prompt files as streams of records: JSON Lines, CSV, Parquet or Arrow, local or remote.

No file is held in memory: text is read line by line, tables are read in batches, and local Arrow
files are memory-mapped.
"""

from __future__ import annotations

import csv
import fnmatch
import glob
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
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import from_url

from plad_dist.data.storage import innermost_cause
from plad_dist.errors import RunFailed, UserError

Record = tuple[int, str, dict[str, Any]]  # row counted from 0, location for messages, columns

_SCHEMES = ("s3", "gs", "az")
_MAX_LINE_BYTES = 64 << 20  # a longer line means that the file does not have one row per line
_BATCH_ROWS = 1024
_BUFFER_BYTES = 1 << 20


def expand(patterns: list[str], key: str) -> list[str]:
    """Return the paths and URIs of the files that match any pattern, without repetitions.

    Args:
        key: config section of the patterns, for messages.

    Raises:
        UserError: a pattern matches no file.
    """
    files: dict[str, None] = {}
    for pattern in patterns:
        matches = _remote_files(pattern, key) if "://" in pattern else _local_files(pattern, key)
        if not matches:
            raise UserError(f"{key}.paths: no file matches {pattern!r}")
        files |= dict.fromkeys(matches)
    return list(files)


def local_bytes(files: list[str]) -> int | None:
    """Return the total size of the files in bytes, or None if a file is on an object store."""
    return None if any("://" in file for file in files) else sum(Path(file).stat().st_size for file in files)


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
    try:
        match suffix:
            case ".jsonl" | ".json" | ".jsonl.gz" | ".json.gz":
                yield from _json_lines(file)
            case ".csv" | ".csv.gz":
                yield from _csv_rows(file)
            case ".parquet":
                with _opened_for_arrow(file) as source:
                    yield from _table_rows(file, _parquet_batches(source, columns))
            case ".arrow":
                with _opened_for_arrow(file) as source:
                    yield from _table_rows(file, _arrow_batches(source, columns))
            case _:
                raise UserError(
                    f"{file}: unknown format {suffix!r}; expected .jsonl, .json or .csv (each also with .gz), .parquet "
                    "or .arrow"
                )
    except (pa.ArrowException, OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        cause = str(error).rstrip(". ") or "its end is missing"
        raise UserError(
            f"{file}: not a readable {suffix[1:]} file: {cause}; check that it is complete and in this format"
        ) from None
    except BaseError as error:
        raise RunFailed(f"{file}: cannot be read: {innermost_cause(error)}; fix the cause and run again") from None


def _suffix(file: str) -> str:
    path = Path(file.lower())
    return Path(path.stem).suffix + path.suffix if path.suffix == ".gz" else path.suffix


# -- finding and opening files


def _local_files(pattern: str, key: str) -> list[str]:
    path = Path(pattern).expanduser()
    if path.is_file():
        return [str(path)]
    if not glob.has_magic(pattern):
        raise UserError(f"{key}.paths: {path}: no such prompts file")
    return [name for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]


def _remote_files(pattern: str, key: str) -> list[str]:
    """Return the URIs of the objects that match a pattern.

    As on a file system, `*` matches within one folder and `**` across folders.
    """
    store, path, root = _store(pattern, key)
    try:
        if not glob.has_magic(path):
            obstore.head(store, path)
            return [pattern]
        folder = path[: path.index(next(letter for letter in path if letter in "*?["))].rpartition("/")[0]
        is_recursive = "**" in path
        patterns = {path, path.replace("**/", "")}
        return sorted(
            f"{root}/{item['path']}"
            for page in obstore.list(store, folder or None)
            for item in page
            if (is_recursive or item["path"].count("/") == path.count("/"))
            and any(fnmatch.fnmatchcase(item["path"], pattern) for pattern in patterns)
        )
    except (NotFoundError, FileNotFoundError):
        raise UserError(f"{key}.paths: {pattern}: no such prompts file") from None
    except BaseError as error:
        raise UserError(
            f"{pattern}: cannot be listed: {innermost_cause(error)}; credentials are taken from the environment"
        ) from None


def _store(url: str, key: str = "prompts") -> tuple[Any, str, str]:
    """Return the store of a URI, the path in the store, and the URI of the store."""
    scheme, _, location = url.partition("://")
    bucket, _, path = location.partition("/")
    if scheme not in _SCHEMES or not bucket or not path or "@" in bucket:
        raise UserError(
            f"{key}.paths: {url!r}: expected a path, or s3://, gs:// or az:// with a bucket and a path in the bucket"
        )
    root = f"{scheme}://{bucket}"
    try:
        return from_url(root), path, root
    except BaseError as error:
        raise UserError(f"{key}.paths: {root}: {innermost_cause(error)}") from None


class _RemoteFile(io.RawIOBase):
    """Raw file over an object, for the buffered readers of the standard library and of pyarrow."""

    def __init__(self, url: str) -> None:
        store, path, _ = _store(url)
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
def _opened_for_arrow(file: str) -> Iterator[Any]:
    """Yield an open pyarrow file. A local file is memory-mapped."""
    if "://" in file:
        with _open(file) as stream:
            yield pa.PythonFile(stream, mode="r")
    else:
        with pa.memory_map(file) as source:
            yield source


# -- formats


def _lines(file: str) -> Iterator[tuple[int, str]]:
    """Yield number (counted from 1) and text of every line, with its line end."""
    with _open(file) as raw, gzip.open(raw) if file.lower().endswith(".gz") else raw as stream:
        number = 0
        while line := stream.readline(_MAX_LINE_BYTES):
            number += 1
            if len(line) == _MAX_LINE_BYTES:
                raise UserError(f"{file}:{number}: longer than {_MAX_LINE_BYTES >> 20} MB; expected one row per line")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # byte order mark
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
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{location}: not valid JSON: {error.msg} at column {error.colno}; expected one JSON object per line"
            ) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{location}: not valid JSON: {error}; expected one JSON object per line") from None
        if ("\\ud" in line or "\\uD" in line) and not _is_unicode(record):
            raise UserError(f"{location}: contains half of a surrogate pair, which is not valid Unicode; fix the text")
        if not isinstance(record, dict):
            raise UserError(f"{location}: expected a JSON object, got {type(record).__name__}")
        yield number - 1, location, record


def _is_unicode(record: Any) -> bool:
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _csv_rows(file: str) -> Iterator[Record]:
    csv.field_size_limit(_MAX_LINE_BYTES)
    reader = csv.reader((line for _, line in _lines(file)), strict=True)
    try:
        header = next(reader, [])
        for row, fields in enumerate(fields for fields in reader if fields):
            location = _row_location(file, row)
            if len(fields) != len(header):
                raise UserError(f"{location}: has {len(fields)} fields, the header has {len(header)} columns")
            yield row, location, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise UserError(f"{file}:{reader.line_num}: not valid CSV: {error}") from None


def _parquet_batches(source: Any, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    table = pq.ParquetFile(source, buffer_size=_BUFFER_BYTES)
    selected = _columns_to_read(columns, table.schema_arrow.names)
    return cast(Iterator[pa.RecordBatch], table.iter_batches(_BATCH_ROWS, columns=selected))


def _arrow_batches(source: Any, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    """Return the batches of a file in either IPC format; `datasets` writes the stream format."""
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
    selected = _columns_to_read(columns, reader.schema.names) or reader.schema.names
    batches = (reader.get_batch(index) for index in range(reader.num_record_batches)) if is_file else reader
    return (batch.select(selected) for batch in batches)


def _columns_to_read(needed: list[str] | None, existing: list[str]) -> list[str] | None:
    """Return the needed columns, or None for all columns if one is missing.

    The records then have all existing columns, which the error about the missing one lists.
    """
    return needed if needed is not None and set(needed) <= set(existing) else None


def _table_rows(file: str, batches: Iterable[pa.RecordBatch]) -> Iterator[Record]:
    row = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            for record in batch.slice(start, _BATCH_ROWS).to_pylist():
                yield row, _row_location(file, row), record
                row += 1


def _row_location(file: str, row: int) -> str:
    return f"{file}: row {row} (counted from 0)"
