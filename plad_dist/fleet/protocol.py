"""What the fleet driver knows of the actors that do blocks, and of the jobs that they do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from plad_dist.data.storage import Storage
from plad_dist.data.store import Dataset, Part
from plad_dist.errors import RunFailed

BlockKey = tuple[str, int]  # dataset path, block
UnderWay = dict[BlockKey, tuple[int, ...]]  # rows of blocks


class EngineDiedError(RuntimeError):
    """The engine is dead and the actor ends.

    Attributes:
        reason: the engine's own.
        under_way: rows that were not finished.
    """

    def __init__(self, reason: str, under_way: UnderWay) -> None:
        super().__init__(reason, under_way)
        self.reason, self.under_way = reason, under_way


class EngineStartError(RuntimeError):
    """An engine's process ended while it started and left no word: it was killed, perhaps. Another one may start."""


class StopStageError(RunFailed):
    """An actor found that the whole stage must stop; what is committed is kept. `cost`: money spent without an answer."""

    def __init__(self, message: str, cost: float = 0.0) -> None:
        super().__init__(message, cost)
        self.message, self.cost = message, cost

    def __str__(self) -> str:
        return self.message


class BlockJob(Protocol):
    """One dataset to be made, a block at a time. Plain values: it travels to the actors."""

    @property
    def output(self) -> str:
        """Path of the dataset in the run directory."""

    @property
    def fingerprint(self) -> str:
        """Of all that decides the rows."""

    def dataset(self, storage: Storage) -> Dataset:
        """The dataset that is made."""


@dataclass(frozen=True)
class Hints:
    """What earlier attempts at a block found out.

    Attributes:
        pieces: rows of the block of which engines may have died or hung: to be done after the others, a piece at a time.
        poison: error by row, for rows that are known to kill or hang the engine: they are not tried again.
    """

    pieces: tuple[tuple[int, ...], ...] = ()
    poison: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockResult:
    """What an actor did for one block.

    Attributes:
        part: the block's committed part.
        first: this attempt committed it; otherwise another had been first.
    """

    part: Part
    first: bool
    seconds: float
    first_error: str | None = None


@dataclass(frozen=True)
class Heartbeat:
    """A sign of life of an actor.

    Attributes:
        finished: units that it finished in its life.
        in_flight: units under way.
        tokens: that its engine has written of what is under way. The actor is hung where neither this nor `finished` grows.
        retries: requests that it tried again in its life.
        changes: its engine is being started anew with other weights.
        stuck: rows under way, where nothing has changed since the heartbeat before.
    """

    finished: int
    in_flight: int
    tokens: int = 0
    retries: int = 0
    changes: bool = False
    stuck: UnderWay = field(default_factory=dict)


class BlockWorker(Protocol):
    """An actor that does blocks, many at a time."""

    async def start(self) -> str | None:
        """Get ready. Returns what the user must mend, None where all is well."""

    async def work(self, job: BlockJob, block: int, attempt: str, hints: Hints) -> BlockResult:
        """Do one block and commit its part."""

    async def heartbeat(self) -> Heartbeat:
        """A sign of life."""

    async def stop(self) -> None:
        """Give back everything before the actor ends."""
