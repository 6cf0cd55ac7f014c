"""Child process: runs one function for the process that asked for it, and dies with that process.

The two processes exchange pickled tuples through a pair of sockets that nobody else can reach. The
first item of a tuple from the child is one of

- ``hello``, after which the parent sends its :class:`Call`;
- ``ready``, or ``refused`` with the environment variables that the server lacks;
- ``beat``, once a second;
- ``tell`` or ``ask`` with the name of a handler and its arguments; an ask gets a reply;
- ``done`` with a result, or ``failed`` with an exception.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from plad_dist.compat.linux import die_with, set_environment
from plad_dist.errors import RunFailed, UserError

BEAT_S = 1.0
# What differs between the processes of one job without a meaning to libraries that are imported.
_OF_THE_PROCESS = {
    "_", "CUDA_VISIBLE_DEVICES", "JE_ARROW_MALLOC_CONF", "MASTER_ADDR", "MASTER_PORT", "OLDPWD", "OPENBLAS_NUM_THREADS",
    "PWD", "PYTORCH_NVML_BASED_CUDA_CHECK", "SHLVL", "SPT_NOENV",
}  # fmt: skip


class ChildFailed(RuntimeError):
    """The function of a child has raised an exception, whose traceback is a note."""


class Call(NamedTuple):
    """Request for a child.

    Attributes:
        title: name of the process in lists of processes.
        environment: environment variables.
        directory: working directory.
        path: folders that modules are imported from.
        function: `module:name` of a function that takes a :class:`Parent` and the arguments.
        arguments: pickled tuple, which is read only after the environment is set.
        first: `module:name` of a function without arguments that a child of a server calls while it
            has one thread; empty for none.
    """

    title: str
    environment: dict[str, str]
    directory: str
    path: list[str]
    function: str
    arguments: bytes
    first: str = ""


class Parent:
    """The child's end of the connection. Any thread may tell; one thread may ask.

    Attributes:
        met: `time.monotonic()` when the child could run its own code.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()
        self.met = time.monotonic()

    def tell(self, name: str, *arguments: Any) -> None:
        """Call a handler of the parent and do not wait for it."""
        self.send("tell", name, *arguments)

    def ask(self, name: str, *arguments: Any) -> Any:
        """Return the reply of a handler of the parent."""
        self.send("ask", name, *arguments)
        return self._connection.recv()

    def receive(self) -> Any:
        """Wait for a message of the parent and return it. Not to be mixed with :meth:`ask`."""
        return self._connection.recv()

    def send(self, *message: Any) -> None:
        """Send a message."""
        data = pickle.dumps(message)
        with self._lock:
            self._connection.send_bytes(data)

    def beat(self) -> None:
        """Send a sign of life every second, in a thread. It ends with the process."""
        pause = threading.Event()
        with contextlib.suppress(OSError):  # the parent does not listen any more
            while not pause.wait(BEAT_S):
                self.send("beat")


def run_child(
    connection: int, lifeline: int, preloaded: Mapping[str, str] | None = None, added: Mapping[str, str] | None = None
) -> None:
    """Run what the other end of a connection asks for.

    Args:
        lifeline: read end of a pipe. The process is killed when its last write end is closed.
        preloaded: environment in which this process has imported modules; None if it has not.
        added: environment variables that these imports have set, and would have set here.
    """
    die_with(lifeline)
    link = Connection(connection)
    parent = Parent(link)
    try:
        parent.send("hello")
        call: Call = link.recv()
    except (EOFError, OSError):  # whoever asked has given up
        return
    if preloaded is not None and (names := _differing(preloaded, call.environment)):
        parent.send("refused", names)
        return
    try:
        set_title(call.title)
        set_environment({**(added or {}), **call.environment})
        os.chdir(call.directory)
        sys.path[:] = call.path
        if call.first and preloaded is not None:
            _function(call.first)()
        threading.Thread(target=parent.beat, daemon=True).start()
        parent.send("ready")
        result = _function(call.function)(parent, *pickle.loads(call.arguments))  # noqa: S301 - from the parent
        sys.stdout.flush()
        parent.send("done", result)
    except BaseException as error:  # noqa: BLE001 - raised again in the process that asked
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        parent.send("failed", _portable(error))


def _function(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def set_title(title: str) -> None:
    """Set the name of this process in lists of processes, if vLLM's library for it is installed."""
    with contextlib.suppress(ImportError):
        from setproctitle import setproctitle

        setproctitle(title)


def _differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    names = {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}
    return sorted(name for name in names if name not in _OF_THE_PROCESS and not name.startswith("RAY_"))


def _portable(error: BaseException) -> Exception:
    """Return an exception that the parent can read without the libraries of this process."""
    if isinstance(error, UserError | RunFailed):
        return error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    failure = ChildFailed(f"{type(error).__name__}: {lines[-1] if lines else ''}")
    failure.add_note("".join(traceback.format_exception(error)))
    return failure


def main(connection: str, lifeline: str) -> None:
    """Run a child in a new interpreter."""
    run_child(int(connection), int(lifeline))
