"""Prompt files as streams of records: JSON lines, CSV, Parquet and Arrow, on a file system or an object store.

No file is ever held in memory: text is read by lines, tables by batches, Arrow files of this machine are memory-mapped.
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

from plad_dist.data.storage import reason
from plad_dist.errors import RunFailed, UserError

Record = tuple[int, str, dict[str, Any]]  # row counted from 0, its place for messages, its columns

_SCHEMES = ("s3", "gs", "az")
_MAX_LINE = 64 << 20  # bytes; a file of one long line is no file of rows
_BATCH = 1024
_BUFFER = 1 << 20


def expand(patterns: list[str], key: str) -> list[str]:
    """Paths and URIs of the files that patterns name, each once. Raises :class:`UserError` for one that names none."""
    found: dict[str, None] = {}
    for pattern in patterns:
        names = _remote_files(pattern, key) if "://" in pattern else _local_files(pattern, key)
        if not names:
            raise UserError(f"{key}.paths: no file matches {pattern!r}")
        found |= dict.fromkeys(names)
    return list(found)


def local_bytes(files: list[str]) -> int | None:
    """Bytes of all files, None where some are on an object store."""
    return None if any("://" in file for file in files) else sum(Path(file).stat().st_size for file in files)


def records(file: str, columns: list[str] | None) -> Iterator[Record]:
    """Records of a file, by its suffix.

    Args:
        columns: those that are needed, None for all. Tables that have them all are read in these columns alone.

    Raises:
        UserError: the file is of no known kind, not whole or not readable.
        RunFailed: an object store stopped answering.
    """
    suffix = _suffix(file)
    try:
        match suffix:
            case ".jsonl" | ".json" | ".jsonl.gz" | ".json.gz":
                yield from _json_lines(file)
            case ".csv" | ".csv.gz":
                yield from _csv_rows(file)
            case ".parquet":
                with _table(file) as source:
                    yield from _table_rows(file, _parquet_batches(source, columns))
            case ".arrow":
                with _table(file) as source:
                    yield from _table_rows(file, _arrow_batches(source, columns))
            case _:
                raise UserError(
                    f"{file}: unknown kind {suffix!r}; expected .jsonl, .json or .csv (each also with .gz), .parquet or .arrow"
                )
    except (pa.ArrowException, OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        why = str(error).rstrip(". ") or "its end is missing"
        raise UserError(f"{file}: not a readable {suffix[1:]} file: {why}. Is it whole, and of this kind?") from None
    except BaseError as error:
        raise RunFailed(f"{file}: cannot be read: {reason(error)}. Run again when it can be.") from None


def _suffix(file: str) -> str:
    path = Path(file.lower())
    return Path(path.stem).suffix + path.suffix if path.suffix == ".gz" else path.suffix


# ------------------------------------------------------------------------------------------------------ naming, opening


def _local_files(pattern: str, key: str) -> list[str]:
    path = Path(pattern).expanduser()
    if path.is_file():
        return [str(path)]
    if not glob.has_magic(pattern):
        raise UserError(f"{key}.paths: {path}: no such prompts file")
    return [name for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]


def _remote_files(pattern: str, key: str) -> list[str]:
    """URIs of the objects that a pattern names. As on a file system, `*` stays within a folder and `**` does not."""
    store, path, root = _store(pattern, key)
    try:
        if not glob.has_magic(path):
            obstore.head(store, path)
            return [pattern]
        folder = path[: path.index(next(letter for letter in path if letter in "*?["))].rpartition("/")[0]
        deep = "**" in path
        patterns = {path, path.replace("**/", "")}
        return sorted(
            f"{root}/{item['path']}"
            for page in obstore.list(store, folder or None)
            for item in page
            if (deep or item["path"].count("/") == path.count("/"))
            and any(fnmatch.fnmatchcase(item["path"], one) for one in patterns)
        )
    except (NotFoundError, FileNotFoundError):
        raise UserError(f"{key}.paths: {pattern}: no such prompts file") from None
    except BaseError as error:
        raise UserError(
            f"{pattern}: cannot be looked up: {reason(error)}. Credentials are taken from the environment."
        ) from None


def _store(url: str, key: str = "prompts") -> tuple[Any, str, str]:
    """The store that a URI is in, the path there, and the URI of the store."""
    scheme, _, rest = url.partition("://")
    bucket, _, path = rest.partition("/")
    if scheme not in _SCHEMES or not bucket or not path or "@" in bucket:
        raise UserError(
            f"{key}.paths: {url!r}: expected a path, or s3://, gs:// or az:// with a bucket and a path in it"
        )
    root = f"{scheme}://{bucket}"
    try:
        return from_url(root), path, root
    except BaseError as error:
        raise UserError(f"{key}.paths: {root}: {reason(error)}") from None


class _RemoteFile(io.RawIOBase):
    """An object as a raw file, for the buffered readers of the standard library and of pyarrow."""

    def __init__(self, url: str) -> None:
        store, path, _ = _store(url)
        self._reader = obstore.open_reader(store, path, buffer_size=8 * _BUFFER)

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
    return io.BufferedReader(_RemoteFile(file), _BUFFER) if "://" in file else Path(file).open("rb")


@contextmanager
def _table(file: str) -> Iterator[Any]:
    """A file as pyarrow reads it."""
    if "://" in file:
        with _open(file) as stream:
            yield pa.PythonFile(stream, mode="r")
    else:
        with pa.memory_map(file) as source:
            yield source


# ---------------------------------------------------------------------------------------------------------------- kinds


def _lines(file: str) -> Iterator[tuple[int, str]]:
    """(number counted from 1, text) of every line, its end included."""
    with _open(file) as raw, gzip.open(raw) if file.lower().endswith(".gz") else raw as stream:
        number = 0
        while line := stream.readline(_MAX_LINE):
            number += 1
            if len(line) == _MAX_LINE:
                raise UserError(f"{file}:{number}: longer than {_MAX_LINE >> 20} MB; expected one row a line")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark that some editors write
            try:
                yield number, line.decode()
            except UnicodeDecodeError as error:
                where = f"{file}:{number}"
                raise UserError(f"{where}: not UTF-8 text ({error.reason}); convert the file to UTF-8") from None


def _json_lines(file: str) -> Iterator[Record]:
    for number, line in _lines(file):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where}: not valid JSON: {error.msg} at column {error.colno}; expected one JSON object a line"
            ) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not valid JSON: {error}; expected one JSON object a line") from None
        if ("\\ud" in line or "\\uD" in line) and not _is_unicode(record):
            raise UserError(f"{where}: holds half of a surrogate pair, which is no Unicode text")
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected a JSON object, got {type(record).__name__}")
        yield number - 1, where, record


def _is_unicode(record: Any) -> bool:
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _csv_rows(file: str) -> Iterator[Record]:
    csv.field_size_limit(_MAX_LINE)
    reader = csv.reader((line for _, line in _lines(file)), strict=True)
    try:
        header = next(reader, [])
        for row, fields in enumerate(fields for fields in reader if fields):
            where = _row(file, row)
            if len(fields) != len(header):
                raise UserError(f"{where}: has {len(fields)} fields, the header has {len(header)} columns")
            yield row, where, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise UserError(f"{file}:{reader.line_num}: not valid CSV: {error}") from None


def _parquet_batches(source: Any, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    table = pq.ParquetFile(source, buffer_size=_BUFFER)
    return cast(
        Iterator[pa.RecordBatch], table.iter_batches(_BATCH, columns=_present(columns, table.schema_arrow.names))
    )


def _arrow_batches(source: Any, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    """Batches of either IPC format; `datasets` writes the stream format."""
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
    wanted = _present(columns, reader.schema.names) or reader.schema.names
    batches = (reader.get_batch(index) for index in range(reader.num_record_batches)) if is_file else reader
    return (batch.select(wanted) for batch in batches)


def _present(columns: list[str] | None, names: list[str]) -> list[str] | None:
    """The columns to read: all, where one is missing, so that a message can name those that are there."""
    return columns if columns is not None and set(columns) <= set(names) else None


def _table_rows(file: str, batches: Iterable[pa.RecordBatch]) -> Iterator[Record]:
    row = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH):
            for record in batch.slice(start, _BATCH).to_pylist():
                yield row, _row(file, row), record
                row += 1


def _row(file: str, row: int) -> str:
    return f"{file}: row {row} (counted from 0)"
