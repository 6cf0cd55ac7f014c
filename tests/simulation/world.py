"""The world of a simulation: an object store in memory, a clock, and commands that take turns.

Whole commands run as threads of which exactly one runs at a time. Every call to the store is a
point at which another command may continue, and at which the faults of a schedule strike. All
choices come from one seeded generator, so that a seed replays its schedule.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from obstore.exceptions import AlreadyExistsError, GenericError, NotFoundError

ERRORS = (
    "Stale file handle (os error 116)",
    "Input/output error (os error 5)",
    "operation timed out",
    "403 Forbidden: AccessDenied",
)
FULL = "No space left on device (os error 28)"
_PAGE = 3  # objects of a page of a listing


class Killed(BaseException):
    """End of a command in the midst of a call. Nothing that it does afterwards has an effect."""


@dataclass
class Fault:
    """Fault of one command.

    Attributes:
        at: number of the call at which it strikes, from 0.
        kind: `kill` before the call has an effect, `kill after` it; `error`; `lost reply`, an error
            after the effect; `full`, an error of writes.
        error: message of the error.
    """

    at: int
    kind: str
    error: str = ERRORS[0]


@dataclass
class Command:
    """One command: a thread that runs only while it has the turn.

    Attributes:
        calls: calls to the store so far.
        outcome: exception that ended it; None if it succeeded or has not ended.
        thread: thread that runs it, the only one that may call the store in its turn.
        probe: number of the call that last looked for a later claim and saw none.
    """

    name: str
    work: Callable[[], object]
    faults: list[Fault] = field(default_factory=list)
    calls: int = 0
    is_dead: bool = False
    has_ended: bool = False
    was_hit: bool = False
    outcome: BaseException | None = None
    thread: threading.Thread | None = None
    probe: int = -1_000_000
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    caches: dict[Any, Any] = field(default_factory=dict)


@dataclass
class Change:
    """One change of an object.

    Attributes:
        data: new bytes, None if it was deleted.
        command: name of the command; empty for the user.
    """

    time: float
    key: str
    data: bytes | None
    command: str
    before: bytes | None


class World:
    """An object store and its users.

    Args:
        seed: decides who runs, how long calls take, and what listings show.
        lag_s: age that a listing can have.
        has_jumping_clock: the time of day jumps backward now and then.
        switches: probability that another command continues at a call.
    """

    def __init__(
        self, seed: int, *, lag_s: float = 0.0, has_jumping_clock: bool = False, switches: float = 0.3
    ) -> None:
        self.random = random.Random(seed)
        self.objects: dict[str, bytes] = {}
        self.changes: list[Change] = []
        self.commands: list[Command] = []
        self.current: Command | None = None
        self.observers: list[Callable[[Change], None]] = []  # called before each change
        self.lag_s, self.has_jumping_clock, self.switches = lag_s, has_jumping_clock, switches
        self.monotonic, self.offset = 1_000_000.0, 800_000_000.0
        self._main = threading.Semaphore(0)

    # -- commands

    def run(self, *commands: Command) -> None:
        """Run commands to their ends, whatever these are."""
        self.commands = list(commands)
        for command in commands:
            command.thread = threading.Thread(target=self._run, args=[command], daemon=True)
            command.thread.start()
        self._pass_turn()
        self._main.acquire()
        for command in commands:
            command.thread.join()
        self.current = None

    def _run(self, command: Command) -> None:
        command.turn.acquire()
        try:
            command.work()
        except BaseException as error:  # noqa: BLE001 - the outcome is what a test examines
            command.outcome = error
        command.has_ended = True
        self._pass_turn()

    def _pass_turn(self) -> None:
        waiting = [command for command in self.commands if not command.has_ended]
        if not waiting:
            self._main.release()
            return
        self.current = self.random.choice(waiting)
        self.current.turn.release()

    def _call(self, effect: Callable[[], Any], *, writes: bool = False) -> Any:
        """Carry out a call to the store, with everything that can happen to it."""
        command = self.current
        if command is not None and command.thread is not threading.current_thread():
            raise AssertionError("A thread of its own calls the store. Its turns could not be replayed.")
        self.monotonic += self.random.choice((0.001, 0.01, 0.1, 1.0))
        if self.has_jumping_clock and self.random.random() < 0.02:
            self.offset -= self.random.uniform(0, 3600)
        if command is None:
            return effect()
        if command.is_dead:
            raise Killed
        if len(self.commands) > 1 and self.random.random() < self.switches:
            self._pass_turn()
            command.turn.acquire()
        fault = next((fault for fault in command.faults if fault.at == command.calls), None)
        command.calls += 1
        if fault is None or (fault.kind == "full" and not writes):
            return effect()
        command.was_hit = True
        if fault.kind == "full":
            raise GenericError(FULL)
        if fault.kind in ("kill", "kill after"):
            command.is_dead = True
        if fault.kind in ("kill after", "lost reply"):
            effect()
        if command.is_dead:
            raise Killed
        raise GenericError(fault.error)

    # -- time

    def time(self) -> float:
        """Return the time of day, which may jump."""
        return self.monotonic + self.offset

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.monotonic += max(0.0, seconds)

    # -- the store

    def change(self, key: str, data: bytes | None) -> None:
        """Change an object and note who did it."""
        command = self.current.name if self.current else ""
        change = Change(self.monotonic, key, data, command, self.objects.get(key))
        for observe in self.observers:
            observe(change)
        self.changes.append(change)
        if data is None:
            self.objects.pop(key, None)
        else:
            self.objects[key] = data

    def put(self, store: Any, key: str, data: Any, *, mode: str = "overwrite", **options: Any) -> None:
        """Write an object; see `obstore.put`."""
        data = bytes(data)

        def effect() -> None:
            if mode == "create" and key in self.objects:
                raise AlreadyExistsError(key)
            self.change(key, data)

        self._call(effect, writes=True)

    def get(self, store: Any, key: str, **options: Any) -> _Reply:
        """Read an object; see `obstore.get`."""

        def effect() -> _Reply:
            if key not in self.objects:
                if key.startswith("claims/") and self.current is not None:
                    self.current.probe = self.current.calls
                raise NotFoundError(key)
            return _Reply(self.objects[key])

        return self._call(effect)

    def head(self, store: Any, key: str, **options: Any) -> dict[str, Any]:
        """Return the size of an object; see `obstore.head`."""
        return {"path": key, "size": len(self.get(store, key).bytes())}

    def delete(self, store: Any, keys: Any) -> None:
        """Delete objects; see `obstore.delete`."""
        for key in [keys] if isinstance(keys, str) else keys:
            self._call(lambda key=key: self.change(key, None) if key in self.objects else None)

    def list(self, store: Any, prefix: str | None = None, **options: Any) -> Iterator[list[dict[str, Any]]]:
        """Yield pages of a listing of everything below a prefix; see `obstore.list`."""
        items = self._call(lambda: self._listed(prefix or ""))
        for start in range(0, len(items), _PAGE):
            yield items[start : start + _PAGE]

    def list_with_delimiter(self, store: Any, prefix: str | None = None, **options: Any) -> dict[str, Any]:
        """Return one level of a listing; see `obstore.list_with_delimiter`."""
        prefix = f"{prefix.rstrip('/')}/" if prefix else ""
        objects, folders = [], dict[str, None]()
        for item in self._call(lambda: self._listed(prefix)):
            name, slash, _ = item["path"].removeprefix(prefix).partition("/")
            if slash:
                folders[f"{prefix}{name}"] = None
            else:
                objects.append(item)
        return {"objects": objects, "common_prefixes": list(folders)}

    def _listed(self, prefix: str) -> list[dict[str, Any]]:
        """Return the objects below a prefix as a listing shows them, which may be an old state."""
        objects = dict(self.objects)
        if self.lag_s:
            shown_until = self.monotonic - self.random.uniform(0, self.lag_s)
            for change in reversed(self.changes):
                if change.time <= shown_until:
                    break
                if change.before is None:
                    objects.pop(change.key, None)
                else:
                    objects[change.key] = change.before
        return [{"path": key, "size": len(objects[key])} for key in sorted(objects) if key.startswith(prefix)]


@dataclass
class _Reply:
    data: bytes

    def bytes(self) -> bytes:
        return self.data

    def stream(self, min_chunk_size: int = 0) -> Iterator[bytes]:
        yield self.data
