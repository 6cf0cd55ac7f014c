"""Promises of the engine that need no model."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from plad_dist.sampling.engine import Engine


class FakeLlm:
    errored = False

    def shutdown(self) -> None:
        pass


def test_a_cancelled_change_of_weights_ends_before_the_next_one_starts() -> None:
    """Ray cancels the request of a lease, but the thread that starts the engine continues."""
    running, most_running, started = 0, 0, []

    def start(path: str) -> Any:
        nonlocal running, most_running
        running += 1
        most_running = max(most_running, running)
        time.sleep(0.2)
        running -= 1
        started.append(path)
        return FakeLlm()

    async def change_weights() -> None:
        engine = object.__new__(Engine)
        engine.path, engine._llm, engine._restart = "a", FakeLlm(), None
        engine._start = start  # type: ignore[method-assign]
        first = asyncio.create_task(engine.load_weights("b"))
        await asyncio.sleep(0.05)
        first.cancel()
        await engine.load_weights("c")
        assert engine.path == "c"
        await engine.load_weights("c")

    asyncio.run(change_weights())
    assert (most_running, started) == (1, ["b", "c"])
