"""Decisions, by the driver, on how the responses of other models become the student's."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from plad_dist.config import Config, Model
from plad_dist.data.models import resolve_model
from plad_dist.data.teacher_texts import TeacherForms
from plad_dist.data.templates import Renderer
from plad_dist.errors import UserError
from plad_dist.rundir import RunDir

logger = logging.getLogger("plad")


REJECTED = "rejected"  # name of another model that writes the rejected responses, in its form


@dataclass(frozen=True)
class PairForms:
    """How stored responses become the chosen and rejected responses of pairs.

    Attributes:
        teachers: forms of the teachers' responses.
        rejected: form of the rejected responses, of a writer named `rejected`; None if the student
            wrote them, in tokens of its own.
        is_on_policy: the student that the round starts from wrote the rejected responses, so that
            the log-likelihoods of the engine are that student's.
    """

    teachers: TeacherForms = field(default_factory=TeacherForms)
    rejected: TeacherForms | None = None
    is_on_policy: bool = True


def pair_forms(config: Config, run: RunDir) -> PairForms:
    """Return how the samples of the round become responses of the student."""
    teachers, student = teacher_forms(config, run), run.student(config)
    if config.sampling.rejected is None:
        return PairForms(teachers)
    if (other := config.rejected_writer()) is None:
        return PairForms(teachers, is_on_policy=run.start_of("student", config.student) == student)
    path = None if other.model.endpoint else resolve_model(other.model)
    rejected = _forms({REJECTED: (path, other.model)}, student, config)
    return PairForms(teachers, rejected, is_on_policy=False)


def teacher_forms(config: Config, run: RunDir, student: str | None = None) -> TeacherForms:
    """Return how the responses of each teacher become responses of the student.

    Args:
        student: folder or hub name of the student; None for the starting student of the round.
    """
    teachers = {
        name: (None if teacher.endpoint else run.teacher(config, name), teacher)
        for name, teacher in config.all_teachers().items()
    }
    return _forms(teachers, student or run.student(config), config)


def _forms(writers: Mapping[str, tuple[str | None, Model]], student: str, config: Config) -> TeacherForms:
    """Return the forms of some models.

    Args:
        writers: folder or hub name, None behind a server, and config section of each model.
    """
    identity = Renderer(student, config.student).identity
    renderers = {name: _renderer(name, path, model) for name, (path, model) in writers.items()}
    available = {name: renderer for name, renderer in renderers.items() if renderer is not None}
    return TeacherForms(
        keep_thought=tuple(name for name, (_, model) in writers.items() if model.reasoning == "keep"),
        same_tokens=tuple(name for name, renderer in available.items() if renderer.identity == identity),
        control_texts=sorted({text for renderer in available.values() for text in renderer.control_tokens.texts}),
    )


def _renderer(name: str, path: str | None, model: Model) -> Renderer | None:
    """Return the renderer of a model, None if its tokenizer is not available.

    Samples may be paired where their writer is not.
    """
    if path is None:
        return None
    try:
        return Renderer(path, model)
    except UserError as error:
        logger.info("pair: the texts of %s are tokenized, not its tokens used: %s", name, error)
        return None
