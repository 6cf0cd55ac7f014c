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
    renderers = {name: _renderer(config, run, name, teacher) for name, teacher in teachers.items()}
    available = {name: renderer for name, renderer in renderers.items() if renderer is not None}
    return TeacherForms(
        keep_thought=tuple(name for name, teacher in teachers.items() if teacher.reasoning == "keep"),
        same_tokens=tuple(name for name, renderer in available.items() if renderer.identity == identity),
        control_texts=sorted({text for renderer in available.values() for text in renderer.control_tokens.texts}),
    )


def _renderer(config: Config, run: RunDir, name: str, teacher: Teacher) -> Renderer | None:
    """Return the renderer of a teacher, None if its tokenizer is not available.

    Samples may be paired where their teacher is not.
    """
    if teacher.endpoint is not None:
        return None
    try:
        return Renderer(run.teacher(config, name), teacher)
    except UserError as error:
        logger.info("pair: the texts of %s are tokenized, not its tokens used: %s", name, error)
        return None
