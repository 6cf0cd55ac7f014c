"""A simulated world for paid sampling: storage, a server that counts, and commands that are killed.

Everything of plad_dist that samples is real: actors, attempts, spools, parts, clients and the
ledger. Storage is in memory, the server answers without a network, and time is virtual. Calls in
threads stop before every operation of storage, so that a seeded generator decides in which order
the operations of all commands happen, which of them fail, and where a command is killed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from plad_dist.config import Decoding, Endpoint, Model
from plad_dist.data.claims import RUN_CLAIMS, claim_run
from plad_dist.data.dataset import Dataset
from plad_dist.data.schemas import PROMPTS, SAMPLES
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed
from plad_dist.fleet.protocol import Hints, StopStageError
from plad_dist.sampling import spool
from plad_dist.sampling.actor import Sampler
from plad_dist.sampling.endpoint import backend as backends
from plad_dist.sampling.endpoint import client as clients
from plad_dist.sampling.endpoint import ledger
from plad_dist.sampling.endpoint.backend import EndpointBackend
from plad_dist.sampling.endpoint.client import EndpointClient
from plad_dist.sampling.endpoint.ledger import FOLDER, Ledger
from plad_dist.sampling.endpoint.reply import Failure, Outcome, Reply
from plad_dist.sampling.endpoint.request import CompletionRequest
from plad_dist.sampling.endpoint.usage import Usage
from plad_dist.sampling.job import SamplingJob
from tests.simulation.stepping import Killed, StepLock, Stepper, VirtualLoop

BLOCKS, PROMPTS_IN_BLOCK, MAX_TOKENS = 3, 4, 5
ANSWER = 5 * 4000 / 1e6  # the worst cost of a request
PAYER, URL = "teacher-teacher", "memory"
LIMIT_S = 100_000.0  # of virtual time


@dataclass(frozen=True)
class Faults:
    """Probabilities of what goes wrong, and the behaviour of the server."""

    kill: float = 0.0  # at each operation of storage and at each request
    error: float = 0.0  # an operation fails without effect
    lost_write: float = 0.0  # a write takes effect, and its reply is lost
    lag_s: float = 0.0  # age of listings
    lost_answer: float = 0.0  # an answer is billed and lost
    no_connection: float = 0.0
    excess: float = 0.0  # an answer costs more than its worst cost

    @staticmethod
    def draw(rng: random.Random) -> Faults:
        def perhaps(*values: float) -> float:
            return rng.choice([0.0, *values])

        return Faults(
            kill=perhaps(0.002, 0.01, 0.03),
            error=perhaps(0.002, 0.01),
            lost_write=perhaps(0.01, 0.1),
            lag_s=perhaps(1.0, 60.0),
            lost_answer=perhaps(0.05, 0.2),
            no_connection=perhaps(0.1),
            excess=perhaps(0.0, 0.0, 0.2),
        )


@dataclass(eq=False)
class Process:
    """A command: `is_dead` once it was killed, so that nothing it does has an effect any more."""

    name: str
    has_claimed: bool = False
    superseded_at: float | None = None
    is_dead: bool = False


@dataclass(eq=False)
class World:
    """All that commands share: objects of storage, and the server with its bill.

    Attributes:
        billed: money that the server has billed.
        largest: largest bill of a request.
    """

    rng: random.Random
    faults: Faults
    cap: float
    loop: VirtualLoop
    mutation: str = ""
    storage_s: float = 0.05  # longest operation of storage
    server_s: float = 3.0  # longest answer
    objects: dict[str, tuple[bytes, float]] = field(default_factory=dict)  # bytes, and the time of creation
    processes: dict[str, Process] = field(default_factory=dict)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)  # kept, as the loop does not
    billed: float = 0.0
    largest: float = 0.0
    kills: int = 0
    is_calm: bool = False  # nothing goes wrong any more
    violations: list[str] = field(default_factory=list)  # promises that were broken

    @property
    def bound(self) -> float:
        """Money that the bill may exceed the cap or the ledger by."""
        return len(self.processes) * self.largest if self.faults.excess else 1e-9

    def hits(self, probability: float) -> bool:
        return not self.is_calm and self.rng.random() < probability

    def remembered(self) -> float:
        """Return what the ledger says was spent."""
        numbers = [int(key.rpartition("/")[2].removesuffix(".json")) for key in self.objects if f"{FOLDER}/" in key]
        assert sorted(numbers) == list(range(1, len(numbers) + 1))
        return Ledger(MemoryStorage(URL, world=self), PAYER).read().total / 1e6

    def bill(self, cost: float) -> None:
        """Bill an answer, and check the promises at this moment."""
        self.billed += cost
        self.largest = max(self.largest, cost)
        if self.billed > self.cap + self.bound:
            self.violations.append(f"{self.billed} billed, {self.cap} is the cap")
        if self.billed > self.remembered() + self.bound:
            self.violations.append(f"{self.billed} billed, {self.remembered()} remembered")

    def receive(self, process: Process) -> None:
        """Receive a request, and check that its command still owns the run."""
        superseded_at = process.superseded_at
        # A client is patient with a storage that fails: it may take several looks at the claims.
        notice_s = (33.0 if self.faults.error else 3.0) + 4 * self.storage_s
        if superseded_at is not None and self.loop.now > superseded_at + notice_s:
            self.violations.append(f"{process.name} sends a request after it was taken over")


@dataclass(frozen=True)
class MemoryStorage(Storage):
    """Storage of a process. Without a process, nothing goes wrong."""

    world: World = None  # type: ignore[assignment]
    process: Process | None = None

    @cached_property
    def local_root(self) -> Path | None:
        return None

    def create(self, key: str, data: bytes) -> bool:
        if self.world.mutation == "overwrite" and key.startswith(FOLDER):
            self.replace(key, data)
            return True

        def effect() -> bool:
            if key in self.world.objects:
                return False
            self._put(key, data)
            return True

        return bool(self._operate(key, effect, is_write=True))

    def replace(self, key: str, data: bytes) -> None:
        self._operate(key, lambda: self._put(key, data), is_write=True)

    def delete(self, key: str) -> None:
        self._operate(key, lambda: self.world.objects.pop(key, None), is_write=True)

    def read(self, key: str) -> bytes | None:
        data: bytes | None = self._operate(key, lambda: self.world.objects.get(key, (None, 0.0))[0])
        return data

    def sizes(self, folder: str) -> dict[str, int]:
        listing: dict[str, int] = self._operate(folder, lambda: self._list(folder))
        return listing

    def _put(self, key: str, data: bytes) -> None:
        created = self.world.objects[key][1] if key in self.world.objects else self.world.loop.now
        self.world.objects[key] = data, created
        if key.startswith(f"{RUN_CLAIMS}/"):
            for process in self.world.processes.values():
                if process.has_claimed and process.superseded_at is None:
                    process.superseded_at = self.world.loop.now
            assert self.process is not None
            self.process.has_claimed = True

    def _list(self, folder: str) -> dict[str, int]:
        prefix, names = f"{folder}/" if folder else "", dict[str, int]()
        lag_s = self.world.rng.random() * self.world.faults.lag_s if self._can_fail() else 0.0
        for key, (data, created) in list(self.world.objects.items()):
            if key.startswith(prefix) and created <= self.world.loop.now - lag_s:
                name, slash, _ = key.removeprefix(prefix).partition("/")
                names[name + slash] = 0 if slash else len(data)
        return names

    def _can_fail(self) -> bool:
        # Threads of the spool's own would draw random numbers in an order that differs each time.
        return self.process is not None and getattr(Stepper.current, "stepper", None) is not None

    def _operate(self, key: str, effect: Callable[[], Any], *, is_write: bool = False) -> Any:
        world, process = self.world, self.process
        if process is None:
            return effect()
        if not self._can_fail():
            self._check_alive()
            return effect()
        Stepper.current.stepper.pause()
        self._check_alive()
        self._perhaps_die()
        if world.hits(world.faults.error):
            raise RunFailed(f"{key}: cannot be used: an error of storage")
        result = effect()
        self._perhaps_die()
        if is_write and world.hits(world.faults.lost_write):
            raise RunFailed(f"{key}: cannot be written: the reply was lost")
        return result

    def _check_alive(self) -> None:
        assert self.process is not None
        if self.process.is_dead:
            raise Killed

    def _perhaps_die(self) -> None:
        assert self.process is not None
        if self.world.hits(self.world.faults.kill):
            self.process.is_dead = True
            self.world.kills += 1
            raise Killed


class SimulatedConnection:
    """Connection of one process to the server that counts."""

    def __init__(self, world: World, endpoint: Endpoint) -> None:
        self._world, self._process, self.events = world, world.processes[endpoint.url.removeprefix("http://")], 0

    def problem(self) -> None:
        return None

    async def check(self) -> None:
        return None

    def redacted(self, text: str) -> str:
        return text

    async def close(self) -> None:
        return None

    async def post(self, request: CompletionRequest) -> Outcome:
        world, faults = self._world, self._world.faults
        await self._perhaps_die()
        if world.hits(faults.no_connection):
            return Failure("transient", "no connection")
        world.receive(self._process)
        await asyncio.sleep(world.rng.random() * world.server_s)
        await self._perhaps_die(0.0)
        usage = Usage(1, MAX_TOKENS if world.rng.random() < 0.5 else world.rng.randint(1, MAX_TOKENS))
        if world.hits(faults.excess):
            usage = Usage(1, MAX_TOKENS + world.rng.randint(1, 20))
        world.bill(usage.completion_tokens * 4000 / 1e6)
        await self._perhaps_die()
        await asyncio.sleep(world.rng.random() * world.server_s)
        await self._perhaps_die(0.0)
        if world.hits(faults.lost_answer):
            return Failure("transient", "silence", usage=None)
        return [Reply("text", "stop", usage)]

    async def _perhaps_die(self, probability: float | None = None) -> None:
        """Wait for ever if the process is dead, or dies now."""
        if self._world.hits(self._world.faults.kill if probability is None else probability):
            self._process.is_dead = True
            self._world.kills += 1
        if self._process.is_dead:
            await asyncio.Event().wait()


async def in_thread(world: World, call: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Call a function step by step, in place of :func:`asyncio.to_thread`."""
    stepper = Stepper(partial(call, *arguments, **keywords))
    try:
        while not stepper.is_done:
            await asyncio.sleep(world.rng.random() * world.storage_s)
            stepper.step()
        return stepper.result()
    except Killed:
        await asyncio.Event().wait()
    finally:
        while not stepper.is_done:  # cancelled: the call ends, as it does in a real thread
            stepper.step()


JOB = SamplingJob(
    prompts="prompts", output="samples", role="teacher", model="m", weights="m",
    decoding=Decoding(max_tokens=MAX_TOKENS), n=1, seed=1, round=0, seed_round=0, fingerprint="f",
)  # fmt: skip


def write_prompts(world: World) -> None:
    prompts = Dataset(MemoryStorage(URL, world=world), "prompts", PROMPTS)
    for block in range(BLOCKS):
        rows = [
            {"prompt_id": f"{block}-{row}", "messages": [{"role": "user", "content": f"{block}-{row}"}]}
            for row in range(PROMPTS_IN_BLOCK)
        ]
        table = pa.Table.from_pylist(rows, schema=PROMPTS)
        prompts.commit(block, table, fingerprint="p", attempt="a")
    prompts.finish(BLOCKS, fingerprint="p", facts={})


def write_earlier_part(world: World) -> None:
    """Commit the first block as an earlier run has, which paid for it before there was a ledger."""
    dataset = Dataset(MemoryStorage(URL, world=world), "samples", SAMPLES)
    rows = [
        {
            "prompt_id": f"0-{row}", "sample_index": 0, "role": "teacher", "text": "text", "token_ids": [],
            "num_tokens": 5, "finish_reason": "stop", "model": "m", "round": 0,
        }
        for row in range(PROMPTS_IN_BLOCK)
    ]  # fmt: skip
    counts = {"cost_micros": round(PROMPTS_IN_BLOCK * ANSWER * 1e6)}
    dataset.commit(0, pa.Table.from_pylist(rows, schema=SAMPLES), fingerprint="f", attempt="a", counts=counts)
    world.billed = PROMPTS_IN_BLOCK * ANSWER


async def command(world: World, process: Process, cap: float | None, *, claims: bool) -> None:
    """Sample all blocks as a command does, until it is done, has to stop or is killed."""
    storage = MemoryStorage(URL, world=world, process=process)
    endpoint = Endpoint(
        url=f"http://{process.name}", model="m", concurrency=3, max_spend=cap, input_price=0.0, output_price=4000.0,
        give_up_after_s=60.0,
    )  # fmt: skip
    try:
        if claims:
            storage = replace(storage, claim=await asyncio.to_thread(claim_run, storage, process.name))
        outputs = [(JOB.dataset(storage), range(BLOCKS))]
        backend = await asyncio.to_thread(EndpointBackend, Model(endpoint=endpoint), "m", outputs, PAYER)
    except RunFailed:
        return
    sampler = Sampler(storage, lambda: backend)
    assert await sampler.start() is None
    try:
        for block in world.rng.sample(range(BLOCKS), BLOCKS):
            for attempt in range(3):
                try:
                    await sampler.work(JOB, block, f"{process.name}-{block}-{attempt}", Hints())
                    break
                except RunFailed:
                    continue
    except StopStageError:
        pass
    try:
        await sampler.stop()
    except RunFailed:
        pass
    finally:
        assert sampler._flusher is not None
        sampler._flusher.cancel()


async def run_to_its_end(world: World, process: Process, work: Coroutine[Any, Any, None]) -> None:
    """Wait until a command has ended or is dead."""
    task = asyncio.create_task(work)
    world.tasks.append(task)
    while not task.done() and not process.is_dead:
        await asyncio.wait([task], timeout=5.0)
    if task.done():
        task.result()


@contextmanager
def simulated(world: World) -> Iterator[None]:
    """Replace time, threads and connections by those of a world."""
    make_client = partial(EndpointClient, clock=world.loop.time, sleep=asyncio.sleep, jitter=world.rng.random)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "to_thread", partial(in_thread, world))
        patch.setattr(clients, "Connection", partial(SimulatedConnection, world))
        patch.setattr(backends, "EndpointClient", make_client)
        patch.setattr(spool, "threading", SimpleNamespace(Lock=StepLock))
        patch.setattr(ledger, "threading", SimpleNamespace(Lock=StepLock))
        yield
