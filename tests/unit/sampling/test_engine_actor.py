"""An engine in a child process: calls, errors and cancellations reach it, and its death is told."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from plad_dist.data.storage import Storage
from plad_dist.errors import UserError
from plad_dist.fleet.protocol import EngineDiedError, EngineStartError, Hints, StopStageError
from plad_dist.nursery.client import ChildDied
from plad_dist.sampling import engine_actor
from plad_dist.sampling.engine_actor import EngineActor
from plad_dist.sampling.engine_process import _portable
from plad_dist.sampling.job import SamplingJob
from tests.fakes import FakeBackend
from tests.unit.sampling.test_attempt import prepare


class HostileBackend(FakeBackend):
    """Raises what a prompt names."""

    fatal: tuple[type[Exception], ...] = (StopStageError, UserError)

    async def complete(self, prompt: Any, *arguments: Any) -> Any:
        if "unpaid" in prompt:
            raise StopStageError("no money is left", 0.25)
        if "unknown" in prompt:
            raise UserError("the key is unknown")
        return await super().complete(prompt, *arguments)


class DeadBackend(FakeBackend):
    """Dies while it starts."""

    async def check(self) -> str | None:
        os.kill(os.getpid(), signal.SIGKILL)
        return None


@pytest.fixture(autouse=True)
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the exit codes with which actors would end this process."""
    codes: list[int] = []
    monkeypatch.setattr(engine_actor, "_EXIT_DELAY_S", 0.0)
    monkeypatch.setattr(engine_actor.os, "_exit", codes.append)
    return codes


@asynccontextmanager
async def actor_of(
    storage: Storage, folder: Path, backend: Callable[[str], Any] = HostileBackend
) -> AsyncIterator[Any]:
    actor = EngineActor(None, storage, partial(backend, str(folder)), 1, first="")
    try:
        yield actor
    finally:
        await actor.stop()


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 120))


def engine_pid(folder: Path) -> int:
    return int((folder / "log").read_text().split()[1])


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.05)


async def hanging_attempt(actor: Any, job: SamplingJob, folder: Path) -> asyncio.Task[Any]:
    """Start an actor, and an attempt at a prompt that hangs its engine."""
    await actor.start()
    attempt = asyncio.create_task(actor.work(job, 0, "first", Hints()))
    await until(lambda: "ask stall" in (folder / "log").read_text())
    return attempt


def test_calls_are_answered_by_a_process_that_ends_with_the_actor(tmp_path: Path) -> None:
    storage, job = prepare(tmp_path, ["a", "refuse", "b"])

    async def check() -> None:
        async with actor_of(storage, tmp_path) as actor:
            assert await actor.start() is None
            assert engine_pid(tmp_path) != os.getpid()
            result = await actor.work(job, 0, "first", Hints())
            assert (result.is_first, result.part.rows) == (True, 3)
            assert result.first_error == "prompt refuse: refused"
            again = await actor.work(job, 0, "second", Hints())
            assert (again.is_first, again.part) == (False, result.part)
            assert (await actor.heartbeat()).finished == 3
            pid = engine_pid(tmp_path)
        assert (tmp_path / "log").read_text().endswith("stop\n")
        assert not psutil.pid_exists(pid)

    run(check())


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ("unpaid", StopStageError("no money is left", 0.25)),
        ("unknown", UserError("the key is unknown")),
        ("poison", EngineDiedError("the fake engine died", {("samples", 0): (0,)})),
    ],
)
def test_errors_of_the_engine_arrive_as_they_were_raised(tmp_path: Path, prompt: str, error: Exception) -> None:
    storage, job = prepare(tmp_path, [prompt])

    async def check() -> None:
        async with actor_of(storage, tmp_path) as actor:
            await actor.start()
            with pytest.raises(type(error)) as raised:
                await actor.work(job, 0, "first", Hints())
            assert vars(raised.value) == vars(error)

    run(check())


def test_a_problem_of_the_start_is_returned(tmp_path: Path) -> None:
    storage, _ = prepare(tmp_path, ["a"])
    (tmp_path / "down").touch()

    async def check() -> None:
        async with actor_of(storage, tmp_path) as actor:
            assert await actor.start() == "the fake is down"

    run(check())


def test_a_death_during_the_start_allows_another_try(tmp_path: Path, exits: list[int]) -> None:
    storage, _ = prepare(tmp_path, ["a"])

    async def check() -> None:
        async with actor_of(storage, tmp_path, DeadBackend) as actor:
            with pytest.raises(EngineStartError, match="killed by SIGKILL"):
                await actor.start()
            await until(lambda: exits == [1])

    run(check())


@pytest.mark.parametrize("error", [ChildDied("its interpreter did not start"), OSError(11, "try again")])
def test_a_process_that_does_not_start_allows_another_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(engine_actor, "start_child", fail)
    storage, _ = prepare(tmp_path, ["a"])

    async def check() -> None:
        async with actor_of(storage, tmp_path) as actor:
            with pytest.raises(EngineStartError):
                await actor.start()

    run(check())


def test_an_error_of_a_library_arrives_in_words(tmp_path: Path) -> None:
    class ErrorOfALibrary(Exception):
        pass

    ErrorOfALibrary.__module__ = "vllm.exceptions"
    error = _portable(ErrorOfALibrary("no blocks are left\nand more"))
    assert (type(error), str(error)) == (RuntimeError, "ErrorOfALibrary: no blocks are left")


def test_a_cancelled_call_is_cancelled_in_the_engine_too(tmp_path: Path) -> None:
    storage, job = prepare(tmp_path, ["stall"])

    async def check() -> None:
        async with actor_of(storage, tmp_path) as actor:
            attempt = await hanging_attempt(actor, job, tmp_path)
            assert (await actor.heartbeat()).in_flight == 1
            attempt.cancel()
            with pytest.raises(asyncio.CancelledError):
                await attempt
            while (await actor.heartbeat()).in_flight:
                await asyncio.sleep(0.05)

    run(check())


def test_a_killed_engine_fails_every_call_and_ends_its_actor(tmp_path: Path, exits: list[int]) -> None:
    storage, job = prepare(tmp_path, ["stall"])

    async def check() -> None:
        async with actor_of(storage, tmp_path) as actor:
            attempt = await hanging_attempt(actor, job, tmp_path)
            os.kill(engine_pid(tmp_path), signal.SIGKILL)
            with pytest.raises(EngineDiedError, match="killed by SIGKILL") as death:
                await attempt
            assert death.value.rows_in_flight == {}, "nobody knows them any more"
            with pytest.raises(EngineDiedError):
                await actor.heartbeat()
            await until(lambda: exits == [1])

    run(check())
