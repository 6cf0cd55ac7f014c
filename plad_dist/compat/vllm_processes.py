"""Engine processes of vLLM that start from a fork server which has imported vLLM already.

Written for vLLM 0.29.0 and Python's `multiprocessing`. Relies on:

- `get_mp_context` of `vllm/v1/engine/utils.py`, which is replaced in that module; its `Process`
  starts `EngineCoreProc.run_engine_core`;
- `vllm.v1.engine.core`, which can be imported before a fork, because it neither starts threads nor
  initialises CUDA.

vLLM itself starts a new interpreter for each engine of a Ray actor, which takes as long to import
vLLM as the actor. The server imports at the same time as the actor, and once for all engines that
the actor starts one after another.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

from plad_dist.compat.assumptions import Assumptions
from plad_dist.compat.linux import die_with, set_environment

_assumptions = Assumptions("vllm", "0.29.0")
_PRELOADED = ["vllm.v1.engine.core"]


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
    """Start importing vLLM in a fork server, and let the engines of this process start from it."""
    context = _Context()
    context.set_forkserver_preload(_PRELOADED)
    is_set = "OPENBLAS_NUM_THREADS" in os.environ
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads would not survive a fork
    try:
        forkserver.ensure_running()
    finally:
        if not is_set:
            del os.environ["OPENBLAS_NUM_THREADS"]
    from vllm.v1.engine import utils

    if isinstance(getattr(utils.get_mp_context, "context", None), _Context):  # an earlier engine of this process
        return
    get_context = _assumptions.attribute(utils, "get_mp_context")
    _assumptions.parameters(get_context)

    def get_mp_context() -> Any:
        get_context()  # sets environment variables
        return context

    get_mp_context.context = context  # type: ignore[attr-defined]
    utils.get_mp_context = get_mp_context
