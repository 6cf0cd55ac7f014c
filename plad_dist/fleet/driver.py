"""The driver of fleets of actors that do blocks: leases from the pool, heartbeats, progress, and the manifest at the end.

Rows never pass through the driver. It holds no state that storage does not have: when it dies, the next one reads names and
journals and goes on.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayTaskError, TaskCancelledError

from plad_dist.config import Config
from plad_dist.data.storage import Storage
from plad_dist.data.store import Part
from plad_dist.errors import RunFailed, UserError, first_line
from plad_dist.fleet.fleet import Fleet, RunningFleet, Task
from plad_dist.fleet.metrics import FleetMetrics
from plad_dist.fleet.output import OutputDataset
from plad_dist.fleet.pool import BlockPool, Lease, Limits
from plad_dist.fleet.protocol import BlockResult, EngineDiedError, EngineStartError, Heartbeat, StopStageError, UnderWay
from plad_dist.progress import Progress

logger = logging.getLogger("plad")

_TICK_S = 1.0
_HEARTBEAT_EVERY_S = 5.0
_STARTS = 3  # of a fleet's first engine
_ENGINES_IN_DOUBT = 8  # a fleet stops after max_attempts failures in a row for each of so many actors
_ID_LINE = re.compile(r"(class_name|actor_id|pid|name|namespace|ip): ")
_STOP_S = 30.0
_REPLACE_AFTER_S, _LONGEST_PAUSE_S = 2.0, 300.0


def run_fleets(
    config: Config,
    storage: Storage,
    fleets: Sequence[Fleet],
    progress: Progress,
    *,
    stage: str = "sample",
    unit: str = "samples",
    facts: Callable[[Sequence[Part]], dict[str, Any]] = lambda parts: {},
) -> None:
    """Do every block of every fleet that is not committed yet, and write the manifests.

    Fleets run side by side where the cluster has room and one after the other where not: an actor without resources
    waits in Ray's queue. Committed blocks are never done again.

    Args:
        facts: makes a manifest's facts of its parts.

    Raises:
        UserError: an actor refused to start.
        RunFailed: a block kept failing, too many rows were errors, or there were too few actors for too long.
    """
    outputs: dict[str, OutputDataset] = {}
    for assignment in (assignment for fleet in fleets for assignment in fleet.assignments):
        job = assignment.job
        if job.output not in outputs and job.dataset(storage).manifest() is None:
            outputs[job.output] = OutputDataset(job, assignment.units, storage)
    driver = _Driver(config, storage, progress, outputs, facts)
    running = [found for fleet in fleets if (found := driver.open(fleet, stage)) is not None]
    if running:
        units = sum(output.units[block] for output in outputs.values() for block in output.missing)
        progress.start(stage, units, unit)
    try:
        driver.finish_complete()
        driver.run(running)
    finally:
        try:
            driver.stop(running)
        finally:
            for output in outputs.values():
                output.journal.keep()


class _Driver:
    def __init__(
        self,
        config: Config,
        storage: Storage,
        progress: Progress,
        outputs: dict[str, OutputDataset],
        facts: Callable[[Sequence[Part]], dict[str, Any]],
    ) -> None:
        self._sampling, self._cluster = config.sampling, config.cluster
        self._storage, self._progress, self._outputs, self._facts = storage, progress, outputs, facts
        # What each outstanding Ray call is about: the fleet, the actor, and its lease, or what else was asked.
        self._calls: dict[Any, tuple[RunningFleet, str, Lease | _Stopping | str]] = {}
        self._last_heartbeat = self._last_tick = time.monotonic()

    def open(self, fleet: Fleet, stage: str) -> RunningFleet | None:
        """The fleet with its missing blocks, None where it has none."""
        tasks = []
        for index, assignment in enumerate(fleet.assignments):
            output = self._outputs.get(assignment.job.output)
            if output is not None:
                tasks += [Task(index, block, assignment.job.output) for block in assignment.blocks
                          if block not in output.parts]  # fmt: skip
        if not tasks:
            return None
        sampling = self._sampling
        limits = Limits(
            window=fleet.window or sampling.window,
            max_attempts=sampling.max_attempts,
            heartbeat_timeout_s=sampling.heartbeat_timeout_s,
            stall_timeout_s=fleet.stall_timeout_s or sampling.stall_timeout_s,
            lease_timeout_s=fleet.lease_timeout_s or sampling.lease_timeout_s,
        )
        running = RunningFleet(fleet, BlockPool(tasks, limits), FleetMetrics(stage, fleet.name))
        running.size()
        return running

    def finish_complete(self) -> None:
        """Write the manifests of all datasets whose blocks are committed."""
        for name in [name for name, output in self._outputs.items() if output.complete]:
            self._outputs.pop(name).finish(self._sampling.max_error_share, self._facts)

    def run(self, running: list[RunningFleet]) -> None:
        next_tick = 0.0
        while any(not fleet.pool.finished for fleet in running):
            calls = list(self._calls)
            if not calls:
                time.sleep(_TICK_S)
            elif ray.wait(calls, num_returns=1, timeout=_TICK_S)[0]:  # whatever else is there is settled with it
                for call in ray.wait(calls, num_returns=len(calls), timeout=0)[0]:
                    if call in self._calls:
                        self._settle(call)
            if (now := time.monotonic()) >= next_tick:
                next_tick = now + _TICK_S
                self._tick([fleet for fleet in running if not fleet.pool.finished], now)

    # -- once a second

    def _tick(self, running: list[RunningFleet], now: float) -> None:
        heartbeats = now - self._last_heartbeat >= min(_HEARTBEAT_EVERY_S, self._sampling.heartbeat_timeout_s / 4)
        self._last_heartbeat = now if heartbeats else self._last_heartbeat
        away, self._last_tick = now - self._last_tick - _TICK_S, now
        for fleet in running:
            if away > _TICK_S:
                fleet.pool.excuse(away)
            fleet.size()
            for name, reason in fleet.pool.silent(now):
                self._lost(fleet, name, reason)
            for name, reason in fleet.pool.stalled(now):
                self._lost(fleet, name, reason, under_way=fleet.ready[name].stuck or None, hung=True)
            for name, since in list(fleet.starting.items()):
                if now - since > self._sampling.engine_start_timeout_s:
                    limit = f"sampling.engine_start_timeout_s={self._sampling.engine_start_timeout_s:g}"
                    self._lost(fleet, name, f"it had its resources, and was not up within {limit}")
            for lease in fleet.pool.overdue(now):
                logger.warning("%s: %s was not done within its time, leased again", lease.actor, lease.block)
                self._cancel(lease)
            if heartbeats:
                for name in fleet.ready.keys() - fleet.asked:
                    fleet.asked.add(name)
                    self._calls[fleet.actors[name].heartbeat.remote()] = (fleet, name, "heartbeat")
            self._scale(fleet, now)
            fleet.metrics.state(list(fleet.ready.values()), fleet.pool.waiting)
        self._refuse_too_few(running, now)
        self._progress.note(self._state(running))
        self._progress.tick()

    def _scale(self, fleet: RunningFleet, now: float) -> None:
        """Ask for actors up to what is useful; let idle ones go."""
        while now >= fleet.not_before and len(fleet.actors) < fleet.useful:
            self._add_actor(fleet)
        for name in list(fleet.ready):
            self._lease(fleet, name, now)
        surplus = len(fleet.actors) - max(1, fleet.useful)
        if surplus > 0:
            waiting = [name for name in fleet.actors if name not in fleet.ready]
            idle = [name for name in fleet.ready if not fleet.pool.leased(name)]
            for name in [*waiting, *idle][:surplus]:
                self._end(fleet, name)

    def _refuse_too_few(self, running: list[RunningFleet], now: float) -> None:
        for fleet in running:
            # It may be waiting for the resources of another fleet, which get free when that is done.
            others = any(other.placed for other in running if other is not fleet)
            if fleet.placed >= fleet.fewest or others:
                fleet.enough_since = now
            elif now - fleet.enough_since > self._cluster.start_timeout_s:
                raise RunFailed(self._no_resources(fleet))

    def _no_resources(self, fleet: RunningFleet) -> str:
        return (
            f"{fleet.fleet.name}: {fleet.placed} sampling actors for {self._cluster.start_timeout_s} s, wanted at least "
            f"{fleet.fewest} of {fleet.most}, each with {fleet.fleet.placement}. The cluster has "
            f"{_resources(ray.cluster_resources())}, free {_resources(ray.available_resources())}. What is committed is kept; "
            "add nodes, or lower replicas, min_replicas or cpus, then run again."
        )

    def _state(self, running: list[RunningFleet]) -> str:
        engines = ", ".join(f"{fleet.fleet.name} {len(fleet.ready)}/{len(fleet.actors)}" for fleet in running)
        errors = sum(output.errors for output in self._outputs.values())
        return f"up: {engines}" + (f", {errors:,} errors" if errors else "")

    # -- actors

    def _add_actor(self, fleet: RunningFleet) -> None:
        name = f"{fleet.fleet.name}-{fleet.born}"
        fleet.born += 1
        placement = fleet.fleet.placement
        options: dict[str, Any] = {"num_cpus": placement.cpus, "num_gpus": placement.gpus}
        if placement.bundles:
            group = ray.util.placement_group([{"GPU": 1, "CPU": placement.cpus}] * placement.bundles, strategy="PACK")
            fleet.groups[name] = group
            options["scheduling_strategy"] = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
            )
        actor = ray.remote(fleet.fleet.worker).options(
            **options, max_concurrency=1000, runtime_env={"env_vars": dict(fleet.fleet.environment)}
        )
        fleet.actors[name] = actor.remote(*fleet.fleet.arguments)
        fleet.metrics.started()
        self._calls[fleet.actors[name].__ray_ready__.remote()] = (fleet, name, "placed")
        self._calls[fleet.actors[name].start.remote()] = (fleet, name, "start")

    def _end(self, fleet: RunningFleet, name: str) -> None:
        """Stop an actor that is not needed any more. An engine that is up ends by itself."""
        logger.info("%s: nothing left for it to do, stopped", name)
        stopping = _Stopping(fleet.actors.pop(name), fleet.groups.pop(name, None))
        fleet.starting.pop(name, None)
        self._forget(name)
        if fleet.ready.pop(name, None) is None:
            stopping.end()
        else:
            fleet.pool.leave(name)
            self._calls[stopping.handle.stop.remote()] = (fleet, name, stopping)

    def _forget(self, actor: str) -> None:
        for call in [call for call, (_, name, _) in self._calls.items() if name == actor]:
            del self._calls[call]

    def _lost(
        self, fleet: RunningFleet, name: str, reason: str, under_way: UnderWay | None = None, *, hung: bool = False
    ) -> None:
        """An actor is gone or given up: its leases go back and another takes its place.

        Args:
            under_way: rows at the death of its engine, or when that was given up as hung; None where they are not to blame.
        """
        what = "hangs" if hung and under_way is not None else "died"
        logger.warning("%s %s (%s); its blocks are leased again", name, what, reason)
        self._forget(name)
        _kill(fleet.actors.pop(name), fleet.groups.pop(name, None))
        if fleet.ready.pop(name, None) is None:
            fleet.failed_starts += 1
        fleet.starting.pop(name, None)
        fleet.changing.pop(name, None)
        fleet.metrics.died()
        if under_way is not None:
            rows: dict[Hashable, tuple[int, ...]] = {
                task: under_way.get((task.output, task.block), ()) for task in fleet.leased(name)
            }
            fleet.pool.died(name, reason, rows, hung=hung)
        else:
            fleet.pool.leave(name)
        pause = min(_LONGEST_PAUSE_S, _REPLACE_AFTER_S * 2.0 ** min(fleet.failed_starts, 16))
        fleet.not_before = time.monotonic() + pause
        limit = (self._sampling.max_attempts + 1) * min(fleet.most, _ENGINES_IN_DOUBT)
        for count, what in ((fleet.pool.failures_in_a_row, "committed"), (fleet.failed_starts, "finished")):
            if count >= limit:
                raise RunFailed(
                    f"{fleet.fleet.name}: actors died {count} times in a row with nothing {what} in between, at last: "
                    f"{reason}. What is committed is kept; see the Ray logs of the actor, then run again."
                )

    # -- what actors answer

    def _settle(self, call: Any) -> None:
        fleet, actor, about = self._calls.pop(call)
        try:
            result = ray.get(call)
        except TaskCancelledError:
            return
        except RayActorError as error:
            if isinstance(about, _Stopping):
                about.end()
            else:
                # A process that dies while its node lives may have died of its rows.
                own = actor in fleet.ready and "node has died" not in str(error)
                self._lost(fleet, actor, _why_died(error), under_way={} if own else None)
        except RayTaskError as error:
            self._failed(fleet, actor, about, error.cause)
        else:
            match about:
                case "placed" if actor in fleet.actors and actor not in fleet.ready:
                    fleet.starting[actor] = time.monotonic()
                case "start":
                    self._started(fleet, actor, result)
                case "heartbeat":
                    self._heard(fleet, actor, result)
                case Lease():
                    self._committed(fleet, about, result)
                case _Stopping():
                    about.end()

    def _failed(self, fleet: RunningFleet, actor: str, about: Any, cause: Exception) -> None:
        match about:
            case "start" if (
                isinstance(cause, EngineStartError) and not fleet.started_once and fleet.failed_starts + 1 >= _STARTS
            ):
                raise RunFailed(f"{actor}: {first_line(cause)} It was tried {fleet.failed_starts + 1} times") from None
            case "start" if fleet.started_once or isinstance(cause, EngineStartError):
                self._lost(fleet, actor, f"did not start: {first_line(cause)}")
            case "start":
                raise RunFailed(f"{actor}: did not start: {cause!r}") from None
            case _Stopping():
                about.end()
            case _ if isinstance(cause, EngineDiedError):
                self._lost(fleet, actor, cause.reason, cause.under_way)
            case _ if isinstance(cause, UserError | StopStageError):
                raise cause from None
            case Lease():
                logger.warning("%s: %s failed: %s", actor, about.block, cause)
                fleet.metrics.retried()
                fleet.pool.fail(about, first_line(cause))

    def _started(self, fleet: RunningFleet, actor: str, problem: str | None) -> None:
        if problem is not None:
            # What is wrong with one node is told while the engines of others load, what is wrong with the config by all.
            if fleet.first_others is None:
                fleet.first_others = set(fleet.starting) - {actor}
            if not fleet.started_once and not (fleet.first_others - {actor}) & fleet.starting.keys():
                raise UserError(problem)
            self._lost(fleet, actor, problem)
            return
        fleet.started_once = True
        fleet.starting.pop(actor, None)
        fleet.ready[actor] = Heartbeat(0, 0)
        fleet.pool.join(actor, time.monotonic())
        fleet.enough_since = time.monotonic()
        self._progress.say(f"{actor}: is up ({len(fleet.ready)} of at most {fleet.most})")
        self._lease(fleet, actor, time.monotonic())

    def _heard(self, fleet: RunningFleet, actor: str, heartbeat: Heartbeat) -> None:
        fleet.asked.discard(actor)
        if actor in fleet.ready:
            if heartbeat.finished > fleet.ready[actor].finished:
                fleet.failed_starts = 0
            if heartbeat.changes and not fleet.ready[actor].changes:
                self._progress.say(f"{actor}: starts its engine anew, with the weights of the next model")
            now, before, fleet.ready[actor] = time.monotonic(), fleet.ready[actor], heartbeat
            if not heartbeat.changes:
                fleet.changing.pop(actor, None)
            loads = (
                heartbeat.changes
                and now - fleet.changing.setdefault(actor, now) <= self._sampling.engine_start_timeout_s
            )
            # Only growth: tokens of what is cancelled go, though nothing was done.
            grown = heartbeat.finished > before.finished or heartbeat.tokens > before.tokens
            fleet.pool.heartbeat(actor, grown or loads, now)

    def _lease(self, fleet: RunningFleet, actor: str, now: float) -> None:
        while (lease := fleet.pool.take(actor, now)) is not None:
            task = lease.block
            assert isinstance(task, Task)
            job = fleet.fleet.assignments[task.assignment].job
            call = fleet.actors[actor].work.remote(job, task.block, uuid.uuid4().hex, lease.hints)
            self._calls[call] = (fleet, actor, lease)

    def _committed(self, fleet: RunningFleet, lease: Lease, result: BlockResult) -> None:
        task = lease.block
        assert isinstance(task, Task)
        for other in fleet.pool.committed(task):
            if other is not lease:
                self._cancel(other)
        output = self._outputs.get(task.output)
        if output is not None and output.add(task.block, result):
            counts = result.part.counts
            fleet.failed_starts = 0
            fleet.metrics.committed(result)
            self._progress.advance(output.units[task.block], tokens=counts.get("tokens", 0))
            output.check_errors(self._sampling.max_error_share, at_end=False)
            self.finish_complete()
        if lease.actor in fleet.ready and not fleet.pool.finished:
            self._lease(fleet, lease.actor, time.monotonic())
        if fleet.pool.finished:
            self.stop([fleet])  # makes room for the others

    def _cancel(self, lease: Lease) -> None:
        for call in [call for call, (_, _, about) in self._calls.items() if about is lease]:
            del self._calls[call]
            ray.cancel(call)

    def stop(self, running: list[RunningFleet]) -> None:
        """Stop all engines; what does not stop by itself within seconds is killed."""
        ending: dict[Any, Any] = {}
        for call in [
            call for call, (owner, _, about) in self._calls.items() if owner in running and isinstance(about, _Stopping)
        ]:
            ending[call] = self._calls.pop(call)[2]
        for fleet in running:
            for name, handle in fleet.actors.items():
                self._forget(name)
                stopping = _Stopping(handle, fleet.groups.pop(name, None))
                if name in fleet.ready:
                    ending[handle.stop.remote()] = stopping
                else:
                    stopping.end()
            fleet.actors.clear()
            fleet.starting.clear()
            fleet.ready.clear()
        if ending:
            ray.wait(list(ending), num_returns=len(ending), timeout=_STOP_S)
        for about in ending.values():
            about.end()


@dataclass(frozen=True)
class _Stopping:
    """An actor on its way out."""

    handle: Any
    group: Any

    def end(self) -> None:
        _kill(self.handle, self.group)


def _kill(handle: Any, group: Any) -> None:
    ray.kill(handle)
    if group is not None:
        ray.util.remove_placement_group(group)


def _why_died(error: RayActorError) -> str:
    """Ray's reason, without its opening sentence, its ids and its advice."""
    if isinstance(error, ActorUnavailableError):
        reason = str(error).partition("RpcError: ")[2].partition(" rpc_code")[0]
        return f"its node or its process is gone, or cannot be reached: {reason or 'no connection'}"
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and line != ActorDiedError.BASE_ERROR_MSG and not _ID_LINE.match(line)]
    return " ".join(told)[:300] or "its actor died"


def _resources(found: Mapping[str, float]) -> str:
    return ", ".join(f"{found.get(name, 0):g} {name}s" for name in ("CPU", "GPU"))
