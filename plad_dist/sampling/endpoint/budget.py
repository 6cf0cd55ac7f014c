"""The spending cap: requests reserve their worst cost first and settle their real cost later.

Requests draw from the amount that their client holds in the ledger
(:mod:`plad_dist.sampling.endpoint.account`). Spent and reserved money together never exceed it, so
the cap holds whatever the requests in flight turn out to cost. A request whose cost is unknown,
because its response was lost, counts at its worst.

The worst cost is known from the prompt and `max_tokens`, unless a server bills more, such as
reasoning beyond `max_tokens` or a long prompt of its own. No bound is known then, so the budget
learns one: every later reservation has the largest excess so far on top, and four times as much
must be free while other requests are in flight. As a server shows only in its responses that it
bills more, requests under a cap start slowly: at most one more is in flight than have been paid.
Spending then exceeds the cap by less than one request.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from plad_dist.config import Endpoint
from plad_dist.data.dataset import Dataset
from plad_dist.sampling.endpoint.ledger import MICROS, spent_before, to_micros
from plad_dist.sampling.endpoint.usage import Usage

_CAUTION = 4.0


class Budget:
    """Money that one client has spent, and that its requests in flight may still cost.

    Args:
        spent: money that was spent before, by earlier runs and other processes.

    Attributes:
        cap: limit of spending, in the currency of the prices; None without a limit.
        earlier: money that other processes and batches have spent, or may have.
        held_elsewhere: part of it that they hold, or held when they were killed.
        paid: settled costs of this client, including assumed ones.
        granted: what this client may spend, in millionths, including what it has spent.
        assumed: part of `paid` that was assumed for requests whose cost is unknown.
        lost_requests: number of these requests.
        reservations: number of requests and batches in flight.
        settlements: number of requests and batches that are no longer in flight.
        excess: largest cost of a request beyond the amount that it had reserved.
    """

    def __init__(self, endpoint: Endpoint, spent: float = 0.0) -> None:
        self.cap, self.earlier, self.held_elsewhere, self.paid = endpoint.max_spend, spent, 0.0, 0.0
        self.granted: float = math.inf if self.cap is None else math.floor((self.cap - spent) * MICROS + 1e-3)
        self._input_price, self._output_price = endpoint.input_price or 0.0, endpoint.output_price or 0.0
        price = endpoint.cached_input_price
        self._cached_price = self._input_price if price is None else price
        self.assumed, self.lost_requests = 0.0, 0
        self.reservations, self._reserved, self._known, self.settlements = 0, 0.0, 0, 0
        self.excess = 0.0

    @property
    def spent(self) -> float:
        """Money spent so far, by all processes and earlier runs."""
        return self.earlier + self.paid

    def cost(self, usage: Usage) -> float:
        """Return the price of a request's tokens."""
        input_cost = (usage.prompt_tokens - usage.cached_tokens) * self._input_price
        cached_cost = usage.cached_tokens * self._cached_price
        return (input_cost + cached_cost + usage.completion_tokens * self._output_price) / 1e6

    def worst_cost(self, usage: Usage) -> float:
        """Return the largest price of these tokens: a cache may cost more than it saves."""
        dearest = max(self._input_price, self._cached_price)
        return (usage.prompt_tokens * dearest + usage.completion_tokens * self._output_price) / 1e6

    @property
    def known_responses(self) -> float:
        """Number of responses whose cost has shown what others may cost, infinite without a cap."""
        return math.inf if self.cap is None else self._known

    @property
    def may_send(self) -> bool:
        """True if one more request may be in flight, as far as the slow start is concerned."""
        return self.reservations <= self.known_responses

    @property
    def amount(self) -> float:
        """The most that this client may have spent so far."""
        return self.paid + self._reserved + self.reservations * self.excess

    def amount_with(self, worst_cost: float) -> float:
        """Return the most that this client may have spent with one more request in flight."""
        needed = self._reserved + worst_cost + (self.reservations + 1) * self.excess
        if self.cap is not None and self.reservations and self.excess:
            needed *= _CAUTION
        return self.paid + needed

    def reserve(self, worst_cost: float) -> bool:
        """Reserve the worst cost of a request, or return False if it must wait."""
        if not self.may_send or to_micros(self.amount_with(worst_cost)) > self.granted:
            return False
        self._reserved += worst_cost
        self.reservations += 1
        return True

    def settle(self, worst_cost: float, cost: float | None) -> float:
        """Replace a reservation by the cost of its request, and return the cost that was counted.

        Args:
            worst_cost: reserved amount.
            cost: cost of the request; None if it is unknown, which counts as the worst cost.
        """
        self.reservations -= 1
        self.settlements += 1
        # Without reservations, nothing is reserved: rounding errors do not add up.
        self._reserved = self._reserved - worst_cost if self.reservations else 0.0
        if cost is None:
            cost = worst_cost + self.excess
            self.assumed += cost
            self.lost_requests += 1
        self.paid += cost
        return cost

    def begin_batch(self) -> None:
        """Count a batch in flight, whose cost the ledger has."""
        self.reservations += 1

    def end_batch(self) -> None:
        """Count a batch that is no longer in flight."""
        self.reservations -= 1
        self.settlements += 1

    def learn(self, worst_cost: float, cost: float) -> None:
        """Compare the cost of a response with what it could cost at most as far as was known."""
        # An error that costs nothing shows nothing of what a response will cost.
        self._known += bool(cost) or not self._output_price
        self.excess = max(self.excess, cost - worst_cost)


def spent_on(outputs: Sequence[tuple[Dataset, Collection[int]]]) -> float:
    """Return the money that blocks of datasets have cost according to their parts and spools.

    Batches in flight count at their worst. The ledger, if there is one, knows more: money whose
    responses were lost, or whose parts were deleted.

    Args:
        outputs: datasets, each with the blocks that count.
    """
    return spent_before(outputs).total / MICROS
