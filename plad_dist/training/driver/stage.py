"""Training phases under Ray Train. Phases that follow one another share a worker group: starting one takes a minute."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from plad_dist.config import Config
from plad_dist.data.models import model_fingerprint
from plad_dist.data.prompts import train_prompts
from plad_dist.errors import RunFailed, UserError
from plad_dist.phases import TEACHER, WARMUP
from plad_dist.progress import Progress
from plad_dist.rundir import RunDir
from plad_dist.sampling.engine_placement import engines_use_gpus
from plad_dist.training.checkpoints.store import CheckpointStore
from plad_dist.training.driver.metrics import TrainingMetrics
from plad_dist.training.job import PhaseJob
from plad_dist.training.plan import plan_phase

if TYPE_CHECKING:
    from plad_dist.training.driver.elastic import WorkerGroupCallbacks

# Ray Train and DeepSpeed are imported where something is trained: a finished run is skipped through in a moment.
logger = logging.getLogger("plad")

_SAY_EVERY_S = 20.0
_STARTS = 10  # of a controller without anything new that is kept


def are_trained(names: Sequence[str], run: RunDir) -> bool:
    """Whether phases have their models."""
    return all(model_fingerprint(run.model(name)) is not None for name in names)


def require_inputs(names: Sequence[str], config: Config, run: RunDir) -> None:
    """Raise :class:`UserError` where what phases are trained on is not there."""
    if set(names) - {TEACHER, WARMUP}:
        run.pairs().require("pair")
    else:
        train_prompts(run.storage).require("prepare")
    if WARMUP in names and config.training.warmup is not None and config.training.warmup.data == "teacher":
        run.samples("teacher").require("sample")


def train_phases(names: Sequence[str], config: Config, run: RunDir, progress: Progress) -> None:
    """Train phases to their ends and export their models, one after the other; what has its model is skipped.

    Raises:
        UserError: inputs are missing, or belong to another config.
        RunFailed: training failed more often than allowed.
    """
    jobs = [plan_phase(name, config, run) for name in names]
    launch = uuid.uuid4().hex[:12]
    jobs = [replace(job, launch=launch) for job in jobs if model_fingerprint(run.model(job.name)) != job.fingerprint]
    if jobs:
        jobs[0].checkpoints.check_writable()
        _fit(jobs, config, run, progress)
    for job in jobs:
        stopped = run.storage.read_json(job.stopped_key)
        if stopped is not None:
            run.storage.delete(job.stopped_key)
            raise (UserError if stopped["by_user"] else RunFailed)(stopped["message"])


def _fit(jobs: list[PhaseJob], config: Config, run: RunDir, progress: Progress) -> None:
    from ray.train import ControllerError

    from plad_dist.training.driver.elastic import WorkerGroupCallbacks, first_death, innermost

    fewest, most = config.training.workers
    names = ", ".join(job.name for job in jobs)
    size = str(most) if fewest == most else f"{fewest} to {most}"
    from plad_dist.training.driver.collapse_watch import watching

    with (
        _ray_train_times(config),
        _open_mailbox(progress, f"train {names}: starting {size} workers") as mailbox,
        watching(jobs, config, run, mailbox, progress),
    ):
        callbacks = WorkerGroupCallbacks(mailbox, names, fewest, most, config.cluster.start_timeout_s)
        tries, kept = 0, _kept(jobs, run)
        while True:
            try:
                with _ctrl_c_as_before():
                    _trainer(jobs, config, run, mailbox, callbacks).fit()
                return
            except SystemExit:  # Ray Train's own answer to Ctrl-C, once it has stopped the workers
                name, what = _kept(jobs, run)
                progress.say(f"train {name}: stopped; kept: {what}")
                raise KeyboardInterrupt from None
            except ControllerError as error:
                if isinstance(cause := innermost(error), RunFailed):
                    raise _explained(error, jobs, run) from cause
                # Ray Train takes a death while a group starts, at the rendezvous say, for an error of its own and gives up.
                tries, kept = (1 if _kept(jobs, run) != kept else tries + 1), _kept(jobs, run)
                if tries == _STARTS:
                    raise _explained(error, jobs, run) from error
                progress.say(f"train {names}: {first_death(error)}; the workers are started anew")
            except Exception as error:
                raise _explained(error, jobs, run) from error


def _trainer(jobs: list[PhaseJob], config: Config, run: RunDir, mailbox: Any, callbacks: WorkerGroupCallbacks) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from plad_dist.training.worker.entry import train_jobs

    gpus = engines_use_gpus()
    training = config.training
    fewest, most = training.workers
    dtype = ("bfloat16" if gpus else "float32") if training.dtype == "auto" else training.dtype
    environment = {"OMP_NUM_THREADS": str(max(1, int(training.cpus_per_worker))), "TOKENIZERS_PARALLELISM": "false"}
    if not gpus:
        environment["DS_ACCELERATOR"] = "cpu"
    return TorchTrainer(
        train_jobs,
        train_loop_config={"jobs": [replace(job, dtype=dtype, mailbox=mailbox) for job in jobs]},
        torch_config=TorchConfig(timeout_s=training.collective_timeout_s),
        scaling_config=ScalingConfig(
            num_workers=most if fewest == most else (fewest, most),
            elastic_resize_monitor_interval_s=training.resize_check_s,
            use_gpu=gpus,
            resources_per_worker={"CPU": training.cpus_per_worker} | ({"GPU": 1} if gpus else {}),
        ),
        run_config=RunConfig(
            name=f"{'-'.join(job.name for job in jobs)}-{uuid.uuid4().hex[:12]}",
            storage_path=str(run.root / ".ray-train"),
            failure_config=FailureConfig(
                max_failures=training.max_failures,
                max_preemption_failures=training.max_preemptions,
                controller_failure_limit=-1,  # for want of resources; the callbacks bounds the wait
            ),
            worker_runtime_env={"env_vars": environment},
            callbacks=[callbacks],
        ),
    )


@contextmanager
def _ctrl_c_as_before() -> Iterator[None]:
    """Ray Train leaves its own handler behind, which would swallow every Ctrl-C in the stages that follow."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


@contextmanager
def _ray_train_times(config: Config) -> Iterator[None]:
    """Ray Train takes its times from the environment; those that are set there by the user stay."""
    training = config.training
    times = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": 1.0,
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": training.worker_timeout_s,
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": training.start_timeout_s,
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": 1.0,
    }
    ours = {name: str(seconds) for name, seconds in times.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


def _explained(error: Exception, jobs: list[PhaseJob], run: RunDir) -> Exception:
    """The first worker's own words. What the user did comes back as :class:`UserError`."""
    from plad_dist.training.driver.elastic import first_death, innermost

    failures = list((getattr(error, "worker_failures", None) or {}).values())
    cause = innermost(failures[0] if failures else error)
    if isinstance(cause, UserError):
        return cause
    name, kept = _kept(jobs, run)
    return RunFailed(
        f"phase {name}: {first_death(error)}. Kept: {kept}. "
        "The workers' logs lie in Ray's session folder (/tmp/ray/session_latest/logs). Run again to go on."
    )


def _kept(jobs: list[PhaseJob], run: RunDir) -> tuple[str, str]:
    """The phase that training was in, and what of it is kept."""
    job = next((job for job in jobs if model_fingerprint(run.model(job.name)) != job.fingerprint), jobs[-1])
    latest, _ = CheckpointStore(job.checkpoints, job.name, job.fingerprint).newest()
    return job.name, f"the checkpoint of step {latest.state.step}" if latest else "no checkpoint was written yet"


@contextmanager
def _open_mailbox(progress: Progress, waiting: str) -> Iterator[Any]:
    """An actor that workers post to, and whose messages are shown while the block runs; `waiting` until there are some."""
    from plad_dist.training.driver.elastic import ProgressMailbox

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(ProgressMailbox).options(num_cpus=0, scheduling_strategy=here).remote()
    finished, heard, begun = threading.Event(), threading.Event(), time.monotonic()
    metrics = TrainingMetrics()

    def show_news() -> None:
        try:
            for message in ray.get(mailbox.drain.remote(), timeout=30):
                heard.set()
                _show(progress, message)
                metrics.heard(message)
            metrics.refresh()
        except ray.exceptions.GetTimeoutError:
            return  # the machine is busy, with starting workers mostly
        except Exception as error:  # noqa: BLE001 - training does not depend on being watched
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
        yield mailbox
    finally:
        finished.set()
        thread.join(timeout=5)
        show_news()
        ray.kill(mailbox)


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
