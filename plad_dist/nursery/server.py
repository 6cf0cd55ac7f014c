"""Fork server: imports modules once, then forks a child for each request.

It has one thread and has not initialised CUDA, because neither survives a fork. A request is one
byte with four file descriptors: the child's connection and lifeline, its stdout and its stderr. The
reply, when the child has ended, is its wait status in decimal digits.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from plad_dist.compat.linux import die_with, peer_of
from plad_dist.nursery.child import run_child, set_title

_REQUEST_TIMEOUT_S = 5.0
_REPEATED_BY_IMPORTS = {"PYTORCH_NVML_BASED_CUDA_CHECK"}  # set for the server, and by vLLM
_CUDA_DEVICE = "/dev/nvidia-uvm"  # that counting devices does not open


def main(lifeline: str, news: str, path: str, *modules: str) -> None:
    """Serve requests on a socket until the write end of the lifeline is closed.

    Requests that arrive before the modules are imported wait.

    Args:
        news: write end of a pipe, which gets one byte after the imports.
        modules: modules to import; those that do not exist are left out.
    """
    gc.disable()  # imports leave hardly any garbage, and the collector would take a tenth of their time
    die_with(int(lifeline))
    set_title("plad:nursery")
    environment = dict(os.environ)
    environment_before = {name: value for name, value in environment.items() if name not in _REPEATED_BY_IMPORTS}
    with contextlib.suppress(FileNotFoundError):
        Path(path).unlink()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    for module in modules:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(module)
    if (obstacle := _obstacle()) is not None:
        print(f"nursery: {obstacle}", file=sys.stderr, flush=True)
        os._exit(1)  # a thread could hold up the end of the interpreter
    added = {name: value for name, value in os.environ.items() if environment_before.get(name) != value}
    gc.collect()
    gc.freeze()  # the collector would copy the pages that children share
    gc.enable()
    os.write(int(news), b"1")
    os.close(int(news))
    _serve(listener, environment, added)


class _Waiting(NamedTuple):
    """Child whose end somebody waits for."""

    pid: int
    client: socket.socket


def _serve(listener: socket.socket, environment: dict[str, str], added: dict[str, str]) -> None:
    """Fork a child for each request.

    Args:
        environment: environment variables before the imports.
        added: those that the imports have set.
    """
    waiting: dict[int, _Waiting] = {}  # by descriptor of the child's process
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is not listener:
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    _report(waiting.pop(key.fd))
                elif (child := _accepted(listener, waiting, environment, added)) is not None:
                    handle = os.pidfd_open(child.pid)
                    waiting[handle] = child
                    selector.register(handle, selectors.EVENT_READ)


def _report(child: _Waiting) -> None:
    _, status = os.waitpid(child.pid, 0)
    with child.client, contextlib.suppress(OSError):
        child.client.sendall(str(status).encode())


def _accepted(
    listener: socket.socket, waiting: Mapping[int, _Waiting], environment: dict[str, str], added: dict[str, str]
) -> _Waiting | None:
    """Fork a child for the next client.

    None if the client has gone, its request is bad, or there is no memory for a child.
    """
    handles: list[int] = []
    client: socket.socket | None = None
    try:
        client, _ = listener.accept()
        if peer_of(client).user != os.geteuid():
            raise PermissionError("a request of another user")
        client.settimeout(_REQUEST_TIMEOUT_S)
        _, handles, *_ = socket.recv_fds(client, 1, 4)
        if len(handles) != 4:
            raise ConnectionError("a request without its four descriptors")
        client.settimeout(None)
        pid = os.fork()
    except (OSError, MemoryError) as error:  # also of a client that has gone
        print(f"nursery: no child: {error!r}", file=sys.stderr, flush=True)
        if client is not None:
            client.close()
        for handle in handles[1:]:
            os.close(handle)
        if handles:
            with contextlib.suppress(OSError), Connection(handles[0]) as connection:
                connection.send(("failed", error))
        return None
    if pid:
        for handle in handles:
            os.close(handle)
        return _Waiting(pid, client)
    try:
        # What the child inherits would keep the ends of its siblings open.
        for other in (listener, client, *(sibling.client for sibling in waiting.values())):
            other.close()
        for handle in waiting:
            os.close(handle)
        _be_a_child(handles, environment, added)
    except BaseException:  # noqa: BLE001 - the frames above belong to the server
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    # Without the clean-up of the interpreter, which belongs to the server.
    os._exit(0)


def _be_a_child(handles: list[int], environment: dict[str, str], added: dict[str, str]) -> None:
    connection, lifeline, stdout, stderr = handles
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.close(stdout)
    os.close(stderr)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # or all children would draw the same numbers
    run_child(connection, lifeline, environment, added)


def _obstacle() -> str | None:
    """Return what the imported modules have left that a child would find broken, or None."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:  # an old kernel, or a container that forbids it
        return f"processes cannot be watched: {error}"
    threads = sorted(task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir())
    if len(threads) > 1:
        return f"the imported modules have started threads: {', '.join(threads)}"
    for handle in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if str(handle.readlink()).startswith(_CUDA_DEVICE):
                return "the imported modules have initialised CUDA"
    return None
