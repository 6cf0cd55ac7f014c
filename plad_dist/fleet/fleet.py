"""Actors of one kind, what they are to do, and how they stand."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import ray

from plad_dist.data.store import part_name
from plad_dist.fleet.metrics import FleetMetrics
from plad_dist.fleet.placement import Placement, replicas_that_fit
from plad_dist.fleet.pool import BlockPool
from plad_dist.fleet.protocol import BlockJob, Heartbeat


@dataclass(frozen=True)
class Assignment:
    """Blocks of a job that one fleet does.

    Attributes:
        units: of progress (samples, prompts) in each block of the whole dataset.
    """

    job: BlockJob
    blocks: Sequence[int]
    units: Sequence[int]


@dataclass(frozen=True)
class Fleet:
    """Actors of one kind and what they do.

    Attributes:
        worker: class of the actors (:class:`~plad_dist.fleet.protocol.BlockWorker`); `arguments` go to its constructor.
        replicas: most actors, `auto` for as many as the GPUs hold; `min_replicas`: fewest with which the stage goes on.
        window, lease_timeout_s, stall_timeout_s: in the place of the config's, where the workers need others.
        environment: variables of the actors' processes. No secrets: Ray shows and logs them.
    """

    name: str
    assignments: tuple[Assignment, ...]
    worker: type
    arguments: tuple[Any, ...]
    placement: Placement
    replicas: int | Literal["auto"] = 1
    min_replicas: int = 1
    window: int | None = None
    lease_timeout_s: float | None = None
    stall_timeout_s: float | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A block of one of a fleet's assignments."""

    assignment: int
    block: int
    output: str

    def __str__(self) -> str:
        return f"{self.output}/{part_name(self.block)}"


@dataclass(eq=False)
class RunningFleet:
    """A fleet at work: its actors by name and what is under way.

    Attributes:
        most: actors at this moment at most.
        starting: when each actor that is not ready yet got its resources.
        changing: since when each actor's engine has been starting anew with other weights.
        failed_starts: in a row, with nothing finished by any actor in between.
        first_others: actors that had their resources when the first one refused to start; None while none has.
    """

    fleet: Fleet
    pool: BlockPool
    metrics: FleetMetrics
    actors: dict[str, Any] = field(default_factory=dict)
    most: int = 1
    starting: dict[str, float] = field(default_factory=dict)
    changing: dict[str, float] = field(default_factory=dict)
    failed_starts: int = 0
    ready: dict[str, Heartbeat] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)  # actors whose heartbeat is awaited
    groups: dict[str, Any] = field(default_factory=dict)  # placement groups by actor
    born: int = 0
    started_once: bool = False
    first_others: set[str] | None = None
    enough_since: float = field(default_factory=time.monotonic)
    not_before: float = 0.0

    def leased(self, actor: str) -> list[Task]:
        return [task for task in self.pool.leased(actor) if isinstance(task, Task)]

    @property
    def useful(self) -> int:
        """Actors that would have something to do."""
        return min(self.most, self.pool.unfinished)

    @property
    def fewest(self) -> int:
        """Actors with which the stage goes on."""
        return min(self.fleet.min_replicas, self.useful)

    @property
    def placed(self) -> int:
        """Actors that have their resources."""
        return len(self.ready) + len(self.starting)

    def size(self) -> None:
        """Note how many actors there may be now: a cluster grows and shrinks."""
        wanted = self.fleet.replicas
        self.most = replicas_that_fit(self.fleet.placement, ray.cluster_resources()) if wanted == "auto" else wanted
