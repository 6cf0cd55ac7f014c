"""Engines that a run starts, and the GPUs that its stages need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from plad_dist.config import Config, Endpoint, LlmJudge, Model, RoleSampling
from plad_dist.holders import Holder
from plad_dist.planning.engine_memory import engine_devices
from plad_dist.planning.known_models import KNOWN_MODELS
from plad_dist.sampling.engine_choice import chosen_engine

Role = Literal["teacher", "student", "rejected"]


@dataclass(frozen=True)
class EngineSpec:
    """Engines that run one model.

    Attributes:
        label: `teacher`, `teachers.NAME`, `student`, `sampling.rejected` or `judge NAME`.
        key: config key of the sampling settings.
        sampling: the settings, in which an engine other than vLLM has its name.
        role: role whose numbers and lengths of responses apply; `rejected` for a model other than
            the student that writes the rejected responses, and `teacher` for judges.
    """

    label: str
    key: str
    model: Model
    sampling: RoleSampling
    role: Role = "teacher"

    @property
    def model_key(self) -> str:
        """Config key of the model."""
        return f"evaluation.judges.{self.label.removeprefix('judge ')}.model" if self.is_judge else self.label

    @property
    def is_judge(self) -> bool:
        return self.label.startswith("judge ")

    @property
    def holder(self) -> Holder:
        """The part of a run that starts the engines."""
        return Holder("judge") if self.is_judge else Holder("sample", self.role)

    @property
    def devices(self) -> int:
        """Devices of one engine."""
        return engine_devices(self.sampling.engine)


@dataclass(frozen=True)
class EndpointSpec:
    """A server that writes responses for the pairs.

    Attributes:
        label: `teacher` or `teachers.NAME`.
        name: name of its model in the run.
        share: share of the responses of its role that it writes.
    """

    label: str
    name: str
    endpoint: Endpoint
    role: Role
    share: float


def engine_specs(config: Config) -> Iterator[EngineSpec]:
    """Yield the engines that a run starts. Models behind endpoints need none."""
    for name, teacher in config.all_teachers().items():
        if teacher.endpoint is None:
            assert teacher.sampling is not None
            is_named = bool(config.teachers)
            label = f"teachers.{name}" if is_named else "teacher"
            has_own_sampling = is_named and config.teachers[name].sampling is not None
            key = f"{label}.sampling" if has_own_sampling else "sampling.teacher"
            yield _spec(label, key, teacher, teacher.sampling)
    yield _spec("student", "sampling.student", config.student, config.sampling.student, "student")
    other = config.rejected_writer()
    if other is not None and other.model.endpoint is None:
        yield _spec(other.key, other.section, other.model, other.sampling, "rejected")
    for name, judge in config.evaluation.judges.items():
        if isinstance(judge, LlmJudge) and judge.model.endpoint is None:
            yield _spec(f"judge {name}", f"evaluation.judges.{name}.sampling", judge.model, judge.sampling)


def _spec(label: str, key: str, model: Model, sampling: RoleSampling, role: Role = "teacher") -> EngineSpec:
    source = model.pretrained()
    if source is None or source.path not in KNOWN_MODELS:  # vLLM has those, and a plan need not reach the hub
        sampling = sampling.model_copy(update={"engine": chosen_engine(model, sampling.engine)})
    return EngineSpec(label, key, model, sampling, role)


def endpoint_specs(config: Config) -> Iterator[EndpointSpec]:
    """Yield the servers that write responses for the pairs."""
    for name, teacher in config.all_teachers().items():
        if teacher.endpoint is not None:
            label = f"teachers.{name}" if config.teachers else "teacher"
            yield EndpointSpec(label, name, teacher.endpoint, "teacher", teacher_share(config, name))
    other = config.rejected_writer()
    if other is not None and other.model.endpoint is not None:
        yield EndpointSpec(other.key, other.key.removeprefix("teachers."), other.model.endpoint, "rejected", 1.0)


def teacher_share(config: Config, name: str) -> float:
    """Return the share of the prompts that a teacher responds to."""
    teachers = config.all_teachers()
    return teachers[name].share / sum(teacher.share for teacher in teachers.values())


def gpu_needs(config: Config) -> tuple[int, int]:
    """Return the fewest GPUs with which every stage runs, and the most GPUs that any stage uses.

    Teachers and the student are sampled at once if there is room, otherwise one after the other.
    Training and judges use the cluster alone. Engines with `replicas: auto` use all free GPUs; they
    count with `min_replicas`.
    """
    specs = list(engine_specs(config))
    fewest, most = config.training.workers
    fewest = max([fewest, *(spec.devices * spec.sampling.min_replicas for spec in specs)])
    sampling = sum(spec.devices * _replicas(spec) for spec in specs if not spec.is_judge)
    judging = [spec.devices * _replicas(spec) for spec in specs if spec.is_judge]
    return fewest, max([fewest, most, sampling, *judging])


def _replicas(spec: EngineSpec) -> int:
    replicas = spec.sampling.replicas
    return spec.sampling.min_replicas if replicas == "auto" else replicas
