"""The protocol between the fleet driver and the actors that process blocks.

The driver calls four methods of an actor (:class:`BlockWorker`), each as an asynchronous Ray call;
the actor never calls the driver.

- `start()` loads the engine. It returns None when the actor is ready, or a message if the user must
  change something. :class:`EngineStartError` means that another actor may succeed.
- `work(job, block, attempt, hints)` is one lease: the actor reads the block's rows from storage,
  processes them and commits the part itself. The reply is a :class:`BlockResult`. Several `work`
  calls run at a time, at most the window of the fleet. The driver cancels a call when the block is
  committed by another actor or the lease expires; an attempt that continues anyway is harmless,
  because storage accepts only the first commit of a block.
- `heartbeat()` returns a :class:`Heartbeat` at once, whatever the actor is doing. The driver gives
  up an actor that does not reply in time, or whose heartbeats show no progress although it holds
  leases.
- `stop()` releases the engine's processes before the driver kills the actor.

Rows never pass through the driver, and it holds no state that storage lacks. So every side can die:

- If an attempt raises an ordinary error, only its block is retried.
- If the engine dies, the attempt raises :class:`EngineDiedError` with the rows in flight, and the
  actor ends itself. If the engine hangs, the driver takes these rows from the last heartbeat.
  Either way the blocks become suspect: the next lease of each carries :class:`Hints` that narrow
  down the row at fault.
- If the actor's process dies while its node lives, its blocks become suspect with unknown rows.
- If the node dies, its blocks are leased again without suspicion.
- :class:`StopStageError` and `UserError` end the stage.
- If the driver dies, Ray ends its actors. The next driver reads from storage which blocks are
  missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from plad_dist.data.dataset import Dataset
from plad_dist.data.parts import Part
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed

BlockKey = tuple[str, int]  # path of the dataset in the run directory, number of the block
RowsInFlight = dict[BlockKey, tuple[int, ...]]  # unfinished rows, by their index in the block


class EngineDiedError(RuntimeError):
    """The engine is dead, and the actor ends itself.

    Attributes:
        reason: the engine's own reason.
        rows_in_flight: rows that were not finished when it died.
    """

    def __init__(self, reason: str, rows_in_flight: RowsInFlight) -> None:
        super().__init__(reason, rows_in_flight)
        self.reason, self.rows_in_flight = reason, rows_in_flight


class EngineStartError(RuntimeError):
    """An engine process died during the start without a message. Another start may succeed."""


class StopStageError(RunFailed):
    """The whole stage must stop. Committed blocks are kept.

    Attributes:
        cost: money spent on the request that raised it, which got no response.
    """

    def __init__(self, message: str, cost: float = 0.0) -> None:
        super().__init__(message, cost)
        self.message, self.cost = message, cost

    def __str__(self) -> str:
        return self.message


class BlockJob(Protocol):
    """Description of one dataset that a fleet fills. Plain values, which are sent to the actors."""

    @property
    def output(self) -> str:
        """Path of the dataset in the run directory."""

    @property
    def fingerprint(self) -> str:
        """Fingerprint of everything that decides the rows."""

    def dataset(self, storage: Storage) -> Dataset:
        """Return the dataset to fill."""


@dataclass(frozen=True)
class Hints:
    """Findings of earlier attempts at a block.

    Attributes:
        pieces: suspect rows, which may have killed or hung an engine. The actor processes all other
            rows first, then one piece after the other, so that the next death names one piece.
        poison: rows that kill or hang engines, each with its error. They become error rows and are
            not tried again.
    """

    pieces: tuple[tuple[int, ...], ...] = ()
    poison: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockResult:
    """Reply of an actor for one block.

    Attributes:
        part: the committed part of the block.
        is_first: True if this attempt committed it, False if another attempt was faster.
        seconds: duration of the attempt.
        first_error: the first error row of the block as `prompt ID: error`, None if it has none.
    """

    part: Part
    is_first: bool
    seconds: float
    first_error: str | None = None


@dataclass(frozen=True)
class Heartbeat:
    """Sign of life of an actor, with its progress.

    Attributes:
        finished: units (samples, prompts) finished since the actor started.
        in_flight: units in progress.
        tokens: tokens generated so far for the units in progress. An actor hangs if neither this
            number nor `finished` grows.
        retries: requests repeated since the actor started.
        is_reloading: True while the engine changes its weights.
        stuck_rows: rows in flight, if nothing has changed since the previous heartbeat.
        start: seconds of each part of the latest start of the engine, up to its first response;
            empty before that.
    """

    finished: int
    in_flight: int
    tokens: int = 0
    retries: int = 0
    is_reloading: bool = False
    stuck_rows: RowsInFlight = field(default_factory=dict)
    start: Mapping[str, float] = field(default_factory=dict)


class BlockWorker(Protocol):
    """Actor that processes blocks, several at a time. The module docstring describes the calls."""

    async def start(self) -> str | None:
        """Get ready for work, for example by loading an engine.

        Returns:
            None if the actor is ready, otherwise a message about what the user must change.

        Raises:
            EngineStartError: the engine died without a message; another actor may succeed.
        """

    async def work(self, job: BlockJob, block: int, attempt: str, hints: Hints) -> BlockResult:
        """Process one block and commit its part.

        Args:
            attempt: unique name of this lease, stored in the part.
        """

    async def heartbeat(self) -> Heartbeat:
        """Return a sign of life at once."""

    async def stop(self) -> None:
        """Release the engine and its processes."""
