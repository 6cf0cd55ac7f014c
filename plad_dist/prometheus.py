"""Prometheus metrics of a run, exported by Ray's own agent on every node (`ray.util.metrics`).

Prometheus sees them as ``ray_plad_<name>``, counters with ``_total`` after it, histograms with ``_bucket``, ``_sum`` and ``_count``.
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
    "idle_seconds": (Gauge, "Seconds since anything was begun or done."),
    "disk_free_bytes": (Gauge, "Free bytes where the run directory lies."),
}
_SECONDS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]
_EVERY_S = 5.0


class MetricSet:
    """Some of the tables above, with the same tags."""

    def __init__(self, table: dict[str, tuple[Any, str]], tags: dict[str, str]) -> None:
        self._metrics = {}
        for name, (kind, description) in table.items():
            arguments = (_SECONDS,) if kind is Histogram else ()
            metric = kind(f"plad_{name}", description, *arguments, tag_keys=tuple(tags))
            self._metrics[name] = metric.set_default_tags(tags)

    def add(self, name: str, value: float = 1.0) -> None:
        """To a counter."""
        if value > 0:
            self._metrics[name].inc(value)

    def set(self, name: str, value: float) -> None:
        """A gauge."""
        self._metrics[name].set(value)

    def observe(self, name: str, value: float) -> None:
        """In a histogram."""
        self._metrics[name].observe(value)


@contextmanager
def run_metrics(root: Path | None, progress: Progress) -> Iterator[None]:
    """Tell that a command works on a run, whether it gets on, and how full its disk is, for as long as the block runs.

    A run does not depend on being watched: what cannot be told is left out.
    """
    metrics, over = MetricSet(RUN, {"run": root.name if root else ""}), threading.Event()

    def tell() -> None:
        while True:
            metrics.set("run_up", 1)
            metrics.set("idle_seconds", progress.idle_s)
            if root is not None:
                with suppress(OSError):
                    metrics.set("disk_free_bytes", shutil.disk_usage(root).free)
            if over.wait(_EVERY_S):
                return

    thread = threading.Thread(target=tell, name="run-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=5)  # a disk that does not answer holds nobody up
        metrics.set("run_up", 0)
