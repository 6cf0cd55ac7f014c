"""Bench of Ray workers without a running group, and reservations of the resources of groups.

The bench lives in the process of Ray Train's controller. Workers come to it when their group ends
or, as recruits, when they start beside a running group. The next group takes those that respond.

Every placement group belongs to workers on the bench, to recruits, or to the reservation of the
group that runs or starts. It is removed when the last of its workers ends, so
:func:`end_benched_workers` leaves no worker and no placement group of a group that has ended. If
the controller dies first, its successor finds the placement groups by name and removes them.

Written for Ray 2.60.0. Relies on the methods of `PlacementGroupHandle`, through which Ray Train
waits for the resources of a group and gives them up.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import ray
from ray.train.v2._internal.execution.worker_group.placement_group_handle import PlacementGroupHandle
from ray.train.v2._internal.execution.worker_group.worker import Worker
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group_table,
    remove_placement_group,
)

from plad_dist.compat.assumptions import Assumptions
from plad_dist.compat.ray_scaling import node_resources

PATIENCE_S = 5.0  # for a worker to reply, or to end its training function

_assumptions = Assumptions("ray", "2.60.0")
_assumptions.parameters(_assumptions.attribute(PlacementGroupHandle, "wait"), "self", "timeout_seconds")


class Member(NamedTuple):
    """Worker of a group, and the placement group that holds its resources."""

    worker: Worker
    resources: PlacementGroup

    @property
    def node(self) -> str:
        return str(self.worker.metadata.node_id)


class Recruit(NamedTuple):
    """Worker that starts.

    Attributes:
        facts: reference of its metadata, which arrive when it has started.
        resources, bundle: placement group, and the part of it that is the worker's.
        node: id of the node that it starts on; empty if Ray chooses one.
        began: `time.monotonic()` of its start.
    """

    actor: Any
    facts: Any
    resources: PlacementGroup
    bundle: int
    node: str
    began: float


class Bench:
    """Workers that belong to no running group, and the resources of the group that runs or starts.

    Attributes:
        name: beginning of the names of all placement groups.
        ask_to_end: asks the training function of the worker that calls it to end soon, if it has
            begun.
        members: workers that have started.
        recruits: workers that start.
        reservation: resources of the group that runs or starts.
    """

    def __init__(self) -> None:
        self.name = ""
        self.ask_to_end: Callable[[], None] = lambda: None
        self.members: list[Member] = []
        self.recruits: list[Recruit] = []
        self.reservation: Reservation | None = None

    def take_over(self, name: str) -> None:
        """Set the name, and remove the placement groups that a dead controller has left with it."""
        self.name = name
        for entry in placement_group_table().values():
            if entry["name"].startswith(name) and entry["state"] != "REMOVED":
                with contextlib.suppress(ValueError):  # it has just been removed
                    remove_placement_group(get_placement_group(entry["name"]))

    def take(self, most: int) -> list[Member]:
        """Remove and return members that respond, on nodes that stay. The others end."""
        replies = {member.worker.actor.get_metadata.remote(): member for member in on_staying_nodes(self.members)}
        taken = [replies[reply] for reply in true_in_time(replies)][:most]
        end_others(self.members, taken)
        self.members = []
        return taken

    def end_leaving(self) -> None:
        """End members on nodes that leave."""
        staying = on_staying_nodes(self.members)
        end_others(self.members, staying)
        self.members = staying

    def dismiss(self, recruits: list[Recruit]) -> None:
        """End recruits."""
        for recruit in recruits:
            ray.kill(recruit.actor)
            remove_placement_group(recruit.resources)
        self.recruits = [recruit for recruit in self.recruits if recruit not in recruits]


bench = Bench()


def benched_nodes() -> list[str]:
    """Return the node of each worker on the bench, and of each recruit."""
    return [member.node for member in bench.members] + [recruit.node for recruit in bench.recruits]


def end_benched_workers() -> None:
    """End the workers on the bench, the recruits, and what a failed start of a group has left."""
    dismiss_recruits()
    if bench.reservation is not None:
        bench.reservation.end()


def dismiss_recruits() -> None:
    """End the workers on the bench, and the recruits."""
    end_others(bench.members, [])
    bench.members = []
    bench.dismiss(bench.recruits)


def recruits_have_started() -> bool:
    """Return True if no recruit is still on its way."""
    return not bench.recruits


def end_others(members: Iterable[Member], kept: Iterable[Member]) -> None:
    """Kill the workers that are not kept, and free the placement groups without kept ones."""
    members, kept = list(members), list(kept)
    kept_actors = {member.worker.actor for member in kept}
    for member in members:
        if member.worker.actor not in kept_actors:
            ray.kill(member.worker.actor)
    for resources in {member.resources for member in members} - {member.resources for member in kept}:
        remove_placement_group(resources)


def on_staying_nodes(members: Iterable[Member]) -> list[Member]:
    """Return the members whose nodes are alive and not about to leave."""
    staying = node_resources().keys()
    return [member for member in members if member.node in staying]


def true_in_time(replies: Iterable[Any]) -> list[Any]:
    """Return the references to replies that are true and arrive in time."""
    references = list(replies)
    done = ray.wait(references, num_returns=len(references), timeout=PATIENCE_S)[0] if references else []
    true = []
    for reference in done:
        with contextlib.suppress(ray.exceptions.RayError):
            if ray.get(reference):
                true.append(reference)
    return true


class Reservation(PlacementGroupHandle):  # type: ignore[misc]
    """Resources of a group: those of workers from the bench, and those for new workers.

    Attributes:
        kept: workers from the bench.
        free: placement group and bundle for each new worker.
        members: all workers, once they have started.
    """

    def __init__(self, kept: list[Member], new: list[PlacementGroup], workers: int, *, is_elastic: bool) -> None:
        self.kept, self._is_elastic = kept, is_elastic
        self.members: list[Member] = []
        self._groups = list(dict.fromkeys([*(member.resources for member in kept), *new]))
        taken = {(member.resources, member.worker.placement_group_bundle_index) for member in kept}
        # Ray moves the bundle of a lost node to another one.
        bundles = [(group, bundle) for group in self._groups for bundle in range(group.bundle_count)]
        self.free = [place for place in bundles if place not in taken][: workers - len(kept)]

    @property
    def placement_group(self) -> PlacementGroup:
        return self._groups[0]

    def ready(self) -> Any:
        """Raise: Ray's abstract class demands this method, but worker groups only call `wait`."""
        raise NotImplementedError

    def wait(self, timeout_seconds: float = 30) -> bool:
        until = time.monotonic() + timeout_seconds
        try:
            return all(group.wait(max(0.0, until - time.monotonic())) for group in self._groups)
        except Exception:  # noqa: BLE001 - Ray's own handle does the same; a group may have been removed
            return False

    def shutdown(self) -> None:
        """Give up the start of the group, or the group.

        Workers from the bench return to it if the start failed before they joined, unless others
        may wait for the resources of a group of one size.
        """
        if self.members or not self._is_elastic:
            self.end()
        else:
            bench.members += self.kept
            self._free(set(self._groups) - {member.resources for member in self.kept})

    def end(self) -> None:
        """End all workers, and free all resources."""
        for member in self.members or self.kept:
            ray.kill(member.worker.actor)
        self._free(self._groups)

    def pass_on(self, kept: list[Member]) -> None:
        """Move workers to the bench. The others end."""
        end_others(self.members, kept)
        bench.members += kept
        self._is_over()

    def _free(self, groups: Iterable[PlacementGroup]) -> None:
        for group in groups:
            remove_placement_group(group)
        self._is_over()

    def _is_over(self) -> None:
        if bench.reservation is self:
            bench.reservation = None
