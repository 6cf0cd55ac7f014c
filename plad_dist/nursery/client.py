"""Start of a child, from a nursery if there is one, and the conversation with it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from plad_dist.compat.linux import oom_kills, peer_of, processor_time
from plad_dist.errors import RunFailed, first_line
from plad_dist.nursery.child import Call

logger = logging.getLogger("plad")

_POLL_S = 0.2
_IDLE_S = 10.0  # a server that uses no time of a processor for so long does not import any more
_STATUS_TIMEOUT_S = 1.0
_END_TIMEOUT_S = 30.0  # for a killed process to give back its memory
_START_TIMEOUT_S = 120.0  # of a new interpreter
_LONGEST_PATH = 107  # bytes of the path of a socket


class ChildDied(RuntimeError):
    """The process of a child ended before its function did.

    Attributes:
        is_aborted: True if the process ended itself by SIGABRT, as a library does that gives up.
        lacked_memory: True if the kernel has killed processes of this machine for lack of memory
            since the process was started, and nothing else explains its end.
    """

    def __init__(self, message: str, *, is_aborted: bool = False, lacked_memory: bool = False) -> None:
        super().__init__(message)
        self.is_aborted, self.lacked_memory = is_aborted, lacked_memory


class ChildKilled(Exception):
    """This process has killed a child because it must end."""


class Child:
    """Running child.

    Args:
        connection: this process's end of the connection.
        lifeline: write end of the pipe whose end kills the child.
        wait: waits for the child's end for some seconds, and returns its wait status, None if it is
            unknown.
        is_warm: True if the child comes from a nursery.
    """

    def __init__(
        self, connection: Connection, lifeline: int, wait: Callable[[float], int | None], *, is_warm: bool
    ) -> None:
        self._connection, self._lifeline, self._wait = connection, lifeline, wait
        self._oom_kills = oom_kills()
        self.is_warm = is_warm

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self.kill()

    def serve(
        self,
        handlers: Mapping[str, Callable[..., Any]],
        silence_s: float,
        must_end: Callable[[], bool] = lambda: False,
    ) -> Any:
        """Handle what the child tells and asks until its function returns, and return its result.

        Args:
            silence_s: seconds without a sign of life after which the child is killed.
            must_end: asked several times a second; True kills the child.

        Raises:
            ChildKilled: `must_end` returned True.
            UserError, RunFailed: the function raised it.
            ChildFailed: the function raised something else.
            ChildDied: the child died, or was silent.
        """
        heard = time.monotonic()
        while True:
            if must_end():
                self.kill()
                raise ChildKilled
            if not self._connection.poll(_POLL_S):
                if time.monotonic() - heard > silence_s:
                    self.kill()
                    raise ChildDied(f"its process gave no sign of life for {silence_s:g} s")
                continue
            heard = time.monotonic()
            try:
                kind, *rest = self._connection.recv()
            except (EOFError, ConnectionError):
                raise self.death() from None
            match kind:
                case "tell":
                    handlers[rest[0]](*rest[1:])
                case "ask":
                    self._connection.send(handlers[rest[0]](*rest[1:]))
                case "done":
                    return rest[0]
                case "failed":
                    raise rest[0]

    def send(self, *message: Any) -> None:
        """Send a message to a child that receives some. Only one thread may send.

        A child that has died is noticed by :meth:`serve`.
        """
        with contextlib.suppress(OSError):
            self._connection.send(message)

    def death(self) -> ChildDied:
        """Return how the child died, once its end of the connection is closed."""
        status = self._wait(_STATUS_TIMEOUT_S)
        code = None if status is None else os.waitstatus_to_exitcode(status)
        if code is not None and code >= 0:
            return ChildDied(f"its process ended with exit code {code}")
        end = "died" if code is None else f"was killed by {signal.Signals(-code).name}"
        lacked_memory = code in (None, -signal.SIGKILL) and oom_kills() > self._oom_kills
        cause = ": out of memory" if lacked_memory else ""
        return ChildDied(
            f"its process {end} on node {socket.gethostname()}{cause}",
            is_aborted=code == -signal.SIGABRT, lacked_memory=lacked_memory,
        )  # fmt: skip

    def kill(self) -> None:
        """Kill the child if it lives, and wait until its memory is free."""
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
            self._connection.close()
            self._wait(_END_TIMEOUT_S)


def start_child(
    title: str, function: str, arguments: tuple[Any, ...], server: Path | None = None, *, first: str = ""
) -> Child:
    """Start a child that runs a function in the environment of this process.

    Args:
        title: name of the process in lists of processes.
        function: `module:name`; see :class:`~plad_dist.nursery.child.Call`.
        arguments: picklable.
        server: socket of a nursery's server. A new interpreter is started if it is None, does not
            respond, or has another environment.
        first: `module:name` of a function without arguments that a child of a server calls while it
            has one thread.
    """
    call = Call(title, dict(os.environ), str(Path.cwd()), list(sys.path), function, pickle.dumps(arguments), first)
    child = _from_server(server, call) if server is not None else None
    return child or _new_interpreter(call)


def interpreter(module: str, *arguments: object) -> list[str]:
    """Return the command that runs the `main` of a module with the import path of this process.

    Args:
        arguments: of `main`, as texts.
    """
    start = f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {module} import main; main(*sys.argv[2:])"
    return [sys.executable, "-c", start, json.dumps(sys.path), *map(str, arguments)]


def socket_path(name: str) -> Path:
    """Return the path of a server's socket, in a folder that only this user can enter.

    Raises:
        RunFailed: the folder is another user's, or open to others.
    """
    folder = Path(tempfile.gettempdir()) / f"plad-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not folder.is_dir() or folder.is_symlink() or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise RunFailed(f"{folder}: expected a folder that only this user can enter; remove it")
    path = folder / name
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise RunFailed(
            f"{path}: too long for a socket, whose path has at most {_LONGEST_PATH} bytes; set a shorter TMPDIR"
        )
    return path


class _Ends:
    """Both ends of a connection and of a lifeline, before the child has its ends."""

    def __init__(self) -> None:
        ours, its = socket.socketpair()
        self.connection, self.its_connection = Connection(ours.detach()), its.detach()
        self.its_lifeline, self.lifeline = os.pipe()

    def close_its(self) -> None:
        """Close the ends that the child has now."""
        os.close(self.its_connection)
        os.close(self.its_lifeline)


def _from_server(server: Path, call: Call) -> Child | None:
    """Return a child of a nursery's server, None if a new interpreter must do."""
    request = socket.socket(socket.AF_UNIX)
    try:
        request.connect(str(server))
    except OSError:  # there is none
        request.close()
        return None
    ends = _Ends()
    child = Child(ends.connection, ends.lifeline, lambda seconds: _status_of(request, seconds), is_warm=True)
    try:
        try:
            socket.send_fds(request, [b"1"], [ends.its_connection, ends.its_lifeline, 1, 2])
        finally:
            ends.close_its()
        problem = _problem_of_start(ends.connection, call, lambda: _responds(ends.connection, request))
    except (OSError, EOFError):
        problem = str(child.death())
    if problem is None:
        return child
    logger.warning("nursery: not used: %s", problem)
    child.kill()
    return None


def _problem_of_start(connection: Connection, call: Call, responds: Callable[[], bool]) -> str | None:
    """Send a call to a child. Return None when it is ready, or why it is not.

    Args:
        responds: waits for a message of the child, and returns False if it is not worth waiting.

    Raises:
        EOFError, OSError: the child has died.
    """
    while responds():
        match connection.recv():
            case ("hello",):
                connection.send(call)
            case ("ready",):
                return None
            case ("refused", names):
                return f"it has another environment: {', '.join(names)}"
            case (_, error):
                return f"its child failed: {first_line(error)}"
    return "it does not respond"


def _responds(connection: Connection, request: socket.socket) -> bool:
    """Wait for the first message of a child as long as its server makes progress."""
    pid = peer_of(request).process
    used, since = -1, time.monotonic()
    while not connection.poll(0.2):
        now = processor_time(pid)
        if now is None:
            return False
        if now != used:
            used, since = now, time.monotonic()
        elif time.monotonic() - since > _IDLE_S:
            return False
    return True


def _status_of(request: socket.socket, seconds: float) -> int | None:
    """Return the wait status that a server reports in time.

    None if the server is silent, stopped or dead.
    """
    until = time.monotonic() + seconds
    with request:
        while True:
            try:
                request.settimeout(0.2)
                return int(request.recv(32))
            except TimeoutError:
                if time.monotonic() > until or processor_time(peer_of(request).process) is None:
                    return None
            except (OSError, ValueError):
                return None


def _new_interpreter(call: Call) -> Child:
    """Start a new interpreter.

    Raises:
        ChildDied: it does not run the child's code.
    """
    ends = _Ends()
    handles = (ends.its_connection, ends.its_lifeline)
    command = interpreter("plad_dist.nursery.child", *handles)
    process = subprocess.Popen(command, pass_fds=handles, start_new_session=True)
    ends.close_its()

    def wait(seconds: float) -> int | None:
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        return -code if code < 0 else code << 8

    child = Child(ends.connection, ends.lifeline, wait, is_warm=False)
    try:
        problem = _problem_of_start(ends.connection, call, lambda: ends.connection.poll(_START_TIMEOUT_S))
        if problem is not None:
            raise ChildDied(f"its interpreter did not start: {problem}")
    except (EOFError, ConnectionError):
        death = child.death()
        child.kill()
        raise death from None
    except BaseException:
        child.kill()
        raise
    return child
