"""Thousands of seeded schedules of faults: each block is committed once, none is lost or stuck.

Everything around the pool is simulated: a storage with put-if-absent; actors that are slow, hang,
lose their engine to poison rows, vanish with their node or start late; attempts that commit after
they were given up; and drivers that die and are replaced while the old actors continue. Time is
simulated too, so that a schedule takes milliseconds.
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
    """Parts by block: the attempt that wrote each, and its error rows.

    Args:
        is_fenced: refuse a second part of a block.
    """

    def __init__(self, is_fenced: bool = True) -> None:
        self.parts: dict[int, tuple[str, frozenset[int]]] = {}
        self.writes: defaultdict[int, int] = defaultdict(int)
        self.is_fenced = is_fenced

    def create(self, block: int, attempt: str, errors: frozenset[int]) -> bool:
        if self.is_fenced and block in self.parts:
            return False
        self.writes[block] += 1
        self.parts[block] = (attempt, errors)
        return True


@dataclass
class Faults:
    """Probabilities of faults, and the poison rows, drawn from the seed."""

    node_loss: float
    hang: float
    slow: float
    lost_reply: float
    glitch: float
    driver_death: float
    poison: frozenset[tuple[int, int]]


@dataclass
class Actor:
    """A simulated actor.

    Attributes:
        is_alive: its process exists.
        is_silent: it sends no heartbeat, but its attempts may still commit.
        is_stalled: it sends heartbeats but finishes nothing.
        stuck_rows: rows in flight since it stalled.
        finished: rows finished.
        reported: rows finished at its latest heartbeat.
    """

    name: str
    is_alive: bool = True
    is_silent: bool = False
    is_stalled: bool = False
    stuck_rows: dict[object, tuple[int, ...]] = field(default_factory=dict)
    finished: int = 0
    reported: int = 0
    attempts: dict[int, Lease] = field(default_factory=dict)


def rows_of(lease: Lease) -> tuple[int, ...]:
    """Return the rows that the engine gets."""
    return tuple(row for row in range(ROWS) if row not in lease.hints.poison)


def in_order(lease: Lease) -> list[tuple[int, ...]]:
    """Return the groups of rows that an exclusive attempt processes one after the other."""
    suspects = {row for piece in lease.hints.pieces for row in piece}
    return [tuple(row for row in rows_of(lease) if row not in suspects), *lease.hints.pieces]


class Schedule:
    """One run of a pool with its actors, and everything that goes wrong."""

    def __init__(self, seed: int, storage: Storage | None = None) -> None:
        self.random = rng = random.Random(seed)
        self.blocks = rng.randint(1, 24)
        self.storage = storage or Storage()
        is_faultless = rng.random() < 0.1
        poison = frozenset(
            (rng.randrange(self.blocks), rng.randrange(ROWS)) for _ in range(rng.choice([0, 0, 0, 1, 1, 2, 3]))
        )
        self.faults = Faults(
            *[0.0 if is_faultless else rng.random() * 0.15 for _ in range(5)], 0.0 if is_faultless else 0.02, poison
        )
        self.limits = Limits(
            window=rng.randint(1, 4),
            max_attempts=1000,  # another test covers the end of a run that fails
            heartbeat_timeout_s=rng.uniform(5, 30),
            stall_timeout_s=rng.uniform(40, 80),
            lease_timeout_s=rng.uniform(60, 200),
        )
        self.max_actors = rng.randint(1, 6)
        self.now, self.order, self.events = 0.0, 0, []
        self.actors: dict[str, Actor] = {}
        self.actor_count = self.drivers = 0
        self.committed_at: dict[int, float] = {}
        self.solo_hangs: Counter[tuple[object, ...]] = Counter()  # by block and row
        self.start_driver()

    def schedule(self, delay: float, event: str, *arguments: object) -> None:
        self.order += 1
        heapq.heappush(self.events, (self.now + delay, self.order, event, arguments))

    # -- the driver

    def start_driver(self) -> None:
        """Replace the driver. The new one knows only the storage; old actors may continue."""
        self.drivers += 1
        self.pool = BlockPool([block for block in range(self.blocks) if block not in self.storage.parts], self.limits)
        self.own_actors: set[str] = set()
        self.schedule(1.0, "tick", self.drivers)

    def tick(self, driver: int) -> None:
        if driver != self.drivers or self.pool.finished:
            return
        if self.random.random() < self.faults.driver_death and self.drivers < 4:
            for name in sorted(self.own_actors):  # they end with their driver, sooner or later
                self.schedule(self.random.uniform(0, 60), "reap", name)
            self.start_driver()
            return
        for name in sorted(self.own_actors):
            actor = self.actors[name]
            if actor.is_alive and not actor.is_silent:
                self.pool.heartbeat(name, actor.finished > actor.reported, self.now)
                actor.reported = actor.finished
        for name, _ in self.pool.silent(self.now):
            self.pool.leave(name)
            self.give_up(name)
        for name, reason in self.pool.stalled(self.now):
            if stuck_rows := self.actors[name].stuck_rows:
                self.pool.engine_died(name, reason, stuck_rows, is_hang=True)
                self.solo_hangs.update((block, *rows) for block, rows in stuck_rows.items() if len(rows) == 1)
            else:
                self.pool.leave(name)
            self.give_up(name)
        for lease in self.pool.expire(self.now):
            self.actors[lease.actor].attempts.pop(lease.number, None)
        useful = min(self.max_actors, self.pool.unfinished)
        for _ in range(useful - len(self.own_actors)):
            self.actor_count += 1
            name = f"actor-{self.actor_count}"
            self.actors[name] = Actor(name)
            self.own_actors.add(name)
            self.schedule(self.random.expovariate(1 / 5), "ready", driver, name)
        self.lease_all()
        self.schedule(1.0, "tick", driver)

    def give_up(self, name: str) -> None:
        self.own_actors.discard(name)
        self.schedule(self.random.uniform(0, 60), "reap", name)

    def ready(self, driver: int, name: str) -> None:
        if driver == self.drivers and name in self.own_actors:
            self.pool.join(name, self.now)
            self.lease_all()

    def lease_all(self) -> None:
        for name in sorted(self.own_actors):
            if name in self.pool._actors:
                while (lease := self.pool.take(name, self.now)) is not None:
                    actor = self.actors[name]
                    actor.attempts[lease.number] = lease
                    delay = self.random.expovariate(1 / 10)
                    if self.random.random() < self.faults.slow:
                        delay *= 30
                    self.schedule(delay, "work", self.drivers, name, lease)

    # -- the actors

    def work(self, driver: int, name: str, lease: Lease) -> None:
        """End an attempt, with a commit or with a fault."""
        actor, chance = self.actors[name], self.random.random
        if not actor.is_alive or lease.number not in actor.attempts or actor.is_stalled:
            return
        if chance() < self.faults.node_loss:
            actor.is_alive = False
            self.schedule(self.random.expovariate(1 / 3), "lost", driver, name)
            return
        if chance() < self.faults.hang:
            actor.is_silent, actor.is_stalled = (True, chance() < 0.5) if chance() < 0.5 else (False, True)
            if actor.is_stalled:
                actor.stuck_rows = self.rows_in_flight(actor, lease)
                return
        deadly = self.deadly_rows(actor, lease)
        if deadly and chance() < 0.3:
            actor.is_stalled, actor.stuck_rows = True, deadly
            return
        if deadly:
            actor.is_alive = False
            self.schedule(self.random.expovariate(1 / 3), "died", driver, name, deadly)
            return
        if chance() < self.faults.glitch:
            actor.attempts.pop(lease.number)
            self.schedule(0.1, "failed", driver, name, lease)
            return
        block = lease.block
        assert isinstance(block, int)
        self.storage.create(block, f"{driver}/{lease.number}", frozenset(lease.hints.poison))
        self.committed_at.setdefault(block, self.now)
        actor.finished += ROWS
        actor.attempts.pop(lease.number)
        if chance() < self.faults.lost_reply:
            actor.is_alive = False  # between its commit and its reply
            self.schedule(self.random.expovariate(1 / 3), "lost", driver, name)
        else:
            self.schedule(self.random.expovariate(1), "reply", driver, block)

    def rows_in_flight(self, actor: Actor, lease: Lease) -> dict[object, tuple[int, ...]]:
        """Return the rows in flight at some moment of an attempt."""
        if not lease.is_exclusive:
            return {other.block: rows_of(lease) for other in actor.attempts.values()}
        return {lease.block: self.random.choice([piece for piece in in_order(lease) if piece] or [()])}

    def deadly_rows(self, actor: Actor, lease: Lease) -> dict[object, tuple[int, ...]]:
        """Return the rows in flight when the engine dies of a poison row; empty if it does not."""
        poison = {row for row in rows_of(lease) if (lease.block, row) in self.faults.poison}
        if not poison:
            return {}
        if not lease.is_exclusive:
            return {other.block: rows_of(lease) for other in actor.attempts.values()}
        for piece in in_order(lease):
            if poison & set(piece):
                finished = (
                    set() if len(poison & set(piece)) > 1 else {row for row in piece if self.random.random() < 0.2}
                )
                return {lease.block: tuple(row for row in piece if row in poison or row not in finished)}
        raise AssertionError("a poison row is in none of the groups")

    # -- replies to the driver

    def reply(self, driver: int, block: int) -> None:
        if driver == self.drivers:
            for lease in self.pool.committed(block):
                if self.random.random() < 0.7:  # others learn too late that their attempt is futile
                    self.actors[lease.actor].attempts.pop(lease.number, None)
            self.lease_all()

    def failed(self, driver: int, name: str, lease: Lease) -> None:
        if driver == self.drivers:
            self.pool.failed(lease, "glitch")
            self.lease_all()

    def lost(self, driver: int, name: str) -> None:
        if driver == self.drivers and name in self.own_actors:
            self.own_actors.discard(name)
            self.pool.leave(name)
            self.lease_all()

    def died(self, driver: int, name: str, rows: dict[object, tuple[int, ...]]) -> None:
        if driver == self.drivers and name in self.own_actors:
            self.own_actors.discard(name)
            self.pool.engine_died(name, "segmentation fault", rows)
            self.lease_all()

    def reap(self, name: str) -> None:
        self.actors[name].is_alive = False

    # -- the whole schedule

    def run(self) -> None:
        """Process events until no block is left. Raises AssertionError if a promise is broken."""
        steps = 0
        while self.events:
            self.now, _, event, arguments = heapq.heappop(self.events)
            getattr(self, event)(*arguments)
            steps += 1
            assert steps < 200_000, f"no progress: {self.pool.unfinished} blocks unfinished at {self.now:.0f} s"
        assert self.pool.finished
        self.check()

    def check(self) -> None:
        assert set(self.storage.parts) == set(range(self.blocks)), "a block is lost"
        assert all(count == 1 for count in self.storage.writes.values()), "a block was committed twice"
        for block, (_, errors) in self.storage.parts.items():
            poison = {row for other, row in self.faults.poison if other == block}
            assert poison <= errors, "a poison row was sampled without its engine dying"
            for row in errors - poison:
                assert self.solo_hangs[block, row] > 1, (
                    "a good row became an error row although no engine hung on it twice"
                )


@pytest.mark.parametrize("tenth", range(10))
def test_each_block_is_committed_once_and_none_is_lost_or_stuck(tenth: int) -> None:
    for seed in range(tenth, SCHEDULES, 10):
        try:
            Schedule(seed).run()
        except Exception as error:
            raise AssertionError(f"schedule {seed}: {error}") from error


def test_the_schedules_have_enough_faults() -> None:
    """Deaths, late commits, stolen leases, poison rows and new drivers do occur."""
    schedules = [Schedule(seed) for seed in range(300)]
    for schedule in schedules:
        schedule.run()
    assert sum(schedule.drivers > 1 for schedule in schedules) > 30
    assert sum(bool(schedule.faults.poison) for schedule in schedules) > 100
    assert sum(any(not actor.is_alive for actor in schedule.actors.values()) for schedule in schedules) > 150
    assert sum(schedule.actor_count > schedule.max_actors for schedule in schedules) > 150


def test_a_commit_without_its_fence_is_caught() -> None:
    """The invariant fails if storage lets a late attempt overwrite a part."""
    caught = 0
    for seed in range(300):
        try:
            Schedule(seed, Storage(is_fenced=False)).run()
        except AssertionError as error:
            caught += "committed twice" in str(error)
    assert caught > 20


def test_a_pool_that_forgets_the_leases_of_the_dead_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losing leases shows up as a block that is stuck."""
    monkeypatch.setattr(BlockPool, "_requeue", lambda self, block, *, is_next: None)

    def run_schedules() -> None:
        for seed in range(50):
            Schedule(seed).run()

    with pytest.raises(AssertionError, match=r"lost|no progress"):
        run_schedules()


def test_a_block_that_fails_forever_ends_the_run_with_its_reason() -> None:
    pool = BlockPool([0], Limits(max_attempts=3))
    pool.join("a", 0)

    def fail() -> None:
        lease = pool.take("a", 0)
        assert lease is not None
        pool.failed(lease, "glitch")

    fail()
    fail()
    with pytest.raises(RunFailed, match="failed 3 times, at last with: glitch"):
        fail()
