"""Resources of one actor, and how many such actors a cluster holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """Resources of one actor and its engine.

    Attributes:
        cpus: cores of the actor.
        gpus: GPUs of the actor, all on one node.
        bundles: GPUs of an engine that spans nodes, one placement group bundle each. The actor
            itself then has no GPU.
    """

    cpus: float
    gpus: float = 0
    bundles: int = 0

    @property
    def total_gpus(self) -> float:
        """GPUs of the engine, wherever they are."""
        return self.gpus + self.bundles

    def __str__(self) -> str:
        gpus = f", {self.total_gpus:g} GPUs" if self.total_gpus else ""
        return f"{self.cpus:g} CPUs{gpus}{' over several nodes' if self.bundles else ''}"


def replicas_that_fit(placement: Placement, cluster: Mapping[str, float]) -> int:
    """Return the number of actors that the GPUs of a cluster hold, at least one.

    An engine on CPUs uses all cores that it can get, so one fits.

    Args:
        cluster: total of each Ray resource.
    """
    if not placement.total_gpus:
        return 1
    return max(1, int(cluster.get("GPU", 0) // placement.total_gpus))
