"""Bytes that a start reads: those of the checkpoint once, or else those of the model once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from plad_dist.training.worker.loop import Worker
from tests.numerics.crash import PHASE
from tests.numerics.reads import BytesRead
from tests.numerics.workers import config_with_pairs, job_of, make_run, train
from tests.tiny import make_random_model

pytestmark = pytest.mark.engine

SHAPE = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "tie_word_embeddings": False,
}  # 36 MB, so that the bytes of configs and pairs do not matter


def start_twice(raw: dict[str, Any], phase: str, _: int) -> None:
    """Start a phase twice in this process; write what all ranks read the second time.

    The first time also reads the modules that Python imports late.
    """
    job = job_of(raw, phase)
    for _ in range(2):
        with BytesRead(Path(raw["run"]["dir"]).parent) as count:
            worker = Worker(job, torch.device("cpu"))
            worker.open_data()
            worker.resume()
        step = worker.state.step
        worker.close()
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, (count.by_calls, count.by_maps))
    if dist.get_rank() == 0:
        (Path(raw["run"]["dir"]).parent / "counts.json").write_text(json.dumps({"step": step, "ranks": counts}))


def counted(folder: Path, raw: dict[str, Any]) -> tuple[int, list[int]]:
    """Return the step of a start at two ranks, and the bytes that each rank reads."""
    train(folder, raw, PHASE, 2, work=start_twice)
    counts = json.loads((folder / "counts.json").read_text())
    return counts["step"], [sum(of_rank) for of_rank in counts["ranks"]]


def size(folder: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in folder.rglob(pattern))


def test_resume_reads_the_checkpoint_once_and_a_first_start_the_model_once(tmp_path: Path) -> None:
    """The ranks also share the reads evenly."""
    raw = config_with_pairs(tmp_path)
    make_random_model(tmp_path / "student", 2, **SHAPE)
    run = make_run(raw)
    model = size(tmp_path / "student", "*.safetensors")
    assert model > 30 << 20
    step, read = counted(tmp_path, raw)
    assert step == 0
    assert model < sum(read) <= 1.1 * model
    assert max(read) <= 0.55 * model
    train(tmp_path, raw, PHASE, 2, stop=1)
    checkpoint = size(run.root / "checkpoints", "*.pt")
    step, read = counted(tmp_path, raw)
    assert step == 1
    assert checkpoint < sum(read) <= 1.05 * checkpoint
    assert max(read) <= 0.53 * checkpoint
