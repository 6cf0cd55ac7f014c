"""Files that a source names: patterns, links, and folders of parts as Spark and Hive write them."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plad_dist.config import FilesSource
from plad_dist.data import source_files
from plad_dist.data.sources import Prompt, read_prompts
from plad_dist.errors import UserError


def put(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": text} for text in texts]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema([("prompt", pa.string())])), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(*paths: Path | str, **options: Any) -> list[Prompt]:
    return list(read_prompts(FilesSource(type="files", paths=[str(path) for path in paths], **options)))


def texts(*paths: Path | str) -> list[str]:
    return [prompt.messages[0]["content"] for prompt in read(*paths)]


def test_a_match_that_is_a_dangling_link_is_named(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", "a")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    for pattern in ("*.jsonl", "b.jsonl", "**/*.jsonl"):
        with pytest.raises(UserError, match=r"prompts\.source\.paths: .*b\.jsonl: is a link to .*gone\.jsonl"):
            read(tmp_path / pattern)


def test_a_match_that_is_a_folder_or_a_pipe_is_named(tmp_path: Path) -> None:
    put(tmp_path / "data/a.jsonl", "a")
    put(tmp_path / "data/out.jsonl/part-0.jsonl", "b")
    with pytest.raises(UserError, match=r"out\.jsonl: is a folder, matched by a pattern"):
        read(tmp_path / "data/*.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for pattern in ("*.jsonl", "pipe.jsonl"):
        with pytest.raises(UserError, match=r"pipe\.jsonl: is no regular file"):
            read(tmp_path / pattern)


def test_a_match_or_folder_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/p.jsonl", "b/p.jsonl"):
        put(tmp_path / name, name)
    # Root may read everything, so the answer of the system is replaced.
    allowed, closed_paths = os.access, set[Path]()
    monkeypatch.setattr(source_files.os, "access", lambda path, mode: path not in closed_paths and allowed(path, mode))
    for closed in (tmp_path / "b", tmp_path / "b/p.jsonl"):
        closed_paths.clear()
        closed_paths.add(closed)
        for pattern in ("*/p.jsonl", "**/*.jsonl"):
            with pytest.raises(UserError, match=rf"{closed}: no permission"):
                read(tmp_path / pattern)
    with pytest.raises(UserError, match=r"p\.jsonl: no permission"):
        read(tmp_path / "b")


def test_a_link_to_nowhere_on_the_way_to_a_match_is_named(tmp_path: Path) -> None:
    put(tmp_path / "a/p.jsonl", "a")
    (tmp_path / "b").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"/b: is a link to .*gone"):
        read(tmp_path / "*/p.jsonl")


def test_one_file_under_two_names_is_read_once_with_a_log_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path / "a.jsonl", "a")
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    (tmp_path / "c.jsonl").hardlink_to(tmp_path / "a.jsonl")
    with caplog.at_level(logging.WARNING, "plad"):
        assert texts(tmp_path / "*.jsonl", tmp_path / "a.jsonl") == ["a"]
        assert texts(tmp_path / "*.jsonl", tmp_path / "a.jsonl") == ["a"]
    for name in ("b.jsonl is the same file as", "c.jsonl is the same file as", "a.jsonl is named twice"):
        assert sum(name in record.getMessage() for record in caplog.records) == 1


def test_a_folder_of_parts_is_one_source_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "out.parquet"
    put(folder / "part-00001-ab.snappy.parquet", "b")
    put(folder / "part-00000-ab.snappy.parquet", "a")
    put(folder / "part-00002-ab.snappy.parquet")  # empty
    for marker in ("_SUCCESS", "_metadata", ".part-00000-ab.snappy.parquet.crc", ".hidden.parquet"):
        (folder / marker).write_bytes(b"")
    assert texts(folder) == ["a", "b"]
    assert texts(f"{folder}/") == ["a", "b"]


def test_names_of_hive_folders_are_columns(tmp_path: Path) -> None:
    for language, text in (("en", "a"), ("de%20at", "b"), ("__HIVE_DEFAULT_PARTITION__", "c")):
        put(tmp_path / f"data/lang={language}/part-0.parquet", text)
    prompts = read(tmp_path / "data", meta_columns=["lang"])
    assert [(p.messages[0]["content"], p.meta["lang"]) for p in prompts] == [("c", None), ("b", "de at"), ("a", "en")]
    assert len({prompt.prompt_id for prompt in prompts}) == 3
    rendered = read(tmp_path / "data", template="{{ lang }}: {{ prompt }}")
    assert rendered[2].messages[0]["content"] == "en: a"
    (tmp_path / "data/lang=en/q.jsonl").write_text('{"prompt": "d", "lang": "fr"}')
    with pytest.raises(UserError, match=r"q\.jsonl:1: the column 'lang' is given twice: 'en' by the folder, 'fr'"):
        read(tmp_path / "data", meta_columns=["lang"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["_SUCCESS", ".p.jsonl.crc"], "no file to read"),
        (["p.jsonl", "README.md"], r"README\.md: unknown format"),
        (["p.jsonl", "_temporary/0/p.jsonl"], "_temporary: a job is still writing it"),
        (["p.parquet", "_delta_log/0.json"], "Delta table"),
        (["data-0.arrow", "state.json"], "type: dataset"),
        (["p.jsonl"], r"p\.jsonl: no prompts in any part"),
    ],
)
def test_a_folder_that_is_no_folder_of_parts_is_refused(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text("")
    with pytest.raises(UserError, match=message):
        read(tmp_path / "data")


def test_dangling_links_and_loops_in_a_folder_of_parts_are_named(tmp_path: Path) -> None:
    put(tmp_path / "data/p.jsonl", "a")
    (tmp_path / "data/q.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"q\.jsonl: is a link to"):
        read(tmp_path / "data")
    (tmp_path / "data/q.jsonl").unlink()
    (tmp_path / "data/sub").symlink_to(tmp_path / "data")
    with pytest.raises(UserError, match=r"sub: is a link to a folder that contains it"):
        read(tmp_path / "data")
