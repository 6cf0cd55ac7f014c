"""The systems that an evaluation compares: the teacher and its students.

Code passes :class:`System` values. Their names (`teacher`, `warmup`, `seqkd`, `plad`, `round-0`,
...) occur only in JSON, paths and tables: `str(system)` writes a name, :meth:`System.parse` reads
it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["teacher", "warmup", "seqkd", "plad"]

_KINDS: tuple[Kind, ...] = get_args(Kind)
_EARLIER_ROUND = re.compile(r"round-(\d+)")


@dataclass(frozen=True)
class System:
    """A model whose responses are compared with those of other models.

    Attributes:
        kind: the teacher, the warm-up student, sequence-level KD, or a student that PLaD
            calibrated.
        round: for `plad`, the earlier round whose student is meant; None for the round's own
            student.
    """

    kind: Kind
    round: int | None = None

    def __post_init__(self) -> None:
        assert self.round is None or self.kind == "plad", "only students of PLaD belong to a round"

    @classmethod
    def parse(cls, name: str) -> System:
        """Return the system of a name. Raises :class:`ValueError` if no system has that name."""
        if match := _EARLIER_ROUND.fullmatch(name):
            return cls("plad", int(match[1]))
        for kind in _KINDS:
            if name == kind:
                return cls(kind)
        raise ValueError(f"{name!r}: not a system; expected {', '.join(_KINDS)} or round-N")

    def __str__(self) -> str:
        return self.kind if self.round is None else f"round-{self.round}"

    @property
    def order(self) -> tuple[int, int]:
        """Sort key of tables: teacher, warm-up student, control, earlier rounds, own student."""
        is_own_student = self.kind == "plad" and self.round is None
        return _KINDS.index(self.kind) + is_own_student, self.round or 0


TEACHER, WARMUP, SEQKD, PLAD = (System(kind) for kind in _KINDS)
