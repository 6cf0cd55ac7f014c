"""Who does which block: decisions only, no Ray, no clock, no I/O, so that a simulation can drive them.

Every block is leased to one actor at a time, up to `window` blocks per actor. An actor that is lost gives its leases back.
When nothing is pending, an idle actor takes over the oldest lease of another (the tail is stolen): both may finish, and
storage lets only the first one commit. Leases have deadlines; actors are given up when they are silent or make no progress.

A block that was under way when an engine died, or hung, is done alone from then on, its suspicious rows in pieces, one after the
other. Each further death splits the piece that it happened in, until a row has killed engines by itself: that row is poison and
is not tried again.

Times are seconds of any clock that does not go back; the caller passes them in.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from plad_dist.errors import RunFailed
from plad_dist.fleet.protocol import Hints

_DEATHS_OF_A_ROW = 2  # a row that kills or hangs an engine by itself so often is poison
_DEATHS_OF_A_BLOCK = 50  # after so many, splitting is taken to lead nowhere
_DEATHS_IN_A_HANG = 4  # as many it counts for: each costs stall_timeout_s
_PIECES = 8
_LOSSES_BEFORE_BLAME = 5  # a block whose actors vanish so often is treated as if it killed them


@dataclass(frozen=True)
class Limits:
    """Bounds of a pool.

    Attributes:
        window: most leases of one actor.
        max_attempts: failures of one block in a row after which :class:`RunFailed` is raised.
        heartbeat_timeout_s: silence after which an actor is given up.
        stall_timeout_s: time without progress after which an actor with leases is given up as hung.
        lease_timeout_s: time after which a lease ends.
    """

    window: int = 4
    max_attempts: int = 3
    heartbeat_timeout_s: float = 60.0
    stall_timeout_s: float = 1800.0
    lease_timeout_s: float = 7200.0


@dataclass(slots=True, eq=False)
class Lease:
    """One attempt of an actor at a block. `since`: when it began; time for which the caller was away does not count."""

    number: int
    block: Hashable
    actor: str
    hints: Hints
    alone: bool
    since: float


@dataclass
class _Actor:
    heard: float
    progressed: float
    expired: int = 0  # leases that ran out since it last got something done
    leases: dict[int, Lease] = field(default_factory=dict)


@dataclass
class _Trouble:
    """What is known of a block that failed."""

    strikes: int = 0
    losses: int = 0
    alone: bool = False
    pieces: list[tuple[int, ...]] = field(default_factory=list)
    poison: dict[int, str] = field(default_factory=dict)
    deaths: int = 0
    deaths_alone: Counter[int] = field(default_factory=Counter)  # by row, while nothing else was under way

    def narrow(self, rows: tuple[int, ...], reason: str, *, hung: bool) -> bool:
        """Learn from a death while only these rows were under way. False: nothing is learnt."""
        self.deaths += _DEATHS_IN_A_HANG if hung else 1
        if not rows or self.deaths > _DEATHS_OF_A_BLOCK:
            return False
        at = next((index for index, piece in enumerate(self.pieces) if set(rows) <= set(piece)), None)
        later = self.pieces if at is None else self.pieces[at + 1 :]  # those before it did no harm
        if len(rows) == 1:
            self.deaths_alone[rows[0]] += 1
        if self.deaths_alone[rows[0]] >= _DEATHS_OF_A_ROW:
            self.poison[rows[0]] = f"killed or hung its engine {_DEATHS_OF_A_ROW} times by itself: {reason}"
            self.pieces = later
        else:
            self.pieces = _split(rows) + later
        return True


class BlockPool:
    """Leases of the blocks of one fleet.

    Args:
        blocks: what is to be done, in order; any hashable names.
    """

    def __init__(self, blocks: Iterable[Hashable], limits: Limits) -> None:
        self.limits = limits
        self._pending: deque[Hashable] = deque(blocks)
        self._alone: deque[Hashable] = deque()  # to be done by an actor that does nothing else
        self._leased: dict[Hashable, list[Lease]] = {}
        self._stealable: dict[Hashable, None] = {}  # leased once, oldest first
        self._by_age: dict[int, Lease] = {}
        self._actors: dict[str, _Actor] = {}
        self._trouble: dict[Hashable, _Trouble] = {}
        self._leases_given = 0
        self.failures_in_a_row = 0

    @property
    def finished(self) -> bool:
        """Every block is committed."""
        return not (self._pending or self._alone or self._leased)

    @property
    def waiting(self) -> int:
        """Blocks that no actor holds."""
        return len(self._pending) + len(self._alone)

    @property
    def unfinished(self) -> int:
        """Blocks that are not committed."""
        return self.waiting + len(self._leased)

    def leased(self, actor: str) -> list[Hashable]:
        """Blocks that an actor holds."""
        return [lease.block for lease in self._actors[actor].leases.values()] if actor in self._actors else []

    # -- actors

    def join(self, actor: str, now: float) -> None:
        """An actor is ready for leases."""
        self._actors[actor] = _Actor(heard=now, progressed=now)

    def heartbeat(self, actor: str, progressed: bool, now: float) -> None:
        """A sign of life, and whether the actor has got anything done since the one before."""
        state = self._actors.get(actor)
        if state is None:
            return
        state.heard = now
        if progressed:
            state.progressed, state.expired = now, 0

    def silent(self, now: float) -> list[tuple[str, str]]:
        """Actors to be given up, each with the reason. The caller ends them and calls :meth:`leave`."""
        found = []
        for name, state in self._actors.items():
            if now - state.heard > self.limits.heartbeat_timeout_s:
                found.append((name, f"no sign of life for {now - state.heard:.0f} s"))
            elif state.expired > 1:
                found.append((name, f"alive, but {state.expired} leases ran out and nothing was done"))
        return found

    def stalled(self, now: float) -> list[tuple[str, str]]:
        """Actors that live and get nothing done, each with the reason. The caller ends them and calls :meth:`died` with what was
        under way, :meth:`leave` where that is not known.
        """
        return [
            (name, f"alive, but nothing done for {now - state.progressed:.0f} s")
            for name, state in self._actors.items()
            if state.leases and now - state.progressed > self.limits.stall_timeout_s
        ]

    def excuse(self, seconds: float) -> None:
        """The caller was away for so long: the actors could not be heard, which is not their fault."""
        for state in self._actors.values():
            state.heard += seconds
            state.progressed += seconds
        for lease in self._by_age.values():
            lease.since += seconds

    def leave(self, actor: str) -> None:
        """The actor is gone, with its node or by the cluster's will: its leases go back, which says little of its blocks."""
        for lease in self._drop(actor):
            trouble = self._trouble.setdefault(lease.block, _Trouble())
            trouble.losses += 1
            if trouble.losses >= _LOSSES_BEFORE_BLAME:
                trouble.losses, trouble.alone = 0, True
                self._strike(lease.block, trouble, f"{_LOSSES_BEFORE_BLAME} actors that held it were lost")
            self._give_back(lease.block, first=True)

    def died(self, actor: str, reason: str, under_way: dict[Hashable, tuple[int, ...]], *, hung: bool = False) -> None:
        """The actor's engine died or hung, of itself or of a row: its blocks are done alone from now on.

        Args:
            under_way: rows of each block that were not finished then.

        Raises:
            RunFailed: a block fails again and again without its suspects becoming fewer.
        """
        self.failures_in_a_row += 1
        for lease in self._drop(actor):
            trouble = self._trouble.setdefault(lease.block, _Trouble())
            trouble.alone = True
            rows = under_way.get(lease.block, ())
            if not lease.alone:
                trouble.pieces = _split(rows)  # or it was another block's fault
            elif trouble.narrow(rows, reason, hung=hung):
                trouble.strikes = self.failures_in_a_row = 0
            else:
                self._strike(lease.block, trouble, reason)
            self._give_back(lease.block, first=True)

    def _drop(self, actor: str) -> list[Lease]:
        state = self._actors.pop(actor, None)
        leases = list(state.leases.values()) if state else []
        for lease in leases:
            self._end(lease)
        return [lease for lease in reversed(leases) if not self._settled(lease.block)]

    # -- leases

    def take(self, actor: str, now: float) -> Lease | None:
        """Lease a block to an actor with room in its window. None: there is nothing for it now."""
        held = self._actors[actor].leases
        if len(held) >= self.limits.window or any(lease.alone for lease in held.values()):
            return None
        if self._pending:
            return self._lease(actor, self._pending.popleft(), now, alone=False)
        if held:
            return None
        if self._alone:
            return self._lease(actor, self._alone.popleft(), now, alone=True)
        for block in self._stealable:
            trouble = self._trouble.get(block)
            return self._lease(actor, block, now, alone=trouble is not None and trouble.alone)
        return None

    def _lease(self, actor: str, block: Hashable, now: float, *, alone: bool) -> Lease:
        self._leases_given += 1
        trouble = self._trouble.get(block)
        hints = Hints(tuple(trouble.pieces), dict(trouble.poison)) if trouble else _NO_HINTS
        lease = Lease(self._leases_given, block, actor, hints, alone, now)
        state = self._actors[actor]
        if not state.leases:
            state.progressed = now
        state.leases[lease.number] = self._by_age[lease.number] = lease
        holders = self._leased.setdefault(block, [])
        holders.append(lease)
        if len(holders) == 1:
            self._stealable[block] = None
        else:
            self._stealable.pop(block, None)
        return lease

    def committed(self, block: Hashable) -> list[Lease]:
        """The block is committed, by whomever. Returns its leases: attempts that go on are futile from now on."""
        leases = self._leased.pop(block, [])
        self._stealable.pop(block, None)
        for lease in leases:
            self._by_age.pop(lease.number, None)
            if lease.actor in self._actors:
                self._actors[lease.actor].leases.pop(lease.number, None)
        if not leases:  # an attempt that had been given up was in time after all
            for queue in (self._pending, self._alone):
                if block in queue:
                    queue.remove(block)
        self._trouble.pop(block, None)
        self.failures_in_a_row = 0
        return leases

    def fail(self, lease: Lease, reason: str) -> None:
        """An attempt failed; the block is tried again after the others. Raises :class:`RunFailed` at `max_attempts`."""
        if lease.number not in self._by_age:
            return
        self._end(lease)
        if self._settled(lease.block):
            return
        self.failures_in_a_row += 1
        self._strike(lease.block, self._trouble.setdefault(lease.block, _Trouble()), reason)
        self._give_back(lease.block, first=False)

    def overdue(self, now: float) -> list[Lease]:
        """Leases that ended because their time was up; the caller cancels their attempts. Raises as :meth:`fail`."""
        found = []
        for lease in list(self._by_age.values()):
            if now - lease.since <= self.limits.lease_timeout_s:
                break
            found.append(lease)
        for lease in found:
            self._actors[lease.actor].expired += 1
            self.fail(lease, f"not done within lease_timeout_s={self.limits.lease_timeout_s:g}")
        return found

    def _end(self, lease: Lease) -> None:
        """Take one lease away; its block may have others."""
        self._by_age.pop(lease.number, None)
        if lease.actor in self._actors:
            self._actors[lease.actor].leases.pop(lease.number, None)
        holders = self._leased[lease.block]
        holders.remove(lease)
        if len(holders) == 1:
            self._stealable[lease.block] = None
        elif not holders:
            del self._leased[lease.block]
            self._stealable.pop(lease.block, None)

    def _settled(self, block: Hashable) -> bool:
        """Whether a block whose lease ended has another one."""
        return block in self._leased

    def _give_back(self, block: Hashable, *, first: bool) -> None:
        queue = self._alone if self._trouble[block].alone else self._pending
        if first:
            queue.appendleft(block)
        else:
            queue.append(block)

    def _strike(self, block: Hashable, trouble: _Trouble, reason: str) -> None:
        trouble.strikes += 1
        if trouble.strikes >= self.limits.max_attempts:
            alone = f"; rows that did so by themselves: {sorted(trouble.poison)}" if trouble.poison else ""
            raise RunFailed(f"block {block} failed {trouble.strikes} times, at last with: {reason}{alone}")


_NO_HINTS = Hints()


def _split(rows: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Rows in at most eight pieces."""
    size = max(1, -(-len(rows) // _PIECES))
    return [rows[start : start + size] for start in range(0, len(rows), size)]
