"""Engines that a run starts, and the GPUs that its stages need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from plad_dist.config import Config, LlmJudge, Model, RoleSampling
from plad_dist.holders import Holder
from plad_dist.planning.engine_memory import engine_devices

Role = Literal["teacher", "student"]


@dataclass(frozen=True)
class EngineSpec:
    """Engines that run one model.

    Attributes:
        label: `teacher`, `teachers.NAME`, `student` or `judge NAME`.
        key: config key of the sampling settings.
    """

    label: str
    key: str
    model: Model
    sampling: RoleSampling

    @property
    def model_key(self) -> str:
        """Config key of the model."""
        return f"evaluation.judges.{self.label.removeprefix('judge ')}.model" if self.is_judge else self.label

    @property
    def is_judge(self) -> bool:
        return self.label.startswith("judge ")

    @property
    def role(self) -> Role:
        """The role whose response lengths apply: `student`, or `teacher` for all other engines."""
        return "student" if self.label == "student" else "teacher"

    @property
    def holder(self) -> Holder:
        """The part of a run that starts the engines."""
        return Holder("judge") if self.is_judge else Holder("sample", self.role)

    @property
    def devices(self) -> int:
        """Devices of one engine."""
        return engine_devices(self.sampling.engine)


def engine_specs(config: Config) -> Iterator[EngineSpec]:
    """Yield the engines that a run starts. Models behind endpoints need none."""
    for name, teacher in config.all_teachers().items():
        if teacher.endpoint is None:
            assert teacher.sampling is not None
            is_named = bool(config.teachers)
            label = f"teachers.{name}" if is_named else "teacher"
            has_own_sampling = is_named and config.teachers[name].sampling is not None
            key = f"{label}.sampling" if has_own_sampling else "sampling.teacher"
            yield EngineSpec(label, key, teacher, teacher.sampling)
    yield EngineSpec("student", "sampling.student", config.student, config.sampling.student)
    for name, judge in config.evaluation.judges.items():
        if isinstance(judge, LlmJudge) and judge.model.endpoint is None:
            yield EngineSpec(f"judge {name}", f"evaluation.judges.{name}.sampling", judge.model, judge.sampling)


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
