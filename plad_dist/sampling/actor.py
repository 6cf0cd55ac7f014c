"""The sampling actor: one engine, or the client of a server, and its blocks in flight."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

from plad_dist.compat.vllm import root_cause
from plad_dist.data.storage import Storage
from plad_dist.errors import UserError
from plad_dist.fleet.protocol import BlockKey, BlockResult, EngineDiedError, Heartbeat, Hints, RowsInFlight
from plad_dist.sampling.attempt import BlockAttempt
from plad_dist.sampling.backend import Backend
from plad_dist.sampling.job import SamplingJob
from plad_dist.sampling.spool import Spool

logger = logging.getLogger("plad")

_EXIT_DELAY_S = 5.0  # after the death of the engine, for the replies of all attempts
_FLUSH_INTERVAL_S = 2.0
_FIRST_RESPONSE = "first response"


class Sampler:
    """A :class:`~plad_dist.fleet.protocol.BlockWorker` that owns one backend for its whole life.

    If the engine dies, the actor ends too, so that its leases go to other actors.

    Args:
        make_backend: starts the engine, or the client of a server. Called in the actor, inside its
            event loop.
        row_tries: number of failures after which a row becomes an error row.
    """

    def __init__(self, storage: Storage, make_backend: Callable[[], Backend], row_tries: int = 3) -> None:
        self._storage, self._make_backend, self._row_tries = storage, make_backend, row_tries
        self._weights_change = asyncio.Condition()
        self._active_blocks = self._finished = 0
        self._last_heartbeat: Heartbeat | None = None
        self._attempts: dict[str, BlockAttempt] = {}
        self._death: EngineDiedError | None = None
        self._spools: dict[str, Spool] = {}
        self._flusher: asyncio.Task[None] | None = None

    async def start(self) -> str | None:
        """Start the backend. Return what the user must change, or None if it is ready."""
        try:
            self._backend = self._make_backend()
            problem = await self._backend.check()
        except UserError as error:
            return str(error)
        if self._backend.paid:
            self._flusher = asyncio.create_task(self._flush_periodically())
        return problem

    async def work(self, job: SamplingJob, block: int, attempt: str, hints: Hints) -> BlockResult:
        """Sample every prompt of a block and commit the part.

        Raises:
            EngineDiedError: the engine is dead; the actor ends within seconds.
        """
        block_attempt = BlockAttempt(
            self._storage,
            self._backend,
            self._spool_of(job) if self._backend.paid else None,
            job,
            block,
            attempt,
            hints,
            row_tries=self._row_tries,
            on_sample=self._count_sample,
        )
        self._attempts[attempt] = block_attempt
        try:
            async with self._weights_of(job):
                return await block_attempt.run()
        except Exception as error:
            if self._backend.dead:
                raise self._report_death(error) from None
            raise
        finally:
            if not self._backend.dead:
                del self._attempts[attempt]

    async def heartbeat(self) -> Heartbeat:
        """Return the progress, and the rows in flight if it has not changed since the last time."""
        heartbeat = Heartbeat(
            finished=self._finished,
            in_flight=sum(len(attempt.rows_in_flight) for attempt in self._attempts.values()),
            tokens=self._backend.tokens,
            retries=self._backend.retries,
            is_reloading=self._backend.path is None,
            start=dict(self._backend.start.parts) if _FIRST_RESPONSE in self._backend.start.parts else {},
        )
        is_unchanged, self._last_heartbeat = heartbeat == self._last_heartbeat, heartbeat
        # A server that stops responding says nothing about the rows.
        if is_unchanged and not self._backend.paid:
            return replace(heartbeat, stuck_rows=self._rows_in_flight())
        return heartbeat

    async def stop(self) -> None:
        """Stop the backend and flush the spools.

        The backend's processes and memory are released before the actor ends.
        """
        try:
            await self._backend.close()
        finally:
            await asyncio.to_thread(self._flush)

    # -- engine

    @asynccontextmanager
    async def _weights_of(self, job: SamplingJob) -> AsyncIterator[None]:
        """Hold the weights of a job. They change only while no other block is in flight."""
        async with self._weights_change:
            while self._backend.path != job.weights and self._active_blocks:
                await self._weights_change.wait()
            await self._backend.load_weights(job.weights)
            self._active_blocks += 1
        try:
            yield
        finally:
            async with self._weights_change:
                self._active_blocks -= 1
                self._weights_change.notify_all()

    def _report_death(self, error: Exception) -> EngineDiedError:
        """Return why the engine died and the rows in flight, and schedule the end of the actor."""
        if self._death is None:
            self._death = EngineDiedError(root_cause(error), self._rows_in_flight())
            asyncio.get_running_loop().call_later(_EXIT_DELAY_S, os._exit, 1)
        return self._death

    def _rows_in_flight(self) -> RowsInFlight:
        rows: dict[BlockKey, set[int]] = {}
        for attempt in self._attempts.values():
            rows.setdefault(attempt.key, set()).update(attempt.rows_in_flight)
        return {key: tuple(sorted(indices)) for key, indices in rows.items() if indices}

    def _count_sample(self) -> None:
        self._finished += 1
        if _FIRST_RESPONSE not in self._backend.start.parts:
            self._backend.start.end(_FIRST_RESPONSE)

    # -- spools of paid responses

    def _spool_of(self, job: SamplingJob) -> Spool:
        if job.output not in self._spools:
            self._spools[job.output] = Spool(job.dataset(self._storage), job.fingerprint)
        return self._spools[job.output]

    async def _flush_periodically(self) -> None:
        """Write paid responses to storage while their blocks are not committed."""
        while True:
            await asyncio.sleep(_FLUSH_INTERVAL_S)
            try:
                await asyncio.to_thread(self._flush)
            except Exception as error:  # noqa: BLE001 - the rows stay in memory until the next flush
                logger.warning("paid responses could not be written to the spool, trying again: %s", error)

    def _flush(self) -> None:
        for spool in list(self._spools.values()):
            spool.flush()
