"""Memory planned by `plad plan`, compared with real ZeRO-3 workers on host memory.

The figures of a GPU are in docs/benchmarks.md.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from plad_dist.config_file import parse_config
from plad_dist.devices import GIB
from plad_dist.planning.sizes import size_of
from plad_dist.planning.training_memory import training_memory
from plad_dist.training.worker.loop import Worker
from tests.numerics.workers import config_with_pairs, job_of, make_run, start
from tests.tiny import make_random_model

SHAPE = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 10, "num_attention_heads": 16,
    "num_key_value_heads": 16, "max_position_embeddings": 512,
}  # fmt: skip
ROW = {
    "chosen_text": "", "rejected_text": "", "chosen_score": 1.0, "rejected_score": 0.0, "rejected_logprob": None,
    "round": 0,
}  # fmt: skip


def measured_steps(raw: dict[str, Any], phase: str, stop: int) -> None:
    """Take some steps and record their peak memory by the kernel's count, without mapped files."""
    worker = Worker(job_of(raw, phase), torch.device("cpu"))
    worker.open_data()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which mapped model files have raised
    for _ in range(stop):
        worker.train_step()
    status = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/self/status").read_text()))
    folder = Path(raw["run"]["dir"])
    peak = 1024 * (int(status["VmHWM"]) - int(status["RssFile"]))
    (folder / f"memory-{worker.rank}.json").write_text(json.dumps(peak))
    worker.close()


@pytest.mark.timeout(1800)
def test_planned_host_memory_is_within_a_tenth_of_the_memory_that_workers_take(tmp_path: Path) -> None:
    """On average over four kinds of run, and each within 15%.

    The C library keeps a varying share of freed memory: a repeated run takes up to 8% more or less.
    """
    errors, model = {}, make_random_model(tmp_path / "large", 3, **SHAPE)
    for workers in (1, 2):
        for recomputed in (False, True):
            taken, planned = taken_and_planned(model, workers, recomputed, tmp_path / f"{workers}-{recomputed}")
            print(f"{workers} workers: took {taken / GIB:.2f} GiB, planned {planned / GIB:.2f}")
            errors[workers, recomputed] = abs(planned - taken) / taken
    assert sum(errors.values()) / len(errors) <= 0.1, errors
    assert max(errors.values()) <= 0.15, errors


def taken_and_planned(model: Path, workers: int, recomputed: bool, folder: Path) -> tuple[float, float]:
    """Return the bytes that a worker takes, as a mean over the workers, and the planned bytes."""
    folder.mkdir()
    raw = config_with_pairs(folder, batch_groups=4 * workers, max_steps=2)
    raw["student"]["path"] = str(model)
    raw["training"] |= {
        "micro_batch_tokens": 1024, "deepspeed": "zero3", "heldout_pairs": 0, "gradient_checkpointing": recomputed
    }  # fmt: skip
    groups = [
        ROW | {"prompt_id": str(number), "prompt_token_ids": [7] * 128, "chosen_token_ids": [9] * 63 + [2],
               "rejected_token_ids": [11] * 63 + [2]}
        for number in range(8 * workers)
    ]  # fmt: skip
    make_run(raw, [groups])
    processes = start(folder, raw, "round-0", workers, 2, measured_steps)
    for process in processes:
        process.join(timeout=600)
    assert [process.exitcode for process in processes] == [0] * workers, (folder / "worker-0.log").read_text()[-3000:]
    config = parse_config(raw, "test")
    planned = training_memory(size_of(config.student), config.training, config.training.round.optimizer, workers, "cpu")
    taken = [json.loads((folder / "run" / f"memory-{rank}.json").read_text()) for rank in range(workers)]
    return sum(taken) / workers, planned.device
