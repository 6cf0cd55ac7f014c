"""Threads that stop wherever a simulation wants to decide who goes on, and virtual time."""

from __future__ import annotations

import asyncio
import selectors
import threading
from collections.abc import Callable
from typing import Any, ClassVar


class Killed(BaseException):
    """End of a process."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """Event loop whose time passes only while every task waits."""

    def __init__(self) -> None:
        self.now = 0.0
        loop = self

        class Selector(selectors.SelectSelector):
            def select(self, timeout: float | None = None) -> Any:
                assert timeout is not None, "all tasks wait for each other"
                loop.now += max(0.0, timeout)
                return []

        super().__init__(Selector())

    def time(self) -> float:
        return self.now


class Stepper:
    """A call in a thread of its own, which stops before each operation of storage."""

    current = threading.local()
    _idle: ClassVar[list[_Worker]] = []

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call, self.is_done = call, False
        self._result: Any = None
        self._error: BaseException | None = None
        self._worker = Stepper._idle.pop() if Stepper._idle else _Worker()
        self._worker.stepper = self

    def run(self) -> None:
        """Carry out the call, in its thread."""
        Stepper.current.stepper = self
        try:
            self._result = self._call()
        except BaseException as error:  # noqa: BLE001 - raised by `result`
            self._error = error
        self.is_done = True

    def step(self) -> None:
        """Let the call go on to its next stop or to its end."""
        self._worker.go.release()
        self._worker.stopped.acquire()
        if self.is_done:
            Stepper._idle.append(self._worker)

    def pause(self) -> None:
        """Stop, in the thread of the call."""
        self._worker.stopped.release()
        self._worker.go.acquire()

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._result


class _Worker:
    """A thread that carries out the calls of one stepper after the other."""

    def __init__(self) -> None:
        self.stepper: Stepper | None = None
        self.go, self.stopped = threading.Lock(), threading.Lock()
        self.go.acquire()
        self.stopped.acquire()
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            self.go.acquire()
            assert self.stepper is not None
            self.stepper.run()
            self.stopped.release()


class StepLock:
    """Lock of steppers: one that waits for it stops, so that the one that holds it can go on."""

    def __init__(self) -> None:
        self._is_held = False

    def __enter__(self) -> None:
        while self._is_held:
            Stepper.current.stepper.pause()
        self._is_held = True

    def __exit__(self, *error: object) -> None:
        self._is_held = False
