"""Stage `prepare`: every kept prompt is written once and in order, whatever fails."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from plad_dist.config import Config
from plad_dist.data import prompts as stage
from plad_dist.data.dataset import Dataset
from plad_dist.data.manifest import Manifest
from plad_dist.data.prompts import (
    check_prompts,
    heldout_prompts,
    is_prepared,
    prepare,
    teacher_blocks,
    train_prompts,
)
from plad_dist.data.sources import read_prompts
from plad_dist.data.storage import Storage
from plad_dist.errors import UserError
from plad_dist.rundir import RunDir, open_run
from tests.unit.data.prompt_stage import (
    TWO_TEACHERS,
    config_of,
    content_of,
    manifest_of,
    prepared,
    raw_config,
    rows_of,
    texts_of,
    with_teachers,
    write_rows,
)


@settings(max_examples=40)
@given(
    texts=st.lists(st.text("abü", min_size=1, max_size=4), min_size=8, max_size=40),
    block_size=st.integers(1, 7),
    duplicates=st.sampled_from(["keep", "drop"]),
    teachers=st.sampled_from([{}, TWO_TEACHERS]),
    own_heldout=st.booleans(),
)
def test_every_kept_row_is_written_exactly_once_and_in_order(
    texts: list[str], block_size: int, duplicates: str, teachers: dict[str, Any], own_heldout: bool
) -> None:
    with TemporaryDirectory() as name:
        raw = raw_config(
            Path(name), texts, block_size=block_size, duplicates=duplicates, heldout_fraction=0.3, max_tokens=None
        )
        if own_heldout:
            write_rows(Path(name) / "heldout.jsonl", ["a", "bb", "a"])
            raw["prompts"]["heldout"] = raw["prompts"]["source"] | {"paths": [f"{name}/heldout.jsonl"]}
        config = config_of(with_teachers(raw, teachers) if teachers else raw)
        heldout_rows = list(read_prompts(config.prompts.heldout)) if config.prompts.heldout else []
        heldout_contents = {row.content for row in heldout_rows}
        source_rows = read_prompts(config.prompts.source)
        rows = [*heldout_rows, *(row for row in source_rows if row.content not in heldout_contents)]
        if duplicates == "drop":
            contents = [row.content for row in rows]
            rows = [row for index, row in enumerate(rows) if row.content not in contents[:index]]
        try:
            train, heldout = prepared(config)
        except UserError as error:
            is_set_empty = any(part in str(error) for part in ("no held-out prompts", "no training prompts"))
            assume(not is_set_empty)
            raise
        expected = [(row.prompt_id, row.messages, row.reference) for row in rows]
        written = [
            (row["prompt_id"], row["messages"], row["reference"], row["teacher"])
            for data in (heldout, train)
            for row in rows_of(data)
        ]
        assert Counter(row[0] for row in written) == Counter(row[0] for row in expected)
        if own_heldout:
            assert {row["prompt_id"] for row in rows_of(heldout)} <= {row.prompt_id for row in heldout_rows}
        for data in (train, heldout):
            stored, manifest = rows_of(data), manifest_of(data)
            assert manifest.facts["content"] == content_of(stored)
            for teacher in teachers or [None]:
                ids = [row["prompt_id"] for row in stored if row["teacher"] == teacher]
                order = [row[0] for row in expected]
                assert ids == [prompt_id for prompt_id in order if prompt_id in set(ids)]
            blocks = teacher_blocks(manifest)
            assert sorted(block for numbers in blocks.values() for block in numbers) == list(range(len(manifest.parts)))
            for teacher, numbers in blocks.items():
                sizes = [manifest.parts[number].rows for number in numbers]
                assert all(size == block_size for size in sizes[:-1])
                for number in numbers:
                    assert set(data.read_block(number)["teacher"].to_pylist()) == {teacher if teachers else None}
        for prompt_id, messages, reference, _ in written:
            assert (prompt_id, messages, reference) in expected


# -- crash and resume


@pytest.fixture(scope="module")
def crashing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("crashing")
    texts = [f"{row % 23:x}" * (1 + row % 3) for row in range(60)]
    return with_teachers(raw_config(folder, texts, block_size=5, heldout_fraction=0.2), TWO_TEACHERS)


def crash_at(monkeypatch: pytest.MonkeyPatch, method: str, call: int, late: bool) -> None:
    """Let one call of a method of datasets die before or after its work (`late`)."""
    original: Callable[..., Any] = getattr(Dataset, method)
    calls = iter(range(1000))

    def crashing_method(self: Dataset, *args: Any, **kwargs: Any) -> Any:
        is_crash = next(calls) == call
        if is_crash and not late:
            raise KeyboardInterrupt
        result = original(self, *args, **kwargs)
        if is_crash:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Dataset, method, crashing_method)


def test_a_resumed_run_has_the_same_rows_as_one_that_never_failed(
    crashing: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config_in(name: str) -> Config:
        return config_of(crashing | {"run": crashing["run"] | {"dir": str(tmp_path / name)}})

    undisturbed = prepared(config_in("undisturbed"))
    commits = sum(len(manifest_of(data).parts) for data in undisturbed)
    assert commits > 12
    points = [("commit", call, late) for call in range(commits) for late in (False, True)]
    points += [("finish", call, late) for call in range(2) for late in (False, True)]
    for method, call, late in points:
        config = config_in(f"{method}-{call}-{late}")
        with monkeypatch.context() as patch:
            crash_at(patch, method, call, late)
            with pytest.raises(KeyboardInterrupt):
                prepare(config, Storage(config.run.dir))
        parts = {path: path.stat().st_mtime_ns for path in Path(config.run.dir).rglob("part-*")}
        resumed = prepared(config)
        assert all(path.stat().st_mtime_ns == mtime_ns for path, mtime_ns in parts.items()), "written once"
        for data, expected in zip(resumed, undisturbed, strict=True):
            assert data.read().equals(expected.read())
            assert manifest_of(data).facts == manifest_of(expected).facts
            assert manifest_of(data).fingerprint == manifest_of(expected).fingerprint
            assert teacher_blocks(manifest_of(data)) == teacher_blocks(manifest_of(expected))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda texts: [*texts[:9], "other", *texts[10:]], "part-00000.arrow"),
        (lambda texts: texts[:64], "part-00001.arrow"),
        (lambda texts: texts[:9], "part-00000.arrow"),
        (lambda texts: [*texts, "more"] * 2, None),
    ],
)
def test_prompt_files_that_changed_since_the_run_started_are_refused(
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
    if part is None:  # rows after the committed ones may change
        prepare(config, Storage(config.run.dir))
        return
    with pytest.raises(
        UserError, match=rf"prompts/{part}: its rows differ from those that the prompt sources yield now"
    ):
        prepare(config, Storage(config.run.dir))
    assert not manifest_of_or_none(config)
    assert set(before) <= set(Path(config.run.dir).rglob("*"))


def manifest_of_or_none(config: Config) -> Manifest | None:
    return train_prompts(Storage(config.run.dir)).manifest()


def test_the_fingerprint_covers_the_config_and_the_content_hash_covers_the_rows(tmp_path: Path) -> None:
    def hashes(name: str, texts: list[str], **changed: Any) -> tuple[str, str]:
        (tmp_path / "data").mkdir(exist_ok=True)
        raw = raw_config(tmp_path / "data", texts, **changed) | {"run": {"dir": str(tmp_path / name), "seed": 5}}
        manifest = manifest_of(prepared(config_of(raw))[0])
        return manifest.fingerprint, manifest.facts["content"]

    texts = [str(row) for row in range(100)]
    first = hashes("first", texts)
    assert hashes("again", texts) == first
    extended = hashes("extended", [*texts, "x"])
    assert (extended[0] == first[0], extended[1] == first[1]) == (True, False)
    assert hashes("blocks", texts, block_size=7)[0] != first[0]


# -- bad files


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
    monkeypatch.setattr(stage, "_MAX_BYTES_READ_TWICE", 0)
    commits = counted_commits(monkeypatch)
    with pytest.raises(UserError, match=r"prompts\.jsonl:2001: not valid JSON"):
        prepare(config, Storage(config.run.dir))
    assert len(commits) > 10, "large files are not read twice"
    assert train_prompts(Storage(config.run.dir)).committed() == {}, "what this attempt has committed is removed"
    write_rows(tmp_path / "prompts.jsonl", map(str, range(2001)))
    prepare(config, Storage(config.run.dir))


# -- duplicates and held-out rows


def test_a_run_without_references_and_judges_is_reported_before_it_starts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = raw_config(tmp_path, map(str, range(200)))
    del raw["prompts"]["source"]["reference_column"], raw["training"]["teacher"]
    raw["teacher"] = {"endpoint": {"url": "http://localhost:1/v1", "model": "big"}}
    raw["training"]["warmup"]["data"] = "teacher"
    caplog.set_level(logging.INFO, "plad")
    summary = (
        "no held-out prompt has a reference and evaluation.judges is empty, "
        "so nothing can measure the quality of responses"
    )
    assert check_prompts(config_of(raw), all_rows=True) == [summary]
    prepared(config_of(raw))
    assert [record.message for record in caplog.records] == [f"prompts: {summary}"]
    raw["evaluation"]["judges"] = {"reader": {"type": "reward_model", "path": "nowhere"}}
    assert check_prompts(config_of(raw), all_rows=True) == []


def test_a_fraction_that_holds_out_no_prompt_says_that_it_is_a_probability(tmp_path: Path) -> None:
    raw = raw_config(tmp_path, map(str, range(5)))
    raw["prompts"]["heldout_fraction"] = 1e-6
    with pytest.raises(UserError, match="1e-06 of 5 rows leaves no held-out prompts: each is held out with this prob"):
        check_prompts(config_of(raw), all_rows=True)


def test_every_notice_about_prompts_is_a_line_of_its_own(tmp_path: Path) -> None:
    raw = raw_config(tmp_path, [*map(str, range(200)), "", "0"])
    del raw["prompts"]["source"]["reference_column"], raw["training"]["teacher"]
    raw["teacher"] = {"endpoint": {"url": "http://localhost:1/v1", "model": "big"}}
    raw["training"]["warmup"]["data"] = "teacher"
    raw["prompts"]["source"]["invalid_rows"] = "drop"
    duplicates, invalid, references = check_prompts(config_of(raw), all_rows=True)
    assert duplicates.startswith("1 duplicates")
    assert invalid.startswith("1 invalid rows dropped, the first: ")
    assert references.startswith("no held-out prompt has a reference")


def test_duplicates_are_counted_and_kept_dropped_or_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = [str(row) for row in range(1200)]
    texts += texts[:12]
    caplog.set_level(logging.INFO, "plad")
    for policy, rows in (("keep", 1212), ("drop", 1200)):
        raw = raw_config(tmp_path, texts, duplicates=policy) | {"run": {"dir": str(tmp_path / policy)}}
        data = prepared(config_of(raw))
        assert sum(manifest_of(dataset).rows for dataset in data) == rows
        assert sum(manifest_of(dataset).facts["duplicates"] for dataset in data) == 12
        dropped = sum(manifest_of(dataset).facts["dropped"].get("duplicates", 0) for dataset in data)
        assert dropped == (12 if policy == "drop" else 0)
    assert [record.message for record in caplog.records] == [
        "prompts: 12 duplicates kept",
        "prompts: 12 duplicates dropped",
    ]
    with pytest.raises(
        UserError, match=r"prompts\.jsonl:1201: repeats an earlier prompt word for word.*prompts\.duplicates to keep"
    ):
        prepared(config_of(raw_config(tmp_path, texts, duplicates="fail")))


def test_heldout_prompts_are_dropped_from_the_training_prompts(tmp_path: Path) -> None:
    raw = raw_config(tmp_path, [*map(str, range(600)), "7", "7"], duplicates="keep")
    write_rows(tmp_path / "heldout.jsonl", ["7", "599", "only here"])
    raw["prompts"]["heldout"] = raw["prompts"]["source"] | {"paths": [str(tmp_path / "heldout.jsonl")]}
    train, heldout = prepared(config_of(raw))
    assert texts_of(heldout) == ["7", "599", "only here"]
    assert texts_of(train) == [str(row) for row in range(600) if row not in (7, 599)]
    assert manifest_of(train).facts["dropped"] == {"heldout": 4}
    assert manifest_of(train).facts["duplicates"] == 0


def test_a_share_of_the_source_is_held_out(tmp_path: Path) -> None:
    train, heldout = prepared(config_of(raw_config(tmp_path, map(str, range(600)))))
    ids = [{row["prompt_id"] for row in rows_of(data)} for data in (train, heldout)]
    assert ids[0].isdisjoint(ids[1])
    assert (len(ids[0] | ids[1]), 30 < len(ids[1]) < 90) == (600, True)


def test_copies_of_a_prompt_are_never_in_both_sets(tmp_path: Path) -> None:
    train, heldout = prepared(config_of(raw_config(tmp_path, [str(row % 200) for row in range(800)])))
    texts = [set(texts_of(data)) for data in (train, heldout)]
    assert texts[0].isdisjoint(texts[1])
    assert len(texts[1]) > 5


def counted_commits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which every committed block is appended."""
    commits: list[int] = []
    commit = Dataset.commit

    def counted(self: Dataset, block: int, *args: Any, **kwargs: Any) -> Any:
        commits.append(block)
        return commit(self, block, *args, **kwargs)

    monkeypatch.setattr(Dataset, "commit", counted)
    return commits


def test_the_config_can_be_corrected_after_a_late_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is derived from the rows before it, which this attempt removes."""
    monkeypatch.setattr(stage, "_MAX_BYTES_READ_TWICE", 0)
    raw = raw_config(tmp_path, [*map(str, range(1200)), "7"], block_size=16, duplicates="fail")
    run, commits = open_run(config_of(raw)), counted_commits(monkeypatch)
    with pytest.raises(UserError, match=r"prompts\.duplicates to keep or drop"):
        prepare(config_of(raw), run.storage)
    assert len(commits) > 5
    raw["prompts"]["duplicates"] = "drop"
    config = config_of(raw)
    train, heldout = train_prompts(run.storage), heldout_prompts(run.storage)
    prepare(config, open_run(config).storage)
    assert manifest_of(train).rows + manifest_of(heldout).rows == 1200


def test_a_bad_row_removes_nothing_that_another_attempt_has_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "_MAX_BYTES_READ_TWICE", 0)
    raw = raw_config(tmp_path, [*map(str, range(1200)), "7"], block_size=16, duplicates="fail")
    config = config_of(raw)
    killed_in_block(3, config, monkeypatch)
    with pytest.raises(UserError, match=r"prompts\.duplicates to keep or drop"):
        prepare(config, open_run(config).storage)
    assert set(train_prompts(RunDir.of(config).storage).committed()) == {0, 1, 2}
    raw["prompts"]["duplicates"] = "drop"
    with pytest.raises(UserError, match=r"belongs to another config.*\n  prompts\.duplicates: 'fail' before"):
        open_run(config_of(raw))  # committed blocks count as begun
    assert set(train_prompts(RunDir.of(config).storage).committed()) == {0, 1, 2}


def killed_in_block(block: int, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepare until a training block is to be committed, and die there."""
    commit = Dataset.commit

    def killed(self: Dataset, number: int, *args: Any, **kwargs: Any) -> Any:
        if number == block and self.path == "prompts":
            raise KeyboardInterrupt
        return commit(self, number, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Dataset, "commit", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, open_run(config).storage)


def test_late_parts_of_a_superseded_command_are_set_aside_by_the_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A command can be frozen before a commit, and wake up when its run has another config."""
    caplog.set_level("INFO", logger="plad")
    raw = raw_config(tmp_path, map(str, range(400)), block_size=16)
    other = config_of({**raw, "run": {**raw["run"], "seed": 6}})
    config = config_of(raw)
    killed_in_block(3, other, monkeypatch)
    RunDir.of(config).storage.delete("run.yaml")
    run = RunDir.of(config).claimed("plad run")
    before = run.storage.read("prompts/part-00001.arrow")
    with pytest.raises(UserError, match=r"prompts/part-00000\.arrow: made by another config"):
        prepare(config, RunDir.of(config).storage)  # without a claim on the run
    prepare(config, run.storage)
    [kept] = (run.root / "prompts" / "damaged").glob("part-00001.arrow.*")
    assert kept.read_bytes() == before
    assert "part-00001.arrow" in caplog.text
    assert "moved to prompts/damaged/" in caplog.text
    train, heldout = prepared(config)
    assert manifest_of(train).rows + manifest_of(heldout).rows == 400


def test_prompts_of_another_config_do_not_count_as_prepared(tmp_path: Path) -> None:
    raw = raw_config(tmp_path, map(str, range(200)))
    config, run = config_of(raw), open_run(config_of(raw))
    assert not is_prepared(config, run.storage)
    prepare(config, run.storage)
    assert is_prepared(config, run.storage)
    other = config_of({**raw, "run": {**raw["run"], "seed": 6}})
    with pytest.raises(UserError, match=r"prompts: complete, but made by another config or from other inputs"):
        is_prepared(other, run.storage)


# -- memory


def test_memory_does_not_grow_with_the_number_of_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filler = "x" * 400
    texts = (f"{row} {filler}" for row in range(200_000))  # 80 MB of text, twice that as objects
    raw = raw_config(tmp_path, texts, block_size=2000, duplicates="drop")
    monkeypatch.setattr(stage, "_MAX_BYTES_READ_TWICE", 0)
    resident: list[int] = []
    commit = Dataset.commit

    def measured_commit(self: Dataset, *args: Any, **kwargs: Any) -> Any:
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
        return commit(self, *args, **kwargs)

    monkeypatch.setattr(Dataset, "commit", measured_commit)
    prepared_rows = prepare(config_of(raw), Storage(str(tmp_path / "run")))
    assert sum(prepared_rows.values()) == 200_000
    assert max(resident) - resident[10] < 24 << 20


def test_dropped_invalid_rows_are_counted_and_the_first_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "plad")
    raw = raw_config(tmp_path, [" " if row in (3, 7) else f"q {row}" for row in range(40)], heldout_fraction=0.3)
    with pytest.raises(UserError, match=r"prompts\.jsonl:4: 'prompt': expected a non-empty string"):
        prepared(config_of(raw))
    raw["prompts"]["source"]["invalid_rows"] = "drop"
    train, heldout = prepared(config_of(raw))
    assert manifest_of(train).rows + manifest_of(heldout).rows == 38
    assert manifest_of(train).facts["dropped"] == {"invalid": 2}
    assert "2 invalid rows dropped, the first: " in caplog.text
    assert "prompts.jsonl:4: " in caplog.text
