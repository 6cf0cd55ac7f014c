"""Ray calls of the driver that have no reply yet, one class for each kind of call."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import ray

from plad_dist.fleet.fleet import Task
from plad_dist.fleet.pool import Lease
from plad_dist.fleet.running import FleetActor, RunningFleet


@dataclass(frozen=True, eq=False)
class ActorCall:
    """A call to an actor of a fleet."""

    fleet: RunningFleet
    actor: FleetActor


@dataclass(frozen=True, eq=False)
class PlacementCall(ActorCall):
    """Ray's own call, whose reply means that the actor has its resources and its process runs."""


@dataclass(frozen=True, eq=False)
class StartCall(ActorCall):
    """The start of the engine; the reply is a problem, or None."""


@dataclass(frozen=True, eq=False)
class HeartbeatCall(ActorCall):
    """A request for a heartbeat."""


@dataclass(frozen=True, eq=False)
class WorkCall(ActorCall):
    """An attempt at a block; the reply is a :class:`~plad_dist.fleet.protocol.BlockResult`."""

    lease: Lease[Task]


@dataclass(frozen=True, eq=False)
class StopCall(ActorCall):
    """The orderly end of an actor that left its fleet; its process is killed after the reply."""


class OutstandingCalls:
    """All calls without a reply, by Ray's reference of the reply."""

    def __init__(self) -> None:
        self._calls: dict[ray.ObjectRef[Any], ActorCall] = {}

    def add(self, reference: ray.ObjectRef[Any], call: ActorCall) -> None:
        """Record a call that was sent."""
        self._calls[reference] = call

    def wait(self, timeout_s: float) -> Iterator[tuple[ray.ObjectRef[Any], ActorCall]]:
        """Wait for a reply, then yield each call that has one.

        The caller may forget or cancel other calls between two of them, which are then not yielded.
        """
        references = list(self._calls)
        if not references:
            time.sleep(timeout_s)
        elif ray.wait(references, num_returns=1, timeout=timeout_s)[0]:
            # All replies that have arrived are handled in one pass.
            for reference in ray.wait(references, num_returns=len(references), timeout=0)[0]:
                call = self._calls.pop(reference, None)
                if call is not None:
                    yield reference, call

    def forget(self, actor: FleetActor) -> None:
        """Ignore the replies of an actor from now on."""
        for reference in [reference for reference, call in self._calls.items() if call.actor is actor]:
            del self._calls[reference]

    def cancel(self, lease: Lease[Task]) -> None:
        """Cancel the attempt of a lease and ignore its reply."""
        for reference, call in list(self._calls.items()):
            if isinstance(call, WorkCall) and call.lease is lease:
                del self._calls[reference]
                ray.cancel(reference)

    def take_stops(self, fleets: Collection[RunningFleet]) -> dict[ray.ObjectRef[Any], FleetActor]:
        """Remove the stop calls of some fleets and return their actors."""
        stops = {
            reference: call.actor
            for reference, call in self._calls.items()
            if isinstance(call, StopCall) and call.fleet in fleets
        }
        for reference in stops:
            del self._calls[reference]
        return stops
