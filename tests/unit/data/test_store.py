"""Datasets: every block is committed exactly once, nothing is lost or half-written."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plad_dist.data import journal as journal_module
from plad_dist.data.dataset import Dataset
from plad_dist.data.parts import Part, part_name
from plad_dist.data.schemas import PAIRS, PROMPTS, SAMPLES
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed, UserError

SCHEMA = pa.schema([pa.field("x", pa.int64(), nullable=False), pa.field("text", pa.string())])


def dataset(folder: Path) -> Dataset:
    return Dataset(Storage(str(folder)), "numbers", SCHEMA)


def rows(*values: int) -> pa.Table:
    return pa.table({"x": list(values), "text": [str(value) for value in values]}, schema=SCHEMA)


def commit(data: Dataset, block: int, table: pa.Table, attempt: str = "a") -> Part | None:
    part, first = data.commit(block, table, fingerprint="f", attempt=attempt)
    return part if first else None


def test_a_late_attempt_changes_nothing(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    assert commit(data, 0, rows(1, 2)) is not None
    path = tmp_path / "numbers" / part_name(0)
    before = path.read_bytes(), path.stat().st_mtime_ns
    assert commit(data, 0, rows(3), attempt="late") is None
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_exactly_one_of_many_writers_of_a_block_wins(tmp_path: Path) -> None:
    data, won_blocks = dataset(tmp_path), list[int]()
    start = threading.Barrier(8)

    def write(writer: int) -> None:
        start.wait()
        for block in range(20):
            if commit(data, block, rows(writer), attempt=str(writer)):
                won_blocks.append(block)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won_blocks) == list(range(20))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    blocks=st.lists(st.lists(st.integers(-(2**40), 2**40), max_size=5), max_size=6),
    known_blocks=st.sets(st.integers(0, 5)),
)
def test_committed_rows_are_read_back_in_the_order_of_blocks(
    tmp_path_factory: pytest.TempPathFactory, blocks: list[list[int]], known_blocks: set[int]
) -> None:
    data = dataset(tmp_path_factory.mktemp("store"))
    parts = [commit(data, block, rows(*values)) for block, values in reversed(list(enumerate(blocks)))]
    known = [part for part in parts if part and int(part.name[5:10]) in known_blocks]
    manifest = data.finish(len(blocks), fingerprint="f", facts={"k": 1}, known_parts=known)
    assert data.manifest() == manifest
    assert manifest.rows == sum(map(len, blocks))
    assert data.read()["x"].to_pylist() == [value for values in blocks for value in values]
    assert set(data.committed()) == set(range(len(blocks)))


def test_the_manifest_does_not_depend_on_which_parts_the_writer_knows(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    parts = [commit(data, 0, rows(1, 2)), commit(data, 1, rows(3))]
    with_known_parts = data.finish(2, fingerprint="f", facts={}, known_parts=[part for part in parts if part])
    assert data.finish(2, fingerprint="f", facts={}) == with_known_parts


def test_remains_of_a_killed_writer_are_not_parts(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    commit(data, 0, rows(1))
    (tmp_path / "numbers" / "part-00001.arrow#1").write_bytes(b"half")
    (tmp_path / "numbers" / ".part-00002.arrow").write_bytes(b"half")
    assert set(data.committed()) == {0}


def test_parts_of_another_fingerprint_are_refused(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    commit(data, 0, rows(1))
    with pytest.raises(UserError, match="another config"):
        data.finish(1, fingerprint="other", facts={})


def test_a_resumed_stage_refuses_parts_of_another_fingerprint_before_it_starts(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    assert data.resume("anything") == {}
    commit(data, 3, rows(1))
    assert data.resume("f") == {3: None}
    assert data.find(3, "f") is not None
    assert data.find(2, "f") is None
    with pytest.raises(UserError, match=r"part-00003\.arrow: made by another config"):
        data.resume("other")


def test_a_complete_dataset_of_another_fingerprint_is_set_aside_as_a_whole(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    data.set_aside_unless("f")
    commit(data, 0, rows(1, 2))
    data.finish(1, fingerprint="f", facts={})
    data.set_aside_unless("f")
    assert data.read()["x"].to_pylist() == [1, 2]
    data.set_aside_unless("other")
    assert data.manifest() is None
    assert data.resume("other") == {}
    assert len(list((tmp_path / "numbers" / "damaged").iterdir())) == 1, "its parts are kept"


def test_parts_are_checked_against_the_manifest_when_read(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    commit(data, 0, rows(1, 2))
    data.finish(1, fingerprint="f", facts={})
    path = tmp_path / "numbers" / part_name(0)
    original = path.read_bytes()
    path.write_bytes(original[:-8])
    with pytest.raises(RunFailed, match=r"part-00000\.arrow: damaged: it has"):
        data.read_block(0)
    altered = bytearray(original)
    altered[len(original) // 2] ^= 1
    path.write_bytes(altered)
    with pytest.raises(RunFailed, match=r"part-00000\.arrow: damaged: its checksum"):
        data.read()


def test_a_journal_that_cannot_be_written_does_not_stop_the_stage_and_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data, replace = dataset(tmp_path), Storage.replace
    parts = [data.commit(block, rows(block), fingerprint="f", attempt="a")[0] for block in range(2)]

    def full(self: Storage, key: str, value: bytes) -> None:
        raise RunFailed("no space left")

    monkeypatch.setattr(journal_module, "_PAGE_SECONDS", 0)
    monkeypatch.setattr(Storage, "replace", full)
    journal = data.journal("f")
    journal.add(parts[0])
    assert "no space left" in caplog.text
    assert data.committed("f") == dict.fromkeys(range(2))
    monkeypatch.setattr(Storage, "replace", replace)
    journal.add(parts[1])
    assert data.committed("f") == dict(enumerate(parts))


def test_the_journal_saves_reads_and_its_entries_of_changed_parts_are_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataset(tmp_path)
    parts = [
        data.commit(block, rows(block), fingerprint="f", attempt="a", counts={"errors": block})[0] for block in range(4)
    ]
    journal = data.journal("f")
    for part in parts[:3]:
        journal.add(part)
    journal.flush()
    assert data.committed("f") == {0: parts[0], 1: parts[1], 2: parts[2], 3: None}
    assert data.committed("g") == dict.fromkeys(range(4))
    assert data.committed_parts()[3] == parts[3], "counts are stored in the part"
    path = tmp_path / "numbers" / part_name(1)
    path.write_bytes(path.read_bytes() + b"x")
    assert data.committed("f")[1] is None
    path.unlink()
    recommitted, first = data.commit(1, rows(7), fingerprint="f", attempt="b")
    assert first
    later = data.journal("f")
    later.add(recommitted)
    later.flush()
    assert data.committed("f")[1] == recommitted, "the later journal is valid"
    reads: list[str] = []
    read = Storage.read
    monkeypatch.setattr(Storage, "read", lambda self, key: (reads.append(key), read(self, key))[1])
    manifest = data.finish(
        4, fingerprint="f", facts={}, known_parts=[part for part in data.committed("f").values() if part]
    )
    assert manifest.count("errors") == 0 + 0 + 2 + 3
    assert [key for key in reads if key.endswith(".arrow")] == ["numbers/part-00003.arrow"]
    assert not (tmp_path / "numbers" / "journal").exists() or not list((tmp_path / "numbers" / "journal").iterdir())


def test_a_full_disk_is_reported_and_leaves_no_part(tmp_path: Path) -> None:
    """A limit on file sizes simulates a full disk: the write fails half-way."""
    script = f"""
import resource
from tests.unit.data.test_store import commit, dataset, rows
from pathlib import Path
from plad_dist.errors import RunFailed
data = dataset(Path({str(tmp_path)!r}))
commit(data, 0, rows(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    commit(data, 1, rows(*range(10_000)))
except RunFailed as error:
    print("error:", error)
print("committed:", sorted(data.committed()))
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "part-00001.arrow: cannot be written" in process.stdout, process.stdout + process.stderr
    assert "What is committed is kept" in process.stdout
    assert "committed: [0]" in process.stdout
    assert commit(dataset(tmp_path), 1, rows(2)) is not None


def test_the_error_names_a_missing_or_damaged_part(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    commit(data, 0, rows(1))
    with pytest.raises(RunFailed, match=r"part-00001\.arrow"):
        data.finish(2, fingerprint="f", facts={})
    (tmp_path / "numbers" / part_name(0)).write_bytes(b"ARROW1 not really")
    with pytest.raises(RunFailed, match=r"part-00000\.arrow: damaged"):
        data.finish(1, fingerprint="f", facts={})


def test_an_incomplete_dataset_is_not_read(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    commit(data, 0, rows(1))
    with pytest.raises(RunFailed, match="not complete"):
        data.read()


def test_parts_load_in_datasets(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    commit(data, 0, rows(1, 2))
    commit(data, 1, rows(3))
    loaded = datasets.load_dataset(
        "arrow", data_files=str(tmp_path / "numbers" / "*.arrow"), cache_dir=str(tmp_path / "c")
    )
    assert loaded["train"]["x"][:] == [1, 2, 3]


def test_storage_accepts_paths_and_file_uris(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    Storage(str(folder)).replace("a/b", b"1")
    assert Storage(folder.as_uri()).read("a/b") == b"1"
    with pytest.raises(UserError, match="expected a path or a file://, s3://"):
        _ = Storage("ftp://host/x").local_root


def test_datasets_have_the_documented_columns() -> None:
    assert [(f.name, str(f.type)) for f in PROMPTS] == [
        ("prompt_id", "string"),
        ("messages", "list<item: struct<role: string, content: string>>"),
        ("reference", "string"),
        ("meta", "string"),
        ("teacher", "string"),
        ("conversation", "string"),
        ("tools", "string"),
    ]
    assert SAMPLES.names[:6] == ["prompt_id", "sample_index", "role", "text", "token_ids", "logprob"]
    assert str(SAMPLES.field("logprob").type) == "double"
    assert str(PAIRS.field("chosen_token_ids").type) == "list<item: int32>"
