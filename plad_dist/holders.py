"""Holders: the parts of a run that occupy the memory of devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Holder:
    """Part of a run that occupies the memory of devices.

    Attributes:
        kind: training of a phase, sampling of a role, or the judges of an evaluation.
        phase: name of the phase, or `teacher` or `student`; empty for judges.
    """

    kind: Literal["train", "sample", "judge"]
    phase: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.phase}".rstrip()
