"""Decisions, by the driver, on how the responses of each teacher become the student's."""

from __future__ import annotations

import logging

from plad_dist.config import Config, Teacher
from plad_dist.data.teacher_texts import TeacherForms
from plad_dist.data.templates import Renderer
from plad_dist.errors import UserError
from plad_dist.rundir import RunDir

logger = logging.getLogger("plad")


def teacher_forms(config: Config, run: RunDir, student: str | None = None) -> TeacherForms:
    """Return how the responses of each teacher become responses of the student.

    Args:
        student: folder or hub name of the student; None for the starting student of the round.
    """
    identity = Renderer(student or run.student(config), config.student).identity
    teachers = config.all_teachers()
    return TeacherForms(
        keep_thought=tuple(name for name, teacher in teachers.items() if teacher.reasoning == "keep"),
        same_tokens=tuple(
            name for name, teacher in teachers.items() if _identity(config, run, name, teacher) == identity
        ),
    )


def _identity(config: Config, run: RunDir, name: str, teacher: Teacher) -> str | None:
    """Return the identity of a teacher's tokenizer, None if it is not available.

    Samples may be paired where their teacher is not.
    """
    if teacher.endpoint is not None:
        return None
    try:
        return Renderer(run.teacher(config, name), teacher).identity
    except UserError as error:
        logger.info("pair: the texts of %s are tokenized, not its tokens used: %s", name, error)
        return None
