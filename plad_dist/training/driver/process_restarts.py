"""Restarts of the training processes of a worker group whose Ray workers stay.

When a training process dies, its Ray worker asks all workers of the group to restart theirs. Each
worker waits for that in a call that is answered only then. Restarts are counted, so that late calls
and several deaths at once are told apart. Processes with the same count meet at one address.
"""

from __future__ import annotations

import asyncio

_MAX_FAILED_STARTS = 3  # in a row before the first step; the whole group restarts after that


class ProcessRestarts:
    """Restarts of the present group. All calls run in one event loop.

    Args:
        most: the most restarts of all groups together; -1 for no limit.
    """

    def __init__(self, most: int) -> None:
        self._most, self._total = most, 0
        self._group = self._count = self._failed_starts = 0
        self._has_finished = False
        self._addresses: dict[str, tuple[str, int]] = {}  # of first ranks, and their counts of restarts
        self._changed = asyncio.Event()

    def new_group(self, group: int) -> None:
        """Begin with another group, and end the waits of the one before."""
        self._group, self._count, self._failed_starts, self._has_finished = group, 0, 0, False
        self._addresses = {}
        self._announce()

    def request(self, group: int, count: int, *, takes_steps: bool) -> bool:
        """Restart the processes, unless they have restarted since the caller's `count`.

        Returns:
            True if they restart. False if the whole group must: the caller belongs to an earlier
            one, a worker has finished, or processes died too often, at all or before their first
            step.
        """
        if group != self._group or self._has_finished:
            return False
        if count < self._count:
            return True
        if self._total == self._most:
            return False
        self._failed_starts = 0 if takes_steps else self._failed_starts + 1
        if self._failed_starts > _MAX_FAILED_STARTS:
            return False
        self._total += 1
        self._count += 1
        self._announce()
        return True

    @property
    def count(self) -> int:
        """Restarts of the present group so far."""
        return self._count

    async def meet(self, group: int, group_id: str, address: str | None) -> tuple[str, int] | None:
        """Tell all workers the address at which the first one waits for the others.

        Args:
            group_id: tells workers apart that have taken the next group for theirs.
            address: of the first worker; the others pass None and wait for it.

        Returns:
            The address that belongs to the present processes, and how often they have restarted;
            None if the group has ended.
        """
        if group == self._group and address is not None:
            self._addresses[group_id] = address, self._count
            self._announce()
        while group == self._group:
            known = self._addresses.get(group_id)
            if known is not None and known[1] == self._count:
                return known
            await self._changed.wait()
        return None

    async def wait(self, group: int, count: int) -> int | None:
        """Wait until the processes of a group have restarted more than `count` times.

        Returns:
            How often they have restarted; None if the group has ended.
        """
        while (group, count) == (self._group, self._count):
            await self._changed.wait()
        return self._count if group == self._group else None

    def finish(self, group: int, count: int) -> bool:
        """Record that a worker has finished. Return False if it must restart its process."""
        if group != self._group:
            return True
        if count != self._count:
            return False
        self._has_finished = True
        return True

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
