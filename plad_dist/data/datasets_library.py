"""Rows of data sets that the `datasets` library reads, as a stream of records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from plad_dist.config import DatasetSource
from plad_dist.data.files import Record, check_arrow_file
from plad_dist.errors import UserError, first_line


def dataset_name(source: DatasetSource) -> str:
    """Return the name of a data set in prompt ids and `meta`, without its parent folders."""
    folder = Path(source.name)
    name = folder.absolute().name if folder.is_dir() else source.name
    return ":".join(part for part in (name, source.subset or source.data_dir, source.split) if part)


def dataset_records(source: DatasetSource, key: str, columns: list[str] | None) -> Iterator[Record]:
    """Yield the records of a data set.

    Args:
        key: config section of the source, for messages.
        columns: the needed columns, or None for all.

    Raises:
        UserError: the data set cannot be read, or has no rows.
    """
    try:
        data = _load(source, key)
        if columns is not None and set(columns) <= set(data.column_names or ()):
            data = data.select_columns(columns)  # other columns, such as images, are not decoded
        row = -1
        for row, record in enumerate(data):
            if row == 0 and data.info.builder_name == "csv":
                _check_header(list(record), columns, source, key)
            yield row, f"{source.name}: row {row} (counted from 0)", record
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - `datasets` passes on any error of its readers and of the hub
        cause = first_line(error)
        if "scripts are no longer supported" in cause:  # code of a data set is never run
            cause += (
                f". Set {key}.revision to refs/convert/parquet, where the hub keeps a copy, and {key}.data_dir to the "
                "name of the configuration instead of subset"
            )
        raise UserError(f"{key}: {source.name}: cannot be read as a data set: {cause}") from None
    if row < 0:
        raise UserError(f"{key}: {source.name}: no prompts in split {source.split!r}; expected one row per prompt")


def _check_header(names: list[str], needed: list[str] | None, source: DatasetSource, key: str) -> None:
    """Raise :class:`UserError` if a CSV header has the name of a needed column twice.

    pandas adds `.1` to the second. Such a name can also be one of the file's own, so it is accepted
    for columns that are not needed, and for an index, which pandas names `Unnamed: 0`.
    """
    used = names if needed is None else needed
    twice = [name for name in used if f"{name}.1" in names and not name.startswith("Unnamed: ")]
    if twice:
        raise UserError(
            f"{key}: {source.name}: header: the column {twice[0]!r} is given twice, or has a second one "
            f"{twice[0] + '.1'!r} beside it; rename or remove one of the two"
        )


def _load(source: DatasetSource, key: str) -> Any:
    """Return the split as a stream, or memory-mapped if `save_to_disk` wrote it."""
    from datasets import load_dataset, load_from_disk

    folder = Path(source.name)
    if folder.is_file():
        raise UserError(
            f"{key}.name: {source.name}: is a file; read it with `type: files` and `paths: [{source.name}]`"
        )
    if not any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        _check(sorted(folder.rglob("*.arrow")) if folder.is_dir() else [])
        name = str(folder) if folder.is_dir() else source.name
        return load_dataset(
            name,
            source.subset,
            data_dir=source.data_dir,
            split=source.split,
            revision=source.revision,
            streaming=True,
        )
    folder = _split_folder(source, key)
    if (folder / "state.json").is_file():
        listed = json.loads((folder / "state.json").read_bytes())["_data_files"]
        _check([folder / file["filename"] for file in listed])
    return load_from_disk(str(folder))


def _split_folder(source: DatasetSource, key: str) -> Path:
    """Return the folder of the wanted split in a data set that `save_to_disk` wrote."""
    folder = Path(source.name)
    if all((folder / name).is_file() for name in ("state.json", "dataset_info.json")):
        return folder  # a single split
    if not (folder / "dataset_dict.json").is_file():
        return folder
    splits = json.loads((folder / "dataset_dict.json").read_bytes())["splits"]
    if source.split not in splits:
        raise UserError(
            f"{key}.split: {source.name} has no split {source.split!r}; it has {', '.join(sorted(splits))}. Set one of "
            "them"
        )
    return folder / source.split


def _check(files: list[Path]) -> None:
    """Check Arrow files in full: the library maps them, and trusts their offsets."""
    for file in files:
        status = file.stat()
        _check_once(str(file.absolute()), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _check_once(file: str, size: int, mtime_ns: int) -> None:  # they tell versions apart
    check_arrow_file(file)
