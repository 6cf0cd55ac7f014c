"""Texts about fleets: the progress note, too few actors, Ray's reason for the death of an actor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError

from plad_dist.fleet.running import RunningFleet
from plad_dist.timeline import Activity

_ID_LINE = re.compile(r"(class_name|actor_id|pid|name|namespace|ip): ")
_LONGEST_REASON = 300


def progress_note(fleets: Iterable[RunningFleet], errors: int) -> str:
    """Return the actors that are up, of all requested ones, and the number of error rows."""
    engines = ", ".join(f"{fleet.name} {len(fleet.ready)}/{len(fleet.actors)}" for fleet in fleets)
    return f"up: {engines}" + (f", {errors:,} errors" if errors else "")


def activity_of(fleets: Iterable[RunningFleet]) -> Activity:
    """Return the activity of a stage: it computes as soon as one actor does."""
    actors = [actor for fleet in fleets for actor in fleet.actors.values()]
    if any(actor.computes for actor in actors):
        return Activity.COMPUTING
    return Activity.STARTING if any(actor.placed_at is not None for actor in actors) else Activity.WAITING


def too_few_actors(fleet: RunningFleet, timeout_s: float) -> str:
    """Return the message for a fleet that did not get resources for enough actors."""
    return (
        f"{fleet.name}: for {timeout_s} s, only {fleet.placed_count} actors had their resources; expected at least "
        f"{fleet.min_count} of {fleet.max_actors}, each with {fleet.fleet.placement}. The cluster has "
        f"{_resources(ray.cluster_resources())}, of which {_resources(ray.available_resources())} are free. Committed "
        "blocks are kept; add nodes, or lower replicas, min_replicas or cpus, then run again."
    )


def death_reason(error: RayActorError) -> str:
    """Return Ray's reason without its opening sentence, its ids and its advice."""
    if isinstance(error, ActorUnavailableError):
        reason = str(error).partition("RpcError: ")[2].partition(" rpc_code")[0]
        return f"its node or its process is gone, or cannot be reached: {reason or 'no connection'}"
    lines = [line.strip() for line in str(error).splitlines()]
    reasons = [line for line in lines if line and line != ActorDiedError.BASE_ERROR_MSG and not _ID_LINE.match(line)]
    return " ".join(reasons)[:_LONGEST_REASON] or "its actor died"


def _resources(amounts: Mapping[str, float]) -> str:
    return ", ".join(f"{amounts.get(name, 0):g} {name}s" for name in ("CPU", "GPU"))
