"""Observer of a worker group in Ray Train's controller, which also answers its scaling policy.

It reports failures, restarts and waits to the driver, and keeps the policy from counting on
resources that are not available.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import ray

from plad_dist.compat.ray_scaling import Resources, node_resources, workers_that_fit
from plad_dist.compat.ray_train import WorkerGroupEvents, is_preemption
from plad_dist.compat.ray_worker_bench import benched_nodes, recruits_have_started
from plad_dist.compat.ray_worker_group import keep_workers
from plad_dist.errors import RunFailed
from plad_dist.nursery.warmth import WarmNodes
from plad_dist.timeline import Activity
from plad_dist.training.driver.failures import describe_failure, unreachable_ranks
from plad_dist.training.driver.growth import NodeRoom, room_in_parts, room_on_whole_nodes
from plad_dist.training.driver.mailbox import reply_to
from plad_dist.training.driver.resizing import Resizing
from plad_dist.training.messages import Enters, Said
from plad_dist.training.worker.entry import end_training

_REPORT_EVERY_S = 30.0
_SUSPECT_S = 30.0
_MAX_FAILED_STARTS = 5  # as for attempts without a new checkpoint


class GroupSettings(NamedTuple):
    """Settings of a worker group.

    Attributes:
        phases: names of its phases, for messages.
        fewest, most: its smallest and largest size.
        patience: seconds that a group of one size waits for resources; an elastic group waits
            without limit.
        check_every: seconds between checks of a running group for more room.
        nursery: kind of the nurseries that its processes come from; None if there are none.
    """

    phases: str
    fewest: int
    most: int
    patience: float
    check_every: float
    nursery: str | None = None


class WorkerGroupCallbacks(WorkerGroupEvents):
    """Observer of the worker group of some phases.

    Args:
        mailbox: mailbox actor of the driver.
    """

    def __init__(self, mailbox: Any, group: GroupSettings) -> None:
        super().__init__(mailbox, group)
        self._mailbox, self._group = mailbox, group
        self._resizing = Resizing(mailbox, self._report, group.fewest, group.most, group.check_every)
        self._warm_nodes = WarmNodes(group.nursery)
        self._suspected_at: dict[str, float] = {}  # by node that does not respond but that Ray has not found dead
        self._waits_since = self._reported_at = time.monotonic()
        self._activity: Activity | None = None  # of those that it has announced, the latest
        self._is_restarting = False
        self._failed_starts = 0  # groups in a row that failed before their first step

    def room(self, per_worker: Resources) -> int:
        """Return how many workers could start now if the group's own ended."""
        return room_in_parts(self._rooms(per_worker).values())

    def next_size(self, size: int, per_worker: Resources, granted: Callable[[], int]) -> int | None:
        """Return the size to restart the running group at now, or None to let it run.

        Args:
            granted: returns how many workers Ray would start, by what the nodes have in total.
        """
        rooms = cache(partial(self._rooms, per_worker))  # asks the cluster at most once
        return self._resizing.next_size(
            size,
            count_room=lambda: min(granted(), room_on_whole_nodes(rooms().values())),
            prepare=lambda workers: self._prepare(workers - size, rooms()),
            give_up=self.dismiss_recruits,
        )

    def _prepare(self, more: int, rooms: Mapping[str, NodeRoom]) -> bool:
        """Start more workers beside the group. Return True once they run on warm nodes."""
        missing = more - len(benched_nodes())
        places = [name for name, room in rooms.items() if room.is_whole for _ in range(room.usable - room.own)]
        for node, problem in self.recruit(places[: max(missing, 0)]).items():
            self._suspected_at[node] = time.monotonic()
            self._report(f"a worker cannot start on node {node}: {problem}")
        nodes = set(benched_nodes())
        return missing <= 0 and recruits_have_started() and self._warm_nodes.among(nodes) == nodes

    def on_controller_start(self) -> None:
        keep_workers(f"plad-train-{self._mailbox._actor_id.hex()}", end_training)
        self._waits_since = self._reported_at = time.monotonic()

    def on_group_start(self) -> None:
        self._resizing.reset()

    def on_running(self) -> None:
        workers = len(self.node_by_rank)
        if self._is_restarting and workers:
            self._report(f"resumes with {workers} workers")
        self._is_restarting = False
        self._waits_since = self._reported_at = time.monotonic()

    def on_failure(self, error: Any) -> None:
        """Report the failure.

        Raises:
            RunFailed: group after group fails before its first step. Workers count their failed
                attempts in the storage, but not while it refuses writes or before they have met.
        """
        self._is_restarting, self._waits_since = True, time.monotonic()
        self._mailbox.disrupted.remote()
        self._suspect_nodes(error)
        is_failed_start = not is_preemption(error) and not self._takes_steps()
        self._failed_starts = self._failed_starts + 1 if is_failed_start else 0
        if self._failed_starts == _MAX_FAILED_STARTS:
            raise RunFailed(f"{describe_failure(error)} ({_MAX_FAILED_STARTS} times in a row before the first step)")
        self._report(f"{describe_failure(error)}; the workers are restarted")

    def on_resize(self) -> None:
        self._is_restarting = True

    def on_scheduling(self, workers: int) -> None:
        self._enter(Activity.STARTING)
        reply_to(self._mailbox.new_group.remote(workers))

    def on_waiting(self) -> None:
        """Report the wait for resources.

        Raises:
            RunFailed: a group of one size has waited longer than its patience.
        """
        now = time.monotonic()
        waited = now - self._waits_since
        self._enter(Activity.WAITING)
        fewest, most, patience = self._group.fewest, self._group.most, self._group.patience
        size = f"{fewest} workers" if fewest == most else f"{fewest} to {most} workers"
        cluster = ray.cluster_resources()
        need = (
            f"room for {size}; the cluster has {cluster.get('CPU', 0):g} CPUs and {cluster.get('GPU', 0):g} GPUs in "
            "total"
        )
        if fewest == most and waited > patience:
            raise RunFailed(
                f"waited {waited:.0f} s (cluster.start_timeout_s) for {need}. Add nodes, or set fewer workers"
            )
        if now - self._reported_at >= _REPORT_EVERY_S:
            self._reported_at = now
            self._report(f"has waited {waited:.0f} s for {need}")

    def _takes_steps(self) -> bool:
        return bool(reply_to(self._mailbox.takes_steps.remote()))

    def _suspect_nodes(self, error: Any) -> None:
        """Suspect the nodes of workers that no longer respond.

        Ray may still list such a node as alive, but new workers cannot start there. Its resources
        are not counted for `_SUSPECT_S` seconds.
        """
        nodes = self.node_by_rank
        for rank in unreachable_ranks(error):
            if rank < len(nodes):
                self._suspected_at[nodes[rank]] = time.monotonic()

    def _rooms(self, per_worker: Resources) -> dict[str, NodeRoom]:
        """Return the room of each node that responds and stays, by its id."""
        suspects = {node for node, since in self._suspected_at.items() if time.monotonic() - since < _SUSPECT_S}
        own = Counter(self.own_nodes)

        def fitting(resources: Mapping[str, float]) -> int:
            return workers_that_fit(resources, per_worker)

        return {
            name: NodeRoom(fitting(node.total), fitting(node.free), own[name])
            for name, node in node_resources().items()
            if name not in suspects
        }

    def _enter(self, activity: Activity) -> None:
        """Announce an activity, once until another one follows."""
        if activity is not self._activity:
            self._activity = activity
            self._mailbox.post.remote(Enters(activity))

    def _report(self, text: str) -> None:
        self._mailbox.post.remote(Said(self._group.phases, text))
