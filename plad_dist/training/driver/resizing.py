"""Growth of a running elastic group: when it yields, and the size that it restarts at."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from plad_dist.training.driver.growth import Choice, Outlook, Room, Verdict, judge
from plad_dist.training.driver.mailbox import reply_to


class Resizing:
    """State of the growth of a group; it lives in Ray Train's controller.

    A group yields when it has committed a checkpoint and waits for its restart. Until then the
    controller keeps polling it, so that a group that finishes or dies first is handled as usual.
    Only growth is voluntary: a group shrinks when one of its nodes dies or leaves.

    Args:
        mailbox: mailbox actor of the driver.
        report: adds a line to the driver's log.
        fewest, most: smallest and largest size of the group.
        check_every: seconds between counts of the room.
    """

    def __init__(self, mailbox: Any, report: Callable[[str], None], fewest: int, most: int, check_every: float) -> None:
        self._mailbox, self._report = mailbox, report
        self._fewest, self._most, self._check_every = fewest, most, check_every
        self._room = Room()
        self._choice = Choice.STAY
        self._reported: tuple[Choice, int, int] | None = None
        self._is_asked_to_yield = False

    def reset(self) -> None:
        """Forget a request to yield: another group has started."""
        self._is_asked_to_yield = False
        self._choice, self._reported = Choice.STAY, None

    def next_size(
        self,
        size: int,
        count_room: Callable[[], int],
        prepare: Callable[[int], bool],
        give_up: Callable[[], None],
    ) -> int | None:
        """Return the size to restart the running group at now, or None to let it run.

        Args:
            size: its present size.
            count_room: returns how many workers the cluster has room for on whole nodes.
            prepare: prepares a group of a size beside the present one; returns True once it could
                start without delay.
            give_up: ends what was prepared.
        """
        if self._is_asked_to_yield:
            return self._size_after_yield(size, count_room)
        now = time.monotonic()
        if now < self._room.seen_at + self._check_every and self._choice is Choice.STAY:
            return None
        workers = count_room()
        outlook: Outlook | None = reply_to(self._mailbox.outlook.remote()) if workers > size else None
        if workers > size and outlook is None:  # the mailbox is slow
            return None
        self._room = self._room.seen(now, size, workers, takes_steps=outlook is not None and outlook.takes_steps)
        self._follow(Verdict(Choice.STAY) if outlook is None else judge(self._room, self._most, outlook))
        if self._choice is Choice.STAY:
            give_up()
        elif self._choice is Choice.GROW and prepare(min(workers, self._most)):
            self._is_asked_to_yield = True
            reply_to(self._mailbox.ask_to_yield.remote())
        return None

    def _size_after_yield(self, size: int, count_room: Callable[[], int]) -> int | None:
        if not reply_to(self._mailbox.has_yielded.remote()):
            return None
        room = count_room()
        # A waiting group must be restarted in any case, at its old size if the room is gone.
        return room if room >= self._fewest else size

    def _follow(self, verdict: Verdict) -> None:
        """Report a verdict once for each room."""
        has_room = f"the cluster has room for {self._room.workers} workers"
        subject = (verdict.choice, self._room.size, self._room.workers)
        self._choice = verdict.choice
        reason = "the new ones start beside the present ones" if verdict.choice is Choice.GROW else verdict.reason
        if reason and subject != self._reported:
            self._report(f"{has_room}; {reason}")
            self._reported = subject
