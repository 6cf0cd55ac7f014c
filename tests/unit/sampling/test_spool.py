"""Promises of the spool: a paid response survives a kill, counts once, and goes with the commit."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from plad_dist.data.dataset import Dataset
from plad_dist.data.schemas import SAMPLES
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed
from plad_dist.sampling.spool import Spool, total_cost


def dataset(folder: Path) -> Dataset:
    return Dataset(Storage(str(folder)), "samples/teacher/round-0", SAMPLES)


def row(prompt_id: str, index: int = 0, text: str = "fine", cost: float = 0.25) -> dict[str, Any]:
    return {
        "prompt_id": prompt_id,
        "sample_index": index,
        "role": "teacher",
        "text": text,
        "token_ids": [],
        "logprob": None,
        "num_tokens": 3,
        "finish_reason": "stop",
        "error": None,
        "model": "m",
        "round": 0,
        "reasoning": None,
        "prompt_tokens": 12,
        "cost": cost,
    }


def spooled_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("spool/*/*.arrow"))


def test_rows_are_read_back_unchanged(tmp_path: Path) -> None:
    spool, rows = Spool(dataset(tmp_path), "f"), [row("a"), row("a", 1, "é\n"), row("b") | {"logprob": -1.5}]
    for sample in rows:
        spool.add(7, sample)
    spool.add(8, row("c"))
    spool.flush()
    assert list(Spool(dataset(tmp_path), "f").load(7)[0].values()) == rows
    assert Spool(dataset(tmp_path), "f").load(9) == ({}, 0.0)
    assert [path.parent.name for path in spooled_files(tmp_path)] == ["00007", "00008"]


def test_a_response_that_is_not_written_yet_is_not_paid_for_again(tmp_path: Path) -> None:
    """An attempt of the same process follows a failed one before the next flush."""
    spool = Spool(dataset(tmp_path), "f")
    spool.add(7, row("a"))
    spool.flush()
    spool.add(7, row("b"))
    assert spool.load(7) == ({("a", 0): row("a"), ("b", 0): row("b")}, 0.0)


def test_the_second_response_to_a_prompt_counts_as_money_lost(tmp_path: Path) -> None:
    spool = Spool(dataset(tmp_path), "f")
    for sample in (row("a"), row("a", text="other", cost=0.5), row("a")):
        spool.add(7, sample)
        spool.flush()
    assert spool.load(7) == ({("a", 0): row("a")}, 0.5)


def test_a_flush_without_new_rows_writes_nothing(tmp_path: Path) -> None:
    spool = Spool(dataset(tmp_path), "f")
    spool.flush()
    spool.add(0, row("a"))
    spool.flush()
    spool.flush()
    assert len(spooled_files(tmp_path)) == 1


def test_the_first_of_two_responses_to_a_prompt_is_kept_and_both_are_paid(tmp_path: Path) -> None:
    first, second = Spool(dataset(tmp_path), "f"), Spool(dataset(tmp_path), "f")
    for spool, text in ((second, "second"), (first, "first")):
        spool.add(0, row("a", text=text))
        spool.flush()
    assert first.load(0)[0]["a", 0]["text"] == "first"
    assert total_cost(dataset(tmp_path)) == 0.5


def test_flushed_rows_survive_a_kill(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom tests.unit.sampling.test_spool import dataset, row\n"
        "from plad_dist.sampling.spool import Spool\n"
        "spool = Spool(dataset(Path(sys.argv[1])), 'f')\n"
        "spool.add(0, row('kept'))\nspool.flush()\nspool.add(0, row('lost'))\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, env=environment, check=False)
    assert Spool(dataset(tmp_path), "f").load(0)[0].keys() == {("kept", 0)}


def test_damaged_and_foreign_files_are_ignored_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("plad"), "propagate", True)
    for fingerprint, prompt_id in (("f", "cut"), ("f", "flipped"), ("other", "foreign"), ("f", "good")):
        spool = Spool(dataset(tmp_path), fingerprint)
        spool.add(0, row(prompt_id))
        spool.flush()
    cut, flipped, foreign, good = spooled_files(tmp_path)
    cut.write_bytes(cut.read_bytes()[:-20])
    flipped.write_bytes(flipped.read_bytes().replace(b"fine", b"fime"))
    (good.parent / "notes.txt").write_text("notes of a user")
    with pa.ipc.new_file(good.with_name(f"{'9' * 20}-{'a' * 8}-000000.arrow"), pa.schema([("x", pa.int64())])):
        pass
    with caplog.at_level(logging.WARNING, "plad"):
        assert Spool(dataset(tmp_path), "f").load(0)[0].keys() == {("good", 0)}
    for path in (cut, flipped, foreign):
        assert path.name in caplog.text
    assert total_cost(dataset(tmp_path)) == 0.5  # the responses under another config were paid too


def test_a_committed_block_leaves_nothing_behind_and_is_not_counted_twice(tmp_path: Path) -> None:
    data, spool = dataset(tmp_path), Spool(dataset(tmp_path), "f")
    for block in (0, 1):
        spool.add(block, row("a"))
    spool.flush()
    spool.add(0, row("b"))
    table = pa.Table.from_pylist([row("a")], schema=SAMPLES)
    data.commit(0, table, fingerprint="f", attempt="x")
    assert total_cost(data) == 0.25  # even if a kill comes between the commit and the discard
    spool.discard(0)
    spool.flush()
    assert [path.parent.name for path in spooled_files(tmp_path)] == ["00001"]
    spool.discard(1)
    spool.discard(5)
    assert not (tmp_path / data.path / "spool").exists()
    assert data.committed().keys() == {0}


def test_rows_that_could_not_be_written_are_written_by_the_next_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool, create = Spool(dataset(tmp_path), "f"), Storage.create

    def fail(self: Storage, key: str, data: bytes) -> bool:
        raise RunFailed("disk full")

    def lose_reply(self: Storage, key: str, data: bytes) -> bool:
        create(self, key, data)
        raise RunFailed("timed out")

    for number, failing in enumerate((fail, lose_reply)):
        spool.add(0, row(f"p{number}"))
        with monkeypatch.context() as patch:
            patch.setattr(Storage, "create", failing)
            with pytest.raises(RunFailed):
                spool.flush()
    spool.add(0, row("p2"))
    spool.flush()
    assert spool.load(0)[0].keys() == {("p0", 0), ("p1", 0), ("p2", 0)}


def test_rows_can_be_added_and_flushed_by_several_threads(tmp_path: Path) -> None:
    spool = Spool(dataset(tmp_path), "f")
    threads = [
        threading.Thread(target=lambda worker=worker: [spool.add(n % 3, row(f"{worker}-{n}")) for n in range(300)])
        for worker in range(4)
    ]
    for thread in threads:
        thread.start()
    flushers = [threading.Thread(target=lambda: [spool.flush() for _ in range(10)]) for _ in range(2)]
    for thread in flushers:
        thread.start()
    for thread in threads + flushers:
        thread.join()
    spool.flush()
    assert sum(len(spool.load(block)[0]) for block in range(3)) == 1200
    assert total_cost(dataset(tmp_path)) == 300.0


def test_money_spent_without_a_response_is_recorded_and_is_no_response(tmp_path: Path) -> None:
    spool = Spool(dataset(tmp_path), "f")
    for sample in (row("a"), row("b", -1, cost=0.5), row("b", -1, cost=0.5)):
        spool.add(0, sample)
    spool.flush()
    responses, lost_cost = Spool(dataset(tmp_path), "f").load(0)
    assert (responses.keys(), lost_cost) == ({("a", 0)}, 1.0)
    assert total_cost(dataset(tmp_path)) == 1.25


def test_the_cost_of_some_blocks_excludes_the_others(tmp_path: Path) -> None:
    spool = Spool(dataset(tmp_path), "f")
    for block in range(3):
        spool.add(block, row("a", cost=float(2**block)))
    spool.flush()
    assert total_cost(dataset(tmp_path), [0, 2]) == 5.0


def test_a_block_that_cannot_be_written_does_not_hold_up_the_others(tmp_path: Path) -> None:
    spool = Spool(dataset(tmp_path), "f")
    spool.add(0, row("a", text="\ud83d"))
    spool.add(1, row("b"))
    with pytest.raises(UnicodeEncodeError):
        spool.flush()
    assert spool.load(1)[0].keys() == {("b", 0)}


def test_a_row_with_other_columns_breaks_an_invariant(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="cost"):
        Spool(dataset(tmp_path), "f").add(0, {key: value for key, value in row("a").items() if key != "cost"})
