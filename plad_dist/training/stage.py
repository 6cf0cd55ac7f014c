"""Training phases under Ray Train. Phases that follow one another share a worker group: starting one takes a minute."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from plad_dist.config import Config
from plad_dist.data.models import model_fingerprint
from plad_dist.data.prompts import train_prompts
from plad_dist.errors import RunFailed, UserError
from plad_dist.phases import ROUND_PHASE, SEQKD
from plad_dist.progress import Progress
from plad_dist.rundir import RunDir
from plad_dist.sampling.placement import engines_use_gpus
from plad_dist.training.agreement import of_first_rank
from plad_dist.training.checkpoints import Checkpoints
from plad_dist.training.job import PhaseJob
from plad_dist.training.loop import STOPPED, train_loop
from plad_dist.training.plan import plan_phase

logger = logging.getLogger("plad")

_SAY_EVERY_S = 20.0


def are_trained(names: Sequence[str], run: RunDir) -> bool:
    """Whether phases have their models."""
    return all(model_fingerprint(run.model(name)) is not None for name in names)


def require_inputs(name: str, run: RunDir) -> None:
    """Raise :class:`UserError` where what a phase is trained on is not there."""
    if name in (ROUND_PHASE, SEQKD):
        run.pairs().require("pair")
    else:
        train_prompts(run.storage).require("prepare")


def train_phases(names: Sequence[str], config: Config, run: RunDir, progress: Progress) -> None:
    """Train phases to their ends and export their models, one after the other; what has its model is skipped.

    Raises:
        UserError: inputs are missing, or belong to another config.
        RunFailed: training failed more often than allowed.
    """
    jobs = [plan_phase(name, config, run) for name in names]
    jobs = [job for job in jobs if model_fingerprint(run.model(job.name)) != job.fingerprint]
    for job in jobs:
        run.storage.delete(f"checkpoints/{job.name}/{STOPPED}")
    if jobs:
        _fit(jobs, config, run, progress)
    for job in jobs:
        stopped = run.storage.read_json(f"checkpoints/{job.name}/{STOPPED}")
        if stopped is not None:
            raise (UserError if stopped["by_user"] else RunFailed)(stopped["message"])


def _fit(jobs: list[PhaseJob], config: Config, run: RunDir, progress: Progress) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    gpus = engines_use_gpus()
    training = config.training
    dtype = ("bfloat16" if gpus else "float32") if training.dtype == "auto" else training.dtype
    environment = {"OMP_NUM_THREADS": str(max(1, int(training.cpus_per_worker))), "TOKENIZERS_PARALLELISM": "false"}
    if not gpus:
        environment["DS_ACCELERATOR"] = "cpu"
    names = ", ".join(job.name for job in jobs)
    with _monitored(progress, f"train {names}: starting {training.num_workers} workers") as monitor:
        trainer = TorchTrainer(
            _entry,
            train_loop_config={"jobs": [replace(job, dtype=dtype, monitor=monitor) for job in jobs]},
            scaling_config=ScalingConfig(
                num_workers=training.num_workers,
                use_gpu=gpus,
                resources_per_worker={"CPU": training.cpus_per_worker} | ({"GPU": 1} if gpus else {}),
            ),
            run_config=RunConfig(
                name="-".join(job.name for job in jobs) + f"-{jobs[0].fingerprint[:8]}",
                storage_path=str(run.root / ".ray-train"),
                failure_config=FailureConfig(max_failures=training.max_failures),
                worker_runtime_env={"env_vars": environment},
            ),
        )
        before = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit()
        except SystemExit:  # Ray Train's own answer to Ctrl-C, once it has stopped the workers
            job, kept = _kept(jobs, run)
            progress.say(f"train {job.name}: stopped; kept: {kept}")
            raise KeyboardInterrupt from None
        except Exception as error:
            raise _explained(error, jobs, run) from error
        finally:
            # Ray Train leaves its own handler behind, which would swallow every Ctrl-C in the stages that follow.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, before)


def _entry(settings: dict[str, Any]) -> None:
    """What Ray Train calls on every worker, again after every failure."""
    for job in settings["jobs"]:
        if of_first_rank(partial(model_fingerprint, job.folder("models"))) != job.fingerprint:
            train_loop(job)
            if of_first_rank((job.folder("checkpoints") / STOPPED).exists):
                return


def _explained(error: Exception, jobs: list[PhaseJob], run: RunDir) -> Exception:
    """The first worker's own words. What the user did comes back as :class:`UserError`."""
    failures = list((getattr(error, "worker_failures", None) or {}).values())
    cause = failures[0] if failures else error
    while (inner := getattr(cause, "cause", None) or cause.__cause__) is not None:
        cause = inner
    if isinstance(cause, UserError):
        return cause
    job, kept = _kept(jobs, run)
    reason = str(cause).strip().splitlines()
    return RunFailed(
        f"phase {job.name}: {type(cause).__name__}: {reason[-1] if reason else ''} Kept: {kept}. "
        "The workers' logs lie in Ray's session folder (/tmp/ray/session_latest/logs). Run again to go on."
    )


def _kept(jobs: list[PhaseJob], run: RunDir) -> tuple[PhaseJob, str]:
    """The phase that training was in, and what of it is kept."""
    job = next((job for job in jobs if model_fingerprint(run.model(job.name)) != job.fingerprint), jobs[-1])
    latest = Checkpoints(job.folder("checkpoints"), job.fingerprint, job.phase.keep_checkpoints).latest()
    return job, f"the checkpoint of step {latest.step}" if latest else "no checkpoint was written yet"


class _Monitor:
    """Takes messages from the workers for the driver."""

    def __init__(self) -> None:
        self._messages: list[dict[str, Any]] = []

    def post(self, message: dict[str, Any]) -> None:
        self._messages.append(message)

    def drain(self) -> list[dict[str, Any]]:
        messages, self._messages = self._messages, []
        return messages


@contextmanager
def _monitored(progress: Progress, waiting: str) -> Iterator[Any]:
    """An actor that workers post to, and whose messages are shown while the block runs; `waiting` until there are some."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    monitor = ray.remote(_Monitor).options(num_cpus=0, scheduling_strategy=here).remote()
    finished, heard, begun = threading.Event(), threading.Event(), time.monotonic()

    def show_news() -> None:
        try:
            for message in ray.get(monitor.drain.remote(), timeout=30):
                heard.set()
                _show(progress, message)
        except ray.exceptions.GetTimeoutError:
            return  # the machine is busy, with starting workers mostly
        except ray.exceptions.RayError as error:  # training does not depend on being watched
            logger.warning("no news from the workers: %s", error)

    def follow() -> None:
        said = begun
        while not finished.wait(1.0):
            show_news()
            if not heard.is_set() and time.monotonic() - said >= _SAY_EVERY_S:
                said = time.monotonic()
                progress.say(f"{waiting}, {said - begun:.0f} s so far")

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield monitor
    finally:
        finished.set()
        thread.join(timeout=5)
        show_news()
        ray.kill(monitor)


def _show(progress: Progress, message: dict[str, Any]) -> None:
    stage = f"train {message['phase']}"
    match message["kind"]:
        case "begin":
            progress.say(f"{stage}: {message['text']}")
            progress.start(stage, message["steps"], "steps")
        case "say":
            progress.say(f"{stage}: {message['text']}")
        case "heldout":
            progress.say(
                f"{stage}: step {message['step']}: {message['pair_accuracy']:.1%} of held-out pairs ranked right"
            )
        case "step":
            progress.set(message["step"], message["tokens"], f"loss {message['loss']:.3f}")
