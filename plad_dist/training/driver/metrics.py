"""Prometheus metrics of training."""

from __future__ import annotations

from typing import Any

from ray.util.metrics import Counter, Gauge

from plad_dist.prometheus import MetricSet

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


class TrainingMetrics:
    """What Prometheus sees of training, from what the workers tell the driver."""

    def __init__(self) -> None:
        self._phases: dict[str, MetricSet] = {}
        self._gauges: dict[str, dict[str, float]] = {}

    def heard(self, message: dict[str, Any]) -> None:
        """A message of the first worker."""
        phase = str(message["phase"])
        if message["kind"] not in ("begin", "step", "heldout", "diverged"):
            return
        if phase not in self._phases:
            self._phases[phase], self._gauges[phase] = MetricSet(TRAINING, {"phase": phase}), {}
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
