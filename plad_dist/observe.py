"""Prometheus metrics of a run, exported by Ray's own agent on every node (`ray.util.metrics`)."""

from __future__ import annotations

from collections.abc import Sequence

from ray.util.metrics import Counter, Gauge, Histogram

from plad_dist.sampling.work import Beat, BlockResult

_TAGS = ("stage", "fleet")
_SECONDS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]


class FleetMetrics:
    """What Prometheus sees of one fleet. Every name begins with `plad_`."""

    def __init__(self, stage: str, fleet: str) -> None:
        def counter(name: str, description: str) -> Counter:
            return Counter(f"plad_{name}", description, _TAGS).set_default_tags(self._tags)

        def gauge(name: str, description: str) -> Gauge:
            return Gauge(f"plad_{name}", description, _TAGS).set_default_tags(self._tags)

        self._tags = {"stage": stage, "fleet": fleet}
        self._rows = counter("rows", "Rows committed.")
        self._tokens = counter("tokens", "Response tokens committed.")
        self._errors = counter("error_rows", "Error rows committed.")
        self._retries = counter("retries", "Blocks and requests that were tried again.")
        self._starts = counter("engine_starts", "Actors asked for.")
        self._deaths = counter("engine_deaths", "Actors that died or were given up.")
        self._in_flight = gauge("in_flight", "Requests under way.")
        self._queue = gauge("queue_blocks", "Blocks that no actor holds.")
        self._actors = gauge("actors", "Actors that are up.")
        self._block_seconds = Histogram(
            "plad_block_seconds", "Seconds from lease to commit of a block.", _SECONDS, _TAGS
        ).set_default_tags(self._tags)
        self._requests_retried = 0

    def committed(self, result: BlockResult) -> None:
        """A block was committed."""
        counts = result.part.counts
        for metric, value in (
            (self._rows, result.part.rows),
            (self._tokens, counts.get("tokens", 0)),
            (self._errors, counts.get("errors", 0)),
        ):
            if value:
                metric.inc(value)
        self._block_seconds.observe(result.seconds)

    def state(self, beats: Sequence[Beat], waiting: int) -> None:
        """The fleet as its last heartbeats show it."""
        self._in_flight.set(sum(beat.in_flight for beat in beats))
        self._queue.set(waiting)
        self._actors.set(len(beats))
        retried = sum(beat.retries for beat in beats)
        if retried > self._requests_retried:
            self._retries.inc(retried - self._requests_retried)
        self._requests_retried = retried

    def retried(self) -> None:
        """A block is tried again."""
        self._retries.inc()

    def started(self) -> None:
        """An actor was asked for."""
        self._starts.inc()

    def died(self) -> None:
        """An actor died or was given up."""
        self._deaths.inc()
