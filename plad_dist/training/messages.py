"""Messages about training, sent to the driver through its mailbox.

The first rank of a phase reports its start, its steps, its held-out evaluations and a divergence.
Every process of a worker group may add a line of text. The driver matches messages by their type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from plad_dist.timeline import Activity


@dataclass(frozen=True)
class Began:
    """An attempt at a phase starts or resumes.

    Attributes:
        steps: number of steps of the whole phase.
        text: where the attempt stands and how the model is partitioned, for the log.
    """

    phase: str
    steps: int
    text: str


@dataclass(frozen=True)
class StepDone:
    """A global step was taken.

    Attributes:
        step: number of the step, counted from 1.
        groups: groups trained on since the start of the phase.
        tokens: tokens computed since the start of the phase.
        workers: size of the worker group.
        figures: means and rates of the step by metric name.
    """

    phase: str
    step: int
    groups: int
    tokens: int
    workers: int
    figures: Mapping[str, float]


@dataclass(frozen=True)
class HeldoutRanked:
    """The held-out pairs were ranked after a step.

    Attributes:
        pair_accuracy: share of the pairs that the student ranks correctly.
    """

    phase: str
    step: int
    pair_accuracy: float


@dataclass(frozen=True)
class Said:
    """A line for the driver's log.

    Attributes:
        phase: the phase, or the phases of a worker group.
    """

    phase: str
    text: str


@dataclass(frozen=True)
class Enters:
    """A worker group starts, or waits for resources."""

    activity: Activity


@dataclass(frozen=True)
class Started:
    """An attempt at a phase has taken its first step.

    Attributes:
        parts: seconds of each part of its start, in order.
    """

    phase: str
    parts: Mapping[str, float]


@dataclass(frozen=True)
class Diverged:
    """The loss or the gradient diverged: the step is not taken, and training stops."""

    phase: str


Message: TypeAlias = Began | StepDone | HeldoutRanked | Said | Enters | Started | Diverged
