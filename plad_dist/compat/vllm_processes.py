"""Engine processes of vLLM that start from a fork server which has imported vLLM already.

Written for vLLM 0.29.0 and Python's `multiprocessing`. Relies on:

- `get_mp_context` of `vllm/v1/engine/utils.py`, which is replaced in that module; its `Process`
  starts `EngineCoreProc.run_engine_core`;
- `ForkServer` of `multiprocessing/forkserver.py`: its private attributes, which say where the
  server is, and `main`, which serves;
- `vllm.v1.engine.core`, which can be imported before a fork, because it neither starts threads nor
  initialises CUDA.

vLLM itself starts a new interpreter for each engine that shares a process with threads, which takes
as long to import vLLM as that process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import arbitrary_address  # type: ignore[attr-defined]
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from plad_dist.compat.assumptions import Assumptions
from plad_dist.compat.linux import die_with, set_environment

_assumptions = Assumptions("vllm", "0.29.0")
_PRELOADED = ["vllm.v1.engine.core"]
_CONNECTIONS = ("socket:", "pipe:")
for _name in ("_forkserver_address", "_forkserver_alive_fd", "_forkserver_pid"):
    _assumptions.attribute(forkserver._forkserver, _name)
_assumptions.parameters(forkserver.main, "listener_fd", "alive_r", "preload", "main_path", "sys_path")


class _EngineProcess(ForkServerProcess):
    """Engine process in the environment of the actor, which dies with the actor."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._environment = dict(os.environ)
        self._lifeline, self._actors_end = multiprocessing.Pipe(duplex=False)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_actors_end"}

    def run(self) -> None:
        set_environment(self._environment)
        die_with(self._lifeline.fileno())
        from vllm.platforms import current_platform

        if current_platform.is_cpu() and os.environ.get("VLLM_CPU_OMP_THREADS_BIND") == "nobind":
            # vLLM forks workers unless something forbids it. On CPUs that is OpenMP with bound
            # threads, which needs a library that is preloaded into a new interpreter.
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        super().run()


class _Context(ForkServerContext):
    Process = _EngineProcess


def start_fork_server() -> None:
    """Start the fork server of this process, unless it runs.

    If this process has imported vLLM and has one thread, the server is a fork of it. Otherwise it
    is a new interpreter, which imports vLLM at the same time as this process.
    """
    server: Any = forkserver._forkserver
    has_one_thread = len(list(Path("/proc/self/task").iterdir())) == 1
    if _PRELOADED[0] in sys.modules and has_one_thread and server._forkserver_pid is None:
        _fork(server)
        return
    forkserver.set_forkserver_preload(_PRELOADED)
    is_set = "OPENBLAS_NUM_THREADS" in os.environ
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads would not survive a fork
    try:
        forkserver.ensure_running()
    finally:
        if not is_set:
            del os.environ["OPENBLAS_NUM_THREADS"]


def use_fork_server() -> None:
    """Let the engines of this process start from its fork server."""
    from vllm.v1.engine import utils

    if isinstance(getattr(utils.get_mp_context, "context", None), _Context):  # an earlier engine of this process
        return
    context = _Context()
    get_context = _assumptions.attribute(utils, "get_mp_context")
    _assumptions.parameters(get_context)

    def get_mp_context() -> Any:
        get_context()  # sets environment variables
        return context

    get_mp_context.context = context  # type: ignore[attr-defined]
    utils.get_mp_context = get_mp_context


def _fork(server: Any) -> None:
    """Do what `ForkServer.ensure_running` does, with a fork instead of a new interpreter."""
    resource_tracker.ensure_running()
    tracker: Any = resource_tracker.getfd()
    address = arbitrary_address("AF_UNIX")
    alive, its_alive = os.pipe()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        pid = os.fork()
        if pid == 0:
            try:
                _close_connections_except(listener.fileno(), alive, tracker)
                die_with(alive)
                forkserver.main(listener.fileno(), alive, [])
            finally:
                os._exit(1)  # the frames above belong to the parent
    os.close(alive)
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = address, its_alive, pid


def _close_connections_except(*kept: int) -> None:
    """Close the other sockets and pipes, whose ends would stay open when the parent has died."""
    for entry in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(OSError):
            if int(entry.name) > 2 and int(entry.name) not in kept and str(entry.readlink()).startswith(_CONNECTIONS):
                os.close(int(entry.name))
