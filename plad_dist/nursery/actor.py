"""Nurseries of a job: one actor on each node, which keeps the node's fork server running."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from plad_dist.compat.linux import processor_time
from plad_dist.errors import first_line
from plad_dist.nursery.client import interpreter, socket_path
from plad_dist.nursery.warmth import WarmNodes, actor_name

logger = logging.getLogger("plad")

_CHECK_EVERY_S = 2.0
_LOOK_FOR_NODES_EVERY_S = 1.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 120.0
# A server must have one thread. OpenBLAS and jemalloc start others while they are imported.
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
_kept: set[str] = set()  # kinds that this process keeps
_WITHOUT_CUDA = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # counts devices without initialising CUDA


class NurseryPlan(NamedTuple):
    """Nurseries of one kind.

    Attributes:
        kind: what their children are for; see :func:`server_path`.
        modules: modules that their servers import.
        environment: environment variables of the processes that will ask for children.
        is_wanted: decides by the total resources of a node.
        most_nodes: the most nodes that have one.
        after: kind of another nursery that finishes its imports first on each node; None for none.
    """

    kind: str
    modules: tuple[str, ...]
    environment: Mapping[str, str]
    is_wanted: Callable[[Mapping[str, float]], bool]
    most_nodes: int
    after: str | None = None


def server_path(kind: str) -> Path:
    """Return the socket of the server of one kind for this job on the node of this Ray worker.

    Raises:
        RunFailed, OSError: the node has no folder for it that only this user can enter.
    """
    context = ray.get_runtime_context()
    return socket_path(f"{kind}-{context.get_job_id()}-{context.get_node_id()[:12]}.sock")


class Nursery:
    """State of an actor that keeps a server running on its node; two calls may run at a time."""

    def __init__(self, kind: str, modules: tuple[str, ...]) -> None:
        self._kind, self._modules = kind, modules
        self._is_warm = False

    def is_warm(self) -> bool:
        """Return True if the server has finished its imports."""
        return self._is_warm

    def keep(self) -> None:
        """Start the server, and again whenever it has ended or is stopped. Never return.

        Raises:
            RunFailed, OSError: as :func:`server_path`.
        """
        path, pause = server_path(self._kind), _FIRST_PAUSE_S
        _remove_dead_sockets(path.parent)
        while True:
            started = time.monotonic()
            its_end, lifeline = os.pipe()  # ours is closed when this process ends
            news, its_news = os.pipe()
            process = subprocess.Popen(
                interpreter("plad_dist.nursery.server", its_end, its_news, path, *self._modules),
                env=os.environ | _ONE_THREAD | _WITHOUT_CUDA,
                pass_fds=(its_end, its_news),
                start_new_session=True,
            )
            os.close(its_end)
            os.close(its_news)
            self._follow(process, news)
            self._is_warm = False
            os.close(news)
            os.close(lifeline)
            code = process.wait()
            path.unlink(missing_ok=True)
            was_short = time.monotonic() - started < _LONGEST_PAUSE_S
            print(f"nursery: ended with code {code}; another starts in {pause:g} s", file=sys.stderr, flush=True)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S) if was_short else _FIRST_PAUSE_S

    def _follow(self, process: subprocess.Popen[bytes], news: int) -> None:
        """Wait until the server has ended, or was stopped for more than one check."""
        stopped = 0
        while process.poll() is None and stopped < 2:
            if self._is_warm:
                time.sleep(_CHECK_EVERY_S)
            elif select.select([news], [], [], _CHECK_EVERY_S)[0]:
                self._is_warm = os.read(news, 1) != b""
                if not self._is_warm:
                    return  # it has closed its end, and is about to end
            stopped = stopped + 1 if processor_time(process.pid) is None else 0


def _remove_dead_sockets(folder: Path) -> None:
    """Remove the sockets of earlier servers, which nobody listens to."""
    for path in folder.glob("*.sock"):
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()


@contextmanager
def nurseries(plan: NurseryPlan) -> Iterator[None]:
    """Keep nurseries on the nodes of the cluster while the block runs.

    A block within a block that keeps the same kind changes nothing.
    """
    if plan.kind in _kept:
        yield
        return
    _kept.add(plan.kind)
    keeper = _Keeper(plan)
    thread = threading.Thread(target=keeper.run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        _kept.discard(plan.kind)
        keeper.finished.set()
        thread.join(timeout=30)
        keeper.end()


class _Retry(NamedTuple):
    """When a nursery whose actor has failed is made again, and the pause before that."""

    at: float
    pause: float


class _Keeper:
    """Thread of the driver that makes an actor on each node, and again when it has died.

    Whatever fails here costs only warm starts.
    """

    def __init__(self, plan: NurseryPlan) -> None:
        self._plan = plan
        self._actor_class: Any = None
        self._actors: dict[str, tuple[Any, Any]] = {}  # actor and the reference of its endless call, by node
        self._retries: dict[str, _Retry] = {}
        self._has_warned = False
        self._may_begin = WarmNodes(plan.after)
        self.finished = threading.Event()

    def run(self) -> None:
        """Follow the nodes of the cluster until `finished` is set."""
        self._actor_class = ray.remote(Nursery)
        while not self.finished.is_set():
            try:
                self.follow_nodes(time.monotonic())
            except Exception as error:  # noqa: BLE001 - Ray raises whatever its layers raise
                self._warn(error)
            self.finished.wait(_LOOK_FOR_NODES_EVERY_S)

    def follow_nodes(self, now: float) -> None:
        """Make the actors that are missing, and forget those that have failed."""
        alive = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        for node in list(self._actors):
            _, call = self._actors[node]
            if node not in alive:
                del self._actors[node]
            elif ray.wait([call], timeout=0)[0]:
                del self._actors[node]
                pause = min(2 * self._retries.get(node, _Retry(0, _FIRST_PAUSE_S / 2)).pause, _LONGEST_PAUSE_S)
                self._retries[node] = _Retry(now + pause, pause)
                try:
                    ray.get(call)
                except ray.exceptions.RayActorError:
                    logger.debug("the nursery of node %s has died, perhaps with its node", node)
                except Exception as error:  # noqa: BLE001 - its own, or one of Ray
                    self._warn(error)
        for node in sorted(self._may_begin.among(alive)):
            if self.finished.is_set() or len(self._actors) >= self._plan.most_nodes:
                return
            may_start = node not in self._retries or now >= self._retries[node].at
            if node not in self._actors and may_start and self._plan.is_wanted(alive[node]):
                self._actors[node] = self._made_on(node)

    def _made_on(self, node: str) -> tuple[Any, Any]:
        actor = self._actor_class.options(
            name=actor_name(self._plan.kind, node),
            get_if_exists=True,  # the one before may still be about to end, as a failure of this one shows
            num_cpus=0,
            max_concurrency=2,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            runtime_env={"env_vars": dict(self._plan.environment)},
        ).remote(self._plan.kind, self._plan.modules)
        return actor, actor.keep.remote()

    def _warn(self, error: Exception) -> None:
        log = logger.debug if self._has_warned else logger.warning
        log("warm starts are not available on every node: %s", first_line(error))
        self._has_warned = True

    def end(self) -> None:
        """End all actors."""
        for actor, _ in list(self._actors.values()):
            with contextlib.suppress(Exception):
                ray.kill(actor)
