"""The same student at any number of workers, and after a resume: real DeepSpeed ZeRO-3 over gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from plad_dist.config_file import parse_config
from plad_dist.data.prompts import prepare
from plad_dist.rundir import RunDir, open_run
from tests.conftest import tiny_config, write_prompts

pytestmark = pytest.mark.engine

WORKER = """
import json, sys, dataclasses
from datetime import timedelta
import torch, torch.distributed as dist
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
from plad_dist.config_file import parse_config
from plad_dist.rundir import RunDir
from plad_dist.training import loop, plan
raw, stop = json.loads(sys.argv[1]), int(sys.argv[2])
config = parse_config(raw, "test")
job = dataclasses.replace(plan.plan_phase("warmup", config, RunDir.of(config)), dtype="float32")
if stop:
    worker = loop.Worker(job, torch.device("cpu"))
    log = loop.MetricsLog(job.folder("events"), 0, job.steps, None) if worker.rank == 0 else None
    while worker.state.step < stop:
        worker._step(log)
    worker.checkpoints.save(worker.engine, worker.state)
else:
    loop.train_loop(job)
dist.barrier()
"""


def train(folder: Path, raw: dict, workers: int, stop: int = 0) -> None:
    """Run the warm-up phase with so many workers, to its end or up to a step."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, json.dumps(raw), str(stop)],
            env=environment
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers), "MASTER_PORT": str(port)},
            stdout=(folder / f"worker-{rank}.log").open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(workers)
    ]
    codes = [process.wait(timeout=300) for process in processes]
    assert codes == [0] * workers, (folder / "worker-0.log").read_text()[-3000:]


def losses(run: RunDir) -> list[float]:
    from plad_dist.training.metrics import read_metrics

    return [record["loss"] for record in read_metrics(run.root / "events" / "warmup")[0]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDir]:
    """Warm-up runs of 20 steps: at 1, 2 and 3 workers, and at 2 workers left after 10 steps and resumed."""
    found = {}
    for name, workers, stop in (("1", 1, 0), ("2", 2, 0), ("3", 3, 0), ("resumed", 2, 10)):
        folder = tmp_path_factory.mktemp(f"world-{name}")
        write_prompts(folder)
        raw = tiny_config(folder)
        raw["training"]["warmup"] |= {"max_steps": 20, "epochs": 10, "checkpoint_every": 100, "batch_groups": 12}
        raw["training"]["micro_batch_tokens"] = 40  # several micro-batches a step, and empty ones at three workers
        raw["prompts"]["source"]["paths"] = [str(folder / "prompts.jsonl")]
        config = parse_config(raw, "test")
        run = open_run(config)
        prepare(config, run.storage)
        from plad_dist.training.plan import plan_phase

        plan_phase("warmup", config, run)  # makes the student
        if stop:
            train(folder, raw, workers, stop)
        train(folder, raw, workers)
        found[name] = run
    return found


def test_losses_are_the_same_at_one_two_and_three_workers(runs: dict[str, RunDir]) -> None:
    one = losses(runs["1"])
    assert len(one) == 20
    assert one[-1] < one[0]
    for other in ("2", "3"):
        assert losses(runs[other]) == pytest.approx(one, rel=1e-4)


def test_a_resumed_run_ends_with_the_very_same_weights(runs: dict[str, RunDir]) -> None:
    assert losses(runs["resumed"]) == losses(runs["2"])
    straight = load_file(runs["2"].model("warmup") / "model.safetensors")
    resumed = load_file(runs["resumed"].model("warmup") / "model.safetensors")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
