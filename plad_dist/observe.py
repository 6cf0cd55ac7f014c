"""Prometheus metrics of a run, exported by Ray's own agent on every node (`ray.util.metrics`).

Prometheus sees them as ``ray_plad_<name>``, counters with ``_total`` after it, histograms with ``_bucket``, ``_sum`` and ``_count``.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from plad_dist.progress import Progress
from plad_dist.sampling.work import Beat, BlockResult

FLEET = {
    "rows": (Counter, "Rows committed."),
    "tokens": (Counter, "Response tokens committed."),
    "error_rows": (Counter, "Error rows committed."),
    "retries": (Counter, "Blocks and requests that were tried again."),
    "engine_starts": (Counter, "Actors asked for."),
    "engine_deaths": (Counter, "Actors that died or were given up."),
    "spent": (Counter, "Money paid to an endpoint, in the unit of its prices."),
    "in_flight": (Gauge, "Requests under way."),
    "queue_blocks": (Gauge, "Blocks that no actor holds."),
    "actors": (Gauge, "Actors that are up."),
    "block_seconds": (Histogram, "Seconds from lease to commit of a block."),
}
TRAINING = {
    "train_starts": (Counter, "Times that the workers began or went on; more than one is a recovery or a resize."),
    "train_diverged": (
        Counter,
        "Times that the loss or the gradient was not a number, or exploded; training stops then.",
    ),
    "train_tokens": (Counter, "Tokens trained on."),
    "train_step": (Gauge, "Steps done."),
    "train_steps": (Gauge, "Steps of the phase in all."),
    "train_workers": (Gauge, "Workers."),
    "train_loss": (Gauge, "Loss of a group, mean over the step."),
    "train_grad_norm": (Gauge, "Norm of the gradient before it is clipped."),
    "train_pair_accuracy": (Gauge, "Share of the step's pairs that are ranked right."),
    "train_chosen_logp_per_token": (Gauge, "Mean log-likelihood of a chosen token."),
    "train_rejected_logp_per_token": (Gauge, "Mean log-likelihood of a rejected token."),
    "train_sampler_gap_per_token": (Gauge, "Log-likelihoods of the engine against the trainer's."),
    "train_tokens_per_s": (Gauge, "Tokens a second, all workers."),
    "train_model_flops_utilisation": (Gauge, "Share of the devices' peak."),
    "train_memory_gb": (Gauge, "Most memory of the first worker's device so far."),
    "train_checkpoint_seconds": (Gauge, "Seconds that the step waited for a checkpoint."),
    "train_input_wait_share": (Gauge, "Share of the step that waited for data."),
    "heldout_pair_accuracy": (Gauge, "Share of the held-out pairs that are ranked right."),
}
RUN = {
    "run_up": (Gauge, "1 while a command works on the run."),
    "idle_seconds": (Gauge, "Seconds since anything was begun or done."),
    "disk_free_bytes": (Gauge, "Free bytes where the run directory lies."),
}
_SECONDS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]
_EVERY_S = 5.0


class _Metrics:
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


class FleetMetrics:
    """What Prometheus sees of one fleet."""

    def __init__(self, stage: str, fleet: str) -> None:
        self._metrics = _Metrics(FLEET, {"stage": stage, "fleet": fleet})
        self._requests_retried = 0

    def committed(self, result: BlockResult) -> None:
        """A block was committed."""
        counts = result.part.counts
        self._metrics.add("rows", result.part.rows)
        self._metrics.add("tokens", counts.get("tokens", 0))
        self._metrics.add("error_rows", counts.get("errors", 0))
        self._metrics.add("spent", counts.get("cost_micros", 0) / 1e6)
        self._metrics.observe("block_seconds", result.seconds)

    def state(self, beats: Sequence[Beat], waiting: int) -> None:
        """The fleet as its last heartbeats show it."""
        self._metrics.set("in_flight", sum(beat.in_flight for beat in beats))
        self._metrics.set("queue_blocks", waiting)
        self._metrics.set("actors", len(beats))
        retried = sum(beat.retries for beat in beats)
        self._metrics.add("retries", retried - self._requests_retried)
        self._requests_retried = retried

    def retried(self) -> None:
        """A block is tried again."""
        self._metrics.add("retries")

    def started(self) -> None:
        """An actor was asked for."""
        self._metrics.add("engine_starts")

    def died(self) -> None:
        """An actor died or was given up."""
        self._metrics.add("engine_deaths")


class TrainingMetrics:
    """What Prometheus sees of training, from what the workers tell the driver."""

    def __init__(self) -> None:
        self._phases: dict[str, _Metrics] = {}
        self._gauges: dict[str, dict[str, float]] = {}

    def heard(self, message: dict[str, Any]) -> None:
        """A message of the first worker."""
        phase = str(message["phase"])
        if message["kind"] not in ("begin", "step", "heldout", "diverged"):
            return
        if phase not in self._phases:
            self._phases[phase], self._gauges[phase] = _Metrics(TRAINING, {"phase": phase}), {}
        metrics, gauges = self._phases[phase], self._gauges[phase]
        match message["kind"]:
            case "begin":
                metrics.add("train_starts")
                gauges["train_steps"] = message["steps"]
            case "diverged":
                metrics.add("train_diverged")
            case "heldout":
                gauges["heldout_pair_accuracy"] = message["pair_accuracy"]
            case "step":
                metrics.add("train_tokens", message["tokens_per_s"] * message["seconds"])
                for name, (kind, _) in TRAINING.items():
                    value = message.get(name.removeprefix("train_"))
                    if kind is Gauge and value is not None:
                        gauges[name] = value

    def refresh(self) -> None:
        """Set every gauge again: Ray forgets one that was not set for some seconds."""
        for phase, gauges in self._gauges.items():
            for name, value in gauges.items():
                self._phases[phase].set(name, value)


@contextmanager
def run_metrics(root: Path | None, progress: Progress) -> Iterator[None]:
    """Tell that a command works on a run, whether it gets on, and how full its disk is, for as long as the block runs.

    A run does not depend on being watched: what cannot be told is left out.
    """
    metrics, over = _Metrics(RUN, {"run": root.name if root else ""}), threading.Event()

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
