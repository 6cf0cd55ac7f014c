"""The fleet driver: a loop that handles replies of actors, and looks after all fleets every second.

Rows never pass through the driver, and it holds no state that storage lacks. If it dies, the next
driver reads the names of parts and the journals, and continues.
:mod:`plad_dist.fleet.protocol` describes the calls between driver and actors.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError

from plad_dist.config import Config
from plad_dist.data.claims import OwnerCheck, SupersededError
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed, UserError
from plad_dist.fleet.actors import STOP_TIMEOUT_S, ActorLoss, ActorManager
from plad_dist.fleet.calls import (
    ActorCall,
    HeartbeatCall,
    OutstandingCalls,
    PlacementCall,
    StartCall,
    StopCall,
    WorkCall,
)
from plad_dist.fleet.display import activity_of, death_reason, progress_note, too_few_actors
from plad_dist.fleet.fleet import Fleet
from plad_dist.fleet.leases import LeaseManager
from plad_dist.fleet.output import ManifestFacts, OutputDatasets
from plad_dist.fleet.protocol import BlockResult, EngineDiedError, StopStageError
from plad_dist.fleet.running import RunningFleet, open_fleet
from plad_dist.progress import Progress

_TICK_S = 1.0
_HEARTBEAT_INTERVAL_S = 5.0
_SUPERSEDED_STOP_TIMEOUT_S = 10.0  # the command that has taken over needs the resources


def run_fleets(
    config: Config,
    storage: Storage,
    fleets: Sequence[Fleet],
    progress: Progress,
    *,
    stage: str = "sample",
    unit: str = "samples",
    facts: ManifestFacts = lambda parts: {},
) -> None:
    """Process all blocks of the fleets that are not committed yet, and write the manifests.

    Fleets run side by side if the cluster has room, otherwise one after the other: an actor without
    resources waits in Ray's queue. Committed blocks are never processed again.

    Args:
        stage: name of the stage, for progress and metrics.
        unit: plural name of a progress unit.
        facts: returns a manifest's facts for the parts of its dataset.

    Raises:
        UserError: an actor refused to start.
        RunFailed: a block kept failing, too many rows were errors, or too few actors got their
            resources.
        SupersededError: a later command has claimed the run. The actors are stopped.
    """
    outputs = OutputDatasets(fleets, storage, config.sampling.max_error_share, facts)
    running = [
        open_fleet(fleet, tasks, config.sampling, stage) for fleet in fleets if (tasks := outputs.missing_tasks(fleet))
    ]
    if running:
        progress.start(stage, outputs.missing_units, unit)
    driver = _Driver(config, storage, running, outputs, progress)
    try:
        outputs.finish_complete()
        while driver.unfinished_fleets:
            driver.handle_replies()
            driver.tick_if_due()
    except SupersededError:
        driver.stop_actors(_SUPERSEDED_STOP_TIMEOUT_S)
        raise
    except BaseException:
        _stop_and_keep(driver, outputs)
        raise
    _stop_and_keep(driver, outputs)


def _stop_and_keep(driver: _Driver, outputs: OutputDatasets) -> None:
    try:
        driver.stop_actors()
    finally:
        outputs.keep_journals()


class _Driver:
    """Actors, leases and outstanding calls of the fleets of one stage."""

    def __init__(
        self,
        config: Config,
        storage: Storage,
        fleets: list[RunningFleet],
        outputs: OutputDatasets,
        progress: Progress,
    ) -> None:
        self._cluster, self._progress = config.cluster, progress
        self._check_owner = OwnerCheck(storage)
        self._fleets, self._outputs = fleets, outputs
        self._calls = OutstandingCalls()
        self._actors = ActorManager(config.sampling, self._calls, progress)
        self._leases = LeaseManager(self._calls, outputs, progress)
        self._heartbeat_interval_s = min(_HEARTBEAT_INTERVAL_S, config.sampling.heartbeat_timeout_s / 4)
        self._next_tick = 0.0
        self._last_heartbeats = self._last_tick = time.monotonic()

    @property
    def unfinished_fleets(self) -> list[RunningFleet]:
        """Fleets with blocks that are not committed."""
        return [fleet for fleet in self._fleets if not fleet.pool.finished]

    def stop_actors(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Stop the actors of all fleets, as :meth:`ActorManager.stop` does."""
        self._actors.stop(self._fleets, timeout_s)

    # -- replies of actors

    def handle_replies(self) -> None:
        """Wait for replies, at most until the next tick, and handle them."""
        for reference, call in self._calls.wait(_TICK_S):
            try:
                reply = ray.get(reference)
            except TaskCancelledError:
                continue
            except RayActorError as error:
                self._handle_actor_death(call, error)
            except RayTaskError as error:
                self._handle_exception(call, error.cause)
            else:
                self._handle_reply(call, reply)

    def _handle_reply(self, call: ActorCall, reply: Any) -> None:
        fleet, actor = call.fleet, call.actor
        match call:
            case PlacementCall():
                actor.placed_at = time.monotonic()
            case StartCall():
                if self._actors.started(fleet, actor, reply):
                    self._leases.fill_window(fleet, actor, time.monotonic())
            case HeartbeatCall():
                self._actors.heard(fleet, actor, reply)
            case WorkCall():
                self._handle_commit(call, reply)
            case StopCall():
                actor.end()

    def _handle_commit(self, call: WorkCall, result: BlockResult) -> None:
        self._leases.commit(call.fleet, call.lease, result)
        if call.fleet.pool.finished:
            self._actors.stop([call.fleet])  # its resources are free for other fleets
        elif call.fleet.is_ready(call.actor.name):
            self._leases.fill_window(call.fleet, call.actor, time.monotonic())

    def _handle_exception(self, call: ActorCall, cause: Exception) -> None:
        fleet, actor = call.fleet, call.actor
        match call:
            case StartCall():
                self._actors.failed_start(fleet, actor, cause)
            case StopCall():
                actor.end()
            case _ if isinstance(cause, EngineDiedError):
                self._actors.lose(fleet, actor, ActorLoss(cause.reason, cause.rows_in_flight))
            case _ if isinstance(cause, UserError | StopStageError):
                raise cause from None
            case WorkCall():
                self._leases.fail(fleet, call.lease, cause)
            case _:
                pass  # without a valid heartbeat, the actor is soon given up as silent

    def _handle_actor_death(self, call: ActorCall, error: RayActorError) -> None:
        if isinstance(call, StopCall):
            call.actor.end()
            return
        # A process that dies while its node lives may have died of a row.
        is_suspect = call.actor.is_ready and "node has died" not in str(error)
        loss = ActorLoss(death_reason(error), rows_in_flight={} if is_suspect else None)
        self._actors.lose(call.fleet, call.actor, loss)

    # -- once a second

    def tick_if_due(self) -> None:
        """Look after all unfinished fleets if a second has passed."""
        now = time.monotonic()
        if now >= self._next_tick:
            self._next_tick = now + _TICK_S
            self._tick(self.unfinished_fleets, now)

    def _tick(self, fleets: list[RunningFleet], now: float) -> None:
        self._check_owner()
        are_heartbeats_due = now - self._last_heartbeats >= self._heartbeat_interval_s
        if are_heartbeats_due:
            self._last_heartbeats = now
        delay_s, self._last_tick = now - self._last_tick - _TICK_S, now
        for fleet in fleets:
            if delay_s > _TICK_S:  # the driver was delayed and could not hear the actors
                fleet.pool.excuse(delay_s)
            fleet.update_max_actors()
            self._actors.give_up_unresponsive(fleet, now)
            self._leases.expire(fleet, now)
            if are_heartbeats_due:
                self._actors.request_heartbeats(fleet)
            self._actors.request_missing(fleet, now)
            for actor in fleet.ready:
                self._leases.fill_window(fleet, actor, now)
            self._actors.release_surplus(fleet)
            fleet.show_metrics()
        self._check_actor_counts(fleets, now)
        self._progress.enter(activity_of(fleets))
        self._progress.note(progress_note(fleets, self._outputs.errors))
        self._progress.tick()

    def _check_actor_counts(self, fleets: list[RunningFleet], now: float) -> None:
        """Raise :class:`RunFailed` if a fleet has had too few actors for too long."""
        for fleet in fleets:
            # A fleet without actors may wait for the resources of another fleet, which become free.
            is_another_placed = any(other.placed_count for other in fleets if other is not fleet)
            if fleet.placed_count >= fleet.min_count or is_another_placed:
                fleet.sufficient_since = now
            elif now - fleet.sufficient_since > self._cluster.start_timeout_s:
                raise RunFailed(too_few_actors(fleet, self._cluster.start_timeout_s))
