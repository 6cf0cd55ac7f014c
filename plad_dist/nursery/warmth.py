"""Nodes that are warm, as any process of the job sees them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from typing import Any

import ray

_LONGEST_WARM_UP_S = 60.0


def actor_name(kind: str, node: str) -> str:
    """Return the name of the actor that keeps the nursery of one kind on a node for this job."""
    return f"plad-nursery-{kind}-{ray.get_runtime_context().get_job_id()}-{node}"


class WarmNodes:
    """Nodes whose nursery has finished its imports, or has had the time to.

    A node counts as warm for good. One without a nursery counts once it has been known for a
    minute.

    Args:
        kind: kind of the nurseries; None if there are none, which makes every node count.
    """

    def __init__(self, kind: str | None) -> None:
        self._kind = kind
        self._warm: set[str] = set()
        self._known_since: dict[str, float] = {}
        self._replies: dict[str, Any] = {}  # references of the latest question to an actor, by node

    def among(self, nodes: Iterable[str]) -> set[str]:
        """Return the nodes that are warm, as far as is known without waiting."""
        nodes = set(nodes)
        if self._kind is None:
            return nodes
        now = time.monotonic()
        for node in nodes - self._warm:
            since = self._known_since.setdefault(node, now)
            if now - since >= _LONGEST_WARM_UP_S or self._has_confirmed(self._kind, node):
                self._warm.add(node)
        return nodes & self._warm

    def _has_confirmed(self, kind: str, node: str) -> bool:
        """Return True if the node's actor has replied that its server is ready, else ask again."""
        if node in self._replies and not ray.wait([self._replies[node]], timeout=0)[0]:
            return False
        with contextlib.suppress(ValueError, ray.exceptions.RayError):  # no actor yet, or it has died
            if node in self._replies and ray.get(self._replies.pop(node)):
                return True
            self._replies[node] = ray.get_actor(actor_name(kind, node)).is_warm.remote()
        return False
