"""Ray Train's trainer for the phases, and the settings of the process that it depends on."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig

from plad_dist.compat.ray_scaling import Trainer
from plad_dist.config import Config
from plad_dist.rundir import RunDir
from plad_dist.sampling.engine_placement import engines_use_gpus
from plad_dist.training.driver.elastic import WorkerGroupCallbacks
from plad_dist.training.driver.warm import worker_environment
from plad_dist.training.job import PhaseJob
from plad_dist.training.worker.entry import train_jobs
from plad_dist.training.worker.shared_devices import SharedDevicesConfig


def build_trainer(
    jobs: list[PhaseJob], config: Config, run: RunDir, mailbox: Any, callbacks: WorkerGroupCallbacks
) -> Trainer:
    """Return the trainer of a worker group for the phases."""
    gpus = engines_use_gpus()
    training = config.training
    fewest, most = training.workers
    dtype = ("bfloat16" if gpus else "float32") if training.dtype == "auto" else training.dtype
    return Trainer(
        train_jobs,
        sizes=callbacks,
        train_loop_config={
            # Bytes, because reading a job imports torch, which only the training process needs.
            "jobs": pickle.dumps([replace(job, dtype=dtype) for job in jobs]),
            "mailbox": mailbox,
            "timeout_s": training.collective_timeout_s,
            "silence_s": training.worker_timeout_s,
        },
        backend_config=SharedDevicesConfig(),
        scaling_config=ScalingConfig(
            num_workers=most if fewest == most else (fewest, most),
            use_gpu=gpus,
            resources_per_worker={"CPU": training.cpus_per_worker} | ({"GPU": 1} if gpus else {}),
        ),
        run_config=RunConfig(
            name=f"{'-'.join(job.name for job in jobs)}-{uuid.uuid4().hex[:12]}",
            storage_path=str(run.root / ".ray-train"),
            failure_config=FailureConfig(
                max_failures=training.max_failures,
                max_preemption_failures=training.max_preemptions,
                controller_failure_limit=-1,  # failures for lack of resources; the callbacks limit the wait
            ),
            worker_runtime_env={"env_vars": worker_environment(training.cpus_per_worker, gpus=gpus)},
            callbacks=[callbacks],
        ),
    )


@contextmanager
def preserved_sigint_handler() -> Iterator[None]:
    """Restore the handler of SIGINT after the block.

    Ray Train leaves its own, which would swallow Ctrl-C in later stages.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


@contextmanager
def ray_train_timeouts(config: Config) -> Iterator[None]:
    """Set the timeouts of Ray Train, which reads them from the environment.

    Values of the user stay.
    """
    training = config.training
    timeouts = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": 1.0,
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": training.worker_timeout_s,
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": training.start_timeout_s,
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": 1.0,
    }
    added = {name: str(seconds) for name, seconds in timeouts.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
