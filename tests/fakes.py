"""A backend without a model, whose faults a test chooses, for tests of fleets."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plad_dist.config import Decoding
from plad_dist.sampling.backend import Completion, RefusedPromptError
from plad_dist.timeline import StartClock


class FakeBackend:
    """Responds to a prompt with its own text, after `seconds`.

    Words in a prompt cause faults:

    - `poison` kills the engine, `stall` hangs it, `crash` kills the whole actor;
    - `long` takes eight seconds and generates tokens all the time;
    - `refuse` is refused, `glitch` always fails, `twice` fails once.

    Files in `folder` cause faults too:

    - `hang`: no response is finished while the file exists;
    - `down`: the backend refuses to start; `slow`: it takes a minute to start;
    - `broken`, which contains a number of engines: the first engine refuses to start as soon as so
      many engines have started, and the others take longer.

    Each start, each engine that is up, each prompt and each stop appends a line to `folder/log`.
    """

    paid, retries = False, 0
    fatal: tuple[type[Exception], ...] = ()
    start = StartClock()

    def __init__(self, folder: str, seconds: float = 0.01) -> None:
        self.path: str | None = "fake"
        self._folder, self._seconds = Path(folder), seconds
        self.dead, self._is_hung, self._has_failed_once = False, False, False
        self.tokens = 0
        self._log(f"start {os.getpid()}")

    def _log(self, line: str) -> None:
        with (self._folder / "log").open("a") as file:
            file.write(line + "\n")

    async def check(self) -> str | None:
        if (self._folder / "slow").exists():
            await asyncio.sleep(60)
        with contextlib.suppress(FileNotFoundError):
            engines = int((self._folder / "broken").read_text())
            (self._folder / "broken").unlink()
            (self._folder / "late").touch()
            while (self._folder / "log").read_text().count("start") < engines:
                await asyncio.sleep(0.1)
            await asyncio.sleep(1)
            return "its node is broken"
        if (self._folder / "late").exists():
            await asyncio.sleep(4)
        if (self._folder / "down").exists():
            return "the fake is down"
        self._log("up")
        return None

    def render(self, prompts: Sequence[Any]) -> Sequence[Any]:
        return [prompt.messages[-1]["content"] for prompt in prompts]

    async def complete(self, prompt: Any, decoding: Decoding, seed: int, request_id: str) -> Completion:
        self._log(f"ask {prompt}")
        await asyncio.sleep(self._seconds)
        for _ in range(80 if "long" in prompt else 0):
            await asyncio.sleep(0.1)
            self.tokens += 1
        self._is_hung |= "stall" in prompt
        while self._is_hung or (self._folder / "hang").exists():
            await asyncio.sleep(0.1)
        if self.dead or "poison" in prompt:
            self.dead = True
            raise RuntimeError("the fake engine died")
        if "crash" in prompt:
            os._exit(1)
        if "refuse" in prompt:
            raise RefusedPromptError("refused")
        if "glitch" in prompt or ("twice" in prompt and not self._has_failed_once):
            self._has_failed_once = self._has_failed_once or "twice" in prompt
            raise ValueError("glitch")
        return Completion(prompt, [1, 2], 2, -1.0, "stop", prompt_tokens=3)

    async def load_weights(self, path: str) -> None:
        pass

    async def close(self) -> None:
        self._log("stop")
