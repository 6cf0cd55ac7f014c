"""History of the worker groups of a run: restart times, disruptions, and the outlook that follows.

All times are seconds by one clock, which the caller reads. docs/runbook.md derives the estimates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from plad_dist.training.driver.growth import Outlook

_PRIOR_S = 3600.0  # between disruptions, before any is known
_PRIOR_WEIGHT = 0.25  # of the prior, in disruptions
_MEMORY_S = 6 * 3600.0  # after which an observation counts for 1/e
_MOST_GROUPS = 200  # that are remembered
_NEW_SHARE = 0.5  # of the latest restart in the average of restarts
_NEW_STEP_SHARE = 0.1  # of the latest step in the average of steps


@dataclass(frozen=True)
class GroupRun:
    """One worker group.

    Attributes:
        started: when its start began.
        restart_s: seconds that its start cost training; None before its first step.
        stepped: when its latest step ended.
        step_s: average seconds of its steps.
        ended: when it ended; None while it runs.
        is_disrupted: True if it ended by a failure or because a node left.
    """

    workers: int
    started: float
    restart_s: float | None = None
    stepped: float | None = None
    step_s: float = 0.0
    ended: float | None = None
    is_disrupted: bool = False


@dataclass(frozen=True)
class RunHistory:
    """Worker groups of a run in order, and the steps that remain.

    Attributes:
        steps_left: steps until training ends; None if that is unknown.
    """

    groups: tuple[GroupRun, ...] = ()
    steps_left: int | None = None

    def starts(self, now: float, workers: int) -> RunHistory:
        """Return the history after another group began to start; the one before has ended."""
        ended = self.ends(now, is_disrupted=False)
        return replace(ended, groups=(*ended.groups, GroupRun(workers, now))[-_MOST_GROUPS:])

    def ends(self, now: float, *, is_disrupted: bool) -> RunHistory:
        """Return the history after the present group ended, if it had not ended before.

        A group that failed before its first step, after a disruption, met the same one.
        """
        if not self.groups or self.groups[-1].ended is not None:
            return self
        if not self.takes_steps() and any(group.is_disrupted for group in self.groups[-2:-1]):
            is_disrupted = False
        return self._with_present(replace(self.groups[-1], ended=now, is_disrupted=is_disrupted))

    def steps(self, now: float, step_s: float, steps_left: int | None) -> RunHistory:
        """Return the history after a step of the present group, which took `step_s` seconds."""
        if not self.groups:
            return self
        group = self.groups[-1]
        if group.restart_s is None:
            group = replace(group, restart_s=max(now - step_s - self._stopped_at(), 0.0), step_s=step_s)
        average = group.step_s + _NEW_STEP_SHARE * (step_s - group.step_s)
        return replace(self._with_present(replace(group, stepped=now, step_s=average)), steps_left=steps_left)

    def takes_steps(self) -> bool:
        """Return True if the present group has taken a step."""
        return bool(self.groups) and self.groups[-1].stepped is not None

    def failed_starts(self) -> int:
        """Return how many groups in a row before the present one have ended without a step."""
        before = reversed(self.groups[:-1])
        return sum(1 for _ in itertools.takewhile(lambda group: group.stepped is None, before))

    def restart_s(self) -> float:
        """Return the average seconds of a restart, in which later ones count more.

        Before the first restart, the start of the run stands for one.
        """
        known = [group.restart_s for group in self.groups if group.restart_s is not None]
        average, *later = known[1:] or known or [0.0]
        for seconds in later:
            average += _NEW_SHARE * (seconds - average)
        return average

    def undisturbed_s(self, now: float, size: int) -> float:
        """Return the expected seconds until a disruption of a group of more than `size` workers.

        The estimate is made from all groups and from the larger ones alone, and the shorter one
        counts. A node that comes and goes disrupts only groups that it belongs to.
        """
        larger = [group for group in self.groups if group.workers > size]
        return min(_mean_interval(self.groups, now), _mean_interval(larger, now))

    def outlook(self, now: float) -> Outlook:
        """Return what the present group can expect."""
        if not self.takes_steps():
            return Outlook(False, 0.0, 0.0, 0.0)
        group = self.groups[-1]
        left_s = math.inf if self.steps_left is None else self.steps_left * group.step_s
        return Outlook(True, self.restart_s(), self.undisturbed_s(now, group.workers), left_s)

    def _stopped_at(self) -> float:
        """Return when training stopped for the start of the present group.

        A group that yields stops at its last step. After a disruption, the time until it was
        noticed does not count, because a voluntary restart has none.
        """
        present, before = self.groups[-1], self.groups[-2] if len(self.groups) > 1 else None
        if before is None or before.is_disrupted or before.stepped is None:
            return present.started
        return before.stepped

    def _with_present(self, group: GroupRun) -> RunHistory:
        return replace(self, groups=(*self.groups[:-1], group))


def _mean_interval(groups: Iterable[GroupRun], now: float) -> float:
    """Return the expected seconds between disruptions: a Gamma-Poisson mean that forgets.

    Seconds and disruptions of the past count less the longer ago they are.
    """
    seconds, disruptions = _PRIOR_WEIGHT * _PRIOR_S, _PRIOR_WEIGHT
    for group in groups:
        ended = now if group.ended is None else group.ended
        seconds += _MEMORY_S * (_weight(now - ended) - _weight(now - group.started))
        disruptions += _weight(now - ended) * group.is_disrupted
    return seconds / disruptions


def _weight(age: float) -> float:
    return math.exp(-age / _MEMORY_S)
