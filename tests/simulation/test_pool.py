"""Thousands of seeded schedules of a sampling night: every block is committed once, none is lost, none is stuck.

The world around the pool is simulated: a storage with put-if-absent, actors that are slow, hang, lose their engine to poison
rows, vanish with their node or come late, attempts that commit after they were given up, and drivers that die and are
replaced while the old actors go on. Time is simulated too, so that a night takes milliseconds.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import pytest

from plad_dist.errors import RunFailed
from plad_dist.fleet.pool import BlockPool, Lease, Limits

SCHEDULES = 6000
ROWS = 20  # rows of a block


class Storage:
    """Parts by block: the attempt that wrote it and its error rows. `fenced`: whether a second create is refused."""

    def __init__(self, fenced: bool = True) -> None:
        self.parts: dict[int, tuple[str, frozenset[int]]] = {}
        self.writes: defaultdict[int, int] = defaultdict(int)
        self.fenced = fenced

    def create(self, block: int, attempt: str, errors: frozenset[int]) -> bool:
        if self.fenced and block in self.parts:
            return False
        self.writes[block] += 1
        self.parts[block] = (attempt, errors)
        return True


@dataclass
class Faults:
    """How bad the night is; drawn from the seed."""

    node_loss: float
    hang: float
    slow: float
    lost_answer: float
    glitch: float
    driver_death: float
    poison: frozenset[tuple[int, int]]


@dataclass
class Actor:
    name: str
    alive: bool = True  # its process
    hung: bool = False  # silent, but its attempts may still commit
    stalled: bool = False  # answers heartbeats, finishes nothing
    stuck: dict[object, tuple[int, ...]] = field(default_factory=dict)  # rows that it has hung on
    finished: int = 0
    heard_of: int = 0  # of what it has finished
    attempts: dict[int, Lease] = field(default_factory=dict)


def rows_of(lease: Lease) -> tuple[int, ...]:
    """Those that are given to the engine."""
    return tuple(row for row in range(ROWS) if row not in lease.hints.poison)


def in_order(lease: Lease) -> list[tuple[int, ...]]:
    """The pieces of an attempt that is alone, as they are done one after the other."""
    suspects = {row for piece in lease.hints.pieces for row in piece}
    return [tuple(row for row in rows_of(lease) if row not in suspects), *lease.hints.pieces]


class Night:
    """One schedule: a pool, its actors and everything that goes wrong."""

    def __init__(self, seed: int, storage: Storage | None = None) -> None:
        self.random = rng = random.Random(seed)
        self.blocks = rng.randint(1, 24)
        self.storage = storage or Storage()
        quiet = rng.random() < 0.1
        poison = frozenset(
            (rng.randrange(self.blocks), rng.randrange(ROWS)) for _ in range(rng.choice([0, 0, 0, 1, 1, 2, 3]))
        )
        self.faults = Faults(*[0.0 if quiet else rng.random() * 0.15 for _ in range(5)], 0.0 if quiet else 0.02, poison)
        self.limits = Limits(
            window=rng.randint(1, 4),
            max_attempts=1000,  # how it ends is the matter of another test
            heartbeat_timeout_s=rng.uniform(5, 30),
            stall_timeout_s=rng.uniform(40, 80),
            lease_timeout_s=rng.uniform(60, 200),
        )
        self.most = rng.randint(1, 6)
        self.now, self.order, self.events = 0.0, 0, []
        self.actors: dict[str, Actor] = {}
        self.born = self.drivers = 0
        self.committed_at: dict[int, float] = {}
        self.accused: Counter[tuple[object, ...]] = Counter()  # rows that were alone when an engine hung
        self.start_driver()

    def at(self, delay: float, what: str, *about: object) -> None:
        self.order += 1
        heapq.heappush(self.events, (self.now + delay, self.order, what, about))

    # -- the driver

    def start_driver(self) -> None:
        """A driver knows nothing but what is in storage. Old actors may go on for a while."""
        self.drivers += 1
        self.pool = BlockPool([block for block in range(self.blocks) if block not in self.storage.parts], self.limits)
        self.mine: set[str] = set()
        self.at(1.0, "tick", self.drivers)

    def tick(self, driver: int) -> None:
        if driver != self.drivers or self.pool.finished:
            return
        if self.random.random() < self.faults.driver_death and self.drivers < 4:
            for name in sorted(self.mine):  # they end with it, sooner or later
                self.at(self.random.uniform(0, 60), "reap", name)
            self.start_driver()
            return
        for name in sorted(self.mine):
            actor = self.actors[name]
            if actor.alive and not actor.hung:
                self.pool.heartbeat(name, actor.finished > actor.heard_of, self.now)
                actor.heard_of = actor.finished
        for name, _ in self.pool.silent(self.now):
            self.pool.leave(name)
            self.give_up(name)
        for name, reason in self.pool.stalled(self.now):
            if stuck := self.actors[name].stuck:
                self.pool.died(name, reason, stuck, hung=True)
                self.accused.update((block, *rows) for block, rows in stuck.items() if len(rows) == 1)
            else:
                self.pool.leave(name)
            self.give_up(name)
        for lease in self.pool.overdue(self.now):
            self.actors[lease.actor].attempts.pop(lease.number, None)
        wanted = min(self.most, self.pool.unfinished)
        for _ in range(wanted - len(self.mine)):
            self.born += 1
            name = f"actor-{self.born}"
            self.actors[name] = Actor(name)
            self.mine.add(name)
            self.at(self.random.expovariate(1 / 5), "ready", driver, name)
        self.lease_all()
        self.at(1.0, "tick", driver)

    def give_up(self, name: str) -> None:
        self.mine.discard(name)
        self.at(self.random.uniform(0, 60), "reap", name)

    def ready(self, driver: int, name: str) -> None:
        if driver == self.drivers and name in self.mine:
            self.pool.join(name, self.now)
            self.lease_all()

    def lease_all(self) -> None:
        for name in sorted(self.mine):
            if name in self.pool._actors:
                while (lease := self.pool.take(name, self.now)) is not None:
                    actor = self.actors[name]
                    actor.attempts[lease.number] = lease
                    delay = self.random.expovariate(1 / 10)
                    if self.random.random() < self.faults.slow:
                        delay *= 30
                    self.at(delay, "work", self.drivers, name, lease)

    # -- the actors

    def work(self, driver: int, name: str, lease: Lease) -> None:
        """An attempt comes to its end, good or bad."""
        actor, chance = self.actors[name], self.random.random
        if not actor.alive or lease.number not in actor.attempts or actor.stalled:
            return
        if chance() < self.faults.node_loss:
            actor.alive = False
            self.at(self.random.expovariate(1 / 3), "lost", driver, name)
            return
        if chance() < self.faults.hang:
            actor.hung, actor.stalled = (True, chance() < 0.5) if chance() < 0.5 else (False, True)
            if actor.stalled:
                actor.stuck = self.under_way(actor, lease)
                return
        deadly = self.deadly_rows(actor, lease)
        if deadly and chance() < 0.3:
            actor.stalled, actor.stuck = True, deadly
            return
        if deadly:
            actor.alive = False
            self.at(self.random.expovariate(1 / 3), "died", driver, name, deadly)
            return
        if chance() < self.faults.glitch:
            actor.attempts.pop(lease.number)
            self.at(0.1, "failed", driver, name, lease)
            return
        block = lease.block
        assert isinstance(block, int)
        self.storage.create(block, f"{driver}/{lease.number}", frozenset(lease.hints.poison))
        self.committed_at.setdefault(block, self.now)
        actor.finished += ROWS
        actor.attempts.pop(lease.number)
        if chance() < self.faults.lost_answer:
            actor.alive = False  # between its commit and its answer
            self.at(self.random.expovariate(1 / 3), "lost", driver, name)
        else:
            self.at(self.random.expovariate(1), "answer", driver, block)

    def under_way(self, actor: Actor, lease: Lease) -> dict[object, tuple[int, ...]]:
        """Rows at some moment of an attempt."""
        if not lease.alone:
            return {other.block: rows_of(lease) for other in actor.attempts.values()}
        return {lease.block: self.random.choice([piece for piece in in_order(lease) if piece] or [()])}

    def deadly_rows(self, actor: Actor, lease: Lease) -> dict[object, tuple[int, ...]]:
        """What was under way when the engine died of a poison row; empty where it did not."""
        poison = {row for row in rows_of(lease) if (lease.block, row) in self.faults.poison}
        if not poison:
            return {}
        if not lease.alone:
            return {other.block: rows_of(lease) for other in actor.attempts.values()}
        for piece in in_order(lease):
            if poison & set(piece):
                done = set() if len(poison & set(piece)) > 1 else {row for row in piece if self.random.random() < 0.2}
                return {lease.block: tuple(row for row in piece if row in poison or row not in done)}
        raise AssertionError("a poison row is innocent or suspected")

    # -- what the driver hears

    def answer(self, driver: int, block: int) -> None:
        if driver == self.drivers:
            for lease in self.pool.committed(block):
                if self.random.random() < 0.7:  # some hear too late that their attempt is futile
                    self.actors[lease.actor].attempts.pop(lease.number, None)
            self.lease_all()

    def failed(self, driver: int, name: str, lease: Lease) -> None:
        if driver == self.drivers:
            self.pool.fail(lease, "glitch")
            self.lease_all()

    def lost(self, driver: int, name: str) -> None:
        if driver == self.drivers and name in self.mine:
            self.mine.discard(name)
            self.pool.leave(name)
            self.lease_all()

    def died(self, driver: int, name: str, under_way: dict[object, tuple[int, ...]]) -> None:
        if driver == self.drivers and name in self.mine:
            self.mine.discard(name)
            self.pool.died(name, "segmentation fault", under_way)
            self.lease_all()

    def reap(self, name: str) -> None:
        self.actors[name].alive = False

    # -- the whole night

    def run(self) -> None:
        """Until nothing is to be done. Raises AssertionError where a promise is broken."""
        steps = 0
        while self.events:
            self.now, _, what, about = heapq.heappop(self.events)
            getattr(self, what)(*about)
            steps += 1
            assert steps < 200_000, f"no progress: {self.pool.unfinished} blocks left at {self.now:.0f} s"
        assert self.pool.finished
        self.check()

    def check(self) -> None:
        assert set(self.storage.parts) == set(range(self.blocks)), "a block is lost"
        assert all(count == 1 for count in self.storage.writes.values()), "a block was committed twice"
        for block, (_, errors) in self.storage.parts.items():
            poison = {row for other, row in self.faults.poison if other == block}
            assert poison <= errors, "a poison row was sampled without its engine dying"
            for row in errors - poison:
                assert self.accused[block, row] > 1, "a good row became an error row with no engine hanging on it twice"


@pytest.mark.parametrize("tenth", range(10))
def test_each_block_is_committed_once_and_none_is_lost_or_stuck(tenth: int) -> None:
    for seed in range(tenth, SCHEDULES, 10):
        try:
            Night(seed).run()
        except Exception as error:
            raise AssertionError(f"schedule {seed}: {error}") from error


def test_the_nights_are_bad_enough() -> None:
    """Deaths, late commits, stolen leases, poison and new drivers do occur in the schedules."""
    nights = [Night(seed) for seed in range(300)]
    for night in nights:
        night.run()
    assert sum(night.drivers > 1 for night in nights) > 30
    assert sum(bool(night.faults.poison) for night in nights) > 100
    assert sum(any(not actor.alive for actor in night.actors.values()) for night in nights) > 150
    assert sum(night.born > night.most for night in nights) > 150


def test_a_commit_without_its_fence_is_caught() -> None:
    """The same schedules over a storage that lets a late attempt overwrite: the invariant must fail."""
    caught = 0
    for seed in range(300):
        try:
            Night(seed, Storage(fenced=False)).run()
        except AssertionError as error:
            caught += "committed twice" in str(error)
    assert caught > 20


def test_a_pool_that_forgets_the_leases_of_the_dead_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losing leases must show up as a block that is stuck."""
    monkeypatch.setattr(BlockPool, "_give_back", lambda self, block, *, first: None)

    def nights() -> None:
        for seed in range(50):
            Night(seed).run()

    with pytest.raises(AssertionError, match=r"lost|no progress"):
        nights()


def test_a_block_that_fails_for_ever_ends_the_run_with_its_reason() -> None:
    pool = BlockPool([0], Limits(max_attempts=3))
    pool.join("a", 0)

    def fail() -> None:
        lease = pool.take("a", 0)
        assert lease is not None
        pool.fail(lease, "glitch")

    fail()
    fail()
    with pytest.raises(RunFailed, match="failed 3 times, at last with: glitch"):
        fail()
