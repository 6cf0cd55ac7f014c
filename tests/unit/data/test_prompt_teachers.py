"""Assignment of prompts to teachers in the stage `prepare`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from plad_dist.data.prompts import check_prompts, teacher_blocks
from plad_dist.errors import UserError
from tests.unit.data.prompt_stage import (
    SERVER,
    TWO_TEACHERS,
    config_of,
    manifest_of,
    prepared,
    raw_config,
    rows_of,
    with_teachers,
)


def test_teachers_get_prompts_by_their_filters_and_shares(tmp_path: Path) -> None:
    raw = raw_config(tmp_path, map(str, range(3000)), block_size=64, heldout_fraction=0.3)
    train, heldout = prepared(config_of(with_teachers(raw, TWO_TEACHERS)))
    for data in (train, heldout):
        prompts = Counter((row["teacher"], len(row["messages"][0]["content"]) < 3) for row in rows_of(data))
        assert prompts["short", False] == 0
        assert prompts["short", True] > prompts["any", True]
    both = with_teachers(raw_config(tmp_path, map(str, range(3000))), {"a": SERVER | {"share": 3}, "b": SERVER})
    both["run"]["dir"] = str(tmp_path / "both")
    for data in prepared(config_of(both)):
        prompts = Counter(row["teacher"] for row in rows_of(data))
        assert 0.65 < prompts["a"] / prompts.total() < 0.85
    (tmp_path / "single").mkdir()
    (train, _) = prepared(config_of(raw_config(tmp_path / "single", map(str, range(100)), block_size=30)))
    assert teacher_blocks(manifest_of(train)) == {"teacher": list(range(len(manifest_of(train).parts)))}
    assert set(train.read()["teacher"].to_pylist()) == {None}


def test_the_filter_of_a_teacher_sees_the_kept_columns(tmp_path: Path) -> None:
    raw = with_teachers(
        raw_config(tmp_path, []),
        {"de": SERVER | {"filter": "meta.lang == 'de' and reference"}, "en": SERVER | {"filter": "meta.lang != 'de'"}},
    )
    with (tmp_path / "prompts.jsonl").open("w") as file:
        for row in range(100):
            lang = "de" if row % 2 else "en"
            file.write(json.dumps({"prompt": f"{lang}{row}", "answer": "x", "lang": lang}) + "\n")
    raw["prompts"]["source"]["meta_columns"] = ["lang"]
    for data in prepared(config_of(raw)):
        assert all(row["messages"][0]["content"].startswith(row["teacher"]) for row in rows_of(data))


@pytest.mark.parametrize(
    ("filter", "message"),
    [
        ("reference == 'no'", r"prompts\.jsonl:1: no teacher's `filter` accepts this prompt"),
        ("meta.lang == 'de'", r"prompts\.jsonl:1: teachers\.a\.filter: .*no attribute 'lang'.*meta_columns adds to it"),
        ("messages[", r"teachers\.a\.filter: 'messages\[': not a valid Jinja expression"),
    ],
)
def test_the_error_names_a_filter_that_cannot_be_used(tmp_path: Path, filter: str, message: str) -> None:
    raw = with_teachers(raw_config(tmp_path, map(str, range(100))), {"a": SERVER | {"filter": filter}})
    for check in (prepared, lambda config: check_prompts(config, all_rows=True)):
        with pytest.raises(UserError, match=message):
            check(config_of(raw))
