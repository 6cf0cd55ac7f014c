"""Resize decisions and observer of a worker group, in Ray Train's controller.

It reports failures, restarts and waits to the driver, keeps the elastic policy from counting
resources that are not available, and has a group write a checkpoint before it is resized.
"""

from __future__ import annotations

import time
from typing import Any

import ray

from plad_dist.compat.ray_train import (
    WorkerGroupEvents,
    count_only_free_resources,
    free_resources,
    is_preemption,
    resize_only_after_yield,
)
from plad_dist.errors import RunFailed
from plad_dist.training.driver.failures import describe_failure, unreachable_ranks
from plad_dist.training.messages import Said

_REPORT_EVERY_S = 30.0
_SUSPECT_S = 30.0
_MAX_FAILED_STARTS = 5  # as for attempts without a new checkpoint


class WorkerGroupCallbacks(WorkerGroupEvents):
    """Observer of the worker group of some phases.

    Args:
        mailbox: mailbox actor of the driver.
        phases: names of the phases, for messages.
        fewest, most: smallest and largest size of the group.
        patience: seconds that a group of one size waits for resources; an elastic group waits
            without limit.
    """

    def __init__(self, mailbox: Any, phases: str, fewest: int, most: int, patience: float) -> None:
        super().__init__()
        self._mailbox, self._phases, self._fewest, self._most, self._patience = mailbox, phases, fewest, most, patience
        self._suspected_at: dict[str, float] = {}  # by node that does not respond but that Ray has not found dead
        self._waits_since = self._reported_at = time.monotonic()
        self._is_restarting = self._is_asked_to_yield = False
        self._failed_starts = 0  # groups in a row that failed before their first step

    def on_controller_start(self) -> None:
        self._waits_since = self._reported_at = time.monotonic()
        count_only_free_resources(self._free_by_node, self._own_workers_on)
        resize_only_after_yield(self._takes_steps, self._ask_to_yield, self._has_yielded)

    def on_group_start(self) -> None:
        self._is_asked_to_yield = False

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
        self._suspect_nodes(error)
        is_failed_start = not is_preemption(error) and not self._takes_steps()
        self._failed_starts = self._failed_starts + 1 if is_failed_start else 0
        if self._failed_starts == _MAX_FAILED_STARTS:
            raise RunFailed(f"{describe_failure(error)} ({_MAX_FAILED_STARTS} times in a row before the first step)")
        self._report(f"{describe_failure(error)}; the workers are restarted")

    def on_resize(self) -> None:
        self._is_restarting = True

    def on_scheduling(self) -> None:
        self._call(self._mailbox.new_group.remote())

    def on_waiting(self) -> None:
        """Report the wait for resources.

        Raises:
            RunFailed: a group of one size has waited longer than its patience.
        """
        now = time.monotonic()
        waited = now - self._waits_since
        size = f"{self._fewest} workers" if self._fewest == self._most else f"{self._fewest} to {self._most} workers"
        cluster = ray.cluster_resources()
        need = (
            f"room for {size}; the cluster has {cluster.get('CPU', 0):g} CPUs and {cluster.get('GPU', 0):g} GPUs in "
            "total"
        )
        if self._fewest == self._most and waited > self._patience:
            raise RunFailed(
                f"waited {waited:.0f} s (cluster.start_timeout_s) for {need}. Add nodes, or set fewer workers"
            )
        if now - self._reported_at >= _REPORT_EVERY_S:
            self._reported_at = now
            self._report(f"has waited {waited:.0f} s for {need}")

    def _takes_steps(self) -> bool:
        return bool(self._call(self._mailbox.takes_steps.remote()))

    def _ask_to_yield(self, size: int) -> None:
        """Ask the workers to commit a checkpoint and to wait for their restart."""
        self._is_asked_to_yield = True
        self._report(f"the cluster has room for {size} workers now; a checkpoint is written first")
        self._call(self._mailbox.ask_to_yield.remote())

    def _has_yielded(self) -> bool | None:
        """Return True if the workers have yielded, None if they were not asked to."""
        return bool(self._call(self._mailbox.has_yielded.remote())) if self._is_asked_to_yield else None

    def _suspect_nodes(self, error: Any) -> None:
        """Suspect the nodes of workers that no longer respond.

        Ray may still list such a node as alive, but new workers cannot start there. Its resources
        are not counted for `_SUSPECT_S` seconds.
        """
        nodes = self.node_by_rank
        for rank in unreachable_ranks(error):
            if rank < len(nodes):
                self._suspected_at[nodes[rank]] = time.monotonic()

    def _free_by_node(self) -> dict[str, dict[str, float]]:
        """Return the free resources of the nodes that respond and stay."""
        suspects = {node for node, since in self._suspected_at.items() if time.monotonic() - since < _SUSPECT_S}
        return {node: free for node, free in free_resources().items() if node not in suspects}

    def _own_workers_on(self, nodes: set[str]) -> int:
        return sum(node in nodes for node in self.node_by_rank)

    def _report(self, text: str) -> None:
        self._mailbox.post.remote(Said(self._phases, text))

    def _call(self, reply: Any) -> Any:
        """Wait up to 10 s for a reply of the mailbox, and return it, or None if the call fails.

        Failures are not reported, because training does not depend on the mailbox.

        Args:
            reply: Ray's reference of the reply.
        """
        try:
            return ray.get(reply, timeout=10)
        except ray.exceptions.RayError:
            return None
