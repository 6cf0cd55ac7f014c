"""Prompt sources: rows are streamed unchanged, and errors name file, row and column."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from plad_dist.config import DatasetSource, FilesSource
from plad_dist.data.hashset import HashSet
from plad_dist.data.sources import read_prompts
from plad_dist.errors import UserError
from tests.conftest import write_prompts
from tests.unit.data.prompt_files import KINDS, ROWS, contents, source, write, write_as


@pytest.mark.parametrize("name", KINDS)
def test_all_file_formats_give_the_same_prompts(tmp_path: Path, name: str) -> None:
    rows = [*ROWS, *({"prompt": f"q{row}", "answer": f"a{row}"} for row in range(3000))]
    path = write_as(tmp_path / name, rows)
    assert contents(read_prompts(source(path))) == [(row["prompt"], row["answer"]) for row in rows]


def test_nulls_are_missing_references(tmp_path: Path) -> None:
    for name in ("p.jsonl", "p.parquet", "p.arrow"):
        path = write_as(tmp_path / name, [{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": None}])
        assert contents(read_prompts(source(path))) == [("a", "b"), ("c", None)]


def test_prompt_ids_are_those_of_earlier_versions_and_unique(tmp_path: Path) -> None:
    first, second = read_prompts(
        source(write(tmp_path, '{"prompt": "a", "answer": ""}\n\n{"prompt": "ü", "answer": ""}'))
    )
    assert first.prompt_id == "ff6145e97fa21ee652921207"
    assert second.prompt_id == "1066fb54d001d8c91d6dbc13"
    assert (second.meta, second.location) == ({"source": "p.jsonl", "row": 2}, f"{tmp_path}/p.jsonl:3")
    assert len({prompt.prompt_id for prompt in read_prompts(source(write_prompts(tmp_path, 50)))}) == 50


def test_globs_are_read_in_sorted_order_and_every_file_once(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b", "a", "sub/a"):
        write(tmp_path, json.dumps({"prompt": name, "answer": "x"}), f"{name}.jsonl")
    assert [text for text, _ in contents(read_prompts(source(tmp_path / "*.jsonl")))] == ["a", "b"]
    everything = FilesSource(type="files", paths=[str(tmp_path / "**/*.jsonl"), str(tmp_path / "b.jsonl")])
    assert [text for text, _ in contents(read_prompts(everything))] == ["a", "b", "sub/a"]


def test_equal_rows_of_files_with_the_same_name_have_different_ids(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, '{"prompt": "a", "answer": "b"}')
    first, second = read_prompts(source(tmp_path / "*" / "p.jsonl"))
    assert first.prompt_id != second.prompt_id
    assert first.content == second.content


def test_a_name_with_brackets_can_be_a_file(tmp_path: Path) -> None:
    assert contents(read_prompts(source(write(tmp_path, '{"prompt": "a", "answer": "b"}', "p[1].jsonl")))) == [
        ("a", "b")
    ]


def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(b"\xef\xbb\xbfprompt,answer\r\na,b\r\n\r\nc,d\r\n")
    assert contents(read_prompts(source(path))) == [("a", "b"), ("c", "d")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"p\.jsonl: no prompts;"),
        (
            '{"prompt": "a", "answer": ""}\n{"prompt": ',
            r"p\.jsonl:2: not valid JSON.*expected one JSON object per line",
        ),
        ("[" * 100_000, r"p\.jsonl:1: not valid JSON"),
        ('{"prompt": "\\ud83d", "answer": ""}', r"p\.jsonl:1: contains half of a surrogate pair"),
        ("[1]", r"p\.jsonl:1: expected a JSON object, got list"),
        (
            '{"question": "a"}',
            r"p\.jsonl:1: no column 'prompt'; it has 'question'\. Set prompts\.source\.prompt_column",
        ),
        ('{"prompt": "a"}', r"p\.jsonl:1: no column 'answer'; it has 'prompt'.*, or write null if other rows have it"),
        ('{"Prompt ": "a"}', r"it has 'Prompt '\. Set prompts\.source\.prompt_column to one of them$"),
        (
            '{"prompt": "a", "answer": "b"}\n{"prompt": "a"}',
            r"p\.jsonl:2: this row lacks the key 'answer', .*; write null for a row without a reference",
        ),
        (
            '{"prompt": "a", "answer": "b"}\n{"answer": "b"}',
            r":2: this row lacks the key 'prompt', .*; add it, or remove",
        ),
        ('{"prompt": "a", "answer": ""}\n{"prompt": 3}', r"p\.jsonl:2: 'prompt': expected a non-empty string, got 3"),
        ('{"prompt": " ", "answer": ""}', r"expected a non-empty string"),
        ('{"prompt": "a", "answer": 3}', r"p\.jsonl:1: 'answer': expected a string or null, got 3"),
    ],
)
def test_the_error_names_a_bad_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(read_prompts(source(write(tmp_path, text))))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", r"p\.csv: no prompts;"),
        (b"prompt,answer\n", r"p\.csv: no prompts;"),
        (
            b"prompt,answer\na,b\na,b,c\n",
            r"p\.csv:3: has 3 fields, the header has 2 columns; put a field .*double quotes",
        ),
        (b'prompt,answer\na,b\na,"b\n', r"p\.csv:3: not valid CSV: unexpected end of data"),
        (b'prompt,answer\n"a\nb",c\n\n,b\n', r"p\.csv:5: 'prompt': expected a non-empty string"),
        (b"prompt;answer\na, b;c\n", r"p\.csv: header: is separated by ';', got 'prompt;answer'; save .* commas"),
        (b"prompt\tanswer\na\tb\n", r"p\.csv: header: is separated by '\\t'"),
        (b"prompt,answer\na,b\na,\xff\n", r"p\.csv:3: not UTF-8 text .*convert"),
        (b"prompt,answer\na,b\n,b\n", r"p\.csv:3: 'prompt': expected a non-empty string"),
    ],
)
def test_the_error_names_a_bad_row_of_csv(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "p.csv").write_bytes(text)
    with pytest.raises(UserError, match=message):
        list(read_prompts(source(tmp_path / "p.csv")))


@pytest.mark.parametrize("name", ["p.parquet", "p.arrow", "stream.arrow"])
def test_the_error_names_a_bad_row_of_a_table_counted_from_0(tmp_path: Path, name: str) -> None:
    path = write_as(tmp_path / name, [*ROWS, {"prompt": "", "answer": ""}])
    with pytest.raises(UserError, match=r"row 2 \(counted from 0\): 'prompt': expected a non-empty string, got ''"):
        list(read_prompts(source(path)))
    with pytest.raises(UserError, match=r"row 0 \(counted from 0\): no column 'question'; it has 'answer', 'prompt'"):
        list(read_prompts(source(path, prompt_column="question")))
    path = write_as(tmp_path / name, [{"prompt": 1.5, "answer": ""}])
    with pytest.raises(UserError, match=r"row 0 \(counted from 0\): 'prompt': expected a non-empty string, got 1\.5"):
        list(read_prompts(source(path)))


@pytest.mark.parametrize("name", [name for name in KINDS if name.endswith((".gz", ".parquet", ".arrow"))])
def test_the_error_names_a_truncated_file(tmp_path: Path, name: str) -> None:
    path = write_as(tmp_path / name, [{"prompt": f"{row * 7919:x}", "answer": "b"} for row in range(2000)])
    path.write_bytes(path.read_bytes()[:-2500])
    with pytest.raises(UserError, match=rf"{name}: not a readable [a-z.]+ file: .*check that it is complete"):
        list(read_prompts(source(path)))


def test_the_error_names_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes('{"prompt": "a"}\n'.encode("utf-16"))
    with pytest.raises(UserError, match=r"p\.jsonl:1: not UTF-8 text"):
        list(read_prompts(source(tmp_path / "p.jsonl")))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "expected a non-empty list"),
        ([], "expected a non-empty list"),
        ([{"role": "robot", "content": "x"}], "role 'robot': expected one of system, user"),
        ([{"role": "user"}], "expected a non-empty list"),
    ],
)
def test_bad_messages_are_refused(tmp_path: Path, messages: Any, message: str) -> None:
    path = write(tmp_path, json.dumps({"m": messages, "answer": "x"}))
    with pytest.raises(UserError, match=message):
        list(read_prompts(source(path, messages_column="m")))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.jsonl", "no such prompts file"),
        ("*.none", "no file matches"),
        ("p.txt", "unknown format '.txt'"),
        ("p.parquet.gz", "unknown format '.parquet.gz'"),
    ],
)
def test_missing_and_unknown_files_are_refused(tmp_path: Path, name: str, message: str) -> None:
    for path in ("p.txt", "p.parquet.gz"):
        write(tmp_path, "x", path)
    with pytest.raises(UserError, match=message):
        list(read_prompts(source(tmp_path / name)))


def test_uris_of_unknown_stores_are_refused() -> None:
    for uri in ("http://host/p.jsonl", "s3://bucket"):
        with pytest.raises(UserError, match=r"prompts\.source\.paths: .*expected a path, or s3://"):
            list(read_prompts(source(uri)))
    with pytest.raises(ValidationError, match="looks like a secret"):
        source("s3://key:secret@bucket/p.jsonl")


def test_a_template_builds_the_prompt_from_several_columns(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps({"title": "T", "body": "B", "lang": "de", "n": 3}))
    options = {"template": "{{ title }}: {{ body }}", "meta_columns": ["lang", "n"], "reference_column": None}
    (prompt,) = read_prompts(source(path, **options))
    assert prompt.messages == [{"role": "user", "content": "T: B"}]
    assert prompt.meta == {"source": "p.jsonl", "row": 0, "lang": "de", "n": 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"template": "{{ text }}"},
            r"p\.jsonl:1: prompts\.source\.template: 'text' is undefined; the row has the columns",
        ),
        ({"template": "{{ prompt"}, r"prompts\.source\.template: not a valid Jinja template"),
        ({"template": "{{ ''.__class__.__mro__ }}"}, r"p\.jsonl:1: prompts\.source\.template: .*unsafe"),
        ({"template": "{% if false %}x{% endif %}"}, r"expected a non-empty string, got ''"),
        ({"meta_columns": ["lang"]}, r"p\.jsonl:1: no column 'lang'.*Set prompts\.source\.meta_columns"),
    ],
)
def test_the_error_about_a_bad_column_names_the_key(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(read_prompts(source(write(tmp_path, '{"prompt": "a", "answer": "b"}'), **options)))


def test_the_last_response_of_a_conversation_is_the_reference(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "he"},
    ]
    rows = [{"m": [*turns, {"role": "assistant", "content": "ha"}]}, {"m": turns}]
    path = write(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
    prompts = list(read_prompts(source(path, messages_column="m", reference_column="m")))
    assert [(prompt.messages, prompt.reference) for prompt in prompts] == [(turns, "ha"), (turns, None)]
    with pytest.raises(UserError, match=r"jsonl:1: 'm': ends with the assistant's turn.*reference_column to m too"):
        list(read_prompts(source(path, messages_column="m", reference_column=None)))
    with pytest.raises(UserError, match=r"jsonl:1: 'm': ends with the assistant's turn.* remove that turn$"):
        list(read_prompts(source(path, messages_column="m", reference_column=None, reference_template="x")))
    answer = {"role": "assistant", "content": "a"}
    for conversation in ([answer], [*turns[:2], answer]):
        path = write(tmp_path, json.dumps({"m": conversation}))
        with pytest.raises(UserError, match="expected a turn of another role before"):
            list(read_prompts(source(path, messages_column="m", reference_column="m")))


def test_a_blank_reference_is_a_missing_reference(tmp_path: Path) -> None:
    path = write(tmp_path, "prompt,answer\na,\nb, \nc,d\n", "rows.csv")
    assert [prompt.reference for prompt in read_prompts(source(path, reference_column="answer"))] == [None, None, "d"]


# -- data sets


def test_a_data_set_gives_the_same_prompts_in_every_storage_format(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    (tmp_path / "files").mkdir()
    rows.to_parquet(tmp_path / "files" / "train-00000.parquet")
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "several")
    for name in ("files", "one", "several"):
        data = DatasetSource(type="dataset", name=str(tmp_path / name), reference_column="answer")
        prompts = list(read_prompts(data))
        assert contents(iter(prompts)) == [(row["prompt"], row["answer"]) for row in ROWS]
        assert prompts[1].meta == {"source": f"{name}:train", "row": 1}


def test_one_configuration_of_a_parquet_copy_is_read(tmp_path: Path) -> None:
    """The hub has one folder per configuration, and in it one folder per split."""
    for place, rows in {"pairs/train": ROWS, "pairs/test": ROWS[:1], "scores/train": [{"score": 1}]}.items():
        (tmp_path / "hub" / place).mkdir(parents=True)
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "hub" / place / "0000.parquet")
    data = DatasetSource(type="dataset", name=str(tmp_path / "hub"), data_dir="pairs", reference_column="answer")
    prompts = list(read_prompts(data))
    assert contents(iter(prompts)) == [(row["prompt"], row["answer"]) for row in ROWS]
    assert prompts[0].meta == {"source": "hub:pairs:train", "row": 0}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("scripted", {}, r"prompts\.source: .*scripted\.py\. Set prompts\.source\.revision to refs/convert/parquet"),
        ("several", {"split": "dev"}, r"prompts\.source\.split: .*has no split 'dev'; it has test, train\. Set one"),
        ("files", {"split": "dev"}, r"prompts\.source: .*dev.*train"),
        (
            "files/train.jsonl",
            {},
            r"source\.name: .*train\.jsonl: is a file; read it with `type: files` and `paths: \[",
        ),
        ("none/at/all", {}, r"prompts\.source: none/at/all: cannot be read as a data set"),
        ("files", {"prompt_column": "q"}, r"files: row 0 \(counted from 0\): no column 'q'; it has 'answer', 'prompt'"),
        ("broken", {}, r"prompts\.source: .*broken: cannot be read as a data set"),
        ("twice", {}, r"prompts\.source: .*twice: header: the column 'prompt' is given twice"),
    ],
)
def test_the_error_names_a_bad_data_set(tmp_path: Path, name: str, options: dict[str, Any], message: str) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "several")
    for folder in ("files", "broken", "scripted", "twice"):
        (tmp_path / folder).mkdir()
    (tmp_path / "scripted" / "scripted.py").write_text("raise SystemExit('run')")
    rows.to_json(tmp_path / "files" / "train.jsonl")
    write(tmp_path / "twice", "prompt,prompt\na,b\n", "train.csv")
    write(tmp_path / "broken", '{"prompt": "a"}\n{"prompt": \n', "train.jsonl")
    path = tmp_path / name
    with pytest.raises(UserError, match=message):
        list(read_prompts(DatasetSource(type="dataset", name=str(path) if path.exists() else name, **options)))


@pytest.mark.parametrize("header", [",Unnamed: 0,prompt,x,x.1", "Unnamed: 0.1,Unnamed: 0,prompt,x,y"])
def test_a_data_set_may_repeat_names_that_are_not_needed(tmp_path: Path, header: str) -> None:
    """A table that was saved with its index several times has such names."""
    write(tmp_path, f"{header}\n0,1,a,b,c\n", "train.csv")
    assert contents(read_prompts(DatasetSource(type="dataset", name=str(tmp_path)))) == [("a", None)]


# -- object stores


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, bytes], None]]:
    """Return a function that puts objects into s3://prompts on a local server."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT": f"http://{host}:{port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        import boto3

        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        client.create_bucket(Bucket="prompts")
        yield lambda key, data: client.put_object(Bucket="prompts", Key=key, Body=data)
    finally:
        server.stop()


def test_files_on_an_object_store_are_read_like_local_files(
    tmp_path: Path, bucket: Callable[[str, bytes], None]
) -> None:
    rows = [*ROWS, *({"prompt": f"q{row}", "answer": f"a{row}"} for row in range(3000))]
    for name in KINDS:
        path = write_as(tmp_path / name, rows)
        bucket(f"data/{name}", path.read_bytes())
        remote = list(read_prompts(source(f"s3://prompts/data/{name}")))
        local = list(read_prompts(source(path)))
        assert [prompt.prompt_id for prompt in remote] == [prompt.prompt_id for prompt in local]
        assert contents(iter(remote)) == contents(iter(local))


def test_globs_match_on_an_object_store_as_on_a_file_system(bucket: Callable[[str, bytes], None]) -> None:
    for name in ("a", "b", "sub/c", "sub/deep/d"):
        bucket(f"tree/{name}.jsonl", json.dumps({"prompt": name, "answer": ""}).encode())

    def matches(pattern: str) -> list[str]:
        return [text for text, _ in contents(read_prompts(source(f"s3://prompts/{pattern}")))]

    assert matches("tree/*.jsonl") == ["a", "b"]
    assert matches("tree/*/*.jsonl") == ["sub/c"]
    assert matches("tree/**/*.jsonl") == ["a", "b", "sub/c", "sub/deep/d"]
    with pytest.raises(UserError, match=r"no file matches 's3://prompts/tree/\*\.csv'"):
        matches("tree/*.csv")
    with pytest.raises(UserError, match=r"s3://prompts/tree/none\.jsonl: no such prompts file"):
        matches("tree/none.jsonl")
    for folder in ("tree", "tree/"):
        assert matches(folder) == ["a", "b", "sub/c", "sub/deep/d"]
    bucket("tree/lang=de/part-0.jsonl", b'{"prompt": "e", "answer": ""}')
    bucket("tree/_SUCCESS", b"")
    assert matches("tree") == ["a", "b", "e", "sub/c", "sub/deep/d"]
    bucket("other/x.jsonl/part-0.jsonl", b'{"prompt": "x", "answer": ""}')
    with pytest.raises(UserError, match=r"s3://prompts/other/x\.jsonl: is a folder"):
        matches("other/*.jsonl")
    bucket("tree/broken.jsonl", b"{}\n{")
    with pytest.raises(UserError, match=r"s3://prompts/tree/broken\.jsonl:1: no column 'prompt'"):
        matches("tree/broken.jsonl")


# -- memory


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.parquet", "p.arrow"])
def test_files_are_not_held_in_memory(tmp_path: Path, name: str) -> None:
    path = write_as(tmp_path / name, [{"prompt": f"{row} {'x' * 2000}", "answer": ""} for row in range(10_000)])
    allocated = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        peak = 0
        for row, _ in enumerate(read_prompts(source(path))):
            if row % 1000 == 0:
                peak = max(peak, pa.total_allocated_bytes() - allocated)
        assert row == 9999
        peak += tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 << 20, "the file has 20 MB"


@given(st.lists(st.lists(st.integers(0, 40) | st.integers(0, 2**64 - 1), max_size=30), max_size=20))
def test_a_hash_set_reports_for_every_hash_if_it_is_new(batches: list[list[int]]) -> None:
    hashes, seen = HashSet(), set[int]()
    for batch in batches:
        batch_hashes = np.array(batch, dtype=np.uint64)
        assert hashes.contains(batch_hashes).tolist() == [item in seen for item in batch]
        new = [item not in seen | set(batch[:index]) for index, item in enumerate(batch)]
        assert hashes.add(batch_hashes).tolist() == new
        seen |= set(batch)
    assert sum(map(len, hashes._runs)) == len(seen), "8 bytes each"
    assert len(hashes._runs) <= 1 + len(seen).bit_length()
