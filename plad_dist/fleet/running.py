"""State of a fleet in the driver: its actors, from request to end, and the pool of its blocks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup

from plad_dist.config import Sampling
from plad_dist.fleet.fleet import Fleet, Task
from plad_dist.fleet.metrics import FleetMetrics
from plad_dist.fleet.placement import replicas_that_fit
from plad_dist.fleet.pool import BlockPool, Limits
from plad_dist.fleet.protocol import Heartbeat


@dataclass(eq=False)
class FleetActor:
    """One actor of a fleet: requested, placed (it has its resources), ready (its engine is up).

    Attributes:
        group: placement group of an engine that spans nodes, otherwise None.
        placed_at: time at which Ray gave it its resources; None while it waits in Ray's queue.
        last_heartbeat: latest heartbeat; None until the actor is ready.
        awaits_heartbeat: True while a heartbeat call has no reply.
        reloading_since: time since which its engine changes its weights, otherwise None.
        start: parts of the latest start of its engine that was reported.
    """

    name: str
    handle: ActorHandle[Any]
    group: PlacementGroup | None
    placed_at: float | None = None
    last_heartbeat: Heartbeat | None = None
    awaits_heartbeat: bool = False
    reloading_since: float | None = None
    start: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_ready(self) -> bool:
        """True once the engine is up."""
        return self.last_heartbeat is not None

    @property
    def computes(self) -> bool:
        """True while the engine is up and does not restart."""
        return self.is_ready and self.reloading_since is None

    @property
    def is_starting(self) -> bool:
        """True while the actor has its resources and its engine is not up."""
        return self.placed_at is not None and not self.is_ready

    def end(self) -> None:
        """Kill the process and free its resources."""
        ray.kill(self.handle)
        if self.group is not None:
            ray.util.remove_placement_group(self.group)


@dataclass(eq=False)
class RunningFleet:
    """A fleet in progress.

    Attributes:
        actors: current actors by name, in the order of their requests.
        max_actors: largest number of actors at this moment.
        request_count: actors requested so far.
        failed_starts: failed starts in a row, with nothing finished by any actor in between.
        failing_since: time of the first failed attempt since the latest commit, otherwise None.
        has_started: True once any actor has been ready.
        first_refusal_peers: actors that were starting when the first actor refused to start; None
            before that.
        next_request_at: time before which no actor is requested, after a loss.
        sufficient_since: latest time at which the fleet had enough actors.
    """

    fleet: Fleet
    pool: BlockPool[Task]
    metrics: FleetMetrics
    actors: dict[str, FleetActor] = field(default_factory=dict)
    max_actors: int = 1
    request_count: int = 0
    failed_starts: int = 0
    failing_since: float | None = None
    has_started: bool = False
    first_refusal_peers: set[str] | None = None
    next_request_at: float = 0.0
    sufficient_since: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        """Name of the fleet."""
        return self.fleet.name

    @property
    def ready(self) -> list[FleetActor]:
        """Actors whose engine is up."""
        return [actor for actor in self.actors.values() if actor.is_ready]

    @property
    def starting(self) -> list[FleetActor]:
        """Actors that have their resources and whose engine is not up."""
        return [actor for actor in self.actors.values() if actor.is_starting]

    @property
    def placed_count(self) -> int:
        """Number of actors that have their resources."""
        return sum(actor.is_ready or actor.is_starting for actor in self.actors.values())

    @property
    def useful_count(self) -> int:
        """Number of actors that would have something to do."""
        return min(self.max_actors, self.pool.unfinished)

    @property
    def min_count(self) -> int:
        """Smallest number of actors with which the stage continues."""
        return min(self.fleet.min_replicas, self.useful_count)

    def is_ready(self, actor: str) -> bool:
        """Return True if the fleet has an actor of this name and its engine is up."""
        return actor in self.actors and self.actors[actor].is_ready

    def update_max_actors(self) -> None:
        """Set the largest number of actors for the present size of the cluster."""
        replicas = self.fleet.replicas
        if replicas == "auto":
            replicas = replicas_that_fit(self.fleet.placement, ray.cluster_resources())
        self.max_actors = replicas

    def show_metrics(self) -> None:
        """Set the gauges of the fleet to its present state."""
        heartbeats = [actor.last_heartbeat for actor in self.actors.values() if actor.last_heartbeat is not None]
        self.metrics.show_state(heartbeats, self.pool.waiting)


def open_fleet(fleet: Fleet, tasks: Sequence[Task], sampling: Sampling, stage: str) -> RunningFleet:
    """Return a fleet without actors whose pool holds `tasks`."""
    limits = Limits(
        window=fleet.window or sampling.window,
        max_attempts=sampling.max_attempts,
        heartbeat_timeout_s=sampling.heartbeat_timeout_s,
        stall_timeout_s=fleet.stall_timeout_s or sampling.stall_timeout_s,
        lease_timeout_s=fleet.lease_timeout_s or sampling.lease_timeout_s,
    )
    running = RunningFleet(fleet, BlockPool(tasks, limits), FleetMetrics(stage, fleet.name))
    running.update_max_actors()
    return running
