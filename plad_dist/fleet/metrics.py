"""Prometheus metrics of fleets: sampling, pairing and judges."""

from __future__ import annotations

from collections.abc import Sequence

from ray.util.metrics import Counter, Gauge, Histogram

from plad_dist.fleet.protocol import BlockResult, Heartbeat
from plad_dist.prometheus import MetricSet

FLEET = {
    "rows": (Counter, "Rows committed."),
    "tokens": (Counter, "Response tokens committed."),
    "error_rows": (Counter, "Error rows committed."),
    "retries": (Counter, "Blocks and requests retried."),
    "engine_starts": (Counter, "Actors requested."),
    "engine_deaths": (Counter, "Actors that died or were given up."),
    "spent": (Counter, "Money paid to an endpoint, in the unit of its prices."),
    "in_flight": (Gauge, "Requests in progress."),
    "queue_blocks": (Gauge, "Blocks without a lease."),
    "actors": (Gauge, "Actors that are up."),
    "block_seconds": (Histogram, "Seconds from lease to commit of a block."),
}


class FleetMetrics:
    """Metrics of one fleet in one stage."""

    def __init__(self, stage: str, fleet: str) -> None:
        self._metrics = MetricSet(FLEET, {"stage": stage, "fleet": fleet})
        self._requests_retried = 0

    def block_committed(self, result: BlockResult) -> None:
        """Count the rows, tokens, errors and cost of a committed block."""
        counts = result.part.counts
        self._metrics.add("rows", result.part.rows)
        self._metrics.add("tokens", counts.get("tokens", 0))
        self._metrics.add("error_rows", counts.get("errors", 0))
        self._metrics.add("spent", counts.get("cost_micros", 0) / 1e6)
        self._metrics.observe("block_seconds", result.seconds)

    def show_state(self, heartbeats: Sequence[Heartbeat], waiting: int) -> None:
        """Set the gauges.

        Args:
            heartbeats: the latest heartbeat of each actor that is up.
            waiting: number of blocks without a lease.
        """
        self._metrics.set("in_flight", sum(heartbeat.in_flight for heartbeat in heartbeats))
        self._metrics.set("queue_blocks", waiting)
        self._metrics.set("actors", len(heartbeats))
        retried = sum(heartbeat.retries for heartbeat in heartbeats)
        self._metrics.add("retries", retried - self._requests_retried)
        self._requests_retried = retried

    def block_retried(self) -> None:
        """Count a block that failed and is retried."""
        self._metrics.add("retries")

    def actor_requested(self) -> None:
        """Count an actor that was requested."""
        self._metrics.add("engine_starts")

    def actor_lost(self) -> None:
        """Count an actor that died or was given up."""
        self._metrics.add("engine_deaths")
