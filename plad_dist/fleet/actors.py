"""Life of the actors of a fleet: request, start, heartbeats, loss, release, stop."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from plad_dist.config import Sampling
from plad_dist.errors import RunFailed, UserError, first_line
from plad_dist.fleet.calls import HeartbeatCall, OutstandingCalls, PlacementCall, StartCall, StopCall
from plad_dist.fleet.fleet import Fleet, Task
from plad_dist.fleet.protocol import EngineStartError, Heartbeat, RowsInFlight
from plad_dist.fleet.running import FleetActor, RunningFleet
from plad_dist.progress import Progress
from plad_dist.timeline import parts_text

logger = logging.getLogger("plad")

_MAX_FIRST_STARTS = 3  # starts before the first engine of a fleet is up
MAX_FAILING_ACTORS = 8  # a fleet stops after max_attempts + 1 failures in a row for each of these
STOP_TIMEOUT_S = 30.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 300.0
_MAX_DOUBLINGS = 16
_CONCURRENT_CALLS = 1000  # of one actor: its leases, heartbeats and the stop


@dataclass(frozen=True)
class ActorLoss:
    """Loss of an actor: its reason, and whether its blocks are suspect.

    Attributes:
        rows_in_flight: unfinished rows of each block when its engine died or hung; a block without
            an entry has unknown rows. None if the blocks are not suspect.
        is_hang: True if the engine is alive but makes no progress.
    """

    reason: str
    rows_in_flight: RowsInFlight | None = None
    is_hang: bool = False


class ActorManager:
    """Requests, watches and ends the actors of all fleets of a stage."""

    def __init__(self, sampling: Sampling, calls: OutstandingCalls, progress: Progress) -> None:
        self._sampling, self._calls, self._progress = sampling, calls, progress

    # -- start

    def request_missing(self, fleet: RunningFleet, now: float) -> None:
        """Request actors up to the useful number, unless the fleet must pause after a loss."""
        while now >= fleet.next_request_at and len(fleet.actors) < fleet.useful_count:
            self._request(fleet)

    def _request(self, fleet: RunningFleet) -> None:
        name = f"{fleet.name}-{fleet.request_count}"
        fleet.request_count += 1
        actor = FleetActor(name, *_create(fleet.fleet))
        fleet.actors[name] = actor
        fleet.metrics.actor_requested()
        self._calls.add(actor.handle.__ray_ready__.remote(), PlacementCall(fleet, actor))
        self._calls.add(actor.handle.start.remote(), StartCall(fleet, actor))

    def started(self, fleet: RunningFleet, actor: FleetActor, problem: str | None) -> bool:
        """Handle the reply to a start. Return True if the actor is ready for leases.

        Raises:
            UserError: no actor of the fleet can start.
        """
        if problem is not None:
            self._refused_start(fleet, actor, problem)
            return False
        now = time.monotonic()
        fleet.has_started = True
        actor.last_heartbeat = Heartbeat(0, 0)
        fleet.pool.join(actor.name, now)
        fleet.sufficient_since = now
        self._progress.say(f"{actor.name}: is up ({len(fleet.ready)} of at most {fleet.max_actors})")
        return True

    def _refused_start(self, fleet: RunningFleet, actor: FleetActor, problem: str) -> None:
        """Decide whether a problem is that of a node or of the config.

        A broken node refuses while the engines of other nodes still load; a wrong config is refused
        by every actor. So the first refusal ends the stage only when all actors that were starting
        at that moment have refused or are lost.
        """
        starting = {peer.name for peer in fleet.starting} - {actor.name}
        if fleet.first_refusal_peers is None:
            fleet.first_refusal_peers = starting
        if not fleet.has_started and not fleet.first_refusal_peers & starting:
            raise UserError(problem)
        self.lose(fleet, actor, ActorLoss(problem))

    def failed_start(self, fleet: RunningFleet, actor: FleetActor, cause: Exception) -> None:
        """Handle an exception of a start. After an `EngineStartError`, another actor may succeed.

        Raises:
            RunFailed: no actor has ever started, and another try is pointless.
        """
        may_succeed = isinstance(cause, EngineStartError)
        if not fleet.has_started and may_succeed and fleet.failed_starts + 1 >= _MAX_FIRST_STARTS:
            raise RunFailed(f"{actor.name}: {first_line(cause)} (tried {fleet.failed_starts + 1} times)") from None
        if not fleet.has_started and not may_succeed:
            raise RunFailed(f"{actor.name}: did not start: {cause!r}") from None
        self.lose(fleet, actor, ActorLoss(f"did not start: {first_line(cause)}"))

    # -- watch

    def request_heartbeats(self, fleet: RunningFleet) -> None:
        """Call for a heartbeat of each actor that has replied to the previous call."""
        for actor in fleet.ready:
            if not actor.awaits_heartbeat:
                actor.awaits_heartbeat = True
                self._calls.add(actor.handle.heartbeat.remote(), HeartbeatCall(fleet, actor))

    def heard(self, fleet: RunningFleet, actor: FleetActor, heartbeat: Heartbeat) -> None:
        """Handle a heartbeat of a ready actor."""
        now, previous = time.monotonic(), actor.last_heartbeat
        assert previous is not None
        actor.awaits_heartbeat, actor.last_heartbeat = False, heartbeat
        if heartbeat.finished > previous.finished:
            fleet.failed_starts = 0
        if heartbeat.start and heartbeat.start != actor.start:
            actor.start = heartbeat.start
            self._progress.say(f"{actor.name}: responded first after {parts_text(heartbeat.start)}")
        if heartbeat.is_reloading and not previous.is_reloading:
            self._progress.say(f"{actor.name}: changes to the weights of the next model")
        if not heartbeat.is_reloading:
            actor.reloading_since = None
        elif actor.reloading_since is None:
            actor.reloading_since = now
        # Tokens shrink when requests are cancelled; only growth is progress.
        has_grown = heartbeat.finished > previous.finished or heartbeat.tokens > previous.tokens
        fleet.pool.heartbeat(actor.name, has_grown or self._may_still_load(actor, now), now)

    def _may_still_load(self, actor: FleetActor, now: float) -> bool:
        since = actor.reloading_since
        return since is not None and now - since <= self._sampling.engine_start_timeout_s

    def give_up_unresponsive(self, fleet: RunningFleet, now: float) -> None:
        """End the actors that are silent, hang, or do not start in time."""
        for name, reason in fleet.pool.silent(now):
            self.lose(fleet, fleet.actors[name], ActorLoss(reason))
        for name, reason in fleet.pool.stalled(now):
            heartbeat = fleet.actors[name].last_heartbeat
            assert heartbeat is not None
            self.lose(fleet, fleet.actors[name], ActorLoss(reason, heartbeat.stuck_rows or None, is_hang=True))
        timeout_s = self._sampling.engine_start_timeout_s
        for actor in fleet.starting:
            if actor.placed_at is not None and now - actor.placed_at > timeout_s:
                limit = f"sampling.engine_start_timeout_s={timeout_s:g}"
                self.lose(fleet, actor, ActorLoss(f"it had its resources but was not up within {limit}"))

    # -- end

    def lose(self, fleet: RunningFleet, actor: FleetActor, loss: ActorLoss) -> None:
        """End an actor that is dead or given up. Its blocks are leased again.

        Raises:
            RunFailed: a block failed too often, or actors are lost again and again.
        """
        is_suspect = loss.rows_in_flight is not None
        event = "hangs" if loss.is_hang and is_suspect else "died"
        logger.warning("%s %s (%s); its blocks are leased again", actor.name, event, loss.reason)
        self._calls.forget(actor)
        del fleet.actors[actor.name]
        actor.end()
        if not actor.is_ready:
            fleet.failed_starts += 1
        fleet.metrics.actor_lost()
        if loss.rows_in_flight is None:
            fleet.pool.leave(actor.name)
        else:
            rows: dict[Task, tuple[int, ...]] = {
                task: loss.rows_in_flight.get((task.output, task.block), ()) for task in fleet.pool.leased(actor.name)
            }
            fleet.pool.engine_died(actor.name, loss.reason, rows, is_hang=loss.is_hang)
        fleet.next_request_at = time.monotonic() + _pause_s(fleet.failed_starts)
        self._stop_if_hopeless(fleet, loss.reason)

    def _stop_if_hopeless(self, fleet: RunningFleet, reason: str) -> None:
        limit = (self._sampling.max_attempts + 1) * min(fleet.max_actors, MAX_FAILING_ACTORS)
        for count, result in ((fleet.pool.failures_in_a_row, "committed"), (fleet.failed_starts, "finished")):
            if count >= limit:
                raise RunFailed(
                    f"{fleet.name}: actors died {count} times in a row with nothing {result} in between, the last one "
                    f"with: {reason}. Committed blocks are kept; see the Ray logs of the actor, then run again."
                )

    def release_surplus(self, fleet: RunningFleet) -> None:
        """Release the actors that have nothing left to do, unready ones first."""
        surplus = len(fleet.actors) - max(1, fleet.useful_count)
        if surplus > 0:
            waiting = [actor for actor in fleet.actors.values() if not actor.is_ready]
            idle = [actor for actor in fleet.ready if not fleet.pool.leased(actor.name)]
            for actor in [*waiting, *idle][:surplus]:
                self._release(fleet, actor)

    def _release(self, fleet: RunningFleet, actor: FleetActor) -> None:
        logger.info("%s: stopped, because no work is left for it", actor.name)
        del fleet.actors[actor.name]
        self._calls.forget(actor)
        if actor.is_ready:
            fleet.pool.leave(actor.name)
            self._calls.add(actor.handle.stop.remote(), StopCall(fleet, actor))
        else:
            actor.end()

    def stop(self, fleets: Collection[RunningFleet], timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Stop all actors of some fleets. An engine that does not stop in time is killed."""
        stopping = self._calls.take_stops(fleets)
        for fleet in fleets:
            for actor in fleet.actors.values():
                self._calls.forget(actor)
                if actor.is_ready:
                    stopping[actor.handle.stop.remote()] = actor
                else:
                    actor.end()
            fleet.actors.clear()
        if stopping:
            ray.wait(list(stopping), num_returns=len(stopping), timeout=timeout_s)
        for actor in stopping.values():
            actor.end()


def _create(fleet: Fleet) -> tuple[ActorHandle[Any], PlacementGroup | None]:
    """Create an actor in Ray, which waits in Ray's queue for its resources."""
    placement, group = fleet.placement, None
    options: dict[str, Any] = {"num_cpus": placement.cpus, "num_gpus": placement.gpus}
    if placement.bundles:
        group = ray.util.placement_group([{"GPU": 1, "CPU": placement.cpus}] * placement.bundles, strategy="PACK")
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
        )
    actor_class = ray.remote(fleet.worker).options(
        **options, max_concurrency=_CONCURRENT_CALLS, runtime_env={"env_vars": dict(fleet.environment)}
    )
    return actor_class.remote(*fleet.arguments), group


def _pause_s(failed_starts: int) -> float:
    """Return the seconds before the next request, which double with each failed start in a row."""
    return min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(failed_starts, _MAX_DOUBLINGS))
