"""Root of the config schema, and functions that walk the schema."""

from __future__ import annotations

import datetime as dt
import re
import types
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from pydantic import Field, model_validator
from pydantic.fields import FieldInfo

from plad_dist.config.evaluation import REFERENCE_JUDGES, Evaluation, LlmJudge, TeacherJudge
from plad_dist.config.models import Model, Student
from plad_dist.config.pairing import Pairing, RewardModel
from plad_dist.config.prompts import Columns, Prompts
from plad_dist.config.run import Cluster, Rounds, Run
from plad_dist.config.sampling import OPERATIONAL_ENGINE, Decoding, Rejected, RoleSampling, Sampling, Teacher
from plad_dist.config.section import OPERATIONAL, Section
from plad_dist.config.training import Training
from plad_dist.config.values import expand_path, refuse_clash
from plad_dist.fingerprint import fingerprint
from plad_dist.systems import WARMUP, System


class RespondingModel(NamedTuple):
    """Model of a config that responds to prompts.

    Attributes:
        key: config key of the model.
        section: config key of its sampling settings.
    """

    key: str
    model: Model
    section: str
    sampling: RoleSampling


class Config(Section):
    """Config of a run."""

    run: Run
    cluster: Cluster = Cluster()
    prompts: Prompts
    teacher: Model | None = Field(None, description="The teacher. If unset, `teachers` defines several.")
    teachers: dict[str, Teacher] = Field(default={}, description="Several teachers by name, which share the prompts.")
    student: Student
    sampling: Sampling = Sampling()
    pairing: Pairing = Pairing()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    rounds: Rounds = Rounds()

    @model_validator(mode="after")
    def _date_models(self) -> Config:
        self._set_dates()
        return self

    def _set_dates(self) -> None:
        """Let every model render its prompts with the date of the run."""
        for model in self.rendering_models().values():
            model._date = None if self.run.date is None else dt.date.fromisoformat(self.run.date)

    def with_date(self, date: str | None) -> Config:
        """Return the config of a run with another date."""
        # A deep copy, because the models hold the date too.
        config = self.model_copy(update={"run": self.run.model_copy(update={"date": date})}, deep=True)
        config._set_dates()
        return config

    def rendering_models(self) -> dict[str, Model | RewardModel]:
        """Return all models that render prompts or conversations, by their config keys."""
        models: dict[str, Model | RewardModel] = {f"teachers.{name}": model for name, model in self.teachers.items()}
        if self.teacher is not None:
            models["teacher"] = self.teacher
        models["student"] = self.student
        if (other := self.rejected_writer()) is not None:
            models[other.key] = other.model
        if self.pairing.reward_model is not None:
            models["pairing.reward_model"] = self.pairing.reward_model
        for name, judge in self.evaluation.judges.items():
            if isinstance(judge, LlmJudge):
                models[f"evaluation.judges.{name}.model"] = judge.model
            elif isinstance(judge, RewardModel):
                models[f"evaluation.judges.{name}"] = judge
        return models

    @model_validator(mode="after")
    def _check_across_sections(self) -> Config:
        """Raise one error for all conflicts between keys, with a line for each."""
        problems = [
            *_created_model_problems(self), *_teacher_problems(self), *_student_problems(self),
            *_rejected_problems(self), *_score_and_reference_problems(self), *_judge_problems(self),
            *_decoding_problems(self), *_endpoint_problems(self),
        ]  # fmt: skip
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def candidates(self) -> int:
        """Candidates per held-out prompt.

        0 if no references exist to measure their quality, or if greedy decoding makes all of them
        the same.
        """
        source = self.prompts.heldout or self.prompts.source
        lacks_references = isinstance(source, Columns) and not source.has_references
        return 0 if lacks_references or self.sampling.student.greedy_by else self.evaluation.candidates

    def all_teachers(self) -> dict[str, Teacher]:
        """Return the teachers that write chosen responses by name, each with its sampling settings
        filled in.

        A single teacher is named `teacher`.
        """
        teachers = {"teacher": Teacher.of(self.teacher)} if self.teacher else self.teachers
        rejected = self.sampling.rejected.teacher if self.sampling.rejected else None
        return {
            name: teacher.model_copy(update={"sampling": teacher.sampling or self.sampling.teacher})
            for name, teacher in teachers.items()
            if not self.teachers or name != rejected
        }

    def rejected_writer(self) -> RespondingModel | None:
        """Return the model other than the student that writes the rejected responses.

        None if the student writes them, before its training or after.
        """
        match self.sampling.rejected:
            case Rejected(path=str(path), revision=revision, max_length=max_length):
                rendering = {name: getattr(self.student, name) for name in ("template", "template_kwargs")}
                model = Model(path=path, revision=revision, max_length=max_length, **rendering)
                model._date = self.student._date
                return RespondingModel("sampling.rejected", model, "sampling.student", self.sampling.student)
            case Rejected(teacher=str(name)) if teacher := self.teachers.get(name):
                key = f"teachers.{name}"
                if teacher.sampling is not None:
                    return RespondingModel(key, teacher, f"{key}.sampling", teacher.sampling)
                return RespondingModel(key, teacher, "sampling.student", self.sampling.student)
        return None

    def named_models(self) -> dict[str, Model]:
        """Return the teachers, the student and any other writer of rejected responses by their
        config keys."""
        teachers = {f"teachers.{name}" if self.teachers else name: model for name, model in self.all_teachers().items()}
        other = self.rejected_writer()
        return {**teachers, "student": self.student} | ({other.key: other.model} if other is not None else {})

    def responders(self) -> Iterator[RespondingModel]:
        """Yield every model that responds to prompts."""
        yield RespondingModel("student", self.student, "sampling.student", self.sampling.student)
        for name, teacher in self.all_teachers().items():
            assert teacher.sampling is not None
            key = f"teachers.{name}" if self.teachers else name
            has_own = name in self.teachers and self.teachers[name].sampling is not None
            section = f"{key}.sampling" if has_own else "sampling.teacher"
            yield RespondingModel(key, teacher, section, teacher.sampling)
        if (other := self.rejected_writer()) is not None:
            yield other
        for name, judge in self.evaluation.judges.items():
            if isinstance(judge, LlmJudge):
                key = f"evaluation.judges.{name}"
                yield RespondingModel(f"{key}.model", judge.model, f"{key}.sampling", judge.sampling)

    def trained(self, role: str) -> Model:
        """Return the config section of the model that a phase trains.

        Args:
            role: `teacher` or `student`. Several teachers are never trained, so `teacher` fails an
                assertion with them.
        """
        model = self.teacher if role == "teacher" else self.student
        assert model is not None, "only a single teacher is trained"
        return model

    def decodings(self) -> dict[str, Decoding]:
        """Return the decodings by name that every system is evaluated with."""
        if self.evaluation.decodings:
            return dict(self.evaluation.decodings)
        sampled = self._student_decoding()
        return {"greedy": sampled.model_copy(update={"temperature": 0.0}), "sampled": sampled}

    def system_decodings(self, system: System) -> dict[str, Decoding]:
        """Return the decodings by name that one system is evaluated with.

        The warm-up student has additional ones, at lower temperatures.
        """
        decodings = self.decodings()
        if system == WARMUP:
            base = self._student_decoding()
            for temperature in self.evaluation.warmup_temperatures:
                decodings[f"t{temperature:g}"] = base.model_copy(update={"temperature": temperature})
        return decodings

    def _student_decoding(self) -> Decoding:
        return Decoding(**{name: getattr(self.sampling.student, name) for name in Decoding.model_fields})

    def fingerprint(self) -> str:
        """Return the SHA-256 of all keys that decide what the run produces.

        These are all but `run.dir` and the operational keys.
        """
        keys = {key: value for key, value in self.flat().items() if not is_operational(key)}
        if self.sampling.rejected is None:  # as in runs of versions without the key
            del keys["sampling.rejected"]
        return fingerprint("run", keys=keys)

    def flat(self) -> dict[str, Any]:
        """Return the values of all keys, defaults included, by dotted name."""
        return dict(flatten(self.model_dump(mode="json")))


def _created_model_problems(config: Config) -> Iterator[str]:
    teacher, student, training = config.teacher, config.student, config.training
    if teacher and teacher.scratch and not training.teacher:
        yield "training.teacher: missing; teacher.scratch creates an untrained teacher, which this section trains"
    if student.scratch and not training.warmup:
        yield "training.warmup: missing; student.scratch creates an untrained student, which this section trains"
    if student.cut and not training.warmup:
        yield (
            "training.warmup: missing; student.from takes layers out of a model, which then writes no sensible text "
            "until this section has trained it"
        )
    if training.lora and (student.scratch or (teacher and teacher.scratch)):
        yield "training.lora: the other weights of a model from scratch would stay random; remove it, or set `path`"
    for name, model in (("teacher", teacher), ("student", student)):
        if model and model.scratch and model.template is None:
            yield f"{name}.template: missing; {name}.scratch creates a tokenizer without a chat template"


def _teacher_problems(config: Config) -> Iterator[str]:
    if (config.teacher is None) == (not config.teachers):
        yield "teacher: needs exactly one of `teacher` and `teachers`"
    try:
        refuse_clash("teachers", config.teachers)
    except ValueError as error:
        yield str(error)
    for name, teacher in config.teachers.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or name == "student":
            yield f"teachers: name {name!r}: use only letters, digits, '-' and '_', and not `student`"
        if teacher.scratch:
            yield f"teachers.{name}.scratch: only for a single `teacher`; set `path` or `endpoint`"
        side = "teacher" if name in config.all_teachers() else "student"
        n = getattr(config.sampling, side).n
        if teacher.sampling and teacher.sampling.n != n:
            yield f"teachers.{name}.sampling.n: {teacher.sampling.n}: must be equal to sampling.{side}.n, which is {n}"
    for key, model in config.named_models().items():
        if model.endpoint and model.endpoint.api == "chat" and _offers_tools(config):
            yield (
                f"{key}.endpoint.api: chat: a server returns calls of tools apart from the text, so they would be "
                "lost; remove prompts.*.tools_column, or set `api: completions` and a `template`"
            )
    if config.training.teacher and (config.teacher is None or config.teacher.endpoint):
        yield "training.teacher: needs a single `teacher` with `path` or `scratch`; remove it, or set one"


def _offers_tools(config: Config) -> bool:
    sources = (config.prompts.source, config.prompts.heldout)
    return any(isinstance(source, Columns) and source.tools_column is not None for source in sources)


def _student_problems(config: Config) -> Iterator[str]:
    if config.student.endpoint:
        yield "student.endpoint: the student is trained, which needs its weights; set `path`, `scratch` or `from`"
    if config.student.reasoning != "strip":
        yield (
            "student.reasoning: is for teachers; a student that thinks is trained on whole responses. Remove it, or "
            "turn its thoughts off by student.template_kwargs"
        )
    if config.sampling.student.stop:
        yield "sampling.student.stop: the student must end with a token to learn it, not with a stop string; remove it"
    if config.sampling.student.stop_token_ids:
        yield (
            "sampling.student.stop_token_ids: the student learns to end with the tokens that its model names; remove "
            "it, or add the tokens to eos_token_id in the generation_config.json of the model"
        )


def _rejected_problems(config: Config) -> Iterator[str]:
    rejected, teachers = config.sampling.rejected, config.teachers
    if rejected is None:
        return
    if rejected.path is not None and "rejected" in teachers:
        yield "teachers: name 'rejected': is that of the model of sampling.rejected.path; choose another"
    if rejected.teacher is None:
        return
    key = f"sampling.rejected.teacher: {rejected.teacher!r}"
    teacher = teachers.get(rejected.teacher)
    if not teachers:
        yield f"{key}: needs several `teachers`, of which it names one; set them, or sampling.rejected.path"
    elif teacher is None:
        yield f"{key}: no such teacher; expected one of {', '.join(teachers)}"
    elif len(teachers) == 1:
        yield f"{key}: is the only one, and none is left to write the chosen responses; add another to `teachers`"
    else:
        for name in ("share", "filter"):
            if getattr(teacher, name) != Teacher.model_fields[name].default:
                yield (
                    f"teachers.{rejected.teacher}.{name}: has no effect, because this teacher writes the rejected "
                    "responses to all prompts; remove it"
                )


def _decoding_problems(config: Config) -> Iterator[str]:
    roles = {"sampling.teacher": config.sampling.teacher, "sampling.student": config.sampling.student}
    roles |= {f"teachers.{name}.sampling": item.sampling for name, item in config.teachers.items() if item.sampling}
    for key, sampling in roles.items():
        if sampling.n > 1 and sampling.greedy_by:
            yield (
                f"{key}.n: {sampling.n}: with {sampling.greedy_by}, all responses to a prompt are the same; set "
                "`n: 1`, or sample at a temperature above 0 from more than one token"
            )
    if (
        config.prompts.heldout is None
        and config.prompts.heldout_fraction == 0
        and isinstance(config.prompts.source, Columns)
    ):
        yield (
            "prompts.heldout_fraction: 0: leaves no held-out prompts, on which the students are compared; set a "
            "fraction above 0, or prompts.heldout"
        )


def _endpoint_problems(config: Config) -> Iterator[str]:
    for key, model, section, _ in config.responders():
        for name, value in model.endpoint.extra_body.items() if model.endpoint else ():
            if name in Decoding.model_fields and value is not None:
                yield (
                    f"{key}.endpoint.extra_body.{name}: replaces a setting of the run; set {section}.{name}, or null "
                    "here if the server refuses the field"
                )


def _score_and_reference_problems(config: Config) -> Iterator[str]:
    loss, source, training = config.training.round.loss, config.prompts.source, config.training
    if loss.needs_scores and config.pairing.score == "none":
        yield f"training.round.loss.name: {loss.name} needs scores; set pairing.score"
    if isinstance(source, Columns) and not source.has_references:
        if training.teacher:
            yield "prompts.source.reference_column: missing; training.teacher trains on references"
        if training.warmup and training.warmup.data == "references":
            yield (
                "prompts.source.reference_column: missing; training.warmup.data is `references`: set the column, or "
                "`data: teacher`"
            )


def _judge_problems(config: Config) -> Iterator[str]:
    source = config.prompts.heldout or config.prompts.source
    needs_references = config.evaluation.judge in REFERENCE_JUDGES
    lacks_references = isinstance(source, Columns) and not source.has_references
    if config.rounds.most > 1 and config.rounds.stop == "no_gain" and needs_references and lacks_references:
        yield (
            f"rounds.stop: no_gain: {config.evaluation.judge} needs references to measure a gain; set another "
            "evaluation.judge, or `stop: never`"
        )
    for name, judge in config.evaluation.judges.items():
        if isinstance(judge, TeacherJudge) and (config.teacher is None or config.teacher.endpoint):
            yield (
                f"evaluation.judges.{name}.type: teacher_likelihood: needs a single `teacher` with weights; a server "
                "returns no likelihoods"
            )


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of every leaf of nested mappings."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flatten(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def schema_fields(model: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every key of the schema with its field, depth first.

    The alternatives of a union follow one another. `*` stands for any name.
    """
    for name, field in model.model_fields.items():
        path = f"{prefix}{field.alias or name}"
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
    """Return the sections that are values of a mapping."""
    return _sections_in(get_args(annotation)[1]) if get_origin(annotation) is dict else []


@cache
def operational_keys() -> set[str]:
    """Return the keys that do not affect what a run produces, and may differ between resumes."""
    operational = {path for path, field in schema_fields() if (field.json_schema_extra or {}) == OPERATIONAL}
    return operational | {"run.dir"}


@cache
def path_keys() -> set[str]:
    """Return the keys that hold a path or a list of paths."""

    def expands(annotation: Any, metadata: list[Any]) -> bool:
        own = any(getattr(item, "func", None) is expand_path for item in metadata)
        return own or any(expands(item, list(get_args(item)[1:])) for item in get_args(annotation))

    return {path for path, field in schema_fields() if expands(field.annotation, field.metadata)}


@cache
def optional_sections() -> dict[str, bool]:
    """Return the keys of sections that may be null, and whether a section without keys is valid."""

    def is_optional(annotation: Any) -> bool:
        return type(None) in get_args(annotation) and bool(_sections_in(annotation))

    def has_defaults(section: type[Section]) -> bool:
        names_a_model = issubclass(section, Model | Rejected)  # and needs a key that does
        return not names_a_model and not any(field.is_required() for field in section.model_fields.values())

    return {
        path: all(map(has_defaults, _sections_in(field.annotation)))
        for path, field in schema_fields()
        if is_optional(field.annotation)
    }


def is_operational(key: str) -> bool:
    """Return True if a dotted key, or a section that contains it, is operational."""
    parts = key.split(".")
    if "engine" in parts[:-1]:
        return parts[parts.index("engine") + 1] in OPERATIONAL_ENGINE
    if parts[0] == "teachers" and len(parts) > 2:
        parts[1] = "*"
    return any(".".join(parts[:end]) in operational_keys() for end in range(1, len(parts) + 1))
