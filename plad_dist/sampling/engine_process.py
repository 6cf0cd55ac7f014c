"""Process of an engine: runs a sampler, and answers the calls that its actor passes on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import threading
from collections.abc import Callable
from typing import Any

from plad_dist.data.storage import Storage
from plad_dist.errors import first_line
from plad_dist.nursery.child import Parent
from plad_dist.sampling.actor import Sampler
from plad_dist.sampling.backend import Backend


def serve(parent: Parent, storage: Storage, make_backend: Callable[[], Backend], row_tries: int) -> None:
    """Answer calls until the sampler has stopped."""
    # As inside a Ray actor: this process has threads, and may have initialised CUDA.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    asyncio.run(_Calls(parent, Sampler(storage, make_backend, row_tries)).answer())


class _Calls:
    """Calls of the actor, each of which is a task."""

    def __init__(self, parent: Parent, sampler: Sampler) -> None:
        self._parent, self._sampler = parent, sampler
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._stopped = asyncio.Event()

    async def answer(self) -> None:
        """Answer calls until `stop` has returned."""
        threading.Thread(target=self._listen, args=(asyncio.get_running_loop(),), daemon=True).start()
        await self._stopped.wait()

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """Receive calls. Runs in a thread, and ends with the process."""
        while True:
            loop.call_soon_threadsafe(self._begin, *self._parent.receive())

    def _begin(self, number: int, method: str, arguments: tuple[Any, ...]) -> None:
        if method == "cancel":
            if (task := self._tasks.get(number)) is not None:
                task.cancel()
            return
        self._tasks[number] = asyncio.get_running_loop().create_task(self._answer(number, method, arguments))
        self._tasks[number].add_done_callback(lambda _: self._tasks.pop(number))

    async def _answer(self, number: int, method: str, arguments: tuple[Any, ...]) -> None:
        try:
            result, error = await getattr(self._sampler, method)(*arguments), None
        except Exception as raised:  # noqa: BLE001 - raised again in the actor
            result, error = None, _portable(raised)
        self._parent.tell("reply", number, result, error)
        if method == "stop":
            self._stopped.set()


def _portable(error: Exception) -> Exception:
    """Return an exception that the actor can read without the libraries of this process."""
    is_known = type(error).__module__.split(".")[0] in ("builtins", "plad_dist")
    with contextlib.suppress(Exception):  # some exceptions can be pickled but not read
        if is_known:
            return pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    return RuntimeError(f"{type(error).__name__}: {first_line(error)}")
