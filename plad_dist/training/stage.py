"""The training phases, run one after the other under Ray Train."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow.compute as pc
import ray

from plad_dist.config import Config, Model, Phase, fingerprint
from plad_dist.data.models import context_length, model_fingerprint, model_identity, model_marker
from plad_dist.data.prompts import train_prompts
from plad_dist.data.store import Dataset
from plad_dist.errors import RunFailed, UserError
from plad_dist.progress import Progress
from plad_dist.rundir import ROUND, RunDir, require_model
from plad_dist.training.batching import steps_per_epoch
from plad_dist.training.deepspeed_config import load_deepspeed
from plad_dist.training.groups import DataSpec
from plad_dist.training.loop import PhaseJob, train_loop
from plad_dist.training.scratch import make_model

logger = logging.getLogger("plad")


def is_trained(name: str, run: RunDir) -> bool:
    """Whether a phase has its model."""
    return model_fingerprint(run.model(name)) is not None


def train_phase(name: str, config: Config, run: RunDir, progress: Progress) -> None:
    """Train one phase to its end and export its model; nothing is done where the model is there.

    Raises:
        UserError: inputs are missing, or belong to another config.
        RunFailed: training failed more often than allowed.
    """
    job = _plan(name, config, run)
    if model_fingerprint(run.model(name)) == job.fingerprint:
        return
    _fit(job, config, run, progress)


def _plan(name: str, config: Config, run: RunDir) -> PhaseJob:
    """Everything about a phase that follows from the config and from what is committed."""
    training = config.training
    heldout = None
    match name:
        case "teacher":
            assert training.teacher is not None
            phase, settings = training.teacher, config.teacher
            start = _starting_model("teacher", settings, config, run)
            kind, source = "references", train_prompts(run.storage)
        case "warmup":
            assert training.warmup is not None
            phase, settings = training.warmup, config.student
            start = _starting_model("student", settings, config, run)
            kind = training.warmup.data
            source = train_prompts(run.storage) if kind == "references" else run.samples("teacher")
        case _:
            kd = name == "seqkd"
            phase, settings = (training.seqkd or training.round) if kd else training.round, config.student
            start = run.student(config)
            require_model(start, "train --phase warmup")
            kind, source = "chosen" if kd else "pairs", run.pairs()
            heldout = DataSpec("pairs", run.heldout_pairs().path, 0)
    manifest = source.manifest()
    if manifest is None:
        raise UserError(f"{run.storage.url}/{source.path}: not complete yet; run the stage that makes it first")
    context = context_length(start, settings)
    data = DataSpec(kind, source.path, context)  # type: ignore[arg-type]
    steps = _steps(name, phase, source, run) if kind != "references" else _steps_for(phase, _count_references(source))
    decides = {key: value for key, value in phase.model_dump(mode="json").items() if not key.endswith("checkpoints")}
    decides.pop("checkpoint_every")
    identity = fingerprint(
        [decides, manifest.fingerprint, model_identity(start, settings), kind, context, config.run.seed, training.dtype]
    )
    return PhaseJob(
        name=name, start=start, settings=settings, phase=phase, data=data, heldout=heldout,
        heldout_limit=training.heldout_pairs, seed=config.run.seed, steps=steps,
        deepspeed=load_deepspeed(training.deepspeed), dtype=training.dtype,
        micro_batch_tokens=training.micro_batch_tokens, gradient_checkpointing=training.gradient_checkpointing,
        log_every=training.log_every, storage=run.storage, fingerprint=identity,
    )  # fmt: skip


def _starting_model(name: str, settings: Model, config: Config, run: RunDir) -> str:
    """The folder or hub name that a first phase starts from; a model from scratch is made if it is not there."""
    start = run.start_of(name, settings)
    if settings.scratch is not None:
        prompts = train_prompts(run.storage)
        manifest = prompts.manifest()
        if manifest is None:
            raise UserError(f"{run.storage.url}/prompts: not complete yet; run `plad prepare` first")
        make_model(settings.scratch, prompts.read(), manifest.fingerprint, config.run.seed, run.model(f"{name}-init"))
    return start


def _count_references(prompts: Dataset) -> int:
    return int(pc.count(prompts.read()["reference"]).as_py())


def _steps_for(phase: Phase, groups: int) -> int:
    if not groups:
        raise UserError("no prompt has a reference, so there is nothing to learn from; set reference_column")
    steps = max(1, round(phase.epochs * steps_per_epoch(groups, phase.batch_groups)))
    return min(steps, phase.max_steps or steps)


def _steps(name: str, phase: Phase, source: Dataset, run: RunDir) -> int:
    """Steps of a phase on pairs or samples. Sequence-level KD gets as many tokens as the round had: equal compute."""
    if name != "seqkd":
        manifest = source.manifest()
        assert manifest is not None
        if not manifest.rows:
            raise RunFailed(
                "no pairs were built, so there is nothing to train on; see the drops by reason of `plad pair`"
            )
        return _steps_for(phase, manifest.rows)
    trained = model_marker(run.model(f"round-{ROUND}"))
    if trained is None:
        raise UserError(f"seqkd is given as many tokens as round-{ROUND}: run `plad train --phase round-{ROUND}` first")
    pairs = source.read(["prompt_token_ids", "chosen_token_ids"])
    lengths = pc.add(pc.list_value_length(pairs["prompt_token_ids"]), pc.list_value_length(pairs["chosen_token_ids"]))
    tokens_per_group = pc.mean(lengths).as_py() - 1
    return max(1, round(trained["facts"]["tokens"] / (tokens_per_group * phase.batch_groups)))


# ---------------------------------------------------------------------------------------------------------- Ray Train


def _fit(job: PhaseJob, config: Config, run: RunDir, progress: Progress) -> None:
    from dataclasses import replace

    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    gpus = ray.cluster_resources().get("GPU", 0) > 0
    training = config.training
    dtype = ("bfloat16" if gpus else "float32") if training.dtype == "auto" else training.dtype
    environment = {"OMP_NUM_THREADS": str(max(1, int(training.cpus_per_worker))), "TOKENIZERS_PARALLELISM": "false"}
    if not gpus:
        environment["DS_ACCELERATOR"] = "cpu"
    with _monitored(progress, job) as monitor:
        trainer = TorchTrainer(
            _entry,
            train_loop_config={"job": replace(job, dtype=dtype, monitor=monitor)},
            scaling_config=ScalingConfig(
                num_workers=training.num_workers,
                use_gpu=gpus,
                resources_per_worker={"CPU": training.cpus_per_worker} | ({"GPU": 1} if gpus else {}),
            ),
            run_config=RunConfig(
                name=f"{job.name}-{job.fingerprint[:8]}",
                storage_path=str(run.root / ".ray-train"),
                failure_config=FailureConfig(max_failures=training.max_failures),
                worker_runtime_env={"env_vars": environment},
            ),
        )
        try:
            trainer.fit()
        except Exception as error:
            raise _explained(error, job) from error


def _entry(settings: dict[str, Any]) -> None:
    train_loop(settings["job"])


def _explained(error: Exception, job: PhaseJob) -> Exception:
    """The worker's own words. What the user did comes back as :class:`UserError`."""
    causes = [error, *(getattr(error, "worker_failures", None) or {}).values()]
    for cause in causes:
        inner = getattr(cause, "cause", cause)
        if isinstance(inner, UserError):
            return UserError(str(inner))
    latest = job.folder("checkpoints") / "latest.json"
    kept = f"kept up to {latest.read_text()!r:.40}" if latest.is_file() else "no checkpoint was written"
    last = str(causes[-1]).strip().splitlines()
    return RunFailed(
        f"phase {job.name} failed: {last[-1] if last else causes[-1]!r}. Checkpoints: {kept}. Run again to go on."
    )


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
def _monitored(progress: Progress, job: PhaseJob) -> Iterator[Any]:
    """A monitor whose messages are shown while the block runs."""
    monitor = ray.remote(_Monitor).options(num_cpus=0).remote()
    finished = threading.Event()
    progress.start(f"train {job.name}", job.steps, "steps")

    def show(message: dict[str, Any]) -> None:
        match message["kind"]:
            case "say":
                progress.say(message["text"])
            case "heldout":
                progress.say(
                    f"train {job.name}: step {message['step']}: {message['pair_accuracy']:.1%} of held-out pairs ranked right"
                )
            case "step":
                progress.set(message["step"], message["tokens"], f"loss {message['loss']:.3f}")

    def follow() -> None:
        while not finished.wait(1.0):
            for message in ray.get(monitor.drain.remote()):
                show(message)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield monitor
    finally:
        finished.set()
        thread.join(timeout=5)
        for message in ray.get(monitor.drain.remote()):
            show(message)
        ray.kill(monitor)
