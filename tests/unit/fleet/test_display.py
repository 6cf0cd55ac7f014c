"""Texts about fleets: Ray's reasons are kept, its advice and ids are not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, ActorUnavailableError

from plad_dist.fleet.display import activity_of, death_reason
from plad_dist.fleet.protocol import Heartbeat
from plad_dist.fleet.running import FleetActor
from plad_dist.timeline import Activity


def test_the_reason_of_a_death_has_no_ids_and_no_advice() -> None:
    context = ActorDiedErrorContext(
        error_message="The actor is dead because its node has died. Node Id: 2c",
        actor_id=bytes(16),
        class_name="Sampler",
        pid=7,
        node_ip_address="10.0.0.1",
    )
    assert death_reason(ActorDiedError(context)) == "The actor is dead because its node has died. Node Id: 2c"


def test_a_death_without_a_reason_is_reported_as_such() -> None:
    assert death_reason(ActorDiedError()) == "its actor died"


def test_an_actor_that_cannot_be_reached_is_reported_with_the_connection_error() -> None:
    error = ActorUnavailableError("RpcError: failed to connect rpc_code: 14", actor_id=None)
    assert death_reason(error).startswith("its node or its process is gone, or cannot be reached: failed to connect")


def fleet_of(*actors: FleetActor) -> Any:
    return SimpleNamespace(actors={actor.name: actor for actor in actors})


def test_stage_computes_from_the_first_engine_on_and_waits_without_resources() -> None:
    queued = FleetActor("teacher-0", None, None)  # type: ignore[arg-type]
    placed = FleetActor("teacher-1", None, None, placed_at=1.0)  # type: ignore[arg-type]
    ready = FleetActor("student-0", None, None, placed_at=1.0, last_heartbeat=Heartbeat(0, 0))  # type: ignore[arg-type]
    assert activity_of([fleet_of(), fleet_of(queued)]) == Activity.WAITING
    assert activity_of([fleet_of(queued, placed)]) == Activity.STARTING
    assert activity_of([fleet_of(queued), fleet_of(placed, ready)]) == Activity.COMPUTING
    ready.reloading_since = 2.0
    assert activity_of([fleet_of(ready)]) == Activity.STARTING
