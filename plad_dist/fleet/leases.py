"""Attempts under way: the driver sends leased blocks to actors, and records their commits."""

from __future__ import annotations

import logging
import time
import uuid

from plad_dist.errors import RunFailed, first_line
from plad_dist.fleet.actors import MAX_FAILING_ACTORS
from plad_dist.fleet.calls import OutstandingCalls, WorkCall
from plad_dist.fleet.fleet import Task
from plad_dist.fleet.output import OutputDatasets
from plad_dist.fleet.pool import Lease
from plad_dist.fleet.protocol import BlockResult
from plad_dist.fleet.running import FleetActor, RunningFleet
from plad_dist.progress import Progress

logger = logging.getLogger("plad")

_LONGEST_OUTAGE_S = 30.0  # of a storage that refuses everything


class LeaseManager:
    """Hands out the blocks of all fleets of a stage, and records what is committed."""

    def __init__(self, calls: OutstandingCalls, outputs: OutputDatasets, progress: Progress) -> None:
        self._calls, self._outputs, self._progress = calls, outputs, progress

    def fill_window(self, fleet: RunningFleet, actor: FleetActor, now: float) -> None:
        """Lease blocks to a ready actor until its window is full or no block is left for it."""
        while (lease := fleet.pool.take(actor.name, now)) is not None:
            task = lease.block
            job = fleet.fleet.assignments[task.assignment].job
            reply = actor.handle.work.remote(job, task.block, uuid.uuid4().hex, lease.hints)
            self._calls.add(reply, WorkCall(fleet, actor, lease))

    def commit(self, fleet: RunningFleet, lease: Lease[Task], result: BlockResult) -> None:
        """Record the block of a successful attempt, and cancel the other attempts at it.

        Raises:
            RunFailed: a dataset has too many error rows.
        """
        task = lease.block
        for futile_lease in fleet.pool.committed(task):
            if futile_lease is not lease:
                self._calls.cancel(futile_lease)
        units = self._outputs.add(task, result)
        if units is not None:
            fleet.failed_starts, fleet.failing_since = 0, None
            fleet.metrics.block_committed(result)
            self._progress.advance(units, tokens=result.part.counts.get("tokens", 0))
            self._outputs.check_errors(task.output)
            self._outputs.finish_complete()

    def fail(self, fleet: RunningFleet, lease: Lease[Task], cause: Exception) -> None:
        """Record an attempt that raised an exception; its block is retried.

        Raises:
            RunFailed: the block failed too often, or one block after the other does.
        """
        logger.warning("%s: %s failed: %s", lease.actor, lease.block, cause)
        fleet.metrics.block_retried()
        fleet.pool.failed(lease, first_line(cause))
        self._stop_if_all_fail(fleet, first_line(cause))

    def _stop_if_all_fail(self, fleet: RunningFleet, reason: str) -> None:
        """Raise :class:`RunFailed` if no attempt succeeds any more, as on a full disk.

        Failed blocks are retried after all others, which would fail in vain before the first of
        them has failed too often.
        """
        now = time.monotonic()
        if fleet.failing_since is None:
            fleet.failing_since = now
        limits, count = fleet.pool.limits, fleet.pool.failures_in_a_row
        limit = limits.max_attempts * limits.window * min(fleet.max_actors, MAX_FAILING_ACTORS)
        seconds = now - fleet.failing_since
        if count >= limit and seconds >= _LONGEST_OUTAGE_S:
            raise RunFailed(
                f"{fleet.name}: {count} attempts have failed in {seconds:.0f} s and none has succeeded, the last one "
                f"with: {reason}"
            )

    def expire(self, fleet: RunningFleet, now: float) -> None:
        """Cancel the attempts whose leases expired; their blocks are retried.

        Raises:
            RunFailed: a block failed too often.
        """
        for lease in fleet.pool.expire(now):
            logger.warning("%s: the lease of %s expired; the block is leased again", lease.actor, lease.block)
            self._calls.cancel(lease)
