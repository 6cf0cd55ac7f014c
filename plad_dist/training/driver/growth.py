"""Decision to grow an elastic group, which must gain more than its restart costs.

Only arithmetic: no clock, no Ray. docs/runbook.md derives the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

_SETTLE_SHARE = 0.05  # of a restart, which waiting for further nodes may always cost
_LONGEST_SETTLE_S = 60.0


class NodeRoom(NamedTuple):
    """Workers that fit on a node.

    Attributes:
        total: that fit into all that it has.
        free: that fit into what is free.
        own: that the group has there.
    """

    total: int
    free: int
    own: int

    @property
    def usable(self) -> int:
        """Workers that fit if the group's own end."""
        return min(self.free + self.own, self.total)

    @property
    def is_whole(self) -> bool:
        """True if nobody else uses a part in which workers would fit."""
        return self.usable == self.total


def room_in_parts(nodes: Iterable[NodeRoom]) -> int:
    """Return how many workers fit, also beside other jobs on a node."""
    return sum(node.usable for node in nodes)


def room_on_whole_nodes(nodes: Iterable[NodeRoom]) -> int:
    """Return how many workers fit on nodes without other jobs; the group's own always count.

    A node that is partly in use may soon be free as a whole, and would then cost another restart.
    """
    return sum(node.usable if node.is_whole else node.own for node in nodes)


class Outlook(NamedTuple):
    """Expectations of a running group.

    Attributes:
        takes_steps: True if it has taken a step; the other figures are 0 otherwise.
        restart_s: seconds that a restart costs.
        undisturbed_s: seconds until a larger group is disrupted.
        left_s: seconds of training left at the present size; infinite if unknown.
    """

    takes_steps: bool
    restart_s: float
    undisturbed_s: float
    left_s: float


@dataclass(frozen=True)
class Room:
    """Room of the cluster, as a running group sees it.

    Attributes:
        size: workers of the group.
        workers: workers that the cluster has room for.
        seen_at: when it was counted.
        grew_at: when it last grew.
        gap_s: seconds between the last two times that it grew; infinite before the second.
        forgone_s: work that the group has forgone at its size since there is room for more, in
            seconds of its own work.
    """

    size: int = 0
    workers: int = 0
    seen_at: float = -math.inf
    grew_at: float = -math.inf
    gap_s: float = math.inf
    forgone_s: float = 0.0

    def seen(self, now: float, size: int, workers: int, *, takes_steps: bool) -> Room:
        """Return the room after another count; without steps, no work is forgone."""
        has_grown = workers > max(self.workers, size)
        is_continued = takes_steps and size == self.size and min(self.workers, workers) > size
        return Room(
            size,
            workers,
            now,
            now if has_grown else self.grew_at,
            now - self.grew_at if has_grown else self.gap_s,
            self.forgone_s + self.gain_rate * (now - self.seen_at) if is_continued else 0.0,
        )

    @property
    def gain_rate(self) -> float:
        """Work gained in a second of training at the larger size, in seconds of the present one.

        Speed is taken as proportional to the number of workers.
        """
        return self.workers / self.size - 1


class Choice(Enum):
    """Choice about a possible growth."""

    GROW = "grow"
    WAIT = "wait"
    STAY = "stay"


class Verdict(NamedTuple):
    """Choice about a possible growth, with its reason for the log."""

    choice: Choice
    reason: str = ""


def judge(room: Room, most: int, outlook: Outlook) -> Verdict:
    """Decide if a group is restarted at the size that the cluster has room for.

    Args:
        most: largest size of the group.
    """
    if not outlook.takes_steps or room.workers <= room.size:
        return Verdict(Choice.STAY)
    ends_s = outlook.left_s * room.size / room.workers
    gain_s = room.gain_rate * min(outlook.undisturbed_s, ends_s)
    if gain_s <= outlook.restart_s:
        if outlook.undisturbed_s < ends_s:
            cause = f"a disruption is expected in {outlook.undisturbed_s:.0f} s"
        else:
            cause = f"training would end {ends_s:.0f} s after it"
        cost = f"a restart costs {outlook.restart_s:.0f} s and would gain {gain_s:.0f} s"
        return Verdict(Choice.STAY, f"stays at {room.size}: {cost}, because {cause}")
    wait_s = 0.0 if room.workers >= most else _wait_s(room, outlook)
    if wait_s > 0:
        reason = f"waits up to {wait_s:.0f} s for further nodes, since a restart costs {outlook.restart_s:.0f} s"
        return Verdict(Choice.WAIT, reason)
    return Verdict(Choice.GROW)


def _wait_s(room: Room, outlook: Outlook) -> float:
    """Return for how many seconds more a group waits for further nodes.

    It waits until nodes no longer arrive, but not if the work forgone until the next node is
    expected would exceed a restart.
    """
    quiet_s = room.seen_at - room.grew_at
    settle_s = min(_SETTLE_SHARE * outlook.restart_s / room.gain_rate, _LONGEST_SETTLE_S)
    forgone_s = room.forgone_s + room.gain_rate * max(room.gap_s - quiet_s, 0.0)
    if forgone_s >= outlook.restart_s:
        return settle_s - quiet_s
    affordable_s = (outlook.restart_s - room.forgone_s) / room.gain_rate
    return max(settle_s - quiet_s, min(2 * room.gap_s - quiet_s, affordable_s))
