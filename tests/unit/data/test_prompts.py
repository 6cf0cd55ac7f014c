"""Stage `prepare`: every prompt once, in order, whatever fails; none cut, dropped or repeated unseen."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from plad_dist.config import Config
from plad_dist.config_file import parse_config
from plad_dist.data import prompts as stage
from plad_dist.data.models import resolve_model
from plad_dist.data.prompts import check_prompts, heldout_prompts, prepare, teacher_blocks, train_prompts
from plad_dist.data.sources import read_prompts
from plad_dist.data.storage import Storage
from plad_dist.data.store import Dataset, Manifest
from plad_dist.data.templates import Renderer
from plad_dist.errors import UserError
from plad_dist.rundir import RunDir, check_same_run, open_run
from plad_dist.training.model.scratch import train_tokenizer
from tests.conftest import SHAPE, tiny_config

Rows = list[dict[str, Any]]
SERVER = {"endpoint": {"url": "http://host/v1", "model": "m"}}
TWO_TEACHERS = {
    "short": SERVER | {"share": 3, "filter": "messages[0].content|length < 3"},
    "any": SERVER | {"share": 1},
}


def raw_config(folder: Path, texts: Iterable[str], **prompts: Any) -> dict[str, Any]:
    """A run over prompts with the given texts."""
    raw = tiny_config(folder)
    write_rows(folder / "prompts.jsonl", texts)
    raw["prompts"] |= prompts
    return raw


def write_rows(path: Path, texts: Iterable[str]) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps({"prompt": text, "answer": f"re {text}"}) + "\n" for text in texts)


def with_teachers(raw: dict[str, Any], teachers: dict[str, Any]) -> dict[str, Any]:
    del raw["teacher"], raw["training"]["teacher"]
    return raw | {"teachers": teachers}


def config_of(raw: dict[str, Any]) -> Config:
    return parse_config(raw, "test")


def prepared(config: Config) -> tuple[Dataset, Dataset]:
    storage = Storage(config.run.dir)
    prepare(config, storage)
    return train_prompts(storage), heldout_prompts(storage)


def rows_of(dataset: Dataset) -> Rows:
    rows: Rows = dataset.read().to_pylist()
    return rows


def texts_of(dataset: Dataset) -> list[str]:
    return [row["messages"][-1]["content"] for row in rows_of(dataset)]


def manifest_of(dataset: Dataset) -> Manifest:
    manifest = dataset.manifest()
    assert manifest is not None
    return manifest


def content_of(rows: Rows) -> str:
    lines = [json.dumps([row["prompt_id"], row["reference"], row["teacher"]]) + "\n" for row in rows]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@settings(max_examples=40)
@given(
    texts=st.lists(st.text("abü", min_size=1, max_size=4), min_size=8, max_size=40),
    block_size=st.integers(1, 7),
    duplicates=st.sampled_from(["keep", "drop"]),
    teachers=st.sampled_from([{}, TWO_TEACHERS]),
    own_heldout=st.booleans(),
)
def test_every_kept_row_is_there_exactly_once_and_in_order(
    texts: list[str], block_size: int, duplicates: str, teachers: dict[str, Any], own_heldout: bool
) -> None:
    with TemporaryDirectory() as name:
        raw = raw_config(
            Path(name), texts, block_size=block_size, duplicates=duplicates, heldout_fraction=0.3, max_tokens=None
        )
        if own_heldout:
            write_rows(Path(name) / "held.jsonl", ["a", "bb", "a"])
            raw["prompts"]["heldout"] = raw["prompts"]["source"] | {"paths": [f"{name}/held.jsonl"]}
        config = config_of(with_teachers(raw, teachers) if teachers else raw)
        held = list(read_prompts(config.prompts.heldout)) if config.prompts.heldout else []
        rows = [
            *held,
            *(row for row in read_prompts(config.prompts.source) if row.content not in {row.content for row in held}),
        ]
        if duplicates == "drop":
            contents = [row.content for row in rows]
            rows = [row for index, row in enumerate(rows) if row.content not in contents[:index]]
        try:
            train, heldout = prepared(config)
        except UserError as error:
            few = any(part in str(error) for part in ("no held-out prompts", "no training prompts"))
            assume(not few)
            raise
        expected = [(row.prompt_id, row.messages, row.reference) for row in rows]
        kept = [
            (row["prompt_id"], row["messages"], row["reference"], row["teacher"])
            for data in (heldout, train)
            for row in rows_of(data)
        ]
        assert Counter(row[0] for row in kept) == Counter(row[0] for row in expected)
        if own_heldout:
            assert {row["prompt_id"] for row in rows_of(heldout)} <= {row.prompt_id for row in held}
        for data in (train, heldout):
            read, manifest = rows_of(data), manifest_of(data)
            assert manifest.facts["content"] == content_of(read)
            for teacher in teachers or [None]:
                ids = [row["prompt_id"] for row in read if row["teacher"] == teacher]
                order = [row[0] for row in expected]
                assert ids == [name for name in order if name in set(ids)]
            blocks = teacher_blocks(manifest)
            assert sorted(block for numbers in blocks.values() for block in numbers) == list(range(len(manifest.parts)))
            for teacher, numbers in blocks.items():
                sizes = [manifest.parts[number].rows for number in numbers]
                assert all(size == block_size for size in sizes[:-1])
                for number in numbers:
                    assert set(data.read_block(number)["teacher"].to_pylist()) == {teacher if teachers else None}
        for name, messages, reference, _ in kept:
            assert (name, messages, reference) in expected


# ------------------------------------------------------------------------------------------------------- crash, resume


@pytest.fixture(scope="module")
def crashing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("crashing")
    texts = [f"{row % 23:x}" * (1 + row % 3) for row in range(60)]
    return with_teachers(raw_config(folder, texts, block_size=5, heldout_fraction=0.2), TWO_TEACHERS)


def crash_at(monkeypatch: pytest.MonkeyPatch, method: str, call: int, late: bool) -> None:
    """The given call of a method of datasets dies, before or after it has done its work."""
    original: Callable[..., Any] = getattr(Dataset, method)
    calls = iter(range(1000))

    def dying(self: Dataset, *args: Any, **kwargs: Any) -> Any:
        crash = next(calls) == call
        if crash and not late:
            raise KeyboardInterrupt
        result = original(self, *args, **kwargs)
        if crash:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Dataset, method, dying)


def test_a_resumed_run_has_the_rows_of_one_that_never_failed(
    crashing: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(name: str) -> Config:
        return config_of(crashing | {"run": crashing["run"] | {"dir": str(tmp_path / name)}})

    whole = prepared(of("whole"))
    commits = sum(len(manifest_of(data).parts) for data in whole)
    assert commits > 12
    points = [("commit", call, late) for call in range(commits) for late in (False, True)]
    points += [("finish", call, late) for call in range(2) for late in (False, True)]
    for method, call, late in points:
        config = of(f"{method}-{call}-{late}")
        with monkeypatch.context() as patch:
            crash_at(patch, method, call, late)
            with pytest.raises(KeyboardInterrupt):
                prepare(config, Storage(config.run.dir))
        parts = {path: path.stat().st_mtime_ns for path in Path(config.run.dir).rglob("part-*")}
        resumed = prepared(config)
        assert all(path.stat().st_mtime_ns == when for path, when in parts.items()), "written once"
        for data, same in zip(resumed, whole, strict=True):
            assert data.read().equals(same.read())
            assert manifest_of(data).facts == manifest_of(same).facts
            assert manifest_of(data).fingerprint == manifest_of(same).fingerprint
            assert teacher_blocks(manifest_of(data)) == teacher_blocks(manifest_of(same))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda texts: [*texts[:9], "other", *texts[10:]], "part-00000.arrow"),
        (lambda texts: texts[:64], "part-00001.arrow"),
        (lambda texts: texts[:9], "part-00000.arrow"),
        (lambda texts: [*texts, "more"] * 2, None),
    ],
)
def test_prompt_files_that_changed_since_the_run_began_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[list[str]], list[str]], part: str | None
) -> None:
    texts = [str(row) for row in range(300)]
    config = config_of(raw_config(tmp_path, texts, block_size=40))
    with monkeypatch.context() as patch:
        crash_at(patch, "commit", 2, True)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, Storage(config.run.dir))
    write_rows(tmp_path / "prompts.jsonl", change(texts))
    before = sorted(Path(config.run.dir).rglob("*"))
    if part is None:  # rows after those that are committed may change
        prepare(config, Storage(config.run.dir))
        return
    with pytest.raises(UserError, match=rf"prompts/{part}: holds other rows than the prompt sources give now"):
        prepare(config, Storage(config.run.dir))
    assert not manifest_of_or_none(config)
    assert set(before) <= set(Path(config.run.dir).rglob("*"))


def manifest_of_or_none(config: Config) -> Manifest | None:
    return train_prompts(Storage(config.run.dir)).manifest()


def test_the_fingerprint_is_that_of_the_config_and_the_content_that_of_the_rows(tmp_path: Path) -> None:
    def facts(name: str, texts: list[str], **changed: Any) -> tuple[str, str]:
        (tmp_path / "data").mkdir(exist_ok=True)
        raw = raw_config(tmp_path / "data", texts, **changed) | {"run": {"dir": str(tmp_path / name), "seed": 5}}
        manifest = manifest_of(prepared(config_of(raw))[0])
        return manifest.fingerprint, manifest.facts["content"]

    texts = [str(row) for row in range(100)]
    first = facts("first", texts)
    assert facts("again", texts) == first
    mended = facts("mended", [*texts, "x"])
    assert (mended[0] == first[0], mended[1] == first[1]) == (True, False)
    assert facts("blocks", texts, block_size=7)[0] != first[0]


# ------------------------------------------------------------------------------------------ nothing written of bad files


def test_small_files_are_checked_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = raw_config(tmp_path, map(str, range(2000)), block_size=8)
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write("{")
    config = config_of(raw)
    for check in (lambda: prepare(config, Storage(config.run.dir)), lambda: check_prompts(config, all_rows=True)):
        with pytest.raises(UserError, match=r"prompts\.jsonl:2001: not valid JSON"):
            check()
        assert not (tmp_path / "run").exists() or not list((tmp_path / "run").rglob("*"))
    check_prompts(config, all_rows=False)
    monkeypatch.setattr(stage, "_READ_FIRST_BYTES", 0)
    with pytest.raises(UserError, match=r"prompts\.jsonl:2001: not valid JSON"):
        prepare(config, Storage(config.run.dir))
    assert len(train_prompts(Storage(config.run.dir)).committed()) > 10, "large files are not read twice"
    write_rows(tmp_path / "prompts.jsonl", map(str, range(2001)))
    prepare(config, Storage(config.run.dir))


# ------------------------------------------------------------------------------------------------------------ duplicates


def test_a_run_that_nothing_can_judge_says_so_before_it_begins(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = raw_config(tmp_path, map(str, range(200)))
    del raw["prompts"]["source"]["reference_column"], raw["training"]["teacher"]
    raw["teacher"] = {"endpoint": {"url": "http://localhost:1/v1", "model": "big"}}
    raw["training"]["warmup"]["data"] = "teacher"
    caplog.set_level(logging.INFO, "plad")
    told = "no held-out prompt has a reference and evaluation.judges is empty, so that nothing will tell how good outputs are"
    assert check_prompts(config_of(raw), all_rows=True) == told
    prepared(config_of(raw))
    assert [record.message for record in caplog.records] == [f"prompts: {told}"]
    raw["evaluation"]["judges"] = {"reader": {"type": "reward_model", "path": "nowhere"}}
    assert check_prompts(config_of(raw), all_rows=True) is None


def test_duplicates_are_counted_and_kept_dropped_or_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = [str(row) for row in range(1200)]
    texts += texts[:12]
    caplog.set_level(logging.INFO, "plad")
    for policy, rows in (("keep", 1212), ("drop", 1200)):
        raw = raw_config(tmp_path, texts, duplicates=policy) | {"run": {"dir": str(tmp_path / policy)}}
        data = prepared(config_of(raw))
        assert sum(manifest_of(one).rows for one in data) == rows
        assert sum(manifest_of(one).facts["duplicates"] for one in data) == 12
        dropped = sum(manifest_of(one).facts["dropped"].get("duplicates", 0) for one in data)
        assert dropped == (12 if policy == "drop" else 0)
    assert [record.message for record in caplog.records] == [
        "prompts: 12 duplicates kept",
        "prompts: 12 duplicates dropped",
    ]
    with pytest.raises(
        UserError, match=r"prompts\.jsonl:1201: this prompt was there before.*prompts\.duplicates to keep"
    ):
        prepared(config_of(raw_config(tmp_path, texts, duplicates="fail")))


def test_heldout_prompts_are_left_out_of_the_training_prompts(tmp_path: Path) -> None:
    raw = raw_config(tmp_path, [*map(str, range(600)), "7", "7"], duplicates="keep")
    write_rows(tmp_path / "held.jsonl", ["7", "599", "none of them"])
    raw["prompts"]["heldout"] = raw["prompts"]["source"] | {"paths": [str(tmp_path / "held.jsonl")]}
    train, heldout = prepared(config_of(raw))
    assert texts_of(heldout) == ["7", "599", "none of them"]
    assert texts_of(train) == [str(row) for row in range(600) if row not in (7, 599)]
    assert manifest_of(train).facts["dropped"] == {"heldout": 4}
    assert manifest_of(train).facts["duplicates"] == 0


def test_a_share_of_the_source_is_held_out_by_the_ids(tmp_path: Path) -> None:
    train, heldout = prepared(config_of(raw_config(tmp_path, map(str, range(600)))))
    ids = [{row["prompt_id"] for row in rows_of(data)} for data in (train, heldout)]
    assert ids[0].isdisjoint(ids[1])
    assert (len(ids[0] | ids[1]), 30 < len(ids[1]) < 90) == (600, True)


def test_copies_of_a_prompt_are_never_on_both_sides(tmp_path: Path) -> None:
    train, heldout = prepared(config_of(raw_config(tmp_path, [str(row % 200) for row in range(800)])))
    texts = [set(texts_of(data)) for data in (train, heldout)]
    assert texts[0].isdisjoint(texts[1])
    assert len(texts[1]) > 5


def test_what_was_begun_with_another_config_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad row that is found late is mended in the config; nothing was made of the rows before it."""
    monkeypatch.setattr(stage, "_READ_FIRST_BYTES", 0)
    raw = raw_config(tmp_path, [*map(str, range(1200)), "7"], block_size=16, duplicates="fail")
    open_run(config_of(raw))
    with pytest.raises(UserError, match=r"prompts\.duplicates to keep or drop"):
        prepared(config_of(raw))
    assert len(train_prompts(Storage(raw["run"]["dir"])).committed()) > 5
    raw["prompts"]["duplicates"] = "drop"
    config = config_of(raw)
    check_same_run(config, RunDir.of(config))
    train, heldout = prepared(config)
    assert manifest_of(train).rows + manifest_of(heldout).rows == 1200


# --------------------------------------------------------------------------------------------------------------- lengths


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a tokenizer and a context of 64 tokens; it has no weights."""
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer(iter(["some text ä"]), 300).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(SHAPE))
    return folder


def long_config(folder: Path, model: Path, **prompts: Any) -> dict[str, Any]:
    """Prompts of 200 letters at rows 3 and 600 among short ones; the student is pretrained."""
    texts = [f"{row} " + ("äx" * 100 if row in (3, 600) else "") for row in range(700)]
    raw = raw_config(folder, texts, heldout_fraction=0.1, **prompts)
    raw["student"] = {"path": str(model), "template": "{{ messages[0].content }} ="}
    return raw


def test_an_over_long_prompt_is_refused_by_its_row_and_the_model(tmp_path: Path, model: Path) -> None:
    expected = r"prompts\.jsonl:4: the prompt has [0-9]+ tokens for student \(.*model.*\), at most 63 fit\. .*prompts\.over_long"
    with pytest.raises(UserError, match=expected):
        prepared(config_of(long_config(tmp_path, model)))
    with pytest.raises(UserError, match=r"at most 20 fit"):
        prepared(config_of(long_config(tmp_path, model, max_tokens=20)))


def test_over_long_prompts_are_dropped_and_counted(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "plad")
    data = prepared(config_of(long_config(tmp_path, model, over_long="drop")))
    assert sum(manifest_of(one).rows for one in data) == 698
    assert sum(manifest_of(one).facts["over_long"] for one in data) == 2
    assert [record.message for record in caplog.records if record.name == "plad"] == ["prompts: 2 over-long dropped"]


@settings(max_examples=8)
@given(text=st.text("aä text\U0001f600", min_size=40, max_size=300), limit=st.integers(14, 30))
def test_a_truncated_prompt_fits_every_model_that_answers_it(model: Path, text: str, limit: int) -> None:
    with TemporaryDirectory() as name:
        raw = raw_config(Path(name), ["a", "b", "c"], over_long="truncate", max_tokens=limit, heldout_fraction=0.5)
        messages = [{"role": "system", "content": "s"}, {"role": "user", "content": text}]
        with (Path(name) / "prompts.jsonl").open("w") as file:
            for row in range(20):
                file.write(json.dumps({"m": [messages[0], {"role": "user", "content": text + str(row)}]}) + "\n")
        raw["prompts"]["source"] |= {"messages_column": "m", "reference_column": None}
        raw["training"]["warmup"]["data"] = "teacher"
        del raw["training"]["teacher"]
        raw["student"] = {"path": str(model), "template": "{{ messages[0].content }}{{ messages[1].content }} ="}
        raw["teacher"] = raw["student"] | {"template": "Answer: {{ messages[1].content }}\n"}
        config = config_of(raw)
        originals = {prompt.prompt_id: prompt for prompt in read_prompts(config.prompts.source)}
        data = prepared(config)
        models = (config.student, config.all_teachers()["teacher"])
        renderers = [Renderer(resolve_model(one), one) for one in models]
        truncated = 0
        for row in (row for one in data for row in rows_of(one)):
            original = originals.pop(row["prompt_id"]).messages
            assert row["messages"][0] == original[0]
            content = row["messages"][1]["content"]
            assert content
            assert original[1]["content"].startswith(content)
            truncated += content != original[1]["content"]
            assert all(len(renderer.prompt_ids([row["messages"]])[0]) <= limit for renderer in renderers)
        assert not originals
        assert sum(manifest_of(one).facts["truncated"] for one in data) == truncated


def test_a_prompt_that_fits_not_even_when_empty_is_refused(tmp_path: Path, model: Path) -> None:
    raw = long_config(tmp_path, model, over_long="truncate", max_tokens=20)
    raw["student"]["template"] = "{{ 'long ' * 40 }}{{ messages[0].content }}"
    with pytest.raises(
        UserError, match=r"prompts\.jsonl:1: even with its last message cut to nothing .* at most 20 fit"
    ):
        prepared(config_of(raw))


def test_a_row_that_a_chat_template_refuses_is_named(tmp_path: Path, model: Path) -> None:
    raw = long_config(tmp_path, model, over_long="drop")
    raw["student"]["template"] = "{{ messages[0].content if '33 ' != messages[0].content else messages[1].content }}"
    with pytest.raises(UserError, match=r"prompts\.jsonl:34: student \(.*\): template of .*cannot render"):
        prepared(config_of(raw))


def test_a_row_that_the_template_of_a_new_model_refuses_is_named(tmp_path: Path) -> None:
    raw = raw_config(tmp_path, map(str, range(50)))
    raw["student"]["template"] = "{{ messages[0].content if messages[0].content != '33' else messages[1].content }}"
    with pytest.raises(UserError, match=r"prompts\.jsonl:34: template of student: cannot render .*'33'"):
        prepared(config_of(raw))


# -------------------------------------------------------------------------------------------------------------- teachers


def test_teachers_get_prompts_by_their_filters_and_shares(tmp_path: Path) -> None:
    raw = raw_config(tmp_path, map(str, range(3000)), block_size=64, heldout_fraction=0.3)
    train, heldout = prepared(config_of(with_teachers(raw, TWO_TEACHERS)))
    for data in (train, heldout):
        taken = Counter((row["teacher"], len(row["messages"][0]["content"]) < 3) for row in rows_of(data))
        assert taken["short", False] == 0
        assert taken["short", True] > taken["any", True]
    both = with_teachers(raw_config(tmp_path, map(str, range(3000))), {"a": SERVER | {"share": 3}, "b": SERVER})
    both["run"]["dir"] = str(tmp_path / "both")
    for data in prepared(config_of(both)):
        taken = Counter(row["teacher"] for row in rows_of(data))
        assert 0.65 < taken["a"] / taken.total() < 0.85
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
        ("reference == 'no'", r"prompts\.jsonl:1: no teacher takes this prompt"),
        ("meta.lang == 'de'", r"prompts\.jsonl:1: teachers\.a\.filter: .*no attribute 'lang'.*meta_columns adds to it"),
        ("messages[", r"teachers\.a\.filter: 'messages\[': not a valid Jinja expression"),
    ],
)
def test_a_filter_that_cannot_be_used_is_named(tmp_path: Path, filter: str, message: str) -> None:
    raw = with_teachers(raw_config(tmp_path, map(str, range(100))), {"a": SERVER | {"filter": filter}})
    for check in (prepared, lambda config: check_prompts(config, all_rows=True)):
        with pytest.raises(UserError, match=message):
            check(config_of(raw))


# ---------------------------------------------------------------------------------------------------------------- memory


def test_memory_does_not_grow_with_the_number_of_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filler = "x" * 400
    texts = (f"{row} {filler}" for row in range(200_000))  # 80 MB of text, twice that as objects
    raw = raw_config(tmp_path, texts, block_size=2000, duplicates="drop")
    monkeypatch.setattr(stage, "_READ_FIRST_BYTES", 0)
    resident: list[int] = []
    commit = Dataset.commit

    def watched(self: Dataset, *args: Any, **kwargs: Any) -> Any:
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
        return commit(self, *args, **kwargs)

    monkeypatch.setattr(Dataset, "commit", watched)
    prepared_rows = prepare(config_of(raw), Storage(str(tmp_path / "run")))
    assert sum(prepared_rows.values()) == 200_000
    assert max(resident) - resident[10] < 24 << 20
