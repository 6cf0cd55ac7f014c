"""Resources of an actor, and how many of such actors a cluster holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """Resources of one engine's actor.

    Attributes:
        cpus: cores of the actor.
        gpus: GPUs of the actor, all in one node.
        bundles: GPUs of an engine that spans nodes, one bundle each; the actor itself then holds none.
    """

    cpus: float
    gpus: float = 0
    bundles: int = 0

    @property
    def gpus_in_all(self) -> float:
        return self.gpus + self.bundles

    def __str__(self) -> str:
        gpus = f", {self.gpus_in_all:g} GPUs" if self.gpus_in_all else ""
        return f"{self.cpus:g} CPUs{gpus}{' over several nodes' if self.bundles else ''}"


def replicas_that_fit(placement: Placement, cluster: Mapping[str, float]) -> int:
    """Engines that a cluster's GPUs hold, at least one; on CPU one, since an engine takes all cores it can get."""
    if not placement.gpus_in_all:
        return 1
    return max(1, int(cluster.get("GPU", 0) // placement.gpus_in_all))
