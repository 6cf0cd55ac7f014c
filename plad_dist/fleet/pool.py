"""Decisions of a fleet: leases within each actor's window, and which actor is given up.

The pool decides and does nothing else. It has no Ray, no clock and no I/O, so that a simulation can
drive it: the caller reports events with their times, and carries out what the pool returns. Times
are seconds of any clock that never goes back.

**Leases.** A block is pending until an actor takes a lease on it, and leased until it is
committed. An actor holds up to `window` leases. A lease ends when its block is committed, when its
attempt fails, when its actor is lost, or after `lease_timeout_s`. A block whose last lease ends
without a commit is pending again.

**Stealing.** When no block is pending, an idle actor takes a second lease on the block that has
been leased for the longest time. Both attempts may finish; storage accepts only the first commit.

**Lost actors.** An actor is given up when it is silent for `heartbeat_timeout_s`, when it holds
leases and shows no progress for `stall_timeout_s`, or when several of its leases expire without
progress.

**Narrowing.** When an engine dies or hangs, every block that it held becomes suspect: one of the
rows in flight may be at fault. A suspect block is leased exclusively, to an actor that holds
nothing else, and its suspect rows are processed in pieces, one piece after the other. The next
death therefore names one piece, which is split into smaller ones. A row that kills or hangs its
engine twice while nothing else runs is a poison row, and is not tried again. A death that narrows
nothing is a strike against the block, as is any other failure; `max_attempts` strikes end the run.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from plad_dist.errors import RunFailed
from plad_dist.fleet.protocol import Hints

Block = TypeVar("Block", bound=Hashable)

_SOLO_DEATHS_OF_POISON = 2  # deaths while a row ran alone that make it a poison row
_MAX_DEATHS_PER_BLOCK = 50  # after that, narrowing is taken to lead nowhere
_DEATHS_PER_HANG = 4  # a hang costs `stall_timeout_s`, so it counts as several deaths
_PIECES = 8
_LOSSES_BEFORE_SUSPICION = 5  # after that, a block is treated as if it had killed the lost actors


@dataclass(frozen=True)
class Limits:
    """Limits of a pool.

    Attributes:
        window: largest number of leases of one actor.
        max_attempts: number of strikes against a block that ends the run.
        heartbeat_timeout_s: seconds without a heartbeat after which an actor is given up.
        stall_timeout_s: seconds without progress after which an actor with leases is given up.
        lease_timeout_s: seconds after which a lease expires.
    """

    window: int = 4
    max_attempts: int = 3
    heartbeat_timeout_s: float = 60.0
    stall_timeout_s: float = 1800.0
    lease_timeout_s: float = 7200.0


@dataclass(slots=True, eq=False)
class Lease(Generic[Block]):
    """One attempt of an actor at a block.

    Attributes:
        number: unique in the pool, ascending with time.
        hints: findings of earlier attempts at the block.
        is_exclusive: True if the actor may hold no other lease beside this one.
        since: start of the lease, shifted by the time for which the caller was delayed.
    """

    number: int
    block: Block
    actor: str
    hints: Hints
    is_exclusive: bool
    since: float


@dataclass
class _Actor(Generic[Block]):
    """State of an actor that has joined.

    Attributes:
        heard_at: time of the latest heartbeat.
        progressed_at: time of the latest progress.
        expired_leases: leases that expired since the latest progress.
        leases: current leases by number.
    """

    heard_at: float
    progressed_at: float
    expired_leases: int = 0
    leases: dict[int, Lease[Block]] = field(default_factory=dict)


@dataclass
class _FailureRecord:
    """Failures of a block, and the rows that may have caused them.

    Attributes:
        strikes: failures in a row that narrowed nothing.
        lost_actors: actors lost while they held the block, since the last suspicion.
        is_suspect: True if the block may have killed or hung an engine.
        pieces: suspect rows, in the pieces in which they are processed.
        poison: error of each poison row.
        deaths: deaths while the block was leased exclusively; a hang counts as several.
        solo_deaths: number of deaths of each row while nothing else ran.
    """

    strikes: int = 0
    lost_actors: int = 0
    is_suspect: bool = False
    pieces: list[tuple[int, ...]] = field(default_factory=list)
    poison: dict[int, str] = field(default_factory=dict)
    deaths: int = 0
    solo_deaths: Counter[int] = field(default_factory=Counter)

    def narrow(self, rows: tuple[int, ...], reason: str, *, is_hang: bool) -> bool:
        """Narrow the suspect rows after a death while only `rows` of this block were in flight.

        Returns:
            False if nothing was learned: the rows are unknown, or too many deaths have happened.
        """
        self.deaths += _DEATHS_PER_HANG if is_hang else 1
        if not rows or self.deaths > _MAX_DEATHS_PER_BLOCK:
            return False
        # The pieces before the one that was in flight did no harm, so they are cleared.
        index = next((index for index, piece in enumerate(self.pieces) if set(rows) <= set(piece)), None)
        later_pieces = self.pieces if index is None else self.pieces[index + 1 :]
        if len(rows) == 1:
            self.solo_deaths[rows[0]] += 1
        if self.solo_deaths[rows[0]] >= _SOLO_DEATHS_OF_POISON:
            self.poison[rows[0]] = (
                f"killed or hung its engine {_SOLO_DEATHS_OF_POISON} times while no other row ran: {reason}"
            )
            self.pieces = later_pieces
        else:
            self.pieces = _split(rows) + later_pieces
        return True


_NO_HINTS = Hints()


class BlockPool(Generic[Block]):
    """Leases of the blocks of one fleet.

    Args:
        blocks: blocks to process, in this order; any hashable values.

    Attributes:
        failures_in_a_row: failed attempts and deaths since the last commit or narrowing.
    """

    def __init__(self, blocks: Iterable[Block], limits: Limits) -> None:
        self.limits = limits
        # Each uncommitted block is in exactly one of these three.
        self._pending: deque[Block] = deque(blocks)
        self._pending_suspects: deque[Block] = deque()
        self._leased: dict[Block, list[Lease[Block]]] = {}
        self._stealable: dict[Block, None] = {}  # blocks with one lease, the oldest first
        self._leases_by_age: dict[int, Lease[Block]] = {}
        self._actors: dict[str, _Actor[Block]] = {}
        self._failures: dict[Block, _FailureRecord] = {}
        self._lease_count = 0
        self.failures_in_a_row = 0

    # -- state

    @property
    def finished(self) -> bool:
        """True if every block is committed."""
        return not (self._pending or self._pending_suspects or self._leased)

    @property
    def waiting(self) -> int:
        """Number of blocks without a lease."""
        return len(self._pending) + len(self._pending_suspects)

    @property
    def unfinished(self) -> int:
        """Number of blocks that are not committed."""
        return self.waiting + len(self._leased)

    def leased(self, actor: str) -> list[Block]:
        """Return the blocks that an actor has leased."""
        return [lease.block for lease in self._actors[actor].leases.values()] if actor in self._actors else []

    def silent(self, now: float) -> list[tuple[str, str]]:
        """Return the actors that are silent or let leases expire, each with the reason.

        The caller ends them and calls :meth:`leave`.
        """
        given_up = []
        for name, actor in self._actors.items():
            if now - actor.heard_at > self.limits.heartbeat_timeout_s:
                given_up.append((name, f"no heartbeat for {now - actor.heard_at:.0f} s"))
            elif actor.expired_leases > 1:
                given_up.append((name, f"alive, but {actor.expired_leases} leases expired without progress"))
        return given_up

    def stalled(self, now: float) -> list[tuple[str, str]]:
        """Return the actors that are alive but show no progress, each with the reason.

        The caller ends them and calls :meth:`engine_died` with the rows in flight, or :meth:`leave`
        if it does not know them.
        """
        return [
            (name, f"alive, but without progress for {now - actor.progressed_at:.0f} s")
            for name, actor in self._actors.items()
            if actor.leases and now - actor.progressed_at > self.limits.stall_timeout_s
        ]

    # -- actors

    def join(self, actor: str, now: float) -> None:
        """Record that an actor is ready for leases, and start its timeouts. An actor joins once.

        Args:
            now: time of the join in seconds, by the clock of all calls of the pool.
        """
        self._actors[actor] = _Actor(heard_at=now, progressed_at=now)

    def heartbeat(self, actor: str, has_progressed: bool, now: float) -> None:
        """Record a heartbeat.

        Args:
            has_progressed: True if the actor got something done since its previous heartbeat.
        """
        state = self._actors.get(actor)
        if state is None:
            return
        state.heard_at = now
        if has_progressed:
            state.progressed_at, state.expired_leases = now, 0

    def excuse(self, seconds: float) -> None:
        """Shift all times by a delay of the caller, during which it could not hear the actors."""
        for state in self._actors.values():
            state.heard_at += seconds
            state.progressed_at += seconds
        for lease in self._leases_by_age.values():
            lease.since += seconds

    def leave(self, actor: str) -> None:
        """Record that an actor is lost through no fault of its blocks, as with its node.

        Its blocks are pending again. Only a block that loses actor after actor becomes suspect.

        Raises:
            RunFailed: a block has `max_attempts` strikes.
        """
        for lease in self._end_leases_of(actor):
            record = self._failures.setdefault(lease.block, _FailureRecord())
            record.lost_actors += 1
            if record.lost_actors >= _LOSSES_BEFORE_SUSPICION:
                record.lost_actors, record.is_suspect = 0, True
                self._strike(lease.block, record, f"{_LOSSES_BEFORE_SUSPICION} actors that held it were lost")
            self._requeue(lease.block, is_next=True)

    def engine_died(
        self, actor: str, reason: str, rows_in_flight: Mapping[Block, tuple[int, ...]], *, is_hang: bool = False
    ) -> None:
        """Record that an actor's engine died or hung, perhaps because of a row.

        Its blocks become suspect. If a lease was exclusive already, its suspect rows are narrowed.

        Args:
            rows_in_flight: unfinished rows of each block; without an entry, they are unknown.

        Raises:
            RunFailed: a block has `max_attempts` strikes.
        """
        self.failures_in_a_row += 1
        for lease in self._end_leases_of(actor):
            record = self._failures.setdefault(lease.block, _FailureRecord())
            record.is_suspect = True
            rows = rows_in_flight.get(lease.block, ())
            if not lease.is_exclusive:
                record.pieces = _split(rows)  # no strike: another block may be at fault
            elif record.narrow(rows, reason, is_hang=is_hang):
                record.strikes = self.failures_in_a_row = 0
            else:
                self._strike(lease.block, record, reason)
            self._requeue(lease.block, is_next=True)

    # -- leases

    def take(self, actor: str, now: float) -> Lease[Block] | None:
        """Lease a block to an actor.

        In this order: a pending block, a pending suspect block, the block that has been leased for
        the longest time. The last two go only to an actor without leases.

        Returns:
            None if the actor's window is full, its lease is exclusive, or no block is available.
        """
        leases = self._actors[actor].leases
        if len(leases) >= self.limits.window or any(lease.is_exclusive for lease in leases.values()):
            return None
        if self._pending:
            return self._lease(actor, self._pending.popleft(), now, is_exclusive=False)
        if leases:
            return None
        if self._pending_suspects:
            return self._lease(actor, self._pending_suspects.popleft(), now, is_exclusive=True)
        block = next(iter(self._stealable), None)
        if block is None:
            return None
        return self._lease(actor, block, now, is_exclusive=self._is_suspect(block))

    def _lease(self, actor: str, block: Block, now: float, *, is_exclusive: bool) -> Lease[Block]:
        self._lease_count += 1
        record = self._failures.get(block)
        hints = Hints(tuple(record.pieces), dict(record.poison)) if record else _NO_HINTS
        lease = Lease(self._lease_count, block, actor, hints, is_exclusive, now)
        state = self._actors[actor]
        if not state.leases:
            state.progressed_at = now  # an idle actor is not expected to progress
        state.leases[lease.number] = self._leases_by_age[lease.number] = lease
        holders = self._leased.setdefault(block, [])
        holders.append(lease)
        if len(holders) == 1:
            self._stealable[block] = None
        else:
            self._stealable.pop(block, None)
        return lease

    def committed(self, block: Block) -> list[Lease[Block]]:
        """Record that a block is committed, by whichever attempt.

        Returns:
            The leases that it had. All their attempts except the successful one are futile.
        """
        leases = self._leased.pop(block, [])
        self._stealable.pop(block, None)
        for lease in leases:
            self._leases_by_age.pop(lease.number, None)
            if lease.actor in self._actors:
                self._actors[lease.actor].leases.pop(lease.number, None)
        if not leases:  # an attempt whose lease had ended committed it after all
            for queue in (self._pending, self._pending_suspects):
                if block in queue:
                    queue.remove(block)
        self._failures.pop(block, None)
        self.failures_in_a_row = 0
        return leases

    def failed(self, lease: Lease[Block], reason: str) -> None:
        """Record that an attempt failed. Its block is retried after all pending ones.

        Raises:
            RunFailed: the block has `max_attempts` strikes.
        """
        if lease.number not in self._leases_by_age:
            return
        self._end_lease(lease)
        if self._is_leased(lease.block):
            return
        self.failures_in_a_row += 1
        self._strike(lease.block, self._failures.setdefault(lease.block, _FailureRecord()), reason)
        self._requeue(lease.block, is_next=False)

    def expire(self, now: float) -> list[Lease[Block]]:
        """End the leases that are older than `lease_timeout_s`.

        Returns:
            The expired leases, whose attempts the caller cancels.

        Raises:
            RunFailed: a block has `max_attempts` strikes.
        """
        expired = []
        for lease in self._leases_by_age.values():
            if now - lease.since <= self.limits.lease_timeout_s:
                break
            expired.append(lease)
        for lease in expired:
            self._actors[lease.actor].expired_leases += 1
            self.failed(lease, f"not finished within lease_timeout_s={self.limits.lease_timeout_s:g}")
        return expired

    def _end_leases_of(self, actor: str) -> list[Lease[Block]]:
        """Remove an actor and end its leases.

        Returns:
            The leases whose blocks have no other lease, the latest first: requeued at the head one
            by one, the blocks keep their order.
        """
        state = self._actors.pop(actor, None)
        leases = list(state.leases.values()) if state else []
        for lease in leases:
            self._end_lease(lease)
        return [lease for lease in reversed(leases) if not self._is_leased(lease.block)]

    def _end_lease(self, lease: Lease[Block]) -> None:
        self._leases_by_age.pop(lease.number, None)
        if lease.actor in self._actors:
            self._actors[lease.actor].leases.pop(lease.number, None)
        holders = self._leased[lease.block]
        holders.remove(lease)
        if len(holders) == 1:
            self._stealable[lease.block] = None
        elif not holders:
            del self._leased[lease.block]
            self._stealable.pop(lease.block, None)

    def _is_leased(self, block: Block) -> bool:
        return block in self._leased

    def _is_suspect(self, block: Block) -> bool:
        return block in self._failures and self._failures[block].is_suspect

    def _requeue(self, block: Block, *, is_next: bool) -> None:
        queue = self._pending_suspects if self._is_suspect(block) else self._pending
        if is_next:
            queue.appendleft(block)
        else:
            queue.append(block)

    def _strike(self, block: Block, record: _FailureRecord, reason: str) -> None:
        record.strikes += 1
        if record.strikes >= self.limits.max_attempts:
            poison = (
                f"; rows that kill or hang an engine on their own: {sorted(record.poison)}" if record.poison else ""
            )
            raise RunFailed(f"block {block} failed {record.strikes} times, at last with: {reason}{poison}")


def _split(rows: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return rows in at most `_PIECES` pieces of equal size."""
    size = max(1, -(-len(rows) // _PIECES))
    return [rows[start : start + size] for start in range(0, len(rows), size)]
