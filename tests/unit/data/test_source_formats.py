"""Formats of prompt files: names given twice, JSON arrays, and templates that use no column."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plad_dist.data.sources import read_prompts
from plad_dist.errors import UserError
from tests.unit.data.prompt_files import ROWS, contents, source, write, write_as


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "prompt,answer,prompt\na,b,c\n", r"p\.csv: header: the column 'prompt' is given twice"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "a", "prompt": "b"}', r"p\.jsonl:2: .*'prompt' is given twice"),
        ("p.jsonl", '{"prompt": "a", "x": [{"y": 1, "y": 1}]}', r"p\.jsonl:1: .*'y' is given twice"),
        ("p.json", '[{"prompt": "a", "prompt": "b"}]', r"p\.json: .*'prompt' is given twice"),
    ],
)
def test_a_name_given_twice_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(read_prompts(source(write(tmp_path, text, name), reference_column=None)))


@pytest.mark.parametrize("name", ["p.parquet", "p.arrow", "stream.arrow"])
def test_a_name_given_twice_in_a_schema_is_refused(tmp_path: Path, name: str) -> None:
    text = pa.array(["a"])
    nested = pa.StructArray.from_arrays([text, text], ["y", "y"])
    for table, place in (
        (pa.Table.from_arrays([text, text], ["prompt", "prompt"]), "'prompt' is given twice"),
        (pa.Table.from_arrays([text, nested], ["prompt", "x"]), "'y' is given twice in 'x'"),
    ):
        path = tmp_path / name
        if name == "p.parquet":
            pq.write_table(table, path)
        else:
            with (pa.ipc.new_file if name == "p.arrow" else pa.ipc.new_stream)(path, table.schema) as writer:
                writer.write_table(table)
        with pytest.raises(UserError, match=rf"{name}: schema: the column {place}"):
            list(read_prompts(source(path, reference_column=None)))


def test_csv_columns_without_a_name_may_repeat(tmp_path: Path) -> None:
    path = write(tmp_path, ",prompt,answer,\n0,a,b,\n", "p.csv")
    assert contents(read_prompts(source(path))) == [("a", "b")]


@pytest.mark.parametrize("name", ["p.json", "p.json.gz"])
def test_a_json_array_is_read_item_by_item(tmp_path: Path, name: str) -> None:
    text = "\ufeff \n" + json.dumps(ROWS, indent=1)
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    first, second = read_prompts(source(path))
    assert contents(iter([first, second])) == [(row["prompt"], row["answer"]) for row in ROWS]
    assert (second.location, second.meta["row"]) == (f"{path}: item 1 (counted from 0)", 1)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.json", '[\n{"prompt": "a"},\n]', r"p\.json: not valid JSON: .* at line \d.*expected one JSON array"),
        ("p.json", '[{"prompt": "a"}]\n[{"prompt": "b"}]', r"p\.json: not valid JSON: Extra data"),
        ("p.json", '[{"prompt": "a"}, 3]', r"item 1 \(counted from 0\): expected a JSON object, got int"),
        ("p.json", "[]", r"p\.json: no prompts"),
        ("p.json", '[{"prompt": "\\ud83d"}]', r"item 0 .*half of a surrogate pair"),
        ("p.json", '{\n "prompt": "a"\n}', r"p\.json:1: .*looks like one object; write it on one line"),
        ("p.jsonl", '[\n{"prompt": "a"}\n]', r"p\.jsonl:1: .*looks like one array; give it the suffix \.json"),
        ("p.jsonl", '[{"prompt": "a"}]', r"p\.jsonl:1: expected a JSON object, got list; .* suffix \.json"),
    ],
)
def test_the_error_says_what_is_wrong_with_an_array_or_object(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        list(read_prompts(source(write(tmp_path, text, name), reference_column=None)))


def test_an_array_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plad_dist.data.files._MAX_ARRAY_BYTES", 10)
    with pytest.raises(UserError, match=r"p\.json: a JSON array of more than .*convert it to JSON Lines"):
        list(read_prompts(source(write(tmp_path, '[{"prompt": "a"}]', "p.json"))))


def test_an_array_on_one_line_may_be_longer_than_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plad_dist.data.files._MAX_LINE_BYTES", 20)
    path = write(tmp_path, json.dumps(ROWS), "p.json")
    assert contents(read_prompts(source(path))) == [(row["prompt"], row["answer"]) for row in ROWS]


def test_the_text_of_an_array_is_searched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search for every item would take hours for an array of 100 MB."""
    searched = []
    monkeypatch.setattr("plad_dist.data.files._has_surrogates", searched.append)
    path = write(tmp_path, json.dumps(ROWS * 10), "p.json")
    assert len(list(read_prompts(source(path)))) == 20
    assert len(searched) == 1


@pytest.mark.parametrize("option", ["template", "reference_template"])
def test_a_template_that_uses_no_column_is_refused(tmp_path: Path, option: str) -> None:
    path = write(tmp_path, '{"prompt": "a", "answer": "b"}')
    for text in ("Question: {prompt} Answer:", "{% if x is defined %}{{ x }}{% else %}y{% endif %}"):
        options = {"reference_column": None, option: text}
        with pytest.raises(UserError, match=rf"source\.{option}: uses no column .* columns 'answer', 'prompt'.*got '"):
            list(read_prompts(source(path, **options)))


def test_a_template_that_renders_all_rows_the_same_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{row}", "lang": "de"} for row in range(9)]
    path = write_as(tmp_path / "p.jsonl", rows)
    with pytest.raises(UserError, match=r"source\.template: renders the same prompt for all 9 rows"):
        list(read_prompts(source(path, template="{{ lang }}", reference_column=None)))
    assert len(list(read_prompts(source(path, template="{{ lang }} {{ prompt }}", reference_column=None)))) == 9
    same = write_as(tmp_path / "same.jsonl", [{"prompt": "a"}] * 9)
    assert len(list(read_prompts(source(same, template="{{ prompt }}", reference_column=None)))) == 9
