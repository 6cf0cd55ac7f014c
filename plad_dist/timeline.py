"""Clocks of a run: the parts of a start, and the activities that take the wall time of a stage."""

from __future__ import annotations

import time
from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple


class Activity(StrEnum):
    """Activity of a stage: only one at a time, although parts of a cluster may differ.

    `STARTING` covers processes, imports, models and engines until the first step or response;
    `WAITING` is for resources of the cluster.
    """

    STARTING = "starting"
    COMPUTING = "computing"
    WAITING = "waiting"


class StageTime(NamedTuple):
    """Seconds that a stage spent on each activity."""

    starting: float = 0.0
    computing: float = 0.0
    waiting: float = 0.0

    @property
    def total(self) -> float:
        """Wall time of the stage."""
        return sum(self)

    def plus(self, other: StageTime) -> StageTime:
        """Return the sum of both by activity."""
        return StageTime(*(a + b for a, b in zip(self, other, strict=True)))


class StageClock:
    """Clock that adds up the seconds of each activity of a stage.

    Attributes:
        activity: the present one.
    """

    def __init__(self, activity: Activity) -> None:
        self.activity, self._since = activity, time.monotonic()
        self._time = StageTime()

    def enter(self, activity: Activity) -> None:
        """Record that the stage is at this activity from now on."""
        now = time.monotonic()
        spent = StageTime(**{self.activity.value: now - self._since})
        self._time, self.activity, self._since = self._time.plus(spent), activity, now

    def read(self) -> StageTime:
        """Return the seconds so far."""
        self.enter(self.activity)
        return self._time


class StartClock:
    """Clock of one start, such as that of an engine, whose parts follow each other.

    Args:
        began: `time.monotonic()` of the beginning, which all processes of a machine share; None for
            now.

    Attributes:
        parts: seconds by part, in order.
    """

    def __init__(self, began: float | None = None) -> None:
        self._since = time.monotonic() if began is None else began
        self.parts: dict[str, float] = {}

    def end(self, part: str, at: float | None = None) -> None:
        """Record that a part has ended, now or at another time. The next one begins."""
        now = time.monotonic() if at is None else at
        self.parts[part] = self.parts.get(part, 0.0) + now - self._since
        self._since = now


def parts_text(parts: Mapping[str, float]) -> str:
    """Return the total of a start and its parts, for a log line."""
    return f"{sum(parts.values()):.1f} s: " + ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts.items())
