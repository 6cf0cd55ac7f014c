"""Every call of the file system under the spool fails once: no paid response is lost unnoticed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from plad_dist.data.dataset import Dataset
from plad_dist.data.schemas import SAMPLES
from plad_dist.data.storage import Storage
from plad_dist.sampling.spool import Spool
from plad_dist.verify.parts import check_dataset
from tests.file_faults import each_fault, temporaries
from tests.unit.data.test_checksums import flips
from tests.unit.data.test_faults import outcome


def row(index: int) -> dict[str, Any]:
    return {
        "prompt_id": "p", "sample_index": index, "role": "teacher", "text": "x", "token_ids": [1], "logprob": None,
        "num_tokens": 1, "finish_reason": "stop", "error": None, "model": "m", "round": 0, "reasoning": None,
        "prompt_tokens": 1, "cost": 0.5,
    }  # fmt: skip


def spool(root: Path) -> Spool:
    return Spool(Dataset(Storage(str(root)), "samples", SAMPLES), "f")


def stored(root: Path) -> int:
    return len(spool(root).load(0)[0])


def test_faults_at_every_call_of_a_flush_keep_the_rows_for_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    root = tmp_path / "run"
    for faults in each_fault(root):
        shutil.rmtree(root, ignore_errors=True)
        first = spool(root)
        first.add(0, row(0))
        first.flush()
        first.add(0, row(1))
        ended = outcome(faults, lambda _, writer=first: writer.flush(), root)
        assert ended in ("done", "failed", "killed")
        if ended == "killed":
            assert stored(root) in (1, 2)
            continue
        assert temporaries(root) == [], faults.hit
        assert len(first.load(0)[0]) == 2
        first.flush()
        assert stored(root) == 2


def test_faults_at_every_call_of_a_read_or_a_discard_are_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A response that cannot be read now must not be paid for again."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    root = tmp_path / "run"
    for command in ("load", "discard"):
        for faults in each_fault(root):
            shutil.rmtree(root, ignore_errors=True)
            writer = spool(root)
            writer.add(0, row(0))
            writer.flush()
            reader = spool(root)
            responses: list[int] = []

            def act(_: Path, reader: Spool = reader, seen: list[int] = responses, command: str = command) -> None:
                seen.append(len(reader.load(0)[0])) if command == "load" else reader.discard(0)

            ended = outcome(faults, act, root)
            assert ended in ("done", "failed", "killed")
            assert responses in ([], [1]), faults.hit
            if command == "load":
                assert stored(root) == 1
            else:
                spool(root).discard(0)
                assert stored(root) == 0


def test_every_flipped_bit_of_a_spooled_file_is_found(tmp_path: Path) -> None:
    writer = spool(tmp_path)
    writer.add(0, row(0))
    writer.flush()
    (path,) = (tmp_path / "samples/spool/00000").iterdir()
    dataset = Dataset(Storage(str(tmp_path)), "samples", SAMPLES)
    assert check_dataset(dataset).problems == []
    for altered in flips(path.read_bytes(), samples=50):
        path.write_bytes(altered)
        (problem,) = check_dataset(dataset).problems
        assert problem.startswith(f"spool/00000/{path.name}: damaged")
        assert problem.endswith("its responses will be paid for again. Restore it from a copy, or run again")
