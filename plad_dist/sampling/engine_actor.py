"""Sampling actor that does not import the library of its engine, which lives in a child process.

The child comes from a nursery that has imported the library. It runs a
:class:`~plad_dist.sampling.actor.Sampler`, to which the actor passes every call of the driver.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from plad_dist.compat.linux import process_began
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed, first_line
from plad_dist.fleet.protocol import BlockJob, BlockResult, EngineDiedError, EngineStartError, Heartbeat, Hints
from plad_dist.nursery.actor import server_path
from plad_dist.nursery.client import Child, ChildDied, start_child
from plad_dist.sampling.backend import Backend
from plad_dist.timeline import StartClock

_SILENCE_S = 120.0  # of a child whose thread for signs of life gets no processor
_EXIT_DELAY_S = 5.0  # after the death of the child, for the replies of all calls


class EngineActor:
    """A :class:`~plad_dist.fleet.protocol.BlockWorker` whose work is done in a child process.

    If the child dies, the actor ends too, so that its leases go to other actors.

    Args:
        nursery: kind of the nursery, or None to start a new interpreter.
        make_backend: starts the engine; called in the child.
        row_tries: number of failures after which a row becomes an error row.
        first: function that a child of the nursery calls while it has one thread, as
            `module:name`; empty for none.
    """

    def __init__(
        self,
        nursery: str | None,
        storage: Storage,
        make_backend: Callable[[], Backend],
        row_tries: int,
        first: str,
    ) -> None:
        self._nursery, self._arguments, self._first = nursery, (storage, make_backend, row_tries), first
        self._numbers = itertools.count()
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._child: Child | None = None
        self._death: str | None = None
        self._start: dict[str, float] = {}  # parts of the start before those of the child

    async def start(self) -> str | None:
        """Start the child and its engine. Return what the user must change, or None.

        Raises:
            EngineStartError: the child died without a message, or did not start.
        """
        clock = StartClock(process_began())
        clock.end("actor")
        function = "plad_dist.sampling.engine_process:serve"
        try:
            self._child = await asyncio.to_thread(
                start_child, "plad:engine", function, self._arguments, self._server(), first=self._first
            )
        except (ChildDied, OSError) as error:
            raise EngineStartError(first_line(error)) from None
        clock.end("nursery")
        self._start = clock.parts
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._listen, args=(self._child, loop), daemon=True).start()
        try:
            problem: str | None = await self._call("start")
        except EngineDiedError as death:
            raise EngineStartError(death.reason) from None
        return problem

    async def work(self, job: BlockJob, block: int, attempt: str, hints: Hints) -> BlockResult:
        """Process one block and commit its part, as :meth:`Sampler.work` does."""
        result: BlockResult = await self._call("work", job, block, attempt, hints)
        return result

    async def heartbeat(self) -> Heartbeat:
        """Return the progress of the child."""
        heartbeat: Heartbeat = await self._call("heartbeat")
        if "imports" in heartbeat.start:  # that of the first engine, not of a later one with other weights
            heartbeat = replace(heartbeat, start={**self._start, **heartbeat.start})
        return heartbeat

    async def stop(self) -> None:
        """Stop the engine, then the child."""
        with contextlib.suppress(EngineDiedError):
            await self._call("stop")
        if self._child is not None:
            await asyncio.to_thread(self._child.kill)

    def _server(self) -> Path | None:
        with contextlib.suppress(RunFailed, OSError):
            return server_path(self._nursery) if self._nursery is not None else None
        return None

    async def _call(self, method: str, *arguments: Any) -> Any:
        """Return the result of a method of the child's sampler.

        Raises:
            EngineDiedError: the child is dead.
            Exception: the method raised it.
        """
        if self._death is not None or self._child is None:
            raise EngineDiedError(self._death or "its engine is not started", {})
        number = next(self._numbers)
        reply = self._replies[number] = asyncio.get_running_loop().create_future()
        try:
            self._child.send(number, method, arguments)
            return await reply
        except asyncio.CancelledError:
            self._child.send(number, "cancel", ())
            raise
        finally:
            del self._replies[number]

    def _listen(self, child: Child, loop: asyncio.AbstractEventLoop) -> None:
        """Pass on the replies of the child until it ends. Runs in a thread."""

        def pass_on(*reply: Any) -> None:
            loop.call_soon_threadsafe(self._handle, *reply)

        try:
            child.serve({"reply": pass_on}, _SILENCE_S)
            reason = "its process ended"
        except Exception as error:  # noqa: BLE001 - whatever ended the child
            reason = str(error)
        loop.call_soon_threadsafe(self._handle_death, reason)

    def _handle(self, number: int, result: Any, error: Exception | None) -> None:
        reply = self._replies.get(number)
        if reply is None or reply.done():  # cancelled
            return
        if error is None:
            reply.set_result(result)
        else:
            reply.set_exception(error)

    def _handle_death(self, reason: str) -> None:
        self._death = reason
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(EngineDiedError(reason, {}))
        asyncio.get_running_loop().call_later(_EXIT_DELAY_S, os._exit, 1)
