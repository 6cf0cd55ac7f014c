"""Description of a fleet: actors of one class, their resources, and their blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from plad_dist.data.parts import part_name
from plad_dist.fleet.placement import Placement
from plad_dist.fleet.protocol import BlockJob


@dataclass(frozen=True)
class Assignment:
    """Blocks of one job that one fleet processes.

    Attributes:
        blocks: blocks of this fleet; other fleets may have the rest of the dataset.
        units: progress units (samples, prompts) of each block of the whole dataset.
    """

    job: BlockJob
    blocks: Sequence[int]
    units: Sequence[int]


@dataclass(frozen=True)
class Fleet:
    """Actors of one class and their work.

    Attributes:
        name: unique in the stage; the actors are named after it.
        worker: class of the actors, a :class:`~plad_dist.fleet.protocol.BlockWorker`.
        arguments: arguments of its constructor.
        replicas: largest number of actors; `auto` for as many as the cluster's GPUs hold.
        min_replicas: smallest number of actors with which the stage continues.
        window: overrides `sampling.window`.
        lease_timeout_s: overrides `sampling.lease_timeout_s`.
        stall_timeout_s: overrides `sampling.stall_timeout_s`.
        environment: environment variables of the actors. No secrets: Ray displays and logs them.
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
    """One block of one assignment of a fleet.

    Attributes:
        assignment: index of the assignment in the fleet.
        output: path of the dataset in the run directory.
    """

    assignment: int
    block: int
    output: str

    def __str__(self) -> str:
        return f"{self.output}/{part_name(self.block)}"
