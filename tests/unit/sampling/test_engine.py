"""The engine's promises that need no model."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from plad_dist.sampling.engine import Engine


class FakeLlm:
    errored = False

    def shutdown(self) -> None:
        pass


def test_a_change_of_weights_whose_asker_is_cancelled_ends_before_another_begins() -> None:
    """Ray cancels what a lease asked for; the thread that starts the engine, and takes the memory, goes on."""
    running, most, started = 0, 0, []

    def start(path: str) -> Any:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.2)
        running -= 1
        started.append(path)
        return FakeLlm()

    async def work() -> None:
        engine = object.__new__(Engine)
        engine.path, engine._llm, engine._restart, engine._start = "a", FakeLlm(), None, start  # type: ignore[method-assign]
        first = asyncio.create_task(engine.load_weights("b"))
        await asyncio.sleep(0.05)
        first.cancel()
        await engine.load_weights("c")
        assert engine.path == "c"
        await engine.load_weights("c")

    asyncio.run(work())
    assert (most, started) == (1, ["b", "c"])
