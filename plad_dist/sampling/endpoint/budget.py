"""The spending cap: requests reserve their worst cost first and settle their real cost later.

Spent and reserved money together never exceed the cap, so the cap holds whatever the requests in
flight turn out to cost. A request whose cost is unknown, because its response was lost, counts at
its worst. Over restarts the cap holds because :func:`spent_on` reads back what earlier runs spent.

The worst cost is known from the prompt and `max_tokens`, unless a server bills more, such as
reasoning beyond `max_tokens` or a long prompt of its own. No bound is known then, so the budget
learns one: every later reservation has the largest excess so far on top, and four times as much
must be free while other requests are in flight. As a server shows only in its responses that it
bills more, requests under a cap start slowly: at most one more is in flight than were settled.
Spending then exceeds the cap by less than one request.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from plad_dist.config import Endpoint
from plad_dist.data.dataset import Dataset
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
        self.reservations, self._reserved, self._settled = 0, 0.0, 0
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

    def reserve(self, worst_cost: float) -> bool:
        """Reserve the worst cost of a request, or return False if it does not fit under the cap."""
        if self.cap is not None:
            needed = self._reserved + worst_cost + (self.reservations + 1) * self.excess
            if self.reservations and self.excess:
                needed *= _CAUTION
            if self.reservations > self._settled or self.spent + needed > self.cap:
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
        # An error that costs nothing shows nothing of what a response will cost.
        self._settled += bool(cost) or not self._output_price
        # Without reservations, nothing is reserved: rounding errors do not add up.
        self._reserved = self._reserved - worst_cost if self.reservations else 0.0
        if cost is None:
            cost = worst_cost + self.excess
            self.assumed += cost
            self.lost_requests += 1
        else:
            self.excess = max(self.excess, cost - worst_cost)
        self.spent += cost
        return cost


def spent_on(outputs: Sequence[tuple[Dataset, Collection[int]]]) -> float:
    """Return the money that blocks of datasets have cost so far, committed and spooled.

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
            spent += total_cost(dataset, blocks)
        spent += sum(parts[block].counts.get("cost_micros", 0) for block in blocks if block in parts) / MICROS
    return spent
