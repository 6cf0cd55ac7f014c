"""Phases trained by real DeepSpeed workers over gloo, each a process, on pairs written by hand."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import socket
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist

from plad_dist.config import Config
from plad_dist.config_file import parse_config
from plad_dist.data.prompts import prepare
from plad_dist.data.schemas import PAIRS
from plad_dist.rundir import RunDir, open_run
from plad_dist.training.job import PhaseJob
from plad_dist.training.plan import plan_phase
from plad_dist.training.records.metrics_file import read_metrics
from plad_dist.training.worker.loop import Worker, train_loop
from tests.conftest import tiny_config, write_prompts
from tests.tiny import TEMPLATE, make_random_model

# Workers are forked from a process that has done the imports, which take ten seconds; each still
# has its own engine and rank.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["deepspeed", "transformers.models.llama", "peft", "plad_dist.training.worker.loop"])

Work = Callable[[dict[str, Any], str, int], None]


def train(folder: Path, raw: dict[str, Any], phase: str, workers: int, stop: int = 0, **options: Any) -> None:
    """Run a phase to its end, or up to the step `stop`. Options: those of :func:`start`."""
    processes = start(folder, raw, phase, workers, stop, **options)
    for process in processes:
        process.join(timeout=300)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * workers, (folder / "worker-0.log").read_text()[-3000:]


def start(
    folder: Path,
    raw: dict[str, Any],
    phase: str,
    workers: int,
    stop: int = 0,
    work: Work | None = None,
    environment: dict[str, str] | None = None,
) -> list[Any]:
    """Start the processes of a worker group; see :func:`train`.

    Args:
        work: function that each worker runs instead of the phase.
        environment: further environment variables.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The fork server inherits these when it starts.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(workers):
        own: dict[str, Any] = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": workers,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        own |= environment or {}
        log = str(folder / f"worker-{rank}.log")
        processes.append(_FORKS.Process(target=_rank, args=(own, log, work or train_phase, raw, phase, stop)))
        processes[-1].start()
    return processes


def _rank(own: dict[str, Any], log: str, work: Work, raw: dict[str, Any], phase: str, stop: int) -> None:
    """Run one worker in this process."""
    with open(log, "w") as file:  # noqa: PTH123
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= {name: str(value) for name, value in own.items()}
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    work(raw, phase, stop)
    dist.barrier()
    dist.destroy_process_group()


def job_of(raw: dict[str, Any], phase: str) -> PhaseJob:
    """Return a phase as a worker receives it."""
    config = parse_config(raw, "test")
    return replace(plan_phase(phase, config, RunDir.of(config)), dtype="float32")


def train_phase(raw: dict[str, Any], phase: str, stop: int) -> None:
    """Train a phase to its end, or up to a step and its checkpoint."""
    job = job_of(raw, phase)
    if not stop:
        return train_loop(job)
    worker = Worker(job, torch.device("cpu"))
    worker.open_data()
    worker.resume()
    worker.open_log()
    worker.evaluate()
    while worker.state.step < stop:
        worker.train_step()
    worker.save()
    worker.settle()
    return worker.close()


def two_engines(raw: dict[str, Any], phase: str, stop: int) -> None:
    """Build two engines in turn, like two phases of a worker group; print if memory is free."""
    for _ in range(2):
        worker = Worker(job_of(raw, phase), torch.device("cpu"))
        worker.open_data()
        worker.train_step()
        model = weakref.ref(worker.engine.module.model)
        worker.close()
        print("memory:", "free" if model() is None else "taken")


def config_with_pairs(folder: Path, **round_: Any) -> dict[str, Any]:
    """Return the config of a run with a random student, whose pairs :func:`make_run` writes."""
    write_prompts(folder, 60)
    raw = tiny_config(folder)
    make_random_model(folder / "student", 2)
    raw["student"] = {"path": str(folder / "student"), "template": TEMPLATE}
    raw["teacher"] = {"path": str(folder / "student"), "template": TEMPLATE}
    del raw["training"]["teacher"], raw["training"]["warmup"]
    # No parameter is small enough to stay gathered, so each is released and gathered again.
    zero = json.loads(Path("ds_configs/zero3.json").read_text())
    zero["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 1000}
    (folder / "zero3.json").write_text(json.dumps(zero))
    raw["training"] |= {"micro_batch_tokens": 128, "heldout_pairs": 16, "deepspeed": str(folder / "zero3.json")}
    raw["training"]["round"] = {
        "epochs": 10, "max_steps": 20, "batch_groups": 12, "checkpoint_every": 100, "optimizer": {"lr": 3e-3},
        "loss": {"mle_weight": 1.0},
    } | round_  # fmt: skip
    return raw


def make_run(raw: dict[str, Any], rows: list[list[dict[str, Any]]] | None = None) -> RunDir:
    """Create the run directory with prompts and pairs; by default two blocks of random pairs."""
    config: Config = parse_config(raw, "test")
    run = open_run(config)
    prepare(config, run.storage)
    blocks = rows or [some_pairs(seed, 24) for seed in (0, 1)]
    for dataset, tables in ((run.pairs(), blocks), (run.heldout_pairs(), [some_pairs(9, 12)])):
        for block, pairs in enumerate(tables):
            counts: Counter[str] = Counter({"pairs": len(pairs), "groups": len({row["prompt_id"] for row in pairs})})
            for side in ("prompt", "chosen", "rejected"):
                counts[f"tokens:{side}"] = sum(len(row[f"{side}_token_ids"]) for row in pairs)
            counts["responses:chosen"] = counts["responses:rejected"] = len(pairs)
            table = pa.Table.from_pylist(pairs, schema=PAIRS)
            dataset.commit(block, table, fingerprint="by hand", attempt="a", counts=dict(counts))
        dataset.finish(len(tables), fingerprint="by hand", facts={})
    return run


def some_pairs(seed: int, prompts: int) -> list[dict[str, Any]]:
    """Return one to three pairs of random tokens per prompt.

    Chosen tokens come from the lower half of the vocabulary, so that the student can learn
    something.
    """
    rng = random.Random(seed)
    rows = []
    for number in range(prompts):
        prompt = [rng.randrange(3, 280) for _ in range(rng.randint(2, 20))]
        for _ in range(rng.choice([1, 1, 2, 3])):
            chosen = [rng.randrange(3, 140) for _ in range(rng.randint(1, 9))]
            rejected = [rng.randrange(140, 280) for _ in range(rng.randint(1, 9))]
            rows.append(
                {
                    "prompt_id": f"{seed}-{number}", "prompt_token_ids": prompt, "chosen_token_ids": [*chosen, 2],
                    "rejected_token_ids": [*rejected, 2], "chosen_text": "", "rejected_text": "",
                    "chosen_score": 1.0 + rng.random(), "rejected_score": rng.random(), "rejected_logprob": None,
                    "round": 0,
                }
            )  # fmt: skip
    return rows


def losses(run: RunDir, phase: str) -> list[float]:
    """Return the losses of the steps of a phase."""
    return [record["loss"] for record in read_metrics(run.root / "events" / phase)[0]]
