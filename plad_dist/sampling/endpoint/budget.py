"""The spending cap: requests reserve their worst cost first and settle their real cost later.

Spent and reserved money together never exceed the cap, so the cap holds whatever the requests in
flight turn out to cost. A request whose cost is unknown, because its response was lost, counts at
its worst. Over restarts the cap holds because :func:`spent_on` reads back what earlier runs spent.

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
from plad_dist.sampling.endpoint.batch_record import open_cost
from plad_dist.sampling.endpoint.usage import Usage
from plad_dist.sampling.spool import total_cost

MICROS = 1_000_000  # parts count their cost in millionths, integers that add up exactly
_CAUTION = 4.0


class Budget:
    """Money that was spent, and that requests in flight may still cost.

    Attributes:
        cap: limit of spending, in the currency of the prices; None without a limit.
        spent: settled costs, including assumed ones and those of earlier runs.
        assumed: part of `spent` that was assumed for requests whose cost is unknown.
        lost_requests: number of these requests.
        reservations: number of requests that hold a reservation.
        excess: largest cost of a request beyond the amount that it had reserved.
    """

    def __init__(self, endpoint: Endpoint, spent: float) -> None:
        self.cap, self.spent = endpoint.max_spend, spent
        self._input_price, self._output_price = endpoint.input_price or 0.0, endpoint.output_price or 0.0
        price = endpoint.cached_input_price
        self._cached_price = self._input_price if price is None else price
        self.assumed, self.lost_requests = 0.0, 0
        self.reservations, self._reserved, self._known = 0, 0.0, 0
        self.excess = 0.0

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
    def room(self) -> float:
        """Money that is neither spent nor reserved, infinite without a cap."""
        return math.inf if self.cap is None else self.cap - self.spent - self._reserved

    @property
    def known_responses(self) -> float:
        """Number of responses whose cost has shown what others may cost, infinite without a cap."""
        return math.inf if self.cap is None else self._known

    def reserve(self, worst_cost: float) -> bool:
        """Reserve the worst cost of a request, or return False if it does not fit under the cap."""
        if self.cap is not None:
            needed = self._reserved + worst_cost + (self.reservations + 1) * self.excess
            if self.reservations and self.excess:
                needed *= _CAUTION
            if self.reservations > self._known or self.spent + needed > self.cap:
                return False
        self._hold(worst_cost)
        return True

    def reserve_batch(self, worst_cost: float) -> None:
        """Reserve the worst cost of a batch, for which there is room."""
        self._hold(worst_cost)

    def adopt(self, worst_cost: float) -> None:
        """Reserve the worst cost of a batch of an earlier process, which counts as spent so far."""
        self.spent -= worst_cost
        self._hold(worst_cost)

    def _hold(self, worst_cost: float) -> None:
        self._reserved += worst_cost
        self.reservations += 1

    def settle(self, worst_cost: float, cost: float | None) -> float:
        """Replace a reservation by the cost of its request, and return the cost that was counted.

        Args:
            worst_cost: reserved amount.
            cost: cost of the request; None if it is unknown, which counts as the worst cost.
        """
        self.reservations -= 1
        # Without reservations, nothing is reserved: rounding errors do not add up.
        self._reserved = self._reserved - worst_cost if self.reservations else 0.0
        if cost is None:
            cost = worst_cost + self.excess
            self.assumed += cost
            self.lost_requests += 1
        self.spent += cost
        return cost

    def learn(self, worst_cost: float, cost: float) -> None:
        """Compare the cost of a response with what it could cost at most as far as was known."""
        # An error that costs nothing shows nothing of what a response will cost.
        self._known += bool(cost) or not self._output_price
        self.excess = max(self.excess, cost - worst_cost)


def spent_on(outputs: Sequence[tuple[Dataset, Collection[int]]]) -> float:
    """Return the money that blocks of datasets have cost so far, committed and spooled.

    Batches in flight count at their worst.

    Args:
        outputs: datasets, each with the blocks that count.
    """
    spent = 0.0
    for dataset, blocks in outputs:
        manifest = dataset.manifest()
        if manifest is not None:
            parts = dict(enumerate(manifest.parts))
        else:
            parts = dataset.committed_parts()
            spent += total_cost(dataset, blocks) + open_cost(dataset, blocks)
        spent += sum(parts[block].counts.get("cost_micros", 0) for block in blocks if block in parts) / MICROS
    return spent
