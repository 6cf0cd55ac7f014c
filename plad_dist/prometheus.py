"""Prometheus metrics: their base class, and those of a run.

Ray's agent on every node exports them (`ray.util.metrics`) as ``ray_plad_<name>``. Counters get the
suffix ``_total``, histograms ``_bucket``, ``_sum`` and ``_count``.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ray.util.metrics import Gauge, Histogram

from plad_dist.progress import Progress

RUN = {
    "run_up": (Gauge, "1 while a command works on the run."),
    "idle_seconds": (Gauge, "Seconds since the last progress of the run."),
    "disk_free_bytes": (Gauge, "Free bytes on the disk of the run directory."),
}
_BUCKETS_S = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]
_UPDATE_EVERY_S = 5.0


class MetricSet:
    """Metrics with common tags.

    Args:
        table: class and description of every metric, by its name without the prefix `plad_`.
        tags: values of the tags.
    """

    def __init__(self, table: dict[str, tuple[Any, str]], tags: dict[str, str]) -> None:
        self._metrics = {}
        for name, (kind, description) in table.items():
            arguments = (_BUCKETS_S,) if kind is Histogram else ()
            metric = kind(f"plad_{name}", description, *arguments, tag_keys=tuple(tags))
            self._metrics[name] = metric.set_default_tags(tags)

    def add(self, name: str, value: float = 1.0) -> None:
        """Increase a counter."""
        if value > 0:
            self._metrics[name].inc(value)

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        self._metrics[name].set(value)

    def observe(self, name: str, value: float) -> None:
        """Add a value to a histogram."""
        self._metrics[name].observe(value)


@contextmanager
def run_metrics(root: Path | None, progress: Progress) -> Iterator[None]:
    """Export the metrics `RUN` from a thread while the block runs.

    A metric that cannot be measured is left out, because a run must not depend on its monitoring.

    Args:
        root: local run directory, or None for a run on an object store.
    """
    metrics, is_over = MetricSet(RUN, {"run": root.name if root else ""}), threading.Event()

    def update() -> None:
        while True:
            metrics.set("run_up", 1)
            metrics.set("idle_seconds", progress.idle_s)
            if root is not None:
                with suppress(OSError):
                    metrics.set("disk_free_bytes", shutil.disk_usage(root).free)
            if is_over.wait(_UPDATE_EVERY_S):
                return

    thread = threading.Thread(target=update, name="run-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(timeout=5)  # do not wait for a disk that does not respond
        metrics.set("run_up", 0)
