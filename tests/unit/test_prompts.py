"""Prompt files: every row read as it is, and what is wrong named by file and row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plad_dist.config import FilesSource
from plad_dist.config_file import parse_config
from plad_dist.data.prompts import load_prompts, prepare, read_files, train_prompts
from plad_dist.data.storage import Storage
from plad_dist.errors import UserError
from tests.conftest import write_prompts

ROWS = [{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": None}]


def source(path: Path | str, **options: Any) -> FilesSource:
    return FilesSource(type="files", paths=[str(path)], **({"reference_column": "answer"} | options))


def write(folder: Path, text: str, name: str = "p.jsonl") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_all_kinds_of_files_give_the_same_prompts(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "p.parquet")
    with pa.ipc.new_file(tmp_path / "p.arrow", table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as writer:
        writer.write_table(table)
    write(tmp_path, "\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    for name in ("p.parquet", "p.arrow", "stream.arrow", "p.jsonl"):
        prompts = list(read_files(source(tmp_path / name)))
        assert [prompt.messages[0]["content"] for prompt in prompts] == ["a", "c"]
        assert [prompt.reference for prompt in prompts] == ["b", None]
    (prompt,) = read_files(source(write(tmp_path, "prompt,answer\n" + '"a\nb",c\n', "p.csv")))
    assert (prompt.messages[0]["content"], prompt.reference) == ("a\nb", "c")


def test_prompt_ids_are_stable_and_differ(tmp_path: Path) -> None:
    path = write_prompts(tmp_path, 50)
    first, again = ([prompt.prompt_id for prompt in read_files(source(path))] for _ in range(2))
    assert first == again
    assert len(set(first)) == 50


def test_globs_are_read_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write(tmp_path, json.dumps({"prompt": name, "answer": "x"}), f"{name}.jsonl")
    assert [prompt.messages[0]["content"] for prompt in read_files(source(tmp_path / "*.jsonl"))] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"p\.jsonl: no prompts in it"),
        ('{"prompt": "a", "answer": ""}\n{"prompt": ', r"p\.jsonl:2: not valid JSON"),
        ('{"prompt": "\\ud83d", "answer": ""}', r"p\.jsonl:1: holds half of a surrogate pair"),
        ("[1]", r"p\.jsonl:1: expected a JSON object, got list"),
        ('{"question": "a"}', r"p\.jsonl:1: no column 'prompt'; it has question\. Set prompts\.source\.prompt_column"),
        ('{"prompt": "a"}', r"p\.jsonl:1: no column 'answer'"),
        ('{"prompt": 3, "answer": ""}', r"p\.jsonl:1: 'prompt': expected a non-empty string, got 3"),
        ('{"prompt": " ", "answer": ""}', r"expected a non-empty string"),
        ('{"prompt": "a", "answer": 3}', r"p\.jsonl:1: 'answer': expected a string or null, got 3"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(read_files(source(write(tmp_path, text))))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "expected a non-empty list"),
        ([], "expected a non-empty list"),
        ([{"role": "robot", "content": "x"}], "role 'robot': expected one of system, user"),
        ([{"role": "user"}], "expected a non-empty list"),
    ],
)
def test_bad_messages_are_named(tmp_path: Path, messages: Any, message: str) -> None:
    path = write(tmp_path, json.dumps({"m": messages, "answer": "x"}))
    with pytest.raises(UserError, match=message):
        list(read_files(source(path, messages_column="m")))


@pytest.mark.parametrize(
    ("name", "message"),
    [("none.jsonl", "no such prompts file"), ("*.none", "no file matches"), ("p.txt", "unknown kind '.txt'")],
)
def test_bad_files_are_named(tmp_path: Path, name: str, message: str) -> None:
    write(tmp_path, "x", "p.txt")
    with pytest.raises(UserError, match=message):
        list(read_files(source(tmp_path / name)))


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"p\.parquet: not a readable parquet file"):
        list(read_files(source(write(tmp_path, "PAR1 no", "p.parquet"))))


def test_training_and_heldout_prompts_do_not_meet(tiny: tuple[Path, dict[str, Any]]) -> None:
    _, raw = tiny
    train, heldout = load_prompts(parse_config(raw, "test"))
    assert {prompt.prompt_id for prompt in train}.isdisjoint(prompt.prompt_id for prompt in heldout)
    assert len(train) + len(heldout) == 600
    assert 30 < len(heldout) < 90


def test_heldout_prompts_are_taken_out_of_the_training_prompts(tiny: tuple[Path, dict[str, Any]]) -> None:
    folder, raw = tiny
    path = write(folder, json.dumps({"prompt": "larger of 0 and 0", "answer": "it is 0"}), "held.jsonl")
    raw["prompts"]["heldout"] = {"type": "files", "paths": [str(path)], "reference_column": "answer"}
    train, heldout = load_prompts(parse_config(raw, "test"))
    assert len(heldout) == 1
    assert all(prompt.messages != heldout[0].messages for prompt in train)


def test_prepare_goes_on_where_it_was_killed(tiny: tuple[Path, dict[str, Any]]) -> None:
    folder, raw = tiny
    config, storage = parse_config(raw, "test"), Storage(str(folder / "run"))
    prepare(config, storage)
    data = train_prompts(storage)
    before, path = data.read(), folder / "run" / "prompts"
    (path / "manifest.json").unlink()
    (path / "part-00003.arrow").unlink()
    kept = (path / "part-00000.arrow").stat().st_mtime_ns
    prepare(config, storage)
    assert data.read().equals(before)
    assert (path / "part-00000.arrow").stat().st_mtime_ns == kept
