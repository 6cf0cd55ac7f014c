"""The driver of sampling: actors per fleet, leases from the pool, progress, and the manifest at the end."""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from plad_dist.config import Cluster, Config, Sampling
from plad_dist.data.storage import Storage
from plad_dist.data.store import Part
from plad_dist.errors import RunFailed, UserError
from plad_dist.progress import Progress
from plad_dist.sampling.actor import EngineDiedError, Sampler
from plad_dist.sampling.job import BlockResult, Fleet, SamplingJob
from plad_dist.sampling.pool import BlockPool

logger = logging.getLogger("plad")

# A block to sample: which job of the fleet, which block of the job.
Task = tuple[int, int]


@dataclass
class _Running:
    """A fleet at work: its actors by name, what is under way, what came of it."""

    fleet: Fleet
    pool: BlockPool
    seed: int
    actors: dict[str, Any] = field(default_factory=dict)
    ready: set[str] = field(default_factory=set)
    remaining: Counter[int] = field(default_factory=Counter)
    parts: defaultdict[int, list[Part]] = field(default_factory=lambda: defaultdict(list))
    errors: int = 0
    rows: int = 0
    first_error: str | None = None
    born: int = 0
    deaths_in_a_row: int = 0
    started_once: bool = False
    started: float = field(default_factory=time.monotonic)


def run_fleets(config: Config, storage: Storage, fleets: Sequence[Fleet], progress: Progress) -> None:
    """Sample every job of every fleet that is not committed yet, and write its manifest.

    Fleets run side by side where the cluster has room and one after the other where not: an actor without resources
    waits in Ray's queue. Committed blocks are never sampled again.

    Raises:
        UserError: an engine refused to start.
        RunFailed: a block kept failing, or too many rows were errors.
    """
    running = [fleet for fleet in (_open(fleet, config, storage) for fleet in fleets) if fleet is not None]
    if not running:
        return
    total = sum(fleet.fleet.jobs[job].rows_in(block) * fleet.fleet.jobs[job].n
                for fleet in running for job, block in fleet.pool.blocks)  # fmt: skip
    progress.start("sample", total, "samples")
    driver = _Driver(config.sampling, config.cluster, storage, progress)
    try:
        driver.run(running)
    finally:
        driver.stop(running)


def _open(fleet: Fleet, config: Config, storage: Storage) -> _Running | None:
    """The fleet with its missing blocks, None where all is committed already. Manifests that are due are written."""
    missing: list[Task] = []
    for index, job in enumerate(fleet.jobs):
        dataset = job.dataset(storage)
        if dataset.manifest() is None:
            done = dataset.committed()
            blocks = [(index, block) for block in range(job.blocks) if block not in done]
            missing += blocks
            if not blocks:
                _finish(job, storage, [], {})
    if not missing:
        return None
    pool = BlockPool(missing, config.sampling.window, config.sampling.max_attempts)
    return _Running(fleet, pool, config.run.seed, remaining=Counter(job for job, _ in missing))


def _finish(job: SamplingJob, storage: Storage, parts: list[Part], facts: dict[str, Any]) -> None:
    job.dataset(storage).finish(job.blocks, fingerprint=job.fingerprint, facts=facts, known=parts)


class _Driver:
    def __init__(self, sampling: Sampling, cluster: Cluster, storage: Storage, progress: Progress) -> None:
        self._sampling, self._cluster, self._storage, self._progress = sampling, cluster, storage, progress
        self._gpus = float(ray.cluster_resources().get("GPU", 0)) > 0
        # What each outstanding Ray call is about: the fleet, the actor, and the block (None: it is starting).
        self._calls: dict[Any, tuple[_Running, str, Task | None]] = {}

    def run(self, running: list[_Running]) -> None:
        for fleet in running:
            for _ in range(min(fleet.fleet.replicas, len(fleet.pool.blocks))):
                self._add_actor(fleet)
        last_news = time.monotonic()
        while self._calls:
            done, _ = ray.wait(list(self._calls), num_returns=1, timeout=1.0)
            if done:
                last_news = time.monotonic()
                self._settle(done[0])
            elif not any(fleet.ready for fleet in running) and self._waited_too_long(last_news):
                raise RunFailed(self._no_resources(running))
            self._progress.tick()

    def _waited_too_long(self, since: float) -> bool:
        return time.monotonic() - since > self._cluster.start_timeout_s

    def _no_resources(self, running: list[_Running]) -> str:
        wanted = ", ".join(f"{f.fleet.replicas} x {self._resources(f.fleet)} for {f.fleet.name}" for f in running)
        return (
            f"no sampling actor started within {self._cluster.start_timeout_s} s. Asked for: {wanted}. The cluster has "
            f"{ray.cluster_resources()}, free {ray.available_resources()}. Committed samples are kept; add nodes or lower "
            "sampling.<role>.replicas or cpus, then run again."
        )

    def _resources(self, fleet: Fleet) -> dict[str, float]:
        tensor_parallel = int(str(fleet.engine.get("tensor_parallel_size", 1)))
        return {"num_cpus": fleet.cpus, "num_gpus": tensor_parallel if self._gpus else 0}

    def _add_actor(self, fleet: _Running) -> None:
        name = f"{fleet.fleet.name}-{fleet.born}"
        fleet.born += 1
        environment = {"VLLM_LOGGING_LEVEL": "WARNING", "OMP_NUM_THREADS": str(max(1, int(fleet.fleet.cpus)))}
        if not self._gpus:
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        actor = ray.remote(Sampler).options(
            **self._resources(fleet.fleet), max_concurrency=1000, runtime_env={"env_vars": environment}
        )
        handle = actor.remote(self._storage, fleet.fleet.path, fleet.fleet.settings, fleet.fleet.engine, fleet.seed)
        fleet.actors[name] = handle
        self._calls[handle.start.remote()] = (fleet, name, None)

    def _settle(self, call: Any) -> None:
        fleet, actor, task = self._calls.pop(call)
        try:
            result = ray.get(call)
        except RayActorError as error:
            self._lost(fleet, actor, str(error).splitlines()[0], blame=False)
        except RayTaskError as error:
            if task is None:
                raise RunFailed(f"{actor}: the engine did not start: {error.cause!r}") from None
            if isinstance(error.cause, EngineDiedError):
                ray.kill(fleet.actors[actor])
                self._lost(fleet, actor, str(error.cause), blame=True)
                return
            logger.warning("%s: block %s failed: %s", actor, task, error.cause)
            fleet.pool.fail(actor, task, repr(error.cause))
            self._lease_all(fleet)
        else:
            if task is None:
                self._started(fleet, actor, result)
            else:
                self._committed(fleet, actor, task, result)

    def _started(self, fleet: _Running, actor: str, problem: str | None) -> None:
        if problem is not None:
            if not fleet.started_once:
                raise UserError(problem)
            ray.kill(fleet.actors[actor])
            self._lost(fleet, actor, problem, blame=False)
            return
        fleet.started_once = True
        fleet.ready.add(actor)
        seconds = time.monotonic() - fleet.started
        self._progress.say(f"{actor}: engine for {fleet.fleet.path} is up after {seconds:.0f} s")
        fleet.started = time.monotonic()
        self._lease(fleet, actor)

    def _lease_all(self, fleet: _Running) -> None:
        for actor in sorted(fleet.ready):
            self._lease(fleet, actor)

    def _lease(self, fleet: _Running, actor: str) -> None:
        while (task := fleet.pool.take(actor)) is not None:
            assert isinstance(task, tuple)
            job = fleet.fleet.jobs[task[0]]
            call = fleet.actors[actor].sample_block.remote(job, task[1], uuid.uuid4().hex)
            self._calls[call] = (fleet, actor, task)

    def _committed(self, fleet: _Running, actor: str, task: Task, result: BlockResult) -> None:
        index = task[0]
        first = fleet.pool.done(task)
        if result.part is not None:
            fleet.parts[index].append(result.part)
            fleet.rows += result.rows
            fleet.deaths_in_a_row = 0
            fleet.errors += result.errors
            fleet.first_error = fleet.first_error or result.first_error
            self._progress.advance(result.rows, tokens=result.tokens)
            self._refuse_too_many_errors(fleet)
        if fleet.pool.finished:
            self._close(fleet)
        else:
            self._lease(fleet, actor)
        fleet.remaining[index] -= first
        if first and not fleet.remaining[index]:
            facts = {"seconds": round(time.monotonic() - fleet.started, 3)}
            _finish(fleet.fleet.jobs[index], self._storage, fleet.parts[index], facts)

    def _refuse_too_many_errors(self, fleet: _Running) -> None:
        allowed = self._sampling.max_error_share
        if fleet.rows >= 100 and fleet.errors > allowed * fleet.rows:
            raise RunFailed(
                f"{fleet.fleet.name}: {fleet.errors} of {fleet.rows} samples are errors, more than "
                f"sampling.max_error_share={allowed}. The first: {fleet.first_error}. What is committed is kept."
            )

    def _lost(self, fleet: _Running, actor: str, reason: str, *, blame: bool) -> None:
        """An actor died: its leases go back and another takes its place. `blame`: of its own, not with its node."""
        logger.warning("%s died (%s); its blocks are leased again", actor, reason)
        fleet.ready.discard(actor)
        fleet.actors.pop(actor, None)
        for call in [call for call, (_, name, _) in self._calls.items() if name == actor]:
            del self._calls[call]
        fleet.pool.remove(actor, reason if blame else None)
        fleet.deaths_in_a_row += 1
        if fleet.deaths_in_a_row >= fleet.fleet.replicas * self._sampling.max_attempts:
            raise RunFailed(
                f"{fleet.fleet.name}: engines died {fleet.deaths_in_a_row} times in a row, at last: {reason}. "
                "What is committed is kept; see the Ray logs of the actor, then run again."
            )
        if not fleet.pool.finished:
            self._add_actor(fleet)
            self._lease_all(fleet)

    def _close(self, fleet: _Running) -> None:
        """The fleet is done: its late attempts are dropped and its engines stopped, to make room for the others."""
        for call in [call for call, (owner, _, _) in self._calls.items() if owner is fleet]:
            del self._calls[call]
        self.stop([fleet])

    def stop(self, running: list[_Running]) -> None:
        """Stop all engines; what does not stop by itself within seconds is killed."""
        stops = {
            handle.stop.remote(): handle
            for fleet in running
            for name, handle in fleet.actors.items()
            if name in fleet.ready
        }
        if stops:
            ray.wait(list(stops), num_returns=len(stops), timeout=15)
        for fleet in running:
            for handle in fleet.actors.values():
                ray.kill(handle)
            fleet.actors.clear()
            fleet.ready.clear()
