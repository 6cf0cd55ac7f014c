"""Announced interruptions of a worker group: a node will leave, or the group is resized.

The group writes a checkpoint when nodes are announced to leave, and another one shortly before they
do. A group that is to be resized writes one at once. Either way all ranks then wait until Ray Train
replaces the group, because further steps would be lost.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

from plad_dist.errors import RunFailed
from plad_dist.training.worker.metrics_log import MetricsLog
from plad_dist.training.worker.signals import StepSignals

_CHECK_EVERY_S = 1.0
_MARGIN_S = 15.0  # between the last checkpoint and the departure of a node
_GRACE_S = 180.0  # beyond the time that Ray Train gives nodes that announce no deadline


class PreemptionNotices:
    """Preemption notices of Ray and the driver's requests to yield, followed on every rank.

    The clock of the first rank decides when all ranks check for notices.

    Args:
        mailbox: mailbox of the driver; None if there is nobody to ask.
    """

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox
        self._checked_at = time.monotonic()
        self._leaving_nodes: set[str] = set()
        self._deadline: float | None = None  # seconds since the epoch; None if unknown or no node leaves
        self._yield_group = 0  # number of the worker group that is asked to yield; 0 for none

    def poll(self, commit_seconds: float, step_seconds: float) -> StepSignals:
        """Return the signals `check_preemption` and `leave` for the current step.

        Only the first rank calls it.

        Args:
            commit_seconds: time that the latest checkpoint took until it was committed.
            step_seconds: time that the latest step took.
        """
        if self._mailbox is None:
            return StepSignals()
        must_check = time.monotonic() - self._checked_at >= _CHECK_EVERY_S
        if must_check:
            self._checked_at = time.monotonic()
            self._yield_group = self._mailbox.wants_yield()
        margin = _MARGIN_S + 3 * commit_seconds + 2 * step_seconds
        is_near = self._deadline is None or time.time() >= self._deadline - margin
        must_leave = (bool(self._leaving_nodes) and is_near) or bool(self._yield_group)
        return StepSignals(check_preemption=must_check, leave=must_leave)

    def check(self, log: MetricsLog | None) -> bool:
        """Ask Ray which nodes will leave; all ranks call it together.

        Returns:
            True if Ray reports leaving nodes that it did not report before.
        """
        nodes, deadline = self._mailbox.leaving_nodes()
        return self.record(nodes, deadline, log)

    def record(self, leaving: Collection[str], deadline: float | None, log: MetricsLog | None) -> bool:
        """Record the nodes that will leave; return True if there are further ones.

        Args:
            deadline: when they leave, in seconds since the epoch; None if it is unknown.
        """
        nodes = set(leaving)
        if not nodes:
            return False
        if self._leaving_nodes and deadline and self._deadline:
            deadline = min(deadline, self._deadline)
        self._deadline = deadline
        if nodes <= self._leaving_nodes:  # a known node, though its deadline may have moved forward
            return False
        self._leaving_nodes |= nodes
        if log is not None:
            when = "soon" if self._deadline is None else f"in {self._deadline - time.time():.0f} s"
            log.report(
                f"a node will leave {when} ({', '.join(sorted(nodes))}): a checkpoint is written now, and another one "
                "before it leaves"
            )
        return True

    def wait_for_restart(self, log: MetricsLog | None, step: int) -> None:
        """Block until Ray Train ends this worker group.

        Raises:
            RunFailed: the group was not ended in time.
        """
        reason = "a node will leave" if self._leaving_nodes else "the number of workers changes"
        if log is not None:
            log.report(f"{reason}: the checkpoint of step {step} is committed; the workers wait for their restart")
            self._mailbox.yielded(self._yield_group)
        until = (self._deadline or time.time()) + _GRACE_S
        while time.time() < until:
            time.sleep(0.5)
        raise RunFailed(f"{reason}, but the workers were not restarted")
