"""The account of a client: the amount that it holds in the ledger, and the batches that it opens.

The client reserves what each request may cost from the amount that it holds. If the amount is too
small, it is raised in storage before the request is sent: by what waiting requests need, and by a
chunk on top, a hundredth of the cap, so that few requests wait for storage. The chunk doubles, up
to a twentieth, while raises follow each other within a second. An amount that is larger than needed
by more than two chunks is lowered, because a client that is killed leaves all of its amount to
be counted as spent. Without a cap, chunks are parts of the money spent so far.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import Callable, Collection
from dataclasses import replace

from plad_dist.config import Endpoint
from plad_dist.data.claims import OwnerCheck, SupersededError, check_owned
from plad_dist.errors import RunFailed
from plad_dist.sampling.endpoint.budget import Budget
from plad_dist.sampling.endpoint.errors import ClientClosedError, SpendingStoppedError, spending_cap_reached
from plad_dist.sampling.endpoint.ledger import MICROS, Ledger, Spending, to_micros

logger = logging.getLogger("plad")

_CHUNK, _LARGEST_CHUNK = 100, 20  # divisors of the cap
_FAST_S = 1.0  # between two raises
_REFUSAL_S = 5.0  # for which a refusal holds, because only other processes could leave room
_CHECK_S = 3.0  # between two looks at the claims of the run


class Account:
    """Money that one client may spend. Use an account in one event loop.

    Args:
        budget: reservations of the client, whose granted amount the account sets.
        ledger: None to keep the state in memory, for a client without storage.
        clock: monotonic seconds.

    Attributes:
        changed: set when a request is settled and when a batch ends, which may leave room.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        budget: Budget,
        ledger: Ledger | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._endpoint, self._budget, self._ledger, self._clock = endpoint, budget, ledger, clock
        self.changed = asyncio.Event()
        self._cap = math.inf if budget.cap is None else math.floor(budget.cap * MICROS + 1e-3)
        self._holder = f"client-{uuid.uuid4().hex[:16]}"
        self._lock = asyncio.Lock()
        self._amount = self._settled = 0
        self._waiting = 0.0  # worst costs of requests that wait for a raise
        self._chunk, self._raised_at, self._read_at, self._checked_at = 1, -math.inf, -math.inf, -math.inf
        self._check_owner = OwnerCheck(ledger.storage, interval_s=0.0) if ledger else None
        self._stop_reason: str | None = None  # why nothing may be sent any more
        self._is_stopped = self._is_closed = False
        self._take(ledger.read() if ledger else Spending(to_micros(budget.spent)))
        if ledger is None and budget.cap is None:
            budget.granted = math.inf  # nothing is counted

    @property
    def room(self) -> float:
        """Money below the cap that no holder has, infinite without a cap."""
        return (self._cap - self._state.total) / MICROS

    # -- requests

    async def reserve(self, worst_cost: float) -> None:
        """Wait until a request is reserved.

        Raises:
            SpendingCapReached: it could exceed `max_spend`, and nothing in flight could leave room.
            SpendingStoppedError: the ledger cannot be written.
            ClientClosedError: the account was stopped.
        """
        while True:
            self._check_open()
            if self._budget.reserve(worst_cost):
                return
            settlements = self._budget.settlements
            if self._budget.may_send and await self.hold(worst_cost):
                continue
            if self._budget.settlements != settlements:
                continue  # something in flight has left room meanwhile
            if not self._budget.reservations:
                raise spending_cap_reached(self._endpoint, self._budget, worst_cost)
            self.changed.clear()
            await self.changed.wait()

    async def hold(self, worst_cost: float) -> bool:
        """Raise the amount so that one more request fits. Return False if the cap has no room.

        Raises:
            SpendingStoppedError: the ledger cannot be written.
            ClientClosedError: the account was stopped.
        """
        self._waiting += worst_cost
        try:
            async with self._lock:
                self._check_open()
                need = to_micros(self._budget.amount_with(worst_cost))
                if need <= self._budget.granted:
                    return True
                if need > self._most(self._state) and self._clock() - self._read_at < _REFUSAL_S:
                    return False
                want = need + max(self._next_chunk(), to_micros(self._waiting - worst_cost))
                await self._change(lambda state: self._raised(state, need, want))
                return need <= self._budget.granted
        finally:
            self._waiting -= worst_cost

    async def adjust(self) -> None:
        """Lower an amount that is much larger than needed, and raise one that a bill has exceeded.

        A failure of the storage is only logged: too large an amount does no harm, and a later raise
        corrects one that is too small.
        """
        if self._is_closed or not self._adjusted_amount():
            return
        async with self._lock:
            if self._is_closed or not (amount := self._adjusted_amount()):
                return
            # Lowered in memory first: nothing is reserved from what is about to be given back.
            self._amount = min(self._amount, amount)
            self._budget.granted = min(self._budget.granted, amount)
            try:
                await self._change(lambda state: self._with_own_amount(state, amount))
            except SpendingStoppedError as error:
                logger.warning("what is reserved cannot be corrected, trying again: %s", error)

    def stop(self) -> None:
        """Reserve nothing more, and end all waits for a reservation."""
        self._is_stopped = True
        self.changed.set()

    async def close(self, unsent: Collection[float] = ()) -> None:
        """Replace the amount by the real cost, and hold nothing more.

        Args:
            unsent: worst costs of requests that are reserved and will not be sent.
        """
        self.stop()
        async with self._lock:
            if self._is_closed:
                return
            # From here on no edit opens the holder again: its cost would count twice.
            self._is_closed, self._budget.granted = True, 0
            cost = to_micros(self._budget.amount - sum(unsent) - len(unsent) * self._budget.excess)
            try:
                self._settled = cost
                await self._change(lambda state: self._settled_state(state, cost))
            except SpendingStoppedError as error:
                self._settled = 0
                logger.warning("reserved money stays counted as spent, because it cannot be settled: %s", error)

    def _check_open(self) -> None:
        if self._is_stopped:
            raise ClientClosedError(f"{self._endpoint.url}: stopped")

    # -- batches

    async def open_batch(self, holder: str, worst_cost: float) -> bool:
        """Reserve the worst cost of a batch, unless it is. Return False if the cap has no room.

        Raises:
            SpendingStoppedError: the ledger cannot be written.
            ClientClosedError: the account was stopped.
        """
        amount = to_micros(worst_cost)

        def opened(state: Spending) -> Spending:
            has_room = state.total + amount <= self._cap
            return state.with_amount(holder, amount) if has_room and holder not in state.open else state

        async with self._lock:
            self._check_open()
            await self._change(opened)
            return holder in self._state.open

    async def settle_batch(self, holder: str, cost: float) -> None:
        """Replace the amount of a batch by its cost, unless it was settled before.

        Raises:
            SpendingStoppedError: the ledger cannot be written.
        """
        async with self._lock:
            await self._change(lambda state: self._with_excess(state).with_settled(holder, to_micros(cost)))

    async def refresh(self) -> None:
        """Read, at most every few seconds, what other processes have spent.

        Raises:
            SpendingStoppedError: the ledger cannot be read.
        """
        if self._ledger is not None and self._clock() - self._read_at >= _REFUSAL_S:
            async with self._lock:
                await self._change(lambda state: state)

    # -- ownership

    async def check_owned(self) -> None:
        """Check, at most every few seconds, that no other command has taken over the run.

        Raises:
            SpendingStoppedError: one has, or storage has not told for a long time.
        """
        if self._stop_reason is None and self._check_owner is not None:
            now = self._clock()
            if now - self._checked_at < _CHECK_S:
                return
            self._checked_at = now
            try:
                await asyncio.to_thread(self._check_owner)
            except RunFailed as error:
                self._stop_reason = str(error)
        if self._stop_reason is not None:
            raise SpendingStoppedError(self._stop_reason)

    async def is_superseded(self) -> bool:
        """Return True if another command has taken over the run, as far as storage tells."""
        try:
            if self._ledger is not None:
                await asyncio.to_thread(check_owned, self._ledger.storage)
        except SupersededError:
            return True
        except RunFailed:
            pass
        return False

    # -- the ledger

    async def _change(self, edit: Callable[[Spending], Spending]) -> None:
        try:
            self._take(await asyncio.to_thread(self._ledger.change, edit) if self._ledger else edit(self._state))
        except RunFailed as error:
            raise SpendingStoppedError(str(error)) from None
        self._read_at = self._clock()

    def _take(self, state: Spending) -> None:
        """Adopt the latest state of the ledger."""
        self._state, self._amount = state, state.open.get(self._holder, 0)
        # A bill beyond all expectation may have raised the amount above the cap.
        self._budget.granted = min(self._amount, self._most(state))
        self._budget.earlier = (state.total - self._amount - self._settled) / MICROS
        self._budget.held_elsewhere = (sum(state.open.values()) - self._amount) / MICROS
        self._budget.excess = max(self._budget.excess, state.excess / MICROS)

    def _most(self, state: Spending) -> float:
        """Return the largest amount that this client may hold."""
        return self._cap - state.total + state.open.get(self._holder, 0)

    def _raised(self, state: Spending, need: int, want: int) -> Spending:
        most = self._most(state)
        if need > most:
            return state
        return self._with_own_amount(state, max(state.open.get(self._holder, 0), want if want < most else int(most)))

    def _with_own_amount(self, state: Spending, amount: int) -> Spending:
        # The edit of a cancelled task may come later than the one that settles the holder.
        return state if self._is_closed else self._with_excess(state).with_amount(self._holder, amount)

    def _settled_state(self, state: Spending, cost: int) -> Spending:
        is_open = self._holder in state.open
        return self._with_excess(state).with_settled(self._holder, cost) if is_open else state

    def _with_excess(self, state: Spending) -> Spending:
        return replace(state, excess=max(state.excess, to_micros(self._budget.excess)))

    def _adjusted_amount(self) -> int:
        """Return the amount to hold from now on, 0 to leave it as it is."""
        needed, chunk = to_micros(self._budget.amount), self._present_chunk()
        if needed > self._amount:
            return needed
        return needed + chunk if self._amount - needed > 2 * chunk else 0

    def _next_chunk(self) -> int:
        """Return the chunk of a raise, which grows while raises come fast."""
        chunk, self._raised_at = 2 * self._present_chunk() if self._is_fast() else self._part(_CHUNK), self._clock()
        self._chunk = min(chunk, self._part(_LARGEST_CHUNK))
        return self._chunk

    def _present_chunk(self) -> int:
        return self._chunk if self._is_fast() else self._part(_CHUNK)

    def _is_fast(self) -> bool:
        return self._clock() - self._raised_at < _FAST_S

    def _part(self, divisor: int) -> int:
        whole = self._cap if math.isfinite(self._cap) else self._state.total
        return max(1, int(whole // divisor))
