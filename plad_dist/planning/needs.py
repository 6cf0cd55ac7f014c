"""How many GPUs a config asks a cluster for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from plad_dist.config import Config, LlmJudge, Model, RoleSampling
from plad_dist.holders import Holder
from plad_dist.planning.memory import engine_devices


@dataclass(frozen=True)
class EngineNeed:
    """Engines that answer for one model.

    Attributes:
        role: `teacher`, `teachers.NAME`, `student` or `judge NAME`.
        key: of the config section that says how they are run.
    """

    role: str
    key: str
    model: Model
    sampling: RoleSampling

    @property
    def model_key(self) -> str:
        """Of the config section that names the model."""
        return f"evaluation.judges.{self.role.removeprefix('judge ')}.model" if self.judges else self.role

    @property
    def judges(self) -> bool:
        return self.role.startswith("judge ")

    @property
    def speaker(self) -> str:
        """`student`, or `teacher` for all else: whose responses are as long."""
        return "student" if self.role == "student" else "teacher"

    @property
    def holder(self) -> Holder:
        """Part of a run that starts the engines."""
        return Holder("judge") if self.judges else Holder("sample", self.speaker)

    @property
    def devices(self) -> int:
        """Of one engine."""
        return engine_devices(self.sampling.engine)


def engines_of(config: Config) -> Iterator[EngineNeed]:
    """All engines that a run starts, one after the other; servers behind endpoints need none."""
    for name, teacher in config.all_teachers().items():
        if teacher.endpoint is None:
            assert teacher.sampling is not None
            named = bool(config.teachers)
            role = f"teachers.{name}" if named else "teacher"
            own = named and config.teachers[name].sampling is not None
            yield EngineNeed(role, f"{role}.sampling" if own else "sampling.teacher", teacher, teacher.sampling)
    yield EngineNeed("student", "sampling.student", config.student, config.sampling.student)
    for name, judge in config.evaluation.judges.items():
        if isinstance(judge, LlmJudge) and judge.model.endpoint is None:
            yield EngineNeed(f"judge {name}", f"evaluation.judges.{name}.sampling", judge.model, judge.sampling)


def gpu_needs(config: Config) -> tuple[int, int]:
    """Fewest GPUs with which every stage runs, and most that any stage uses.

    Teachers and student are sampled at once where there is room, else one after the other; training and judges have the cluster
    for themselves. Engines whose number is `auto` take what there is: they count with their fewest.
    """
    needs = list(engines_of(config))
    fewest, most = config.training.workers
    fewest = max([fewest, *(need.devices * need.sampling.min_replicas for need in needs)])
    sampled = sum(need.devices * _most(need) for need in needs if not need.judges)
    return fewest, max([fewest, most, sampled, *(need.devices * _most(need) for need in needs if need.judges)])


def _most(need: EngineNeed) -> int:
    wanted = need.sampling.replicas
    return need.sampling.min_replicas if wanted == "auto" else wanted
