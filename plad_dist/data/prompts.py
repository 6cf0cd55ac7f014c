"""Stage `prepare`: prompts from their source into the run directory, training and held-out rows apart."""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from plad_dist.config import Config, FilesSource, PythonFunctionsSource, fingerprint
from plad_dist.data.harvest import NamedFunction, harvest
from plad_dist.data.schemas import PROMPTS
from plad_dist.data.storage import Storage
from plad_dist.data.store import Dataset
from plad_dist.errors import UserError

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of the prompts dataset."""

    prompt_id: str
    messages: list[dict[str, str]]
    reference: str | None
    meta: dict[str, Any]


def train_prompts(storage: Storage) -> Dataset:
    """Prompts that are trained on and sampled for pairs."""
    return Dataset(storage, "prompts", PROMPTS)


def heldout_prompts(storage: Storage) -> Dataset:
    """Prompts that only the evaluation sees."""
    return Dataset(storage, "eval/prompts", PROMPTS)


def prepare(config: Config, storage: Storage) -> dict[str, int]:
    """Write both prompt datasets and return their row counts. Raises :class:`UserError` for bad prompts."""
    datasets = (train_prompts(storage), heldout_prompts(storage))
    if not all(dataset.manifest() for dataset in datasets):
        for dataset, rows in zip(datasets, load_prompts(config), strict=True):
            # Of the rows themselves: a source that changed since a first attempt must not be mixed with it.
            made_of = fingerprint([config.prompts.block_size, [[row.prompt_id, row.reference] for row in rows]])
            _write(dataset, rows, config.prompts.block_size, made_of)
    manifests = [dataset.manifest() for dataset in datasets]
    return {name: manifest.rows for name, manifest in zip(("train", "heldout"), manifests, strict=True) if manifest}


def _write(dataset: Dataset, rows: list[Prompt], block_size: int, made_of: str) -> None:
    attempt, done, known = uuid.uuid4().hex, dataset.committed(), []
    blocks = range(0, len(rows), block_size)
    for block, start in enumerate(blocks):
        if block not in done:
            part, _ = dataset.commit(
                block, _table(rows[start : start + block_size]), fingerprint=made_of, attempt=attempt
            )
            known.append(part)
    dataset.finish(len(blocks), fingerprint=made_of, facts={}, known=known)


def _table(rows: list[Prompt]) -> pa.Table:
    columns = [
        [row.prompt_id for row in rows],
        [row.messages for row in rows],
        [row.reference for row in rows],
        [json.dumps(row.meta, sort_keys=True) for row in rows],
    ]
    return pa.Table.from_arrays(
        [pa.array(column, field.type) for column, field in zip(columns, PROMPTS, strict=True)], schema=PROMPTS
    )


def load_prompts(config: Config) -> tuple[list[Prompt], list[Prompt]]:
    """(training prompts, held-out prompts) of the config's source. Raises :class:`UserError` for bad rows."""
    source, seed = config.prompts.source, config.run.seed
    if isinstance(source, PythonFunctionsSource):
        train, heldout = (
            [_from_function(item, index) for index, item in enumerate(rows)] for rows in harvest(source, seed)
        )
    else:
        train = list(read_files(cast(FilesSource, source)))
        if config.prompts.heldout is None:
            share = config.prompts.heldout_fraction
            heldout = [prompt for prompt in train if _unit_hash(seed, prompt.prompt_id) < share]
            train = [prompt for prompt in train if _unit_hash(seed, prompt.prompt_id) >= share]
        else:
            heldout = []
    if config.prompts.heldout is not None:
        heldout = list(read_files(cast(FilesSource, config.prompts.heldout)))
        held = {content_key(prompt.messages) for prompt in heldout}
        train = [prompt for prompt in train if content_key(prompt.messages) not in held]
    if not train:
        raise UserError("prompts.source: no training prompts are left; give more rows or a smaller heldout_fraction")
    if not heldout:
        raise UserError(
            "prompts: no held-out prompts, so nothing could be evaluated; set prompts.heldout, or a larger heldout_fraction"
        )
    return train, heldout


def _from_function(item: NamedFunction, index: int) -> Prompt:
    messages = [{"role": "user", "content": item.description}]
    return Prompt(prompt_id("python_functions", index, messages), messages, item.name, {"package": item.package})


def prompt_id(source: str, row: int, messages: list[dict[str, str]]) -> str:
    """Stable name of a prompt: a hash of its source, row and content."""
    return hashlib.sha256(f"{source}\0{row}\0{content_key(messages)}".encode()).hexdigest()[:24]


def content_key(messages: list[dict[str, str]]) -> str:
    """Canonical text of a conversation, equal for equal content."""
    return json.dumps([[message["role"], message["content"]] for message in messages], ensure_ascii=False)


def _unit_hash(seed: int, name: str) -> float:
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8]) / 2**64


# ------------------------------------------------------------------------------------------------------ prompt files


def read_files(source: FilesSource) -> Iterator[Prompt]:
    """Prompts of a `files` source, in order. Raises :class:`UserError` naming the file and row of what is wrong."""
    for path in _expand(source.paths):
        empty = True
        for row, where, record in _records(path):
            empty = False
            messages = _messages(record, source, where)
            reference = _reference(record, source, where)
            yield Prompt(prompt_id(path.name, row, messages), messages, reference, {"source": path.name, "row": row})
        if empty:
            raise UserError(f"{path}: no prompts in it; expected one row a prompt")


def check_files(source: FilesSource, *, all_rows: bool) -> None:
    """Raise :class:`UserError` for files that are not there, are empty, or whose rows (or first row) are wrong."""
    for _ in read_files(source):
        if not all_rows:
            return


def _expand(patterns: list[str]) -> list[Path]:
    paths: list[Path] = []
    for pattern in patterns:
        found = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        if not found:
            raise UserError(f"prompts.source.paths: no file matches {pattern!r}")
        paths += [Path(item) for item in found]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such prompts file")
    return paths


def _records(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(row, place for messages, record) of a file, by its suffix."""
    match path.suffix.lower():
        case ".jsonl" | ".json":
            yield from _json_lines(path)
        case ".csv":
            with path.open(newline="", encoding="utf-8") as file:
                try:
                    for row, record in enumerate(csv.DictReader(file)):
                        yield row, f"{path}: row {row}", record
                except (UnicodeDecodeError, csv.Error) as error:
                    raise UserError(f"{path}: not a readable UTF-8 CSV file: {error}") from None
        case ".parquet" | ".arrow":
            try:
                table = pq.read_table(path) if path.suffix == ".parquet" else _read_arrow(path)
                for row, record in enumerate(_rows(table)):
                    yield row, f"{path}: row {row}", record
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path}: not a readable {path.suffix[1:]} file: {error}") from None
        case suffix:
            raise UserError(f"{path}: unknown kind {suffix!r}; expected .jsonl, .parquet, .arrow or .csv")


def _read_arrow(path: Path) -> pa.Table:
    """An Arrow file in either IPC format; `datasets` writes the stream format."""
    source = pa.memory_map(str(path))
    try:
        return pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_stream(source).read_all()


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=1024):
        yield from batch.to_pylist()


def _json_lines(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    with path.open("rb") as file:
        for row, line in enumerate(file):
            if not line.strip():
                continue
            where = f"{path}:{row + 1}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where}: not valid JSON: {error}") from None
            if "\\ud" in str(line).lower() and not _is_unicode(record):
                raise UserError(f"{where}: holds half of a surrogate pair, which is no Unicode text")
            if not isinstance(record, dict):
                raise UserError(f"{where}: expected a JSON object, got {type(record).__name__}")
            yield row, where, record


def _is_unicode(record: Any) -> bool:
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _messages(record: dict[str, Any], source: FilesSource, where: str) -> list[dict[str, str]]:
    if source.messages_column is None:
        text = _column(record, source.prompt_column, "prompt_column", where)
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: {source.prompt_column!r}: expected a non-empty string, got {text!r:.60}")
        return [{"role": "user", "content": text}]
    messages = _column(record, source.messages_column, "messages_column", where)
    expected = f"{where}: {source.messages_column!r}: expected a non-empty list of {{role, content}}"
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{expected}, got {messages!r:.60}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise UserError(f"{expected}, got an item {message!r:.60}")
        if message.get("role") not in ROLES:
            raise UserError(f"{where}: role {message.get('role')!r}: expected one of {', '.join(ROLES)}")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _reference(record: dict[str, Any], source: FilesSource, where: str) -> str | None:
    if source.reference_column is None:
        return None
    reference = _column(record, source.reference_column, "reference_column", where)
    if reference is not None and not isinstance(reference, str):
        raise UserError(f"{where}: {source.reference_column!r}: expected a string or null, got {reference!r:.60}")
    return reference


def _column(record: dict[str, Any], name: str, key: str, where: str) -> Any:
    if name not in record:
        raise UserError(
            f"{where}: no column {name!r}; it has {', '.join(sorted(record)) or 'none'}. Set prompts.source.{key}."
        )
    return record[name]
