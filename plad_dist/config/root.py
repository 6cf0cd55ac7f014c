"""The whole of a run, and walking its schema."""

from __future__ import annotations

import hashlib
import json
import re
import types
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import Field, model_validator
from pydantic.fields import FieldInfo

from plad_dist.config.evaluation import REFERENCE_JUDGES, Evaluation, TeacherJudge
from plad_dist.config.models import Model
from plad_dist.config.pairing import Pairing
from plad_dist.config.prompts import Columns, Prompts
from plad_dist.config.sampling import OPERATIONAL_ENGINE, Decoding, Sampling, Teacher
from plad_dist.config.section import OPERATIONAL, Section
from plad_dist.config.training import Training


class Run(Section):
    """Where the run lives and what makes it repeatable."""

    dir: str = Field(description="Run directory: a path, or file://, s3://, gs://, az:// URI.", min_length=1)
    seed: int = Field(17, ge=0, lt=2**31, description="Every random choice of the run follows from it.")
    reuse: str | None = Field(
        None,
        min_length=1,
        description="Another run directory, whose prompts, models, samples and pairs a new run takes over as far as it would make them alike.",
        json_schema_extra=OPERATIONAL,
    )


class Cluster(Section):
    """Which Ray cluster does the work."""

    address: str | None = Field(
        None,
        description="Ray address to join (`auto`, `host:port`). Empty: the RAY_ADDRESS variable, else a local Ray.",
        json_schema_extra=OPERATIONAL,
    )
    start_timeout_s: int = Field(
        600,
        ge=10,
        description="Seconds to wait for the cluster to give the actors and workers their resources.",
        json_schema_extra=OPERATIONAL,
    )
    unfit: Literal["refuse", "warn"] = Field(
        "refuse",
        description="What to do with a config that takes more memory than the devices have, by `plad plan`, before anything is started.",
        json_schema_extra=OPERATIONAL,
    )


class Rounds(Section):
    """Steps 1 to 4 again, with the student that came out of them. The teacher is sampled once."""

    most: int = Field(1, ge=1, le=100, description="Rounds at most.", json_schema_extra=OPERATIONAL)
    stop: Literal["no_gain", "never"] = Field(
        "no_gain",
        description="no_gain: the rounds end when the student of one does not beat the one it began as on held-out prompts (the "
        "lower end of the 95% interval of its win rate is not above one half).",
        json_schema_extra=OPERATIONAL,
    )


class Config(Section):
    """A run."""

    run: Run
    cluster: Cluster = Cluster()
    prompts: Prompts
    teacher: Model | None = Field(None, description="The teacher. Empty: `teachers` names several.")
    teachers: dict[str, Teacher] = Field(
        default={}, description="Several teachers by name, each with a part of the prompts."
    )
    student: Model
    sampling: Sampling = Sampling()
    pairing: Pairing = Pairing()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    rounds: Rounds = Rounds()

    @model_validator(mode="after")
    def _keys_agree(self) -> Config:
        """All that is wrong between keys is said at once, a line each that begins with its key."""
        problems = [
            *_of_scratch_models(self), *_of_teachers(self), *_of_the_student(self), *_of_scores_and_references(self), *_of_judges(self),
        ]  # fmt: skip
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def candidates(self) -> int:
        """Responses of the warm-up student to each held-out prompt whose quality references tell; 0 without references."""
        source = self.prompts.heldout or self.prompts.source
        return 0 if isinstance(source, Columns) and not source.has_references else self.evaluation.candidates

    def all_teachers(self) -> dict[str, Teacher]:
        """The teachers by name; a single one is called `teacher`. Each with how it is sampled."""
        teachers = {"teacher": Teacher(**self.teacher.model_dump())} if self.teacher else self.teachers
        return {
            name: teacher.model_copy(update={"sampling": teacher.sampling or self.sampling.teacher})
            for name, teacher in teachers.items()
        }

    def named_models(self) -> dict[str, Model]:
        """Teachers and student by the keys that they stand at."""
        teachers = {f"teachers.{name}" if self.teachers else name: model for name, model in self.all_teachers().items()}
        return {**teachers, "student": self.student}

    def trained(self, role: str) -> Model:
        """The section of a model that the run may train: `teacher` (a single one) or `student`."""
        model = self.teacher if role == "teacher" else self.student
        assert model is not None, "only a single teacher is trained"
        return model

    def decodings(self) -> dict[str, Decoding]:
        """The decodings that every system is evaluated with, by name."""
        if self.evaluation.decodings:
            return dict(self.evaluation.decodings)
        sampled = self._as_the_student_is_sampled()
        return {"greedy": sampled.model_copy(update={"temperature": 0.0}), "sampled": sampled}

    def system_decodings(self, system: str) -> dict[str, Decoding]:
        """The decodings that one system is evaluated with: the warm-up student also at lower temperatures."""
        decodings = self.decodings()
        if system == "warmup":
            base = self._as_the_student_is_sampled()
            for temperature in self.evaluation.warmup_temperatures:
                decodings[f"t{temperature:g}"] = base.model_copy(update={"temperature": temperature})
        return decodings

    def _as_the_student_is_sampled(self) -> Decoding:
        return Decoding(**{name: getattr(self.sampling.student, name) for name in Decoding.model_fields})

    def fingerprint(self) -> str:
        """SHA-256 of everything that decides what the run produces; run.dir and operational keys are left out."""
        return fingerprint({key: value for key, value in self.flat().items() if not is_operational(key)})

    def flat(self) -> dict[str, Any]:
        """Every resolved key with its value, by dotted name."""
        return dict(flatten(self.model_dump(mode="json")))


def _of_scratch_models(config: Config) -> Iterator[str]:
    teacher, student, training = config.teacher, config.student, config.training
    if teacher and teacher.scratch and not training.teacher:
        yield "training.teacher: missing; teacher.scratch makes an untrained teacher, this section trains it"
    if student.scratch and not training.warmup:
        yield "training.warmup: missing; student.scratch makes an untrained student, this section trains it"
    if training.lora and (student.scratch or (teacher and teacher.scratch)):
        yield "training.lora: adapters of a model from scratch would learn beside random weights; leave it out"
    for name, model in (("teacher", teacher), ("student", student)):
        if model and model.scratch and model.template is None:
            yield f"{name}.template: missing; {name}.scratch makes a tokenizer without a chat template"


def _of_teachers(config: Config) -> Iterator[str]:
    if (config.teacher is None) == (not config.teachers):
        yield "teacher: exactly one of `teacher` and `teachers` is needed"
    for name, teacher in config.teachers.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or name == "student":
            yield f"teachers: name {name!r}: use letters, digits, '-' and '_' alone, and not `student`"
        if teacher.scratch:
            yield f"teachers.{name}.scratch: only a single `teacher` can be made from scratch"
        if teacher.sampling and teacher.sampling.n != config.sampling.teacher.n:
            yield (
                f"teachers.{name}.sampling.n: {teacher.sampling.n}: must be that of sampling.teacher.n, which is "
                f"{config.sampling.teacher.n}"
            )
    if config.training.teacher and (config.teacher is None or config.teacher.endpoint):
        yield "training.teacher: trains a single `teacher` with a path or from scratch"


def _of_the_student(config: Config) -> Iterator[str]:
    if config.student.endpoint:
        yield "student.endpoint: only a teacher may be behind a server; the student is trained here"
    if config.sampling.student.stop:
        yield "sampling.student.stop: the student must end with a token, not a stop string, to be trained on it"


def _of_scores_and_references(config: Config) -> Iterator[str]:
    loss, source, training = config.training.round.loss, config.prompts.source, config.training
    if loss.needs_scores and config.pairing.score == "none":
        yield f"training.round.loss.name: {loss.name} needs scores: set pairing.score"
    if isinstance(source, Columns) and not source.has_references:
        if training.teacher:
            yield "prompts.source.reference_column: missing; training.teacher learns from references"
        if training.warmup and training.warmup.data == "references":
            yield (
                "prompts.source.reference_column: missing; training.warmup.data is `references`; set it, or use "
                "`data: teacher`"
            )


def _of_judges(config: Config) -> Iterator[str]:
    source = config.prompts.heldout or config.prompts.source
    by_reference = config.evaluation.judge in REFERENCE_JUDGES
    has_none = isinstance(source, Columns) and not source.has_references
    if config.rounds.most > 1 and config.rounds.stop == "no_gain" and by_reference and has_none:
        yield (
            f"rounds.stop: no_gain: without references {config.evaluation.judge} sees no gain: set another evaluation.judge, or never"
        )
    for name, judge in config.evaluation.judges.items():
        if isinstance(judge, TeacherJudge) and (config.teacher is None or config.teacher.endpoint):
            yield (
                f"evaluation.judges.{name}.type: teacher_likelihood: needs a single `teacher` with weights; a server gives no likelihoods"
            )


def fingerprint(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf of nested mappings."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flatten(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def schema_fields(model: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of the schema with its field, depth first. Alternatives of a union follow one another; `*` is any name."""
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        yield path, field
        for section in _sections_in(field.annotation):
            yield from schema_fields(section, f"{path}.")
        for section in _named_sections_in(field.annotation):
            yield from schema_fields(section, f"{path}.*.")


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return [section for item in get_args(annotation) for section in _sections_in(item)]
    return []


def _named_sections_in(annotation: Any) -> list[type[Section]]:
    """Sections that the values of a mapping are."""
    return _sections_in(get_args(annotation)[1]) if get_origin(annotation) is dict else []


@cache
def operational_keys() -> set[str]:
    """Keys whose change does not change what a run produces: they may differ between resumes."""
    operational = {path for path, field in schema_fields() if (field.json_schema_extra or {}) == OPERATIONAL}
    return operational | {"run.dir"}


def is_operational(key: str) -> bool:
    """Whether a dotted key, or the key that holds it, is operational."""
    parts = key.split(".")
    if "engine" in parts[:-1]:
        return parts[parts.index("engine") + 1] in OPERATIONAL_ENGINE
    if parts[0] == "teachers" and len(parts) > 2:
        parts[1] = "*"
    keys = operational_keys()
    return any(".".join(parts[:end]) in keys for end in range(1, len(parts) + 1))
