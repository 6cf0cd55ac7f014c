"""Datasets and run directories on an S3 server, with conditional puts."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from plad_dist.config_file import parse_config
from plad_dist.data.dataset import Dataset
from plad_dist.data.prompts import prepare, train_prompts
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed
from plad_dist.rundir import check_same_run, open_run
from plad_dist.status import status_table
from plad_dist.verify.run import verify
from tests.conftest import tiny_config, write_prompts

SCHEMA = pa.schema([pa.field("x", pa.int64(), nullable=False)])


def rows(*values: int) -> pa.Table:
    return pa.table({"x": list(values)}, schema=SCHEMA)


def test_exactly_one_of_two_writers_of_a_block_wins_and_the_other_learns_it(bucket: str) -> None:
    data = Dataset(Storage(bucket), "numbers", SCHEMA)
    start, results = threading.Barrier(2), dict[tuple[int, int], bool]()

    def write(writer: int) -> None:
        for block in range(20):
            start.wait()
            _, first = data.commit(block, rows(writer), fingerprint="f", attempt=str(writer))
            results[writer, block] = first

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results[0, block] != results[1, block] for block in range(20))
    data.finish(20, fingerprint="f", facts={})
    assert data.read()["x"].to_pylist() == [int(results[1, block]) for block in range(20)]


def test_a_retry_of_an_own_commit_counts_as_the_first_commit(bucket: str) -> None:
    """The response to a put can be lost: the retry then finds the part of the same attempt."""
    data = Dataset(Storage(bucket), "numbers", SCHEMA)
    first = data.commit(0, rows(1), fingerprint="f", attempt="a")
    assert data.commit(0, rows(1), fingerprint="f", attempt="a") == first
    assert data.commit(0, rows(2), fingerprint="f", attempt="b") == (first[0], False)


def test_a_resumed_writer_knows_the_committed_parts_from_names_and_the_journal(bucket: str) -> None:
    data = Dataset(Storage(bucket), "numbers", SCHEMA)
    journal = data.journal("f")
    parts = [data.commit(block, rows(block), fingerprint="f", attempt="a")[0] for block in range(5)]
    for part in parts[:3]:
        journal.add(part)
    journal.flush()
    assert data.committed("f") == {0: parts[0], 1: parts[1], 2: parts[2], 3: None, 4: None}
    assert data.finish(5, fingerprint="f", facts={}).parts == parts


def test_a_run_directory_can_be_a_uri(bucket: str, tmp_path: Path) -> None:
    write_prompts(tmp_path, 100)
    raw: dict[str, Any] = tiny_config(tmp_path)
    raw["run"]["dir"] = bucket
    config = parse_config(raw, "test")
    run = open_run(config)
    assert prepare(config, run.storage)["train"] > 50
    check_same_run(config, run)
    with pytest.raises(ValueError, match=r"run\.seed: 5 before, 6 now"):
        check_same_run(parse_config(raw | {"run": {"dir": bucket, "seed": 6}}, "test"), run)
    assert train_prompts(run.storage).read().num_rows > 50
    assert status_table(bucket).row_count > 5
    checked, problems = verify(bucket)
    assert not problems
    assert [item.state for item in checked] == ["complete", "complete"]


def test_the_error_names_a_missing_bucket(bucket: str) -> None:
    storage = Storage("s3://no-such-bucket/run")
    with pytest.raises(RunFailed, match=r"s3://no-such-bucket/run/x: cannot be written"):
        storage.replace("x", b"1")
    with pytest.raises(ValueError, match="s3://no-such-bucket/run: cannot be written"):
        storage.check_writable()


def test_messages_and_pickles_contain_no_secret(bucket: str) -> None:
    import pickle

    storage = Storage(bucket)
    storage.replace("x", b"1")
    assert b"not-a-secret" not in pickle.dumps(storage)
    assert "not-a-secret" not in repr(storage)


def test_an_object_that_is_missing_does_not_exist_and_is_no_failure(bucket: str) -> None:
    storage = Storage(bucket)
    assert not storage.exists("folder/object")
    storage.create("folder/object", b"x")
    assert storage.exists("folder/object")
    assert storage.exists("folder")
