"""Who samples which block: decisions only, no Ray, no clock, no I/O.

Every block is leased to one actor at a time, up to `window` blocks per actor. An actor that dies gives its leases back.
When nothing is pending, an idle actor takes over the oldest lease of another (the tail is stolen): both may finish, and
storage lets only the first one commit.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from plad_dist.errors import RunFailed


@dataclass
class BlockPool:
    """Leases of the blocks of one fleet. A block is any hashable name.

    Args:
        blocks: what is to be done, in order.
        window: most leases of one actor.
        max_attempts: tries of one block after which :class:`RunFailed` is raised.
    """

    blocks: list[Any]
    window: int
    max_attempts: int
    _pending: deque[object] = field(init=False)
    _leases: dict[object, list[str]] = field(init=False, default_factory=dict)
    _failures: Counter[object] = field(init=False, default_factory=Counter)

    def __post_init__(self) -> None:
        self.blocks = list(self.blocks)
        self._pending = deque(self.blocks)

    @property
    def finished(self) -> bool:
        """Nothing is pending and nothing is leased."""
        return not self._pending and not self._leases

    def take(self, actor: str) -> object | None:
        """Lease a block to an actor with room in its window. None: there is nothing for it now."""
        held = sum(actor in holders for holders in self._leases.values())
        if held >= self.window:
            return None
        if self._pending:
            block = self._pending.popleft()
            self._leases[block] = [actor]
            return block
        if held == 0:
            for block, holders in self._leases.items():  # oldest first
                if len(holders) == 1:
                    holders.append(actor)
                    return block
        return None

    def done(self, block: object) -> bool:
        """The block is committed, by whomever. False: that was known already."""
        return self._leases.pop(block, None) is not None

    def fail(self, actor: str, block: object, reason: str) -> None:
        """An attempt failed; the block is tried again, at most `max_attempts` times."""
        if block not in self._leases:
            return
        self._failures[block] += 1
        if self._failures[block] >= self.max_attempts:
            raise RunFailed(f"block {block} failed {self.max_attempts} times, at last with: {reason}")
        self._release(actor, block)

    def remove(self, actor: str, blame: str | None) -> None:
        """The actor is gone: its leases go back. `blame`: its engine died of this, which counts against its blocks; a lost
        node does not."""
        for block in [block for block, holders in self._leases.items() if actor in holders]:
            if blame is None:
                self._release(actor, block)
            else:
                self.fail(actor, block, blame)

    def _release(self, actor: str, block: object) -> None:
        holders = self._leases[block]
        holders.remove(actor)
        if not holders:
            del self._leases[block]
            self._pending.appendleft(block)
