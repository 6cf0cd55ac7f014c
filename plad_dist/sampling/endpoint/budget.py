"""The spending cap: requests reserve their worst cost first and settle their real cost later.

Spent and reserved money together never exceed the cap, so the cap holds whatever the requests in
flight turn out to cost. A request whose cost is unknown, because its response was lost, counts at
its worst. Over restarts the cap holds because :func:`spent_on` reads back what earlier runs spent.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from plad_dist.data.dataset import Dataset
from plad_dist.sampling.endpoint.reply import Usage
from plad_dist.sampling.spool import total_cost

MICROS = 1_000_000  # parts count their cost in millionths, integers that add up exactly


class Budget:
    """Money that was spent, and that requests in flight may still cost.

    Attributes:
        cap: limit of spending, in the currency of the prices; None without a limit.
        spent: settled costs, including assumed ones and those of earlier runs.
        assumed: part of `spent` that was assumed for requests whose cost is unknown.
        lost_requests: number of these requests.
        reservations: number of requests that hold a reservation.
    """

    def __init__(self, cap: float | None, input_price: float | None, output_price: float | None, spent: float) -> None:
        self.cap, self.spent = cap, spent
        self._input_price, self._output_price = input_price or 0.0, output_price or 0.0
        self.assumed, self.lost_requests = 0.0, 0
        self.reservations, self._reserved = 0, 0.0

    def cost(self, usage: Usage) -> float:
        """Return the price of a request's tokens."""
        return (usage.prompt_tokens * self._input_price + usage.completion_tokens * self._output_price) / 1e6

    def reserve(self, worst_cost: float) -> bool:
        """Reserve the worst cost of a request, or return False if it does not fit under the cap."""
        if self.cap is not None and self.spent + self._reserved + worst_cost > self.cap:
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
        # Without reservations, nothing is reserved: rounding errors do not add up.
        self._reserved = self._reserved - worst_cost if self.reservations else 0.0
        if cost is None:
            cost = worst_cost
            self.assumed += worst_cost
            self.lost_requests += 1
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
