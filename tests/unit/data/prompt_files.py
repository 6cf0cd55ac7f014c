"""Prompt files in every format, for the tests of prompt sources."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from plad_dist.config import FilesSource
from plad_dist.data.sources import Prompt

ROWS = [{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": "ü\n\u2028"}]
KINDS = ("p.jsonl", "p.json", "p.jsonl.gz", "p.csv", "p.csv.gz", "p.parquet", "p.arrow", "stream.arrow")


def source(path: Path | str, **options: Any) -> FilesSource:
    return FilesSource(type="files", paths=[str(path)], **({"reference_column": "answer"} | options))


def write(folder: Path, text: str, name: str = "p.jsonl") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def write_as(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows in the format that the name of the file implies."""
    if path.name.endswith(".gz"):
        plain = write_as(path.with_suffix(""), rows)
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
        return path
    table = pa.Table.from_pylist(rows)
    match path.name:
        case "p.parquet":
            pq.write_table(table, path, row_group_size=3)
        case "p.arrow":
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=3)
        case "stream.arrow":
            with pa.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table)
        case "p.csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        case _:
            write(path.parent, "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), path.name)
    return path


def contents(prompts: Iterator[Prompt]) -> list[tuple[str, str | None]]:
    return [(prompt.messages[0]["content"], prompt.reference) for prompt in prompts]
