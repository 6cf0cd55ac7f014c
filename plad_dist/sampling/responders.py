"""Models that respond to prompts (teachers, the student, judges), and the fleet of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from plad_dist.config import Config, Decoding, LlmJudge, Model, RoleSampling, Teacher
from plad_dist.data.dataset import Dataset
from plad_dist.data.models import model_identity, resolve_model
from plad_dist.fleet.fleet import Assignment, Fleet
from plad_dist.fleet.placement import Placement
from plad_dist.rundir import RunDir, require_model
from plad_dist.sampling.actor import Sampler
from plad_dist.sampling.endpoint.backend import EndpointBackend
from plad_dist.sampling.engine_actor import EngineActor
from plad_dist.sampling.engine_arguments import generates_by_transformers, max_sequences, with_executor
from plad_dist.sampling.engine_choice import chosen_engine, start_engine
from plad_dist.sampling.engine_placement import engine_environment, engines_use_gpus, place, window_for
from plad_dist.sampling.warm import nursery_of

_BATCH_WINDOW = 128  # blocks, each of which is a batch that may take a day
FORK_SERVER = "plad_dist.compat.vllm_processes:start_fork_server"  # from which vLLM's engine process is forked


@dataclass(frozen=True)
class Responder:
    """A model that responds to prompts.

    Attributes:
        name: `student`, the name of a teacher, `rejected` or the name of a judge.
        role: `student`, `teacher` or `judge`. Whoever writes rejected responses for the pairs has
            the role `student`.
        path: folder or hub name of its weights, or its name at a server.
        settings: its model section of the config.
        sampling: its decoding and its engine settings.
    """

    name: str
    role: str
    path: str
    settings: Model
    sampling: RoleSampling

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides its responses, except for the decoding."""
        identity: dict[str, Any] = {
            "model": model_identity(self.path, self.settings),
            "rendering": self.settings.rendering(),
            "reasoning": {"refused": self.settings.reasoning == "refuse", "parser": self.settings.reasoning_parser},
            "max_length": self.settings.max_length,
            "engine": self.sampling.deciding_engine(),
        }
        if isinstance(self.settings, Teacher):
            identity |= {"share": self.settings.share, "filter": self.settings.filter}
        return identity

    def decoding(self) -> Decoding:
        """Return the decoding of its role."""
        return Decoding(**{name: getattr(self.sampling, name) for name in Decoding.model_fields})


def student_responder(config: Config, path: str) -> Responder:
    """Return the student with the weights in a folder."""
    return Responder("student", "student", path, config.student, config.sampling.student)


def judge_responder(name: str, judge: LlmJudge) -> Responder:
    """Return a judge that reads responses."""
    model = judge.model
    path = model.endpoint.model if model.endpoint else resolve_model(model)
    return Responder(name, "judge", path, model, judge.sampling)


def role_responders(config: Config, run: RunDir, role: str) -> list[Responder]:
    """Return the student of the round, or all teachers.

    Raises:
        UserError: a model that the run trains does not exist yet.
    """
    if role == "student":
        path = run.student(config)
        require_model(path, run.student_made_by)
        return [student_responder(config, path)]
    responders = []
    for name, settings in config.all_teachers().items():
        path = settings.endpoint.model if settings.endpoint else run.teacher(config, name)
        if not settings.endpoint:
            require_model(path, "train --phase teacher")
        assert settings.sampling is not None
        responders.append(Responder(name, role, path, settings, settings.sampling))
    return responders


def rejected_responder(config: Config, run: RunDir) -> Responder:
    """Return the model that writes the rejected responses for the pairs.

    Raises:
        UserError: it is a student that does not exist yet.
    """
    rejected = config.sampling.rejected
    if rejected is None:
        return role_responders(config, run, "student")[0]
    if (other := config.rejected_writer()) is None:
        path = run.start_of("student", config.student)
        require_model(path, "train --phase warmup")
        return student_responder(config, path)
    path = other.model.endpoint.model if other.model.endpoint else resolve_model(other.model)
    return Responder(rejected.teacher or "rejected", "student", path, other.model, other.sampling)


def fleet_of(
    config: Config,
    run: RunDir,
    responder: Responder,
    assignments: Sequence[Assignment],
    other_outputs: Sequence[Dataset] = (),
) -> Fleet:
    """Return the fleet of a responder.

    Args:
        other_outputs: further datasets whose cost counts towards the spending cap of its endpoint.
    """
    if responder.settings.endpoint is not None:
        return _endpoint_fleet(config, run, responder, assignments, other_outputs)
    return _engine_fleet(config, run, responder, assignments)


def _engine_fleet(config: Config, run: RunDir, responder: Responder, assignments: Sequence[Assignment]) -> Fleet:
    sampling, has_gpus = responder.sampling, engines_use_gpus()
    engine = chosen_engine(responder.settings, sampling.engine)
    backend = partial(start_engine, responder.path, responder.settings, engine, config.run.seed)
    concurrency = max_sequences(engine, "gpu" if has_gpus else "cpu")
    worker: type = EngineActor
    arguments: tuple[Any, ...] = (run.storage, backend, config.sampling.max_attempts)
    if with_executor(engine).get("distributed_executor_backend") == "ray":
        worker = Sampler  # vLLM starts its workers through the Ray of its own process
    else:
        nursery = nursery_of(engine, sampling.cpus) if config.cluster.warm_starts else None
        arguments = (nursery, *arguments, "" if generates_by_transformers(engine) else FORK_SERVER)
    return Fleet(
        name=responder.name,
        assignments=tuple(assignments),
        worker=worker,
        arguments=arguments,
        placement=place(engine, sampling.cpus, has_gpus=has_gpus),
        replicas=sampling.replicas,
        min_replicas=sampling.min_replicas,
        window=window_for(concurrency, config.prompts.block_size, config.sampling.window),
        environment=engine_environment(sampling.cpus, has_gpus=has_gpus),
    )


def _endpoint_fleet(
    config: Config,
    run: RunDir,
    responder: Responder,
    assignments: Sequence[Assignment],
    other_outputs: Sequence[Dataset],
) -> Fleet:
    endpoint = responder.settings.endpoint
    assert endpoint is not None
    outputs = [(assignment.job.dataset(run.storage), assignment.blocks) for assignment in assignments]
    outputs += [(dataset, range(len(dataset.committed()))) for dataset in other_outputs]
    payer = f"{responder.role}-{responder.name}"
    backend = partial(EndpointBackend, responder.settings, responder.path, outputs, payer)
    window = window_for(endpoint.concurrency, config.prompts.block_size, config.sampling.window)
    is_batch = endpoint.mode == "batch"
    return Fleet(
        name=responder.name,
        assignments=tuple(assignments),
        worker=Sampler,
        arguments=(run.storage, backend, config.sampling.max_attempts),
        placement=Placement(responder.sampling.cpus),
        replicas=1,  # one client, because limits on requests, tokens and money belong to one key
        window=max(window, _BATCH_WINDOW) if is_batch else window,
        # The client has its own timeouts, and no other actor would process a block faster.
        lease_timeout_s=math.inf,
        stall_timeout_s=math.inf
        if is_batch
        else max(config.sampling.stall_timeout_s, endpoint.give_up_after_s + 2 * endpoint.timeout_s),
    )
